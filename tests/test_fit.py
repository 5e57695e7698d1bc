"""fit: it learns, the base is untouched, the best epoch comes back, and what is wrong is said."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError, DivergedError, ModelError, SmidgenError, TrainError
from smidgen.common.memory import memory_guard
from smidgen.data.batching import ShuffledBatches
from smidgen.data.kinds.base import kind_named
from smidgen.inference.evaluation import Scores
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import trained_parameters
from smidgen.steps.divergence import remedy
from smidgen.steps.objectives import Needs, Objective, StayClose, TaskLoss
from smidgen.steps.step import BASE, Step
from smidgen.testing.cases import shake
from smidgen.training.run.run_folder import METRICS
from smidgen.training.run.settings import Settings, SettingsOptions
from tests import helpers as h

QUICK = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "head_lr": 1e-2, "progress": False}
LOOP = sys.modules.get("smidgen.training.run.loop") or __import__("smidgen.training.run.loop", fromlist=["Loop"])


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return h.task(tmp_path_factory.mktemp("films"), train=64)


def fit(task, recipe="LN()", model=None, **options):
    return sm.fit(model or h.bert(), recipe, task, tokenizer=h.tokenizer(), **{**QUICK, **options})


# What comes out


@pytest.mark.parametrize(("recipe", "lr"), [("LN()", 5e-2), ("LoRA(rank=4, target='linear')", 2e-2), ("Full()", 1e-2)])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_learns_and_leaves_the_base_untouched(recipe, lr, pooling, task):
    model = h.bert().train()
    with h.untouched(model):
        delta = fit(task, recipe, model, epochs=8, lr=lr, head_lr=2e-2, pooling=pooling)
    assert delta.info["scores"]["validation accuracy"] > 0.9
    scores = sm.evaluate(model, task, delta=delta, split="validation", tokenizer=h.tokenizer())
    assert scores.values == {k.removeprefix("validation "): v for k, v in delta.info["scores"].items()}
    before = sm.evaluate(model, task, split="validation", tokenizer=h.tokenizer())
    assert before.value < 0.9, "the base alone can do it: the test shows nothing"
    assert sm.evaluate(model, task, delta=delta, tokenizer=h.tokenizer()).value > 0.9
    assert delta.pooling == pooling


def test_what_is_recorded(task, tmp_path):
    delta = fit(task, out=tmp_path / "run", max_length=9)
    assert delta.info["task"] == {"name": task.name, "kind": "classification", "metric": "accuracy", "text": ["text"]}
    assert delta.info["settings"]["max_length"] == 9
    assert (delta.info["steps"], delta.info["settings"]["epochs"]) == (16, 2)
    loaded = sm.Delta.load(tmp_path / "run")
    h.same(loaded, delta)
    assert loaded.info == json.loads(json.dumps(dict(delta.info)))
    entries = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [8, 10, 16, 16]
    assert set(entries[1]) == {"step", "loss", "lr", "rate"}
    assert entries[-1] == {"epoch": 2, "step": 16, "validation": entries[-1]["validation"]}
    assert not list((tmp_path / "run").glob(".part-*"))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(task):
    first, again, other = (
        fit(task, "LoRA(rank=2, dropout=0.1)", h.bert(0.1), seed=seed, epochs=1) for seed in (3, 3, 4)
    )
    h.same(first, again)
    name = next(iter(first.tensors))
    assert not torch.equal(first.tensors[name], other.tensors[name])


def declining(monkeypatch, values):
    """Validation that gives these values, one an epoch; keeps what the model was then."""
    seen, left = [], list(values)

    def held_out(self):
        seen.append({n: p.detach().clone() for n, p in trained_parameters(self.model).items()})
        return Scores("accuracy", {"accuracy": left.pop(0)}, [], [])

    monkeypatch.setattr(LOOP.Loop, "_held_out", held_out)
    return seen


@pytest.mark.parametrize(
    ("values", "best"),
    [((0.5, 0.9, 0.7), 2), ((0.9, 0.5, 0.1), 1), ((0.1, 0.2, 0.3), 3), ((0.5, 0.5, 0.5), 1)],
)
def test_the_best_epoch_is_kept(values, best, task, monkeypatch):
    seen = declining(monkeypatch, values)
    delta = fit(task, epochs=3)
    assert delta.info["best_epoch"] == best
    assert delta.info["scores"] == {"validation accuracy": values[best - 1]}
    h.same(delta, seen[best - 1])
    assert not torch.equal(seen[0]["classifier.weight"], seen[2]["classifier.weight"])


def test_an_undefined_score_is_never_the_best(task, monkeypatch):
    """A correlation with constant predictions is nan; nothing compares above nan."""
    nan = float("nan")
    seen = declining(monkeypatch, (nan, 0.4, nan))
    delta = fit(task, epochs=3)
    assert delta.info["best_epoch"] == 2
    h.same(delta, seen[1])


def test_lower_is_better_for_errors(task, monkeypatch):
    def held_out(self):
        return Scores("mse", {"mse": left.pop(0)}, [], [])

    left = [3.0, 1.0, 2.0]
    monkeypatch.setattr(LOOP.Loop, "_held_out", held_out)
    assert fit(task, epochs=3).info["best_epoch"] == 2


# Kinds


def tagged(count, start=0):
    tags = {**dict.fromkeys(h.KINDS["pos"], "B-X"), **dict.fromkeys(h.KINDS["neg"], "B-Y")}
    texts = [row["text"].split() for row in h.rows(count, start)]
    return [{"tokens": words, "tags": [tags.get(word, "O") for word in words]} for words in texts]


def rated(count, start=0):
    return [
        {"text": r["text"], "label": 0.5 + (r["label"] == "pos") + i % 3 / 10}
        for i, r in enumerate(h.rows(count, start))
    ]


def prose(count, start=0):
    return [{"text": row["text"]} for row in h.rows(count, start)]


def asked(count, start=0):
    return [{"prompt": "the film was", "completion": r["text"].split()[3]} for r in h.rows(count, start)]


KINDS = {
    "regression": (rated, {}, lambda: h.bert(num_labels=1, problem_type="regression"), "pearson"),
    "tokens": (tagged, {}, lambda: h.build("bert", "AutoModelForTokenClassification", num_labels=3), "entity_f1"),
    "prose": (prose, {"kind": "causal-lm"}, lambda: h.causal(), "perplexity"),
    "completion": (asked, {"kind": "causal-lm"}, lambda: h.causal("gpt2", resid_pdrop=0.0), "perplexity"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name, tmp_path):
    make, options, build, metric = KINDS[name]
    task = h.task(tmp_path / "task", 48, 16, make, **options)
    assert task.metric == metric
    model = build()
    before = sm.evaluate(model, task, split="validation", tokenizer=h.tokenizer()).better
    with h.untouched(model):
        delta = fit(task, "Full()", model, epochs=8)
    scores = sm.evaluate(model, task, delta=delta, split="validation", tokenizer=h.tokenizer())
    assert scores.better > before
    assert scores.value == pytest.approx(delta.info["scores"][f"validation {metric}"], rel=1e-6)
    assert bool(delta.head) == (name not in ("prose", "completion"))


# Objectives


def test_stay_close_keeps_a_language_model_near_its_base(tmp_path):
    task = h.task(tmp_path / "task", 32, 8, asked, kind="causal-lm")
    model, inputs = h.causal(), h.ids(mask=False)
    base = h.logits(model, **inputs).log_softmax(-1)
    far = {}
    for weight in (None, 20.0):
        objective = None if weight is None else StayClose(weight)
        with h.untouched(model):
            delta = fit(task, "LN()", model, epochs=4, lr=3e-2, objective=objective)
        with sm.attached(model, delta):
            tuned = h.logits(model, **inputs).log_softmax(-1)
        far[weight] = float((base.exp() * (base - tuned)).sum(-1).mean())
    assert far[20.0] < 0.5 * far[None], far


def by_hand(kind, weight, loss, tuned, base, labels):
    """Loss plus weight times KL(base || tuned), summed in plain loops over what carries a label."""
    p, q = base.double().softmax(-1), tuned.double().softmax(-1)
    terms = []
    for row in range(len(labels)):
        if kind == "classification":
            terms.append(float((p[row] * (p[row] / q[row]).log()).sum()))
            continue
        for place, label in enumerate(labels[row].tolist()):
            at = place - 1 if kind == "causal-lm" else place  # a causal label is predicted from the token before it
            if label != -100 and at >= 0:
                terms.append(float((p[row, at] * (p[row, at] / q[row, at]).log()).sum()))
    return float(loss) + weight * sum(terms) / len(terms)


@pytest.mark.parametrize("kind", ["classification", "tokens", "causal-lm"])
def test_stay_close_is_taken_where_the_labels_stand(kind):
    """Token labels belong to their own positions, a causal model's to the position before; shapes do not tell."""
    generator = torch.Generator().manual_seed(0)
    shape = (3,) if kind == "classification" else (3, 6)
    labels = torch.randint(0, 4, shape, generator=generator)
    if kind != "classification":
        labels[0, :3], labels[2, 4:] = -100, -100
    tuned, base = (3 * torch.randn(*shape, 4, generator=generator) for _ in range(2))
    outputs, reference = (SimpleNamespace(logits=x, loss=torch.tensor(0.5)) for x in (tuned, base))
    found = StayClose(0.7).loss(seen_as(kind, labels, outputs, reference))
    assert float(found) == pytest.approx(by_hand(kind, 0.7, 0.5, tuned, base, labels), rel=1e-5)
    assert StayClose(0.7).identity == "StayClose(weight=0.7)"  # what a run's folder says, and said before


