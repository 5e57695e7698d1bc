"""What the Python API calls an argument, the command line calls by its option."""

from __future__ import annotations

import dataclasses

import pytest
import typer

import smidgen.methods  # noqa: F401
from smidgen.cli.commands import _options, app
from smidgen.common.argument_spelling import FIELDS, as_options, spelled
from smidgen.recipe.recipe import Term
from tests import helpers as h
from tests.test_bad_input import refused, shell

TUNE, FISHER, SEARCH, PREDICT, MERGE = ["tune"], ["analyze", "fisher"], ["search"], ["predict"], ["merge"]
SAID = [
    (TUNE, "name it with label=", "name it with --label"),
    (TUNE, "name it with text=; or leave out cache=", "name it with --text; or leave out --cache"),
    (TUNE, "use metric='token_accuracy'", "use --metric token_accuracy"),
    (TUNE, "max_length=4 or a shorter prompt fits", "--max-length 4 or a shorter prompt fits"),
    (TUNE, "cache=True, but it cannot; leave it out", "--cache, but it cannot; leave it out"),
    (TUNE, "cache=False goes on", "--no-cache goes on"),
    (TUNE, "only_read=False", "--all-rows"),
    (TUNE, "give max_length=None.", "give no --max-length."),
    (TUNE, "lr=0.01, batch_size=8.", "--lr 0.01, --batch-size 8."),
    (TUNE, "LoRA(rank=8, lr=2) and sm.load(name, dtype='auto') stay", None),
    (TUNE, "LoRA(layers='top:2') has layers= of its own", None),
    (TUNE, "LN() + LoRA(rank=(2, 4), lr=3): lr=3", "LN() + LoRA(rank=(2, 4), lr=3): --lr 3"),
    (["plan"], "every=2 is a field of a method, not --all", None),
    (TUNE, "set batch_size, for rows of max_length;", "set --batch-size, for rows of --max-length;"),
    (TUNE, "the column 'max_length' in a/max_length.csv, a.max_length and LoRA(max_length) stay", None),
    (["analyze", "select"], "needs data: give task=; or none", "needs data: give --data; or none"),
    (TUNE, "read: --lr=3 stays, a.lr=3 too", None),
    (TUNE, "rows are few (or validation=0 for train alone)", "rows are few"),
    (TUNE, "rows are few (or batching='pack' of them)", "rows are few (or --batching pack of them)"),
    (SEARCH, "seeds=[0, 0] must name one", "--seed 0 --seed 0 must name one"),
    (FISHER, "kind='regression' or kind='true'", "--task-kind regression or --kind true"),
    (TUNE, "use kind='regression'", "use --kind regression"),
    (TUNE, "kind='expected' would sum over all; use kind='true'", None),
    (MERGE, "dtype=torch.float32 keeps them", "--dtype float32 keeps them"),
    (PREDICT, "load it with dtype=bfloat16 (or pass verify=False to go on)", "load it with --dtype bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "python", "shell"), SAID, ids=str)
def test_a_message_for_a_command(command, python, shell):
    with as_options(_options([*command, "--model", "tune"])):
        assert spelled(python) == (python if shell is None else shell)
    assert spelled(python) == python


def test_no_field_of_a_method_is_taken_for_an_option():
    command, fields = (
        typer.main.get_command(app),
        {f.name for cls in Term.registry.values() for f in dataclasses.fields(cls)},
    )
    commands = [*command.commands.values(), *command.commands["analyze"].commands.values()]
    both = {param.name for each in commands for param in each.params if f"--{param.name}" in param.opts} & fields
    assert both - set(FIELDS) == {"kind", "seed"}  # kind is told by its value; no message speaks of a field seed
    assert "--target" in {option for each in commands for param in each.params for option in param.opts}


ROWS = {
    "no label": ([{"body": "a", "kind_of": "x"}], [], "name it with --label"),
    "two texts": ([{"text": "a", "sentence": "b", "label": i % 2} for i in range(30)], [], "name it with --text"),
    "fractions": (
        [{"text": f"a {i}", "label": i / 2} for i in range(30)], ["--kind", "classification"], "use --kind regression"
    ),
    "tags": ([{"tokens": ["a", str(i)], "tags": ["N", "V"]} for i in range(30)], [], "use --metric token_accuracy"),
    "few": ([{"text": "a", "label": 0}, {"text": "b", "label": 1}], [], "give a folder with a file for each split"),
    "no words": (
        [{"text": f"a {i}", "label": i % 2} for i in range(30)], ["--kind", "tokens"],
        "--kind tokens needs a column of lists of words, as .jsonl and .conll files have; the columns are text, label",
    ),
    "packed": (
        [{"text": f"a {i}", "label": i % 2} for i in range(30)], ["--batching", "pack"], "use --batching length"
    ),
    "no layer": ([{"text": f"a {i}", "label": i % 2} for i in range(30)], ["--recipe", "LN(layers=7)"], "layers=7"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_errors_of_the_command_line_name_its_options(case, tmp_path):
    rows, options, said = ROWS[case]
    h.build("bert", "AutoModel").save_pretrained(tmp_path / "base")
    h.tokenizer().save_pretrained(tmp_path / "base")
    data = h.jsonl(tmp_path / "a.jsonl", rows)
    command = ["tune", "--model", tmp_path / "base", "--data", data, "--out", tmp_path / "run", "--epochs", 1]
    refused(*command, *options, words=(said,))
    errors = shell(*command, *options)[2]
    assert not any(f"{name}=" in errors[0] for name in ("label", "text", "kind", "metric", "batching", "validation"))


def test_notes_name_options_too(tmp_path, capsys):
    h.build("bert", "AutoModel").save_pretrained(tmp_path / "base")
    h.tokenizer().save_pretrained(tmp_path / "base")
    data = h.jsonl(tmp_path / "a.jsonl", [{"text": f"a {i}", "label": float(i % 3)} for i in range(30)])
    from smidgen.cli.commands import main

    assert main(["plan", "--model", str(tmp_path / "base"), "--data", str(data)]) == 0
    assert "read as labels; give --kind regression to read numbers" in capsys.readouterr().err
