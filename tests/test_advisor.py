"""A recommendation within a budget: predicted times, rungs that stay fair, evidence, and going on after a kill."""

import json
import math
import shlex
from dataclasses import replace

import pytest

import smidgen as sm
from smidgen.common.errors import DataError, StudyError
from smidgen.data.resplitting import with_test
from smidgen.studies.advisor import advising
from smidgen.studies.advisor.advising import advise
from smidgen.studies.advisor.budgets import seconds_of
from smidgen.studies.advisor.recommendations import recommended
from smidgen.studies.advisor.run_times import RunTimes
from smidgen.studies.advisor.rungs import best_arms, best_rates, middle
from smidgen.studies.comparison.comparing import StudyRuns, reopened
from smidgen.studies.comparison.run_store import Result
from tests import helpers as h
from tests.test_cli import call
from tests.test_comparison import base, data, made, study  # noqa: F401  (fixtures)

FOUR = {"LN": "LN()", "LoRA": "LoRA(rank=2)", "head": "Head()", "BitFit": "BitFit()"}


def test_budgets():
    assert [seconds_of(text) for text in ("90s", "20min", "1h30m", "2 hours")] == [90, 1200, 5400, 7200]
    for text, said in (("20", "write 90s"), ("soon", "is no time"), ("-5min", "must be above 0"), ("0s", "above 0")):
        with pytest.raises(StudyError, match=said):
            seconds_of(text)


def test_times_are_in_proportion_to_the_work():
    times = RunTimes(100, 2, {"a": (100, 8.0), "b": (100, 16.0)}, overhead=1.5)
    assert times.work(100) == 2 * (3 * 100 + 100)
    assert times.seconds(["a"], 100) == pytest.approx(1.5 * 8.0)
    assert times.seconds(["a", "b", "b"], 100) == pytest.approx(1.5 * (8 + 16 + 16))
    assert times.seconds(["new"], 100) == times.seconds(["b"], 100)  # as long as the longest
    for examples in (0, 37, 5000):
        assert times.examples(["a", "b"], times.seconds(["a", "b"], examples) + 1e-6) == examples
    assert times.examples(["a"], 0.1) < 0


def run(arm, lr, value, metric="accuracy", error=None):
    return Result("k", "m", "t", metric, None, arm, "LN()", 0, "lr", lr, value, error=error)


def test_what_goes_on_is_best_on_validation():
    found = [run("a", 1, 0.5), run("a", 2, 0.6), run("b", 1, 0.9), run("b", 2, None, error="lost"), run("c", 1, 0.7),
             run("c", 2, math.nan), run("d", 1, None, error="lost"), run("d", 2, None, error="lost")]  # fmt: skip
    assert best_arms(found, 2) == ["b", "c"]
    assert best_arms(found, 9) == ["b", "c", "a"]
    assert best_rates(found, "a", 1) == (2,)
    assert best_rates(found, "b", 1) == (1,)
    assert best_rates(found, "a", 2) == (1, 2)
    assert [middle((3, 1, 2, 4), count) for count in (1, 2, 3, 9)] == [(2,), (2, 3), (1, 2, 3), (1, 2, 3, 4)]
    losses = [run("a", 1, 5.0, "perplexity"), run("b", 1, 3.0, "perplexity")]
    assert best_arms(losses, 1) == ["b"]


def test_an_arm_is_recommended_that_is_better_or_smaller(tmp_path):
    usual = (0.80, 0.81, 0.79)
    better = made(tmp_path / "1", {"a": {"t": usual}, "longer": {"t": (0.90, 0.91, 0.90)}})
    arm, why = recommended(better)
    assert arm.arm == "longer"
    assert "longer is 10.3 points ahead of a on the test split, certain by 3 pairs of runs" in why
    worse = made(tmp_path / "2", {"a": {"t": usual}, "longer": {"t": (0.60, 0.62, 0.60)}})
    assert recommended(worse)[0].arm == "a"
    ahead = made(tmp_path / "6", {"a": {"t": usual}, "longer": {"t": (0.80, 0.99, 0.95)}})
    arm, why = recommended(ahead)
    assert arm.arm == "longer"
    assert "longer is 11.3 points ahead of a on the test split, which 3 pairs of runs do not make certain" in why
    unclear = made(tmp_path / "3", {"longer": {"t": usual}, "a": {"t": (0.70, 0.95, 0.78)}})
    arm, why = recommended(unclear)
    assert arm.arm == "a"  # the smaller one
    assert "cannot be told apart by so few runs" in why
    assert "a trains 10 values, longer 1,000,000" in why
    same = made(tmp_path / "4", {"longer": {"t": usual}, "a": {"t": (0.801, 0.81, 0.79)}})
    assert "are equal within 2 points" in recommended(same)[1]
    alone = made(tmp_path / "5", {"a": {"t": (None, None, None)}, "b": {"t": usual}})
    arm, why = recommended(alone)
    assert arm.arm == "b"
    assert "only one" in why


def test_a_budget_is_spent_rung_by_rung(base, data, tmp_path, monkeypatch):  # noqa: F811
    splits, real, rungs = [], advising.compare, []

    def watched(wanted, out, **more):
        splits.append((wanted.runs, more["tested"]))
        return real(wanted, out, **more)

    monkeypatch.setattr(advising, "compare", watched)
    found = advise(study(base, data, arms=FOUR, trials=4), tmp_path / "out", budget=4000.0, begun=rungs.append)
    timing, first, last = found.rungs
    assert splits == [(4, False), (16, False), (14, True)]  # the last: two arms, two rates, six seeds
    assert [list(rung.arms) for rung in (timing, first)] == [list(FOUR)] * 2
    assert len(last.arms) == 2
    assert all(len(rates) == 2 for rates in last.arms.values())
    assert (timing.examples, first.examples, last.examples) == (16, 48, 48)
    assert [rung.last for rung in rungs] == [False, False, True]
    assert found.arm.arm in last.arms
    assert 0 < found.seconds == pytest.approx(sum(rung.seconds for rung in found.rungs))
    results = reopened(tmp_path / "out").results  # of the last rung
    assert {result.arm for result in results} == set(last.arms)
    untested = [r for r in found.findings.store.results() if r.examples == 16]
    assert untested
    assert not any(r.test for r in untested)
    json.dumps(found.to_json())


