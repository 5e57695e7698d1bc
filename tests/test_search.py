"""search: each trial is what fit alone gives, what is frozen is computed once, and a killed search goes on."""

import json
import math
import signal
import warnings
from dataclasses import replace

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import DataError, SmidgenError, TrainError
from smidgen.delta.attaching import attach, remove
from smidgen.delta.delta import Delta
from smidgen.efficiency.first_token.last_block import FirstRow
from smidgen.efficiency.prefix_cache.cache import PrefixCache
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.ports.attachment_record import attachment
from smidgen.studies.rate_search import SearchWarning
from smidgen.studies.search_folder import FILE, TRIAL
from smidgen.studies.trial import Search, Trial
from smidgen.training.run.loop import Loop
from tests import helpers as h
from tests.test_cli import bert as saved_bert
from tests.test_cli import call

TOP = "LN(layers='top:1')"
OPTIONS = {"epochs": 2, "batch_size": 8, "progress": False, "max_length": 16}
RATES = [1e-3, 1e-2, 3e-2]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return h.task(tmp_path_factory.mktemp("search") / "data")


def searched(task, recipe=TOP, model=None, **more):
    """Without the warning about edges, which random tiny models run into."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SearchWarning)
        given = {"lr": RATES, **OPTIONS, **more}
        return sm.search(model or h.bert(dropout=0.2), recipe, task, tokenizer=h.tokenizer(), **given)


def fitted(task, recipe=TOP, **more):
    return sm.fit(h.bert(dropout=0.2), recipe, task, tokenizer=h.tokenizer(), **{**OPTIONS, **more})


def results(found):
    """All but the seconds."""
    return [replace(trial, seconds=0.0) for trial in found.trials]


@pytest.fixture
def fills(monkeypatch):
    """Numbers of rows of the caches that were filled."""
    seen, fill = [], PrefixCache.fill

    def counted(self, rows, *args, **options):
        seen.append(len(rows))
        return fill(self, rows, *args, **options)

    monkeypatch.setattr(PrefixCache, "fill", counted)
    return seen


def trial_folder(out, trial):
    """Where the run of a trial lies."""
    (found,) = (
        path.parent / "fit"
        for path in (out / "runs").glob(f"*/{TRIAL}")
        if Trial.from_json(json.loads(path.read_text())) == trial
    )
    return found


def same_as_fit(task, recipe, folder, **more):
    """Every trial of a search is bit for bit what fit alone gives."""
    model = h.bert(dropout=0.2)
    with h.untouched(model):
        found = searched(task, recipe, model, seeds=(0, 1), out=folder, **more)
    assert [(t.lr, t.seed) for t in found.trials] == [(lr, seed) for lr in RATES for seed in (0, 1)]
    for trial in found.trials:
        alone = fitted(task, recipe, seed=trial.seed, **{found.rate: trial.lr}, **more)
        h.same(Delta.load(trial_folder(folder, trial)), alone)
        assert alone.info["best_epoch"] == trial.best_epoch
        assert alone.info["scores"] == {f"validation {k}": v for k, v in trial.scores[trial.best_epoch - 1].items()}
    return found


@pytest.mark.parametrize(
    "recipe", [TOP, "LN()", "LoRA(rank=2, dropout=0.1, layers='top:1')", "Head()", "LN() | Select('fisher', keep=0.5)"]
)
def test_each_trial_is_what_fit_alone_gives(task, recipe, tmp_path):
    same_as_fit(task, recipe, tmp_path / "out")


def test_a_trial_that_leaks_into_the_next_would_be_seen(task, tmp_path, monkeypatch):
    fit = Loop.fit

    def leaking(self):
        if self.run.shared is not None and self.settings.lr == RATES[1]:
            self.settings = replace(self.settings, warmup=0.5)
        return fit(self)

    monkeypatch.setattr(Loop, "fit", leaking)
    with pytest.raises(AssertionError, match="differs by"):
        same_as_fit(task, TOP, tmp_path / "out")


def test_the_best_delta_is_saved_beside_the_table(task, tmp_path):
    found = searched(task, out=tmp_path / "out")
    h.same(Delta.load(tmp_path / "out"), found.delta)
    record = json.loads((tmp_path / "out" / FILE).read_text())
    assert {k: v for k, v in record.items() if k != "asked"} == json.loads(json.dumps(found.to_json()))
    h.same(searched(task).delta, found.delta)  # in memory too


def test_hidden_states_are_computed_once_for_all_trials(task, fills, tmp_path):
    searched(task)
    assert fills == [32, 12]
    fills.clear()
    for lr in RATES:
        fitted(task, lr=lr)
    assert fills == [32, 12] * 3


def test_the_epochs_of_all_trials_count(task, fills):
    searched(task, epochs=1)
    assert fills == [32, 12]
    fills.clear()
    searched(task, epochs=1, lr=[1e-3])
    searched(task, cache=False)
    assert fills == []


def test_states_in_a_file_lie_in_the_search_and_are_taken_away(task, fills, tmp_path):
    model, states = h.bert(dropout=0.2), []
    handle = model.bert.embeddings.register_forward_hook(
        lambda *_: states.extend(p.name for p in (tmp_path / "out").glob("prefix-*.states"))
    )
    searched(task, model=model, cache=True, cache_bytes=100, out=tmp_path / "out")
    handle.remove()
    assert fills == [32, 12]
    assert states
    assert not list(tmp_path.rglob("prefix-*.states"))


def shared(kept, model, recipe, rows, task):
    attach(model, recipe)

    def fill(rows):
        cache = PrefixCache(model, attachment(model).plan)
        cache.fill(rows, task.collator(h.tokenizer()))
        return cache

    (cache,) = kept.caches(model, [rows], fill)
    remove(model)
    return cache


def test_a_cache_is_not_shared_with_another_cut_rows_base_or_model(task):
    kept, model = Kept(4), h.bert()
    rows, held = (task.encode(h.tokenizer(), split) for split in ("train", "validation"))
    first = shared(kept, model, TOP, rows, task)
    assert shared(kept, model, TOP, rows, task) is first
    assert shared(kept, model, "LoRA(layers='top:1', rank=2)", rows, task) is not first  # cut in front of the block
    assert shared(kept, model, "Head()", rows, task) is not first
    second = shared(kept, model, TOP, rows, task)
    assert shared(kept, model, TOP, held, task) is not second
    third = shared(kept, model, TOP, rows, task)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias += 0.1
    fourth = shared(kept, model, TOP, rows, task)
    assert fourth is not third
    assert shared(kept, h.twin(model), TOP, rows, task) is not fourth
    assert kept.fills == 8


@pytest.mark.parametrize(("recipe", "times"), [(TOP, 1), ("LN()", 3)])
def test_the_rows_that_are_read_are_found_out_once_where_something_is_kept(task, monkeypatch, recipe, times):
    found, of = [], FirstRow.of.__func__
    monkeypatch.setattr(FirstRow, "of", classmethod(lambda cls, *about: found.append(of(cls, *about)) or found[-1]))
    searched(task, recipe)
    assert len(found) == times


def test_what_is_found_once_is_found_again_for_another_recipe_rows_or_model(task):
    kept, model, found = Kept(4), h.bert(), []
    rows, held = (task.encode(h.tokenizer(), split) for split in ("train", "validation"))

    def told(model, recipe, rows, key="same"):
        shared(kept, model, recipe, rows, task)
        return kept.once(key, lambda: found.append(None) or len(found))

    assert kept.once("same", lambda: 0) == 0  # nothing is kept yet
    assert [told(model, TOP, rows), told(model, TOP, rows), told(model, TOP, rows, "other")] == [1, 1, 2]
    assert told(model, TOP, held) == 3
    assert told(h.twin(model), TOP, held) == 4


def test_what_was_refused_is_not_tried_again(task):
    kept, model, tries = Kept(4), h.bert(), []
    attach(model, TOP)

    def refuse(rows):
        tries.append(rows)
        raise TrainError("depends on chance")

    for _ in range(2):
        with pytest.raises(TrainError, match="chance"):
            kept.caches(model, [task.encode(h.tokenizer(), "train")], refuse)
    assert len(tries) == 1


def test_a_mistake_that_shows_up_late_does_not_spoil_the_folder(task, tmp_path):
    with pytest.raises(SmidgenError, match="pooling"):
        searched(task, pooling="middle", out=tmp_path / "out")
    searched(task, lr=[1e-3], out=tmp_path / "out")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["before", "within", "unrecorded"])
def test_a_killed_search_goes_on_with_the_trials_that_are_left(task, tmp_path, monkeypatch, where):
    """Between two trials, within one, and after one that ended but was not written down."""
    whole, fit, begun = searched(task), Loop.fit, []

    def dies(self):
        if self.settings.lr == RATES[1]:
            if where == "before":
                raise Killed
            if where == "unrecorded":
                fit(self)
                raise Killed
            validate = Loop._validate
            monkeypatch.setattr(Loop, "_validate", lambda s, e: (_ for _ in ()).throw(Killed) if e else validate(s, e))
        return fit(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "fit", dies)
        with pytest.raises(Killed):
            searched(task, out=tmp_path / "out")
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "out" / FILE).read_text())["trials"]) == 1

    monkeypatch.setattr(Loop, "fit", lambda self: begun.append(self.settings.lr) or fit(self))
    again = searched(task, out=tmp_path / "out")
    assert begun == RATES[1:]
    assert results(again) == results(whole)
    h.same(again.delta, whole.delta)
    h.same(searched(task, out=tmp_path / "out").delta, whole.delta)
    assert begun == RATES[1:]  # a finished one only reports


def test_another_search_in_the_folder_is_refused(task, tmp_path):
    searched(task, out=tmp_path / "out")
    for more in ({"epochs": 1}, {"recipe": "LN()"}):
        with pytest.raises(TrainError, match="holds another run") as error:
            searched(task, out=tmp_path / "out", **more)
        assert "\n" not in str(error.value)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(TrainError, match="holds no search"):
        searched(task, out=tmp_path / "full")


def test_a_search_of_an_earlier_version_is_refused(task, tmp_path):
    (tmp_path / "out" / "trials" / "lr-0.001-seed-0").mkdir(parents=True)
    (tmp_path / "out" / FILE).write_text(json.dumps({"asked": {}, "trials": []}))
    with pytest.raises(TrainError, match="of an earlier version of smidgen; choose another --out"):
        searched(task, out=tmp_path / "out")


def test_further_rates_and_seeds_are_added_to_a_search(task, tmp_path, monkeypatch):
    """What is there is not made again, and the whole is what a search for all of it at once finds."""
    fit, begun = Loop.fit, []
    first = searched(task, lr=RATES[:1], out=tmp_path / "out")
    monkeypatch.setattr(Loop, "fit", lambda self: begun.append((self.settings.lr, self.settings.seed)) or fit(self))
    grown = searched(task, lr=RATES[:2], seeds=(0, 1), out=tmp_path / "out")
    assert begun == [(RATES[0], 1), (RATES[1], 0), (RATES[1], 1)]
    whole = searched(task, lr=RATES[:2], seeds=(0, 1))
    assert results(grown) == results(whole)
    h.same(grown.delta, whole.delta)
    h.same(sm.Delta.load(tmp_path / "out"), whole.delta)
    begun.clear()
    assert results(searched(task, lr=RATES[:1], out=tmp_path / "out")) == results(first)
    assert begun == []


def trial(lr, *values, seed=0, error=None):
    best = None if error else 1 + max(range(len(values)), key=values.__getitem__)
    return Trial(lr, seed, tuple({"accuracy": v} for v in values), best, 1.0, error)


def table(*trials):
    return Search(sm.parse(TOP), "sst2", "accuracy", "lr", trials)


def test_the_best_rate_is_best_in_the_mean_over_seeds():
    found = table(trial(1e-3, 0.9, seed=0), trial(1e-3, 0.5, seed=1), trial(1e-2, 0.7, 0.8), trial(1e-2, 0.7, seed=1))
    assert found.best is found.trials[2]
    assert found.table().splitlines()[4].split() == ["0.01", "0", "0.8000", "2", "1.0", "best"]
    assert found.table().count("best") == 1


def test_a_trial_that_diverged_is_never_best():
    found = table(trial(1e-3, 0.2), trial(1e-2, 0.3), trial(1e-1, 0.9, error="the loss is nan"))
    assert (found.best.lr, found.edge) == (1e-2, None)
    assert "diverged" in str(found).splitlines()[-1]


@pytest.mark.parametrize(
    ("values", "edge"), [((0.9, 0.8, 0.7), "lowest"), ((0.7, 0.8, 0.9), "highest"), ((0.7, 0.9, 0.8), None)]
)
def test_the_edge(values, edge):
    assert table(*(trial(lr, value) for lr, value in zip(RATES, values, strict=True))).edge == edge
    assert table(trial(1e-3, values[0])).edge is None  # a single rate has no neighbours to ask for


def test_a_best_rate_at_the_edge_is_warned_of_in_one_line(task):
    with pytest.warns(SearchWarning, match="lr, .*, is the (lowest|highest) that was tried; try some") as seen:
        sm.search(h.bert(), TOP, task, tokenizer=h.tokenizer(), lr=[1e-3, 1e-2], **OPTIONS)
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


def test_a_rate_that_diverges_ends_its_trial_alone(task, tmp_path):
    options = {"epochs": 8, "clip": 1e30, "head_lr": 1e-3}
    found = searched(task, "Full()", lr=[1e-3, 1e30], out=tmp_path / "out", **options)
    assert found.trials[1].best_epoch is None
    assert "the loss is" in found.trials[1].error
    assert found.best is found.trials[0]
    again = searched(task, "Full()", lr=[1e-3, 1e30], out=tmp_path / "out", **options)
    assert results(again) == results(found)
    with pytest.raises(TrainError, match="every trial diverged"):
        searched(task, "Full()", lr=[1e30], **options)


@pytest.mark.parametrize(
    ("recipe", "rate", "middle"),
    [("LN()", "lr", 3e-3), ("LoRA(rank=2)", "lr", 3e-3), ("IA3()", "lr", 3e-2), ("Head()", "head_lr", 5e-3)],
)
def test_default_rates_lie_around_the_recipes_own(task, recipe, rate, middle):
    found = searched(task, recipe, lr=None, trials=3, epochs=1)
    assert found.rate == rate
    assert [t.lr for t in found.trials] == pytest.approx([middle / 10, middle, middle * 10])


def test_several_methods_have_one_rate_the_geometric_mean(task):
    found = searched(task, "LN() + IA3()", lr=None, trials=1, epochs=1)
    assert found.trials[0].lr == pytest.approx(math.sqrt(3e-3 * 3e-2), rel=1e-2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lr": None, "trials": 0}, "trials=0"),
        ({"lr": [1e-3, -1e-3]}, "lr=-0.001"),
        ({"lr": []}, "at least one"),
        ({"lr": [1e-3, 1e-3]}, "twice"),
        ({"seeds": ()}, "seeds"),
        ({"seed": 3}, "seeds=(3,)"),
        ({"epoch": 3}, "epoch"),
        ({"recipe": "Head()", "head_lr": 1e-3}, "leave out head_lr"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(task, tmp_path, more, said):
    model = h.bert()
    with h.untouched(model), pytest.raises(SmidgenError) as error:
        searched(task, model=model, out=tmp_path / "out", **more)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_a_validation_split_there_is_nothing_to_choose_by(tmp_path):
    h.jsonl(tmp_path / "data" / "train.jsonl", h.rows(20))
    with pytest.raises(DataError, match="validation"):
        searched(sm.Task.load(tmp_path / "data", validation=0))


@pytest.fixture(scope="module")
def world(tmp_path_factory, task):
    folder = tmp_path_factory.mktemp("cli")
    saved_bert(folder / "base")
    for split, start in (("train", 0), ("validation", 100), ("test", 200)):
        h.jsonl(folder / "data" / f"{split}.jsonl", h.rows(24, start))
    return folder


def command(world, *more, out="run"):
    files = ["--model", world / "base", "--data", world / "data", "--out", world / out]
    return call("search", *files, "--recipe", TOP, "--epochs", 2, "--batch-size", 8, *more)


def test_the_command_prints_a_table_and_one_json_object(world):
    rates = ["--lr", 1e-3, "--lr", 3e-3, "--lr", 1e-2]
    said = command(world, *rates)
    assert said.code == 0, said.err
    assert said.out.count("best") == 1
    assert len([line for line in said.err.splitlines() if " of 3)" in line]) == 3
    found = command(world, *rates, "--json").json
    assert [t["lr"] for t in found["trials"]] == [1e-3, 3e-3, 1e-2]
    assert found["best"]["accuracy"] == max(max(s["accuracy"] for s in t["scores"]) for t in found["trials"])
    assert {"delta.safetensors", "delta.json", FILE} <= found["files"].keys()
    assert ("note: the best lr" in said.err) == (found["edge"] is not None)


@pytest.mark.parametrize(
    ("more", "said"), [(["--trials", 0], "--trials 0"), (["--lr=-1"], "--lr -1"), (["--metric", "bleu"], "bleu")]
)
def test_a_mistake_is_one_line_and_exit_2(world, more, said):
    done = command(world, *more, out="bad")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error:")
    assert said in done.err.splitlines()[-1]
    assert not (world / "bad").exists()


def test_ctrl_c_says_how_to_go_on(world, monkeypatch):
    validate = Loop._validate

    def interrupted(self, epoch):
        signal.raise_signal(signal.SIGINT)
        validate(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_validate", interrupted)
        done = command(world, "--lr", 1e-3, "--lr", 1e-2, out="stopped")
    assert done.code == 130
    assert "goes on from there" in done.err
    assert command(world, "--lr", 1e-3, "--lr", 1e-2, out="stopped").code == 0