def seen_as(kind, labels, outputs, reference):
    """A step with outputs of one's own."""
    made = {None: outputs, "base": reference}
    return Step(torch.nn.Module(), kind_named(kind), {"train": {"labels": labels}}, lambda which, batch: made[which])


def test_stay_close_while_tagging(tmp_path):
    """In `fit` and in a warm-up, the task says what a label belongs to."""
    task = h.task(tmp_path / "tags", 12, 6, tagged)
    assert task.kind == "tokens"
    model = h.build("bert", "AutoModelForTokenClassification", num_labels=3)
    found = []

    @dataclass(frozen=True)
    class Watched(StayClose):
        def loss(self, step):
            loss, outputs = super().loss(step), step.outputs()
            logits = (outputs.logits.detach(), step.reference().logits)
            wanted = by_hand("tokens", self.weight, outputs.loss.detach(), *logits, step.batch["labels"])
            found.append((loss.item(), wanted))
            return loss

    fit(task, "LN()", model, epochs=1, objective=Watched(5.0))
    here = len(found)
    sm.select(
        model, "LN() | Select('change', warmup=2)", task, tokenizer=h.tokenizer(), objective=Watched(5.0), batch_size=4
    )
    assert len(found) > here > 1
    assert [a for a, _ in found] == pytest.approx([b for _, b in found], rel=1e-4)