def test_a_short_budget_tries_fewer_rates_then_fewer_arms(base, data, tmp_path, monkeypatch):  # noqa: F811
    slow = {"LN": 1.0, "LoRA": 3.0, "head": 0.5, "BitFit": 2.0}  # seconds of a run of 16 examples

    def timed(wanted, out, *, told, **more):
        found = [run(arm, lr, 0.5) for arm in wanted.arms for lr in wanted.arms[arm].lr or (0.01,)]
        return StudyRuns(wanted, tuple(replace(r, costs={"seconds": slow[r.arm]}) for r in found), None)

    monkeypatch.setattr(advising, "compare", timed)
    begun = []
    for budget in (5 * 4 * 6.5, 5 * 3 * 6.5, 5 * 2 * 6.5, 5 * 2 * 3.5, 5 * 2 * 1.5):  # first rung: a fifth

        def stop(rung):
            if rung.seconds is None and any(rung.arms.values()):
                begun.append({arm: len(rates) for arm, rates in rung.arms.items()})
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            advise(study(base, data, arms=FOUR, trials=4), tmp_path / str(budget), budget=budget + 0.5, begun=stop)
    assert begun[0] == dict.fromkeys(FOUR, 4)
    assert begun[1] == dict.fromkeys(FOUR, 3)
    assert begun[2] == dict.fromkeys(FOUR, 2)
    assert begun[3] == {"LN": 2, "head": 2, "BitFit": 2}  # without the slowest
    assert begun[4] == {"LN": 2, "head": 2}


def test_the_recommended_command_runs(base, data, tmp_path):  # noqa: F811
    said = call("compare", "--budget", "9min", "--model", base, "--data", data, "--out", str(tmp_path / "out"),
                "--recipe", "LN()", "--recipe", "Head()", "--epochs", "1", "--batch-size", "8", "--max-length", "16",
                "--trials", "2", "--json")  # fmt: skip
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["command"][:2] == ["smidgen", "tune"]
    assert "2 recipes, 2 rates each" in said.err
    assert (tmp_path / "out" / "report.html").is_file()
    rest = [*found["command"][1:-1], str(tmp_path / "delta")]
    told = call(*rest)
    assert told.code == 0, shlex.join(rest) + told.err
    assert sm.Delta.load(tmp_path / "delta").head


def test_stopped_it_goes_on_with_what_is_left(base, data, tmp_path):  # noqa: F811
    wanted = study(base, data, arms={"LN": "LN()", "head": "Head()", "LoRA": "LoRA(rank=2)"})

    def stop(rung):
        if rung.last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        advise(wanted, tmp_path / "out", budget=600.0, begun=stop)
    record = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert len(record["rungs"]) == 2
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/result.json")}
    found = advise(wanted, tmp_path / "out", budget=600.0)
    assert [rung.seconds for rung in found.rungs[:2]] == [rung["seconds"] for rung in record["rungs"]]
    kept = {path: path.stat().st_mtime_ns for path in made}
    assert sum(kept[path] != made[path] for path in made) <= len(found.rungs[-1].arms)  # those that are tested now
    with pytest.raises(StudyError, match="of another study or budget"):
        advise(wanted, tmp_path / "out", budget=99.0)


def test_what_cannot_be_advised_is_said(base, data, tmp_path):  # noqa: F811
    with pytest.raises(StudyError, match="one model, one task and two recipes or more, found 1, 1 and 1"):
        advise(study(base, data, arms={"LN": "LN()"}), tmp_path / "one", budget=60.0)
    with pytest.raises(StudyError, match=r"a budget of 0 s is too short for 2 arms of 2 rates: \d+\.\d min would do"):
        advise(study(base, data), tmp_path / "short", budget=0.01)
    broken = {"a": "LN(layers=[99])", "b": "BitFit(layers=[99])"}
    with pytest.raises(StudyError, match="no arm came to the end of a first short run: .*99"):
        advise(study(base, data, arms=broken), tmp_path / "none", budget=60.0)
    said = call("compare", "--budget", "1min", "--data", "bbc-news", "--seed", "1", "--out", str(tmp_path / "x"))
    assert (said.code, "--seed is chosen by --budget" in said.err) == (2, True)
    said = call("compare", "--budget", "ever", "--data", "bbc-news", "--out", str(tmp_path / "x"))
    assert (said.code, "is no time" in said.err) == (2, True)


def test_one_table_of_rows_is_cut_in_three(tmp_path):
    h.jsonl(tmp_path / "all.jsonl", h.rows(200))
    task = sm.Task.load(tmp_path / "all.jsonl", validation=0)
    found = with_test(task)
    parts = {name: set(split["text"][:]) for name, split in found.splits.items()}
    assert set(parts) == {"train", "validation", "test"}
    assert sum(map(len, parts.values())) == len(set(task.splits["train"]["text"][:]))
    assert found.notes["test"] == "is cut off train"
    assert min(len(parts["test"]), len(parts["validation"])) >= 10
    assert with_test(task).splits["test"][:] == found.splits["test"][:]
    with pytest.raises(DataError, match="train has 2 rows"):
        with_test(replace(task, splits={"train": task.splits["train"].select(range(2))}))
