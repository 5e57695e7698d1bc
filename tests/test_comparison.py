"""smidgen compare: studies, their runs in a folder, what is found, the report."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import smidgen as sm
from smidgen.common.errors import DataError, StudyError, WriteError
from smidgen.data.resplitting import with_examples, with_test
from smidgen.studies.comparison.arm_runs import chosen_rate
from smidgen.studies.comparison.comparing import compare, reopened
from smidgen.studies.comparison.efficiency_meter import EfficiencyMeter, time_average
from smidgen.studies.comparison.findings import Findings
from smidgen.studies.comparison.forgetting import feature_drift
from smidgen.studies.comparison.run_store import RESULT, Examples, Result, RunStore
from smidgen.studies.comparison.scratch_models import from_scratch
from smidgen.studies.comparison.study import Study
from smidgen.studies.reports.comparison import comparison_report, results_csv, write_report
from smidgen.studies.reports.errors import ReportError
from smidgen.studies.reports.sections import Intervals
from smidgen.studies.run_folders import key_of
from smidgen.training.run.run_folder import RunFolder
from tests import helpers as h
from tests.test_cli import call

ARMS = {"LN": "LN()", "LoRA": "LoRA(rank=2)", "head": "Head()"}
SETTINGS = {"epochs": 1, "batch_size": 8, "max_length": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    h.build("bert", "AutoModel").save_pretrained(folder)
    h.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for split, count, start in (("train", 48, 0), ("validation", 16, 48), ("test", 24, 64)):
        h.jsonl(folder / f"{split}.jsonl", h.rows(count, start))
    return str(folder)


def study(base, data, **more):
    given = {"models": [base], "arms": ARMS, "tasks": [{"data": data, "name": "films"}], "seeds": [0, 1], "trials": 2}
    return Study.of({**given, "settings": SETTINGS, **more})


# What is compared


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": {}}, "arms names none"),
        ({"arms": {"a": "LN()", "b": "LN( )"}}, r"arms 'a' and 'b' are the same: LN\(\)"),
        ({"arms": {"a": "LNN()"}}, "arm 'a': .*LNN"),
        ({"arms": {"a": {"recipe": "LN()", "lr": [0.1]}, "b": "Head()"}}, "as many rates, found a 1, b 4"),
        ({"arms": {"a": {"recipe": "LN()", "rate": 1}}}, "unknown field arms.a.rate; there are recipe, lr,"),
        ({"seeds": [1, 1]}, "seeds names one of them twice: 1, 1"),
        ({"seeds": []}, "seeds names none"),
        ({"reference": "Full"}, "reference='Full' is no arm; there are a, b"),
        ({"examples": [0]}, "examples.0"),
        ({"tuning_seeds": 4}, "tuning_seeds=4 are more than the 3 seeds"),
        ({"settings": {"lr": 1.0}}, "settings names lr, which the study itself varies"),
        ({"settings": {"epoch": 1}}, "epoch"),
        ({"lr": [-1.0]}, "lr.0: .* found -1.0"),
        ({"sead": [1]}, "unknown field sead; there are .*did you mean 'seeds'"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_a_line(change, said):
    with pytest.raises(StudyError, match=said) as caught:
        Study.of({"arms": {"a": "LN()", "b": "Head()"}, "tasks": ["bbc-news"], **change})
    assert "\n" not in str(caught.value)


def test_a_file_is_the_same_as_its_data(tmp_path):
    (tmp_path / "s.toml").write_text(
        'name = "few"\ntasks = ["bbc-news", {data = "x.csv", label = "y"}]\nexamples = [16, "all"]\n'
        '[arms]\nLN = "LN()"\n[arms.scratch]\nrecipe = "Full()"\nscratch = true\n'
    )
    found = Study.read(tmp_path / "s.toml")
    assert (found.against, found.rates_each, found.tasks[1].label) == ("LN", 4, "y")
    assert found.runs == 2 * 2 * 2 * (4 + 2)
    assert Study.of(json.loads(json.dumps(found.model_dump(mode="json")))) == found
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(StudyError, match=r"bad.toml is no TOML file: Invalid value"):
        Study.read(tmp_path / "bad.toml")


def test_a_validation_split_becomes_test_where_there_is_none(tmp_path):
    h.jsonl(tmp_path / "train.jsonl", h.rows(60))
    h.jsonl(tmp_path / "validation.jsonl", h.rows(20, 60))
    task = sm.Task.load(tmp_path, validation=0)
    found = with_test(task)
    assert found.splits["test"][:] == task.splits["validation"][:]
    assert len(found.splits["train"]) + len(found.splits["validation"]) == 60
    assert not set(found.splits["train"]["text"][:]) & set(found.splits["validation"]["text"][:])
    few = with_examples(found, 8, seed=1)
    assert [len(few.splits[s]) for s in ("train", "validation", "test")] == [8, len(found.splits["validation"]), 20]
    assert few.splits["train"][:] != with_examples(found, 8, seed=2).splits["train"][:]
    with pytest.raises(DataError, match=r"examples=99 are more than the \d+ that"):
        with_examples(found, 99)


# Runs


def test_a_study_is_run_chosen_on_validation_and_tested_once(base, data, tmp_path, monkeypatch):
    splits, real = [], sys.modules["smidgen.studies.comparison.arm_runs"].evaluate

    def watched(*args, **kwargs):
        splits.append(kwargs["split"])
        return real(*args, **kwargs)

    monkeypatch.setattr("smidgen.studies.comparison.arm_runs.evaluate", watched)
    told = []
    found = compare(study(base, data), tmp_path / "out", told=told.append)
    assert len(found.results) == len(told) == found.study.runs == 3 * (2 + 1)
    tested = [result for result in found.results if result.test is not None]
    assert splits == ["test"] * len(tested) == ["test"] * 6
    for arm in ARMS:
        runs = [result for result in found.results if result.arm == arm]
        best = max((run for run in runs if run.seed == 0), key=lambda run: run.validation).lr
        assert {(run.lr, run.seed) for run in runs if run.test} == {(best, 0), (best, 1)}
        assert {run.rate for run in runs} == {"head_lr" if arm == "head" else "lr"}
    again, before = [], {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").rglob("*")}
    same = compare(study(base, data), tmp_path / "out", told=again.append)
    assert [r.key for r in same.results] == [r.key for r in found.results]
    assert [r.key for r in told] == [r.key for r in again]
    assert {r.key for r in told} == {r.key for r in found.results}
    assert same.results == found.results
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").rglob("*")} == before
    more = compare(study(base, data, seeds=[0, 1, 2]), tmp_path / "out")
    assert len(more.results) == 12
    assert {r.key for r in found.results} < {r.key for r in more.results}


def test_a_run_is_that_of_fit(base, data, tmp_path):
    found = compare(study(base, data, arms={"LN": "LN()"}), tmp_path / "out")
    run = next(result for result in found.results if result.seed == 1)
    task = with_test(sm.Task.load(data, name="films"))
    model, tokenizer = sm.load(base, task=task, seed=1)
    delta = sm.fit(model, "LN()", task, tokenizer=tokenizer, lr=run.lr, seed=1, progress=False, cache=False, **SETTINGS)
    mine = sm.Delta.load(found.store.folder(run.key) / "fit")
    assert all(torch.allclose(delta.tensors[name], mine.tensors[name], atol=1e-6) for name in delta.tensors)
    assert run.validation == delta.info["scores"]["validation accuracy"]
    assert run.test == sm.evaluate(model, task, delta=mine, tokenizer=tokenizer).values
    heads = [sm.Delta.load(found.store.folder(r.key) / "fit").tensors["classifier.weight"] for r in found.results[:3]]
    assert not torch.equal(heads[0], heads[2])  # each seed its own head


def test_from_scratch_draws_all_weights_by_the_seed(base, data, tmp_path):
    model, _ = sm.load(base, task=sm.Task.load(data))
    one, same, other = (from_scratch(model, seed) for seed in (0, 0, 1))
    pairs = zip(one.state_dict().items(), same.state_dict().values(), strict=True)
    assert all(torch.equal(value, again) for (_, value), again in pairs)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], model.state_dict()[name])
    arms = {"pretrained": "Full()", "scratch": {"recipe": "Full()", "scratch": True}}
    found = compare(study(base, data, arms=arms, lr=[1e-3]), tmp_path / "out")
    keys = {result.key for result in found.results}
    assert len(keys) == 4
    assert all(result.error is None and result.test for result in found.results)


def test_runs_in_processes_are_those_of_one(base, data, tmp_path):
    one, two = (compare(study(base, data, arms={"LN": "LN()"}), tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    assert [r.key for r in one.results] == [r.key for r in two.results]
    for mine, other in zip(one.results, two.results, strict=True):
        assert mine.validation == pytest.approx(other.validation, abs=1e-6)


def test_a_study_that_is_killed_goes_on(base, data, tmp_path):
    (tmp_path / "study.toml").write_text(
        f'models = ["{base}"]\ntasks = [{{data = "{data}", name = "films"}}]\nseeds = [0, 1]\ntrials = 2\n'
        "[settings]\nepochs = 1\nbatch_size = 8\nmax_length = 16\n"
        '[arms]\nLN = "LN()"\nLoRA = "LoRA(rank=2)"\nhead = "Head()"\n'
    )
    out, arguments = tmp_path / "out", ["compare", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(sm.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "smidgen.cli", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while len(list(out.glob(f"runs/*/{RESULT}"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.read_bytes() for path in out.glob(f"runs/*/{RESULT}")}
    assert 3 <= len(kept) < 9
    said = call(*arguments, "--json")
    assert said.code == 0, said.err
    assert len(list(out.glob("runs/*"))) == len(list(out.glob(f"runs/*/{RESULT}"))) == 9
    whole = compare(study(base, data), tmp_path / "whole")
    resumed = {result.key: result for result in reopened(out).results}
    assert resumed.keys() == {result.key for result in whole.results}
    for result in whole.results:
        assert resumed[result.key].validation == pytest.approx(result.validation, abs=1e-6)
        assert (resumed[result.key].test is None) == (result.test is None)


def test_a_run_that_fails_is_shown_and_the_rest_goes_on(base, data, tmp_path):
    arms = {"LN": "LN()", "no such layer": "LN(layers=[99])", "wild": {"recipe": "LoRA(rank=2)", "lr": [1e30, 1e-3]}}
    found = compare(study(base, data, arms=arms, lr=[1e-3, 1e-2]), tmp_path / "out")
    by_arm = {arm: [r for r in found.results if r.arm == arm] for arm in arms}
    assert all("99" in r.error and not r.diverged for r in by_arm["no such layer"])
    assert [r.diverged for r in by_arm["wild"] if r.lr == 1e30] == [True]
    assert [r.lr for r in by_arm["wild"] if r.test is not None] == [1e-3, 1e-3]
    assert all(r.error is None for r in by_arm["LN"])
    findings = write_report(found)
    assert {arm.arm: bool(arm.failed) for arm in findings.arms} == {"LN": False, "no such layer": True, "wild": True}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Runs that failed" in page
    assert "3 of 8 runs failed" in page


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_line_that_does_not_fit_on_the_disk_is_an_error_with_the_file(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"cannot write to .*metrics.jsonl: No space left on device"):
        folder.log({"step": 1})


def test_a_full_disk_ends_the_study_and_nothing_is_lost(base, data, tmp_path, monkeypatch):
    wanted, out, folders = study(base, data, arms={"LN": "LN()"}), tmp_path / "out", set()

    def full(self, entry):
        folders.add(self.path)
        if len(folders) > 1:
            raise WriteError("cannot write: No space left on device")
        real(self, entry)

    real = RunFolder.log
    monkeypatch.setattr(RunFolder, "log", full)
    with pytest.raises(WriteError, match="No space left"):
        compare(wanted, out)
    assert [result.error for result in RunStore(out).results()] == [None]  # the first run, whole
    monkeypatch.setattr(RunFolder, "log", real)
    found = compare(wanted, out)
    assert len(found.results) == wanted.runs
    assert not found.failed


def test_a_large_delta_is_dropped_and_made_again_if_it_is_needed(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("smidgen.studies.comparison.run_store.LARGE", 10)
    found = compare(study(base, data, arms={"LN": "LN()"}), tmp_path / "out")
    assert not list((tmp_path / "out").glob("runs/*/fit"))
    other = next(r for r in found.results if r.test is None)
    best = next(r for r in found.results if r.test is not None and r.seed == 0)
    store = RunStore(tmp_path / "out")
    store.keep(replace(best, validation=-1.0))  # so that the other rate is the best one now
    again = compare(study(base, data, arms={"LN": "LN()"}), tmp_path / "out")
    made = next(r for r in again.results if r.key == other.key)
    assert made.test is not None
    assert made.validation == other.validation


def test_bad_folders(base, data, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("x")
    with pytest.raises(StudyError, match="is not empty and holds no study"):
        compare(study(base, data), tmp_path / "other")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StudyError, match="s3:/bucket/study is a URL that a path has joined; give it as text"):
        compare(study(base, data), Path("s3://bucket/study"))
    with pytest.raises(StudyError, match="no-such://x cannot be opened: Protocol not known: no-such"):
        compare(study(base, data), "no-such://x")
    with pytest.raises(StudyError, match="is a file"):
        compare(study(base, data), tmp_path / "file")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "study.json").write_text('{"format": 0}')
    with pytest.raises(StudyError, match="is of format 0, this version writes 1"):
        compare(study(base, data), tmp_path / "old")
    with pytest.raises(StudyError, match="holds no study"):
        reopened(tmp_path / "none")
    two = [{"data": data, "name": "films"}, {"data": data, "name": "films", "limit": {"train": 9}}]
    with pytest.raises(StudyError, match="two tasks are named 'films'"):
        compare(study(base, data, tasks=two), tmp_path / "twice")
    with pytest.raises(StudyError, match="jobs=0"):
        compare(study(base, data), tmp_path / "jobs", jobs=0)


def test_the_chosen_rate_is_the_best_mean_on_validation():
    def run(lr, seed, value, metric="accuracy"):
        return Result("k", "m", "t", metric, None, "a", "LN()", seed, "lr", lr, value)

    assert chosen_rate([run(1, 0, 0.5), run(2, 0, 0.7), run(2, 1, 0.3), run(1, 1, 0.6)]) == 1
    assert chosen_rate([run(1, 0, 5.0, "perplexity"), run(2, 0, 3.0, "perplexity")]) == 2
    assert chosen_rate([run(1, 0, None), run(1, 1, 0.9), run(2, 0, 0.1), run(2, 1, 0.1)]) == 2  # one seed diverged
    assert chosen_rate([run(1, 0, 0.5), run(2, 0, 0.5)]) == 1
    assert chosen_rate([run(1, 0, None)]) is None


# What is found


def made(tmp_path, scores, metric="accuracy", seeds=(0, 1, 2), **more):
    """Findings of made-up test scores: arm -> task -> score of each seed."""
    arms = {name: f"LoRA(rank={i + 1})" for i, name in enumerate(scores)}
    tasks = list(next(iter(scores.values())))
    wanted = Study.of({"arms": arms, "tasks": tasks, "seeds": list(seeds), "models": ["m"], "lr": [1e-3], **more})
    store, results = RunStore(tmp_path), []
    for arm, by_task in scores.items():
        for task, values in by_task.items():
            for seed, value in zip(seeds, values, strict=True):
                place = Result(
                    key_of({"arm": arm, "task": task, "seed": seed}),
                    "m",
                    task,
                    metric,
                    None,
                    arm,
                    arms[arm],
                    seed,
                    "lr",
                    1e-3,
                )
                costs = {"trained_values": 10.0 ** len(arm), "seconds": 1.0}
                came = (
                    {"error": "lost"} if value is None else {"test": {metric: value}, "costs": costs, "validation": 0.5}
                )
                results.append(replace(place, **came))
                count = round(100 * min(1.0, value or 0))
                store.keep(results[-1], value and Examples([1] * count + [0] * (100 - count), [1] * 100))
    return Findings(wanted, results, store)


def test_differences_are_paired_by_task_and_seed(tmp_path):
    one = {"t": (0.80, 0.70, 0.60), "u": (0.5, 0.5, 0.5)}
    found = made(tmp_path, {"a": one, "bb": {"t": (0.83, 0.72, 0.63), "u": (0.5, 0.5, None)}})
    over_all, on_t, on_u = found.against
    assert (over_all.task, on_t.task, on_u.task) == (None, "t", "u")
    assert over_all.difference.mean == pytest.approx((0.08 / 3 + 0.0) / 2)
    assert (over_all.difference.pairs, over_all.difference.missing) == (5, 1)
    told = stats.ttest_1samp([0.03, 0.02, 0.03], 0.0).confidence_interval(0.95)
    assert on_t.difference.interval == pytest.approx((told.low, told.high))
    assert on_t.equivalence.verdict == "better"
    assert on_u.equivalence is None
    assert "the same with every seed" in on_u.difference.why
    assert over_all.equivalence.interval[0] < over_all.difference.mean < over_all.equivalence.interval[1]
    assert list(on_t.same_examples) == [0, 1, 2]
    assert on_t.same_examples[1] == pytest.approx(0.5)  # two examples that one alone has right
    assert next(a for a in found.arms if (a.arm, a.task) == ("bb", "u")).failed == ("lr 0.001, seed 2: lost",)


def test_p_values_are_corrected_over_the_arms(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.6, 6)
    scores = {"ref": {"t": base.tolist()}}
    scores |= {name: {"t": (base + rng.normal(0.02, 0.01, 6)).tolist()} for name in ("x", "yy", "zzz")}
    found = made(tmp_path, scores, seeds=range(6))
    raw = sorted(each.difference.t_p for each in found.against)
    corrected = sorted(each.holm_p for each in found.against)
    assert corrected[0] == pytest.approx(min(1.0, 3 * raw[0]))
    assert all(c >= r for c, r in zip(corrected, raw, strict=True))


def test_a_loss_is_better_if_it_is_lower_and_is_not_averaged_over_tasks(tmp_path):
    low = {"ref": {"t": (3.0, 3.1, 3.2), "u": (9.0, 9.1, 9.0)}, "x": {"t": (2.0, 2.2, 2.2), "u": (9.5, 9.7, 9.4)}}
    found = made(tmp_path, low, metric="perplexity")
    assert [each.task for each in found.against] == ["t", "u"]
    assert [each.equivalence.verdict for each in found.against] == ["better", "worse"]
    assert found.arms[0].test.worst == 3.2


def test_a_metric_that_is_no_finite_number_is_shown_and_compared_with_none(tmp_path):
    found = made(tmp_path, {"ref": {"t": (3.0, 3.1, 3.2)}, "x": {"t": (2.0, math.inf, 2.3)}}, metric="perplexity")
    (each,) = found.against
    assert (each.difference.pairs, each.difference.missing) == (2, 1)
    assert found.arms[1].test.count == 2
    assert found.arms[1].failed == ("lr 0.001, seed 1: perplexity on the test split is no finite number",)
    comparison_report(found)


def test_metrics_that_are_no_means_are_tested_example_by_example(tmp_path):
    found = made(tmp_path, {"ref": {"t": (0.5, 0.6, 0.7)}, "x": {"t": (0.9, 0.6, 0.71)}}, metric="f1")
    p = found.against[0].same_examples
    assert p[0] == 1 / 200
    assert p[1] is None  # the same answers
    assert p[2] > 0.05


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    found = made(tmp_path, {"ref": {"t": (0.5,)}, "x": {"t": (0.6,)}}, seeds=(0,))
    (each,) = found.against
    assert (each.difference.interval, each.equivalence, each.smallest) == (None, None, None)
    report = comparison_report(found)
    assert any("One seed" in line for line in report.summary)


def test_the_front_has_what_none_beats_in_both(tmp_path):
    from smidgen.studies.reports.sections import Points

    points = {"a": (1.0, 0.5, None), "b": (2.0, 0.4, None), "c": (3.0, 0.9, None), "d": (3.0, 0.8, None)}
    assert Points("x", points=points).front == ["a", "c"]
    assert Points("x", points=points, more_is_better=False).front == ["a", "b"]


def test_the_files_of_a_report(tmp_path):
    found = made(tmp_path, {"ref": {"t": (0.5, 0.6, 0.7)}, "x": {"t": (0.6, 0.7, 0.9)}})
    rows = list(csv.DictReader(results_csv(found).splitlines()))
    assert len(rows) == 6
    assert rows[0]["test"] == "0.5"
    assert rows[0]["examples"] == "all"
    from smidgen.studies.comparison.comparing import StudyRuns

    write_report(StudyRuns(found.study, tuple(found.results), found.store))
    page = (tmp_path / "report.html").read_text()
    assert "x against ref: +13.3 (−1.0 to +27.7) points" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    text = (tmp_path / "report.md").read_text()
    assert "| ref | 0.001 |" in text
    json.loads((tmp_path / "report.json").read_text())


# What is measured


def test_average_memory_is_an_integral_over_time():
    ramp = [(t, 10.0 * t) for t in (0.0, 0.1, 0.15, 0.9, 1.0)]  # uneven: a mean of samples would be 4.3
    assert time_average(ramp) == pytest.approx(5.0)
    assert time_average([(0.0, 7.0), (3.0, 7.0)]) == 7.0
    assert time_average([(0.0, 7.0)]) == 7.0


def test_a_meter_sees_memory_and_work():
    with EfficiencyMeter(every=0.01) as meter:
        held = torch.ones(30_000_000)
        until = time.perf_counter() + 0.2
        while time.perf_counter() < until:
            held.mul_(1.0)
    said = meter.to_json()
    assert said["seconds"] >= 0.2
    assert said["peak_memory_bytes"] >= said["average_memory_bytes"] > 1e8
    assert 0 < said["cpu_utilisation"] <= 1.5
    assert said["average_power_watts"] is None


def test_forgetting_is_nothing_for_a_delta_that_does_nothing_and_grows_with_it(base, data):
    task = sm.Task.load(data)
    model, tokenizer = sm.load(base, task=task)
    sm.attach(model, "LN()")
    still = replace(sm.detach(model), info={"settings": {"max_length": 16}})
    assert feature_drift(model, still, tokenizer) == 0.0
    moved = {name: value + 0.1 for name, value in still.tensors.items() if name not in still.head}
    once = replace(still, tensors={**still.tensors, **moved})
    twice = replace(still, tensors={**still.tensors, **{name: value + 0.1 for name, value in moved.items()}})
    assert 0 < feature_drift(model, once, tokenizer) < feature_drift(model, twice, tokenizer)
    assert feature_drift(model, once, object()) is None


# As a user types it


def test_by_command(base, data, tmp_path):
    out = tmp_path / "out"
    typed = ["compare", "--model", base, "--data", data, "--recipe", "LN()", "--recipe", "Head()", "--out", out]
    typed += ["--seed", 0, "--seed", 1, "--trials", 1, "--epochs", 1, "--max-length", 16]
    typed += ["--examples", 16, "--examples", "all"]
    said = call(*typed)
    assert said.code == 0, said.err
    assert "8 of 8: Head() on" in said.err
    assert "Against LN()" in said.out
    assert (out / "report.html").is_file()
    before = (out / "report.md").read_bytes()
    (out / "report.md").unlink()
    again = call("report", out)
    assert again.code == 0, again.err
    assert (out / "report.md").read_bytes() == before
    told = json.loads(call("report", out, "--json").out)
    assert told["runs"] == 8
    assert len(told["findings"]["arms"]) == 4
    assert not any(isinstance(v, float) and math.isnan(v) for v in told["findings"]["arms"][0]["costs"].values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "arms names none"),
        (["--recipe", "LN()"], "tasks names none"),
        (["--data", "bbc-news", "--recipe", "LN()", "--examples", "few"], 'neither a number nor "all"'),
        (["none.toml"], "none.toml"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(more, said, tmp_path):
    found = call("compare", "--out", tmp_path / "out", *more)
    assert found.code == 2
    assert said in found.err
    assert len(found.err.strip().splitlines()) == 1


def test_what_a_selection_draws_is_drawn_by_the_seed_of_the_run(base, data, tmp_path):
    arms = {"random": "LN() | Select('random', keep=0.1)", "all": "LN()"}
    wanted = study(base, data, arms=arms, seeds=[0, 1, 2], trials=1)
    found = compare(wanted, tmp_path / "out")
    kept = [sm.Delta.load(tmp_path / "out" / "runs" / r.key / "fit") for r in found.results if r.arm == "random"]
    assert [delta.recipe for delta in kept] == [
        sm.parse(f"LN() | Select('random', keep=0.1, seed={seed})") for seed in range(3)
    ]
    masks = [sm.selection_of(sm.load(base, task=sm.Task.load(data))[0], delta) for delta in kept]
    assert all(masks[i].overlap(masks[j]) < 0.5 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert {r.recipe for r in found.results if r.arm == "random"} == {str(sm.parse(arms["random"]))}
    assert len(reopened(tmp_path / "out").results) == 6


def test_intervals_and_epochs_are_charts_of_the_report(tmp_path):
    scores = {"ref": {"t": (0.5, 0.6, 0.7), "u": (0.5, 0.5, 0.6)}, "x": {"t": (0.9, 0.6, 0.75), "u": (0.5, 0.4, 0.7)}}
    found = made(tmp_path, scores)
    curves = ({"accuracy": 0.25}, {"accuracy": 0.5})
    found = replace(found, results=[replace(r, scores=curves[: 1 + (r.seed > 0)]) for r in found.results])
    sections = {section.title: section for section in comparison_report(found).sections}
    forest = sections["Differences from ref"]
    assert list(forest.intervals) == ["x, all tasks", "x, t", "x, u"]
    mean, low, high = forest.intervals["x, all tasks"]
    assert mean == pytest.approx(100 * found.against[0].difference.mean)
    assert (low, high) == pytest.approx(tuple(100 * end for end in found.against[0].difference.interval))
    assert forest.margin == 2.0
    epochs = sections["Validation over epochs, t"]
    assert list(epochs.x) == [1.0, 2.0]
    assert epochs.series["x"][0] == [0.25, 0.5]  # one seed stopped after the first
    page = comparison_report(found).html()
    assert page.count("<svg") >= 4
    alone = made(tmp_path / "one", {"ref": {"t": (0.5,)}, "x": {"t": (0.6,)}}, seeds=(0,))
    sections = {section.title: section for section in comparison_report(alone).sections}
    assert sections["Differences from ref"].intervals == {"x": (pytest.approx(10.0), None, None)}
    comparison_report(alone).html()
    with pytest.raises(ReportError, match="has one end of an interval"):
        Intervals("t", intervals={"a": (1.0, None, 2.0)})