def test_stay_close_refuses_what_it_cannot_do(tmp_path):
    logits = SimpleNamespace(logits=torch.zeros(2, 3, 4), loss=torch.tensor(0.0))
    labels = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(SmidgenError, match=r"do not fit a task of kind 'classification'") as error:
        StayClose().loss(seen_as("classification", labels, logits, logits))
    assert "\n" not in str(error.value)
    scores = h.task(tmp_path / "r", 8, 4, lambda n, start=0: [{"text": "a film", "label": 0.5 + i} for i in range(n)])
    assert scores.kind == "regression"
    model = h.bert(num_labels=1)
    with h.untouched(model), pytest.raises(SmidgenError, match="a regression has none"):
        fit(scores, "LN()", model, objective=StayClose())


def test_the_reference_is_the_base(task):
    seen = []

    @dataclass(frozen=True)
    class Looks(Objective):
        def needs(self, kind):
            return Needs(references={"base": BASE})

        def loss(self, step):
            inputs = {k: v for k, v in step.batch.items() if k != "labels"}
            seen.append((step.outputs().logits.detach(), step.reference().logits, inputs))
            return step.outputs().loss

    model = h.bert()
    fit(task, "LN()", model, objective=Looks())
    assert not any(reference.requires_grad for _, reference, _ in seen)
    tuned, reference, batch = seen[-1]
    torch.testing.assert_close(reference, h.logits(model, **batch))
    assert not torch.allclose(tuned, reference)


