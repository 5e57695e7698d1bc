"""Runs in an experiment tracker: TensorBoard's files are read back, each value is there once."""

from pathlib import Path

import pytest

from smidgen.common.errors import StudyError
from smidgen.studies import trackers
from smidgen.studies.comparison.comparing import compare
from tests.test_comparison import base, data, study  # noqa: F401  (fixtures)


def scalars(folder):
    """Run -> tag -> (step, value), all that was written."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for run in sorted(Path(folder).iterdir()):
        events = event_accumulator.EventAccumulator(str(run))
        events.Reload()
        found[run.name] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found


def test_tensorboard_has_each_run_once(base, data, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    wanted, out = study(base, data, arms={"LN": "LN()", "my head": "Head()"}, settings={"epochs": 2}), tmp_path / "out"
    for _ in range(2):  # the second call finds them logged
        found = compare(wanted, out, tracker="tensorboard")
    written = scalars(out / "tensorboard")
    assert len(written) == len(found.results) == 6
    assert sum("my_head" in name for name in written) == 3
    for result in found.results:
        (tags,) = (tags for name, tags in written.items() if name.endswith(result.key))
        values = [(i, pytest.approx(scores["accuracy"])) for i, scores in enumerate(result.scores, 1)]
        assert tags["validation/accuracy"] == values
        assert len(values) == 2
        if result.test is None:
            assert not any(tag.startswith("test/") for tag in tags)
        else:
            assert tags["test/accuracy"] == [(2, pytest.approx(result.test["accuracy"]))]
            assert tags["cost/trained_values"] == [(2, result.costs["trained_values"])]


def test_other_trackers_get_the_same_calls(base, data, tmp_path, monkeypatch):  # noqa: F811
    """Those that this machine has not got, by what Accelerate's classes would be given."""
    calls = []

    class Stand:
        def __init__(self, **options):
            calls.append(("made", options))

        def start(self):
            calls.append(("start",))

        def store_init_configuration(self, values):
            calls.append(("configuration", values))

        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Stand)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    out = tmp_path / "out"
    (result,) = compare(study(base, data, arms={"LN": "LN()"}, seeds=[0], trials=1), out, tracker="wandb").results
    made = {"run_name": "study", "id": result.key, "resume": "allow", "dir": str(out)}
    assert [call[0] for call in calls] == [
        "made",
        "start",
        "configuration",
        "log",
        "finish",
        "made",
        "start",
        "log",
        "finish",
    ]
    assert made.items() <= calls[0][1].items()
    assert calls[0] == calls[5]
    assert calls[2][1]["recipe"] == "LN()"
    assert calls[3][2]["validation/accuracy"] == result.validation
    assert calls[7][2]["test/accuracy"] == result.test["accuracy"]


def test_a_tracker_that_is_not_there(base, data, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(StudyError, match="no tracker 'wandbb'; there are tensorboard, trackio, wandb; did you mean"):
        compare(study(base, data), tmp_path / "out", tracker="wandbb")
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    with pytest.raises(StudyError, match="tracker 'trackio' needs its package: pip install trackio"):
        compare(study(base, data), tmp_path / "out", tracker="trackio")
    assert not (tmp_path / "out" / "runs").exists()
