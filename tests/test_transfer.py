"""Carry-over and trust on tiny tasks."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch

import smidgen as sm
from smidgen.cli.commands import main
from smidgen.common.errors import SmidgenError
from smidgen.studies.experiments.arm import Bench
from smidgen.studies.experiments.fisher_stability import measure_stability
from smidgen.studies.experiments.selection_transfer import ARMS, carry, measure_transfer
from smidgen.studies.reports.fisher_stability import trust_report
from smidgen.studies.reports.markdown_report import markdown
from smidgen.studies.reports.selection_transfer import score_gaps, transfer_report
from tests import helpers

RECIPE = "LN() | Select('fisher', keep=0.1)"
FAST = {"epochs": 1, "batch_size": 8, "max_length": 16, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    helpers.bert().save_pretrained(path / "tiny")
    helpers.tokenizer().save_pretrained(path / "tiny")
    return path


@pytest.fixture(scope="module")
def tasks(folder):
    """Three tasks on other texts; the second has its labels the other way round."""

    def shifted(step, turned=False):
        def make(count, start=0):
            found = helpers.rows(count, start + step)
            return [{**r, "label": ("pos", "neg")[r["label"] == "pos"]} for r in found] if turned else found

        return make

    makers = {"a": shifted(0), "b": shifted(7, turned=True), "c": shifted(14)}
    return [helpers.task(folder / name, train=24, held=8, make=make, name=name) for name, make in makers.items()]


@pytest.fixture(scope="module")
def carried(folder, tasks):
    said = []
    result = measure_transfer(folder / "tiny", tasks, RECIPE, seeds=2, out=folder / "out", say=said.append, **FAST)
    return result, said


def test_every_target_has_every_arm_and_seed(carried):
    result, said = carried
    assert len(result.outcomes) == 3 * len(ARMS) * 2
    assert all(len(result.values(task, arm)) == 2 for task in "abc" for arm in ARMS)
    assert len(said) == 3 * 2 + len(result.outcomes)


def test_budgets_are_equal_but_for_all(carried):
    result, _ = carried
    trained = {arm: {run["trained"] for run in result.outcomes if run["arm"] == arm} for arm in ARMS}
    assert trained == {"own": {16}, "transferred": {16}, "random": {16}, "all": {160}}


def test_overlaps_are_a_symmetric_matrix_of_ones_on_the_diagonal(carried):
    result, _ = carried
    assert result.overlaps.shape == (2, 3, 3)
    assert (result.overlaps.diagonal(axis1=1, axis2=2) == 1).all()
    assert (result.overlaps == result.overlaps.transpose(0, 2, 1)).all()
    assert ((result.overlaps >= 0) & (result.overlaps <= 1)).all()
    assert result.chance == pytest.approx(0.1, rel=1e-12)


def test_finished_runs_are_read_not_repeated(carried, folder, tasks, monkeypatch):
    result, _ = carried
    monkeypatch.setattr(Bench, "_train", lambda *args: pytest.fail("a finished run was trained again"))
    again = measure_transfer(folder / "tiny", tasks, RECIPE, seeds=2, out=folder / "out", **FAST)
    assert again.outcomes == result.outcomes
    with pytest.raises(pytest.fail.Exception, match="trained again"):  # other settings are other runs
        measure_transfer(folder / "tiny", tasks, RECIPE, seeds=2, out=folder / "out", **{**FAST, "epochs": 2})


def test_a_run_of_another_base_is_another_run(folder, tasks, monkeypatch):
    """The name of a base is not what it is."""
    recipe, out, train, made = sm.parse("LN()"), folder / "bases", Bench._train, []
    monkeypatch.setattr(Bench, "_train", lambda self, *args: made.append(self) or train(self, *args))
    for shift in (0.0, 0.5, 0.0):
        model, processor = sm.load(folder / "tiny", task=tasks[0], seed=0)
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(shift * torch.arange(model.config.hidden_size))
        Bench(model, processor, tasks[0], 0, FAST, folder=out).run("all", recipe)
    assert len(made) == 2  # the third was read
    assert len(list((out / "runs").glob("*/result.json"))) == 2


def test_a_task_does_not_see_its_own_scores(folder, tasks):
    """What is carried to a task depends on the others alone, and is what their scores choose together."""
    model, tokenizer = sm.load(folder / "tiny", task=tasks[0])
    recipe = sm.parse(RECIPE)
    scores = {
        t.name: sm.score(sm.load(folder / "tiny", task=t)[0], recipe, t, tokenizer=tokenizer, max_length=16)
        for t in tasks[1:]
    }
    both = carry(model, recipe, scores)
    alone = carry(model, recipe, {"b": scores["b"]})
    assert alone.overlap(sm.select(model, recipe, scores=scores["b"])) == 1
    assert both.kept == alone.kept == 16
    assert both.info == {"tasks": ["b", "c"], "how": "mean"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": slice(0, 1)}, "at least two tasks"),
        ({"targets": ["d"]}, "none of the tasks"),
        ({"recipe": "LN()"}, "one Select"),
        ({"how": "meen"}, "did you mean 'mean'"),
    ],
)
def test_bad_requests_are_one_line(folder, tasks, change, message):
    given = tasks[change.pop("tasks", slice(None))]
    with pytest.raises(SmidgenError, match=message) as error:
        measure_transfer(folder / "tiny", given, **{"recipe": RECIPE, "seeds": 1, **FAST, **change})
    assert "\n" not in str(error.value)


def test_the_report_holds_the_numbers(carried, tmp_path):
    result, _ = carried
    report = transfer_report(result, "smidgen analyze transfer")
    report.write(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["data"]["outcomes"] == json.loads(json.dumps(list(result.outcomes)))
    text = markdown(report)
    assert "Overlap of the tasks' own selections" in text
    assert "| a (accuracy) |" in text
    assert len(score_gaps(result, "own", "random")) == 6


def test_trust_compares_draws_heads_and_kinds(folder, tasks, tmp_path):
    said = []
    result = measure_stability(
        folder / "tiny",
        tasks[0],
        RECIPE,
        counts=(4, 12, 24, 999),
        seeds=3,
        say=said.append,
        batch_size=8,
        max_length=16,
    )
    assert result.enough == (4, 12, 24)
    assert all(len(found) == 3 for found in (*result.draws, *result.reference, result.heads, result.warmed))
    assert result.draws[-1] == (1, 1, 1), "draws of the whole split are the same examples"
    assert result.examples_needed(1.0) == 24
    assert set(result.kinds) == {"true", "expected"}
    for shares in result.mass.values():
        assert sum(v for k, v in shares.items() if k in ("gain", "bias")) == pytest.approx(1)
        assert sum(v for k, v in shares.items() if k not in ("gain", "bias")) == pytest.approx(1)
    assert 0 <= result.outliers[0] <= 1
    report = trust_report(result)
    report.write(tmp_path)
    assert f"{result.examples_needed()} examples are enough here" in markdown(report)


def run(*words):
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def test_a_choice_of_two_tasks_is_saved_and_tuned_on_a_third(folder, tasks, tmp_path):
    given = ["--model", folder / "tiny", "--max-length", 16, "--batch-size", 8]
    code, out, err = run(
        "analyze", "select", *given, "--data", folder / "b", "--data", folder / "c", "--out", tmp_path / "s"
    )
    assert code == 0, err
    assert "keeps 16 of 160 values" in out
    choice = sm.Selection.load(tmp_path / "s")
    assert choice.info == {"tasks": ["b", "c"], "how": "mean"}
    tune = ["tune", *given, "--data", folder / "a", "--recipe", "LN()", "--epochs", 1, "--json"]
    code, out, err = run(*tune, "--selection", tmp_path / "s", "--out", tmp_path / "run")
    assert code == 0, err
    assert json.loads(out)["trained"] == 16
    code, out, err = run(*tune, "--selection", tmp_path / "run", "--out", tmp_path / "again")
    assert code == 0, err
    first, second = sm.Delta.load(tmp_path / "run"), sm.Delta.load(tmp_path / "again")
    helpers.same(first, second)


def test_a_choice_that_needs_no_data(folder, tmp_path):
    words = ["analyze", "select", "--model", folder / "tiny", "--recipe", "LN() | Select('random', keep=7)"]
    code, out, _ = run(*words, "--out", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["kept"] == 7


def test_transfer_and_trust_as_commands(folder, tasks, tmp_path):
    given = ["--model", folder / "tiny", "--max-length", 16, "--batch-size", 8]
    both = ["--data", folder / "a", "--data", folder / "b"]
    options = ["--target", "a", "--seeds", 1, "--epochs", 1, "--out", tmp_path / "t"]
    code, out, err = run("analyze", "transfer", *given, *both, *options)
    assert code == 0, err
    assert "the others' choice" in out
    assert "a, transferred, seed 0" in err
    assert (tmp_path / "t" / "report.html").is_file()
    counts = ["--count", 8, "--count", 24, "--seeds", 2]
    code, out, err = run("analyze", "trust", *given, "--data", folder / "a", *counts, "--json")
    assert code == 0, err
    assert json.loads(out)["enough"] == [8, 24]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["select", "--out", "x"], "needs data to choose"),
        (["select", "--out", "x", "--recipe", "LN()"], "nothing to choose"),
        (["transfer"], "at least two tasks"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(folder, words, message):
    code, out, err = run("analyze", words[0], "--model", folder / "tiny", *words[1:])
    assert (code, out) == (2, "")
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert message in told[0]


def test_trust_refuses_too_little(folder, tasks):
    with pytest.raises(SmidgenError, match="two seeds"):
        measure_stability(folder / "tiny", tasks[0], RECIPE, seeds=1)
    with pytest.raises(SmidgenError, match="two counts"):
        measure_stability(folder / "tiny", tasks[0], RECIPE, counts=(999,))
    with pytest.raises(SmidgenError, match=r"one Select\('fisher'\)"):
        measure_stability(folder / "tiny", tasks[0], "LN() | Select('random')")
