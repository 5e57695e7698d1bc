"""What a person sees while training runs."""

import io
import re
import sys

from smidgen.training.run.progress_bar import Bar


def used(capsys, **options):
    with Bar(4, **options) as bar:
        bar.step(0.5, 8)
        bar.validated("accuracy", 0.75)
    return capsys.readouterr().err


def test_without_a_terminal_there_is_a_line_per_validation(capsys):
    said = used(capsys)
    assert re.fullmatch(r"step 1 of 4: loss 0\.5000, validation accuracy 0\.7500, \d+ examples/s\n", said)


def test_progress_false_says_nothing(capsys):
    assert used(capsys, show=False) == ""


def test_a_terminal_has_a_bar_and_no_lines(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with Bar(4) as bar:
        assert bar.show
        assert not bar.lines
        bar.validated("accuracy", 0.75)
    assert "step 0 of 4" not in sys.stderr.getvalue()