def test_a_task_loss_gets_no_reference(task):
    class Looks(TaskLoss):
        def loss(self, step):
            return step.outputs().loss + 0 * step.reference().loss

    with pytest.raises(TrainError, match="reads a reference 'base', but needs.. names none"):
        fit(task, epochs=1, objective=Looks())


# What goes wrong


@pytest.mark.parametrize("lr", [1e20, 1e30])
def test_a_loss_that_is_not_finite(lr, task):
    model = h.bert()
    with (
        h.untouched(model),
        pytest.raises(TrainError, match=r"the loss is (nan|inf) at step \d+, lr \S+; try a lower lr"),
    ):
        fit(task, "Full()", model, lr=lr, clip=1e30)


def test_a_gradient_that_is_not_finite(task):
    model = h.bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with h.untouched(h.bert()), pytest.raises(TrainError, match="not finite"):
        fit(task, "LN()", model)


def test_a_gradient_that_is_not_finite_later(task):
    """The loss may be finite where its gradient is not, and the last step has no loss behind it."""

    @dataclass(frozen=True)
    class Rooted(Objective):
        steps: list = field(default_factory=list)

        def loss(self, step):
            self.steps.append(0)
            loss = step.outputs().loss
            gap = loss - loss.detach()
            return loss + (0 * gap if len(self.steps) < 4 else gap.abs().sqrt())

    model, objective = h.bert(), Rooted()
    with (
        h.untouched(model),
        pytest.raises(DivergedError, match=r"the gradient is nan at step 2, lr \S+; try a lower lr"),
    ):
        fit(task, "LN()", model, objective=objective)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float16_is_named_where_a_gradient_is_not_finite(dtype, task):
    """Its largest number is the likely reason, and no rate helps."""
    model = h.bert().to(dtype)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(TrainError, match="not finite") as caught:
        fit(task, "LN()", model)
    said = "the base is in float16, whose largest number is 65504: load it in bfloat16 or float32, else try a lower lr"
    assert (said in str(caught.value)) == (dtype is torch.float16)
    assert "try a lower lr, or look at the data of this step" in str(caught.value)


def test_autocast_in_float16_is_named():
    model = sm.attach(h.bert(), "LN()")
    usual = "try a lower lr, or look at the data of this step"
    assert remedy(model) == remedy(model, "no") == remedy(model, "bf16") == usual
    wanted = f"autocast computes in float16, whose largest number is 65504: choose bfloat16 or none, else {usual}"
    assert remedy(model, "fp16") == wanted
    with torch.autocast("cpu", torch.float16):
        assert remedy(model) == wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert remedy(model) == usual


def test_a_tensor_that_is_not_reached(task):
    model = h.bert()
    model.bert.encoder.layer[1].forward = lambda hidden, *args, **kwargs: hidden
    with pytest.raises(TrainError, match=r"8 of \d+ trained tensors|trained tensors got no gradient") as error:
        fit(task, "LN()", model)
    assert "bert.encoder.layer.1" in str(error.value)
    assert "narrow the recipe" in str(error.value)
    fit(task, "LN(layers=0)", model, epochs=1)


def test_a_tensor_that_does_not_move(task):
    @dataclass(frozen=True)
    class Still(Objective):
        def loss(self, step):
            return step.outputs().loss * 0

    with pytest.raises(TrainError, match=r"did not move in 5 steps, first bert\.embeddings\.LayerNorm\.weight"):
        fit(task, "LN()", objective=Still())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 1}, r"unexpected keyword argument 'learning_rate'; settings: seed, epochs, lr, head_lr"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1"),
        ({"lr": 0.0}, r"lr=0\.0 must be above 0"),
        ({"lr": float("inf")}, "lr=inf must be above 0"),
        ({"head_lr": -1.0}, r"head_lr=-1\.0 must be above 0"),
        ({"clip": float("nan")}, "clip=nan must be above 0"),
    ],
)
def test_settings_that_cannot_be(settings, said, task):
    model = h.bert()
    with h.untouched(model), pytest.raises(TrainError, match=said):
        fit(task, "LN()", model, **settings)


def test_what_is_attached_already_stays(task):
    model = sm.attach(h.bert(), "LN()")
    shake(trained_parameters(model).values(), 0.1)
    before = sm.Delta.of(model)
    with pytest.raises(AttachError, match=r"LN\(\) is attached already; detach it first"):
        sm.fit(model, "IA3()", task, tokenizer=h.tokenizer(), epochs=1)
    h.same(sm.detach(model), before)


def test_a_model_without_a_tokenizer(task):
    with pytest.raises(ModelError, match="does not say where it came from; pass tokenizer="):
        sm.fit(h.bert(), "LN()", task, **QUICK)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory(error, task):
    @dataclass(frozen=True)
    class Hungry(TaskLoss):
        def loss(self, step):
            if len(step.batch["labels"]) > 2:
                raise error
            return step.outputs().loss

    with pytest.raises(TrainError, match="a batch of 8 does not fit into memory; try batch_size=4") as raised:
        fit(task, objective=Hungry())
    assert raised.value.__cause__ is error
    with pytest.raises(RuntimeError, match="something else"), memory_guard(8):
        raise RuntimeError("something else")


def test_out_of_memory_in_validation(task, monkeypatch):
    def starved(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(sys.modules["smidgen.training.run.loop"], "run_examples", starved)
    with pytest.raises(TrainError, match="a batch of 8 does not fit into memory; try batch_size=4"):
        sm.fit(h.bert(), "LN()", task, tokenizer=h.tokenizer(), **QUICK)


def test_mixed_precision_leaves_nothing_behind(task, monkeypatch):
    """Accelerate puts a forward of its own on a model that it prepares."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    try:
        model = h.bert()
        with h.untouched(model):
            delta = fit(task, "LN()", model)
    finally:
        AcceleratorState._reset_state(True)
    assert {t.dtype for t in delta.tensors.values()} == {torch.float32}


# What lies below the lowest edit


def test_what_lies_below_the_lowest_edit_stays_in_eval_mode(task):
    model, modes = h.bert(0.3), []

    @dataclass(frozen=True)
    class Looks(TaskLoss):
        def loss(self, step):
            layers = model.bert.encoder.layer
            modes.append((model.bert.embeddings.dropout.training, layers[0].training, layers[1].training))
            return step.outputs().loss

    fit(task, "LN(layers='top:1')", model, objective=Looks(), epochs=2)
    assert modes[0] == (False, False, False), "the dry run"
    assert set(modes[1:]) == {(False, False, True)}
    modes.clear()
    fit(task, "Head()", model, objective=Looks(), epochs=1)
    assert set(modes) == {(False, False, False)}
    modes.clear()
    fit(task, "LN()", model, objective=Looks(), epochs=1)
    assert set(modes[1:]) == {(True, True, True)}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "distilbert", "deberta-v2"])
def test_two_forwards_through_the_frozen_prefix_are_equal(kind):
    drop = {"bert": "hidden_dropout_prob", "deberta-v2": "hidden_dropout_prob", "gpt2": "embd_pdrop"}.get(
        kind, "dropout"
    )
    model = h.build(kind, **{drop: 0.5})
    seen = []
    (blocks,) = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2][:1]
    blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach()),
        with_kwargs=True,
    )
    for frozen, equal in ((True, True), (False, False)):
        seen.clear()
        model.train()
        for module in frozen_prefix(model, resolve(model, "LN(layers='top:1')")) if frozen else ():
            module.eval()
        for _ in range(2):
            model(**h.ids())
        assert torch.equal(*seen) == equal


def test_prefix_of_an_edited_embedding_is_empty():
    model = h.bert()
    assert frozen_prefix(model, resolve(model, "LN()")) == []
    assert frozen_prefix(model, resolve(model, "LN(which='embedding')")) == []
    top = frozen_prefix(model, resolve(model, "LN(layers='top:1')"))
    assert model.bert.encoder.layer[0] in top
    assert model.bert.encoder.layer[1] not in top
    assert model.bert.embeddings.dropout in top


# Schedules and batches


def test_the_rate_rises_falls_and_is_never_zero():
    settings = Settings(warmup=0.1)
    rates = [settings.rate(step, 100) for step in range(100)]
    assert rates[9] == 1.0 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates) > 0
    assert Settings(warmup=0.0).rate(0, 1) == 1.0
    assert all(0 < Settings().rate(step, 3) <= 1 for step in range(3))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_same_global_batches_for_any_number_of_processes(world):
    whole = list(ShuffledBatches(23, 6, seed=1, epoch=2))
    assert sorted(row for batch in whole for row in batch) == list(range(23))
    shares = [list(ShuffledBatches(23, 6, seed=1, epoch=2, rank=rank, world=world)) for rank in range(world)]
    assert {len(share) for share in shares} == {4}
    for index, batch in enumerate(whole):
        parts = [share[index] for share in shares]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert sorted(row for part in parts for row in part) == sorted(batch), "each row in one process"
    assert list(ShuffledBatches(23, 6, seed=1, epoch=2, skip=2)) == whole[2:]
    assert list(ShuffledBatches(23, 6, seed=1, epoch=3)) != whole
    assert list(ShuffledBatches(23, 6, seed=2, epoch=2)) != whole


TWO = """
import json, os, sys
from pathlib import Path
import torch
import helpers as h
import smidgen as sm
from smidgen.data import Task

torch.set_num_threads(1)
root, fit = Path(sys.argv[1]), sm.fit
child = os.fork()  # two processes from one import, each with what torchrun would set
rank = int(child == 0)
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
task = Task.load(root / "task")
settings = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "head_lr": 1e-2, "progress": False}
for name in ("first", "second"):
    model = h.bert()
    with h.untouched(model):
        delta = fit(model, "LN() + LoRA(rank=2)", task, tokenizer=h.tokenizer(), out=root / name, **settings)
digest = float(sum(t.double().abs().sum() for t in delta.tensors.values()))
from accelerate import PartialState
state = PartialState()
(root / f"{state.process_index}.json").write_text(json.dumps([state.num_processes, digest, delta.info]))
state.destroy_process_group()
assert rank or os.waitpid(child, 0)[1] == 0
"""


def test_two_processes_do_as_one(tmp_path):
    task = h.task(tmp_path / "task", 40, 11)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {k: str(v) for k, v in shared.items()} | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    process = h.script(tmp_path / "two.py", TWO, tmp_path, **env)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    assert results[0][0] == 2
    one = fit(task, "LN() + LoRA(rank=2)", out=tmp_path / "one")
    two = sm.Delta.load(tmp_path / "first")
    h.same(two, sm.Delta.load(tmp_path / "second"))
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-3, atol=1e-4)
    assert two.info["scores"] == one.info["scores"]
    metrics = [
        [json.loads(line) for line in (tmp_path / name / METRICS).read_text().splitlines()] for name in ("one", "first")
    ]
    assert [entry["step"] for entry in metrics[1]] == [entry["step"] for entry in metrics[0]]
    assert [entry.get("validation") for entry in metrics[1]] == [entry.get("validation") for entry in metrics[0]]
    assert sorted(os.listdir(tmp_path / "first")) == sorted(os.listdir(tmp_path / "one"))


def test_the_keywords_of_fit_are_the_fields_of_its_settings():
    assert get_type_hints(SettingsOptions) == get_type_hints(Settings)
