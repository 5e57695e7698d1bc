"""Models in wrappers, models without values: unwrapped everywhere, or refused at attach in one line."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError
from smidgen.common.wrappers import bare
from smidgen.delta.hf_peft.conversion import from_peft, to_peft
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import is_attached, trained_parameters
from smidgen.studies.experiments.model_components import components
from smidgen.studies.experiments.tuning_changes import change_of
from smidgen.testing.cases import shake
from tests import helpers as h

RECIPE = "LN() + LoRA(rank=2)"
MAP = "bert.encoder.layer.0.attention.self.query"
WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.fixture(autouse=True)
def eager():
    """torch.compile wraps, and what is wrapped runs as it is: `compiled_sees_attach_and_detach` compiles."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def compiled(model=None):
    return torch.compile(model or h.bert(), backend="eager")


def trained(wrap=None):
    """A model, plain or wrapped, and its delta, attached and shaken."""
    model = h.bert() if wrap is None else wrap(h.bert())
    sm.attach(model, RECIPE)
    shake(trained_parameters(model).values(), 0.3)
    return model, sm.Delta.of(model)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_attached_through_a_wrapper_is_attached_to_the_model_inside(wrap):
    model = h.bert()
    wrapped = wrap(model)
    with h.untouched(model):
        before = h.logits(wrapped)
        assert sm.attach(wrapped, RECIPE) is wrapped
        assert is_attached(wrapped)
        assert is_attached(model)
        shake(trained_parameters(wrapped).values(), 0.3)
        adam = sm.optimizer(wrapped)
        assert sum(len(group["params"]) for group in adam.param_groups) == len(trained_parameters(model))
        found = h.logits(wrapped)
        assert not torch.allclose(found, before)
        torch.testing.assert_close(found, h.logits(model))
        merged = sm.merge(wrapped)
        assert type(merged) is type(model)
        torch.testing.assert_close(h.logits(merged), found, rtol=1e-4, atol=1e-5)
        with sm.disabled(wrapped):
            torch.testing.assert_close(h.logits(wrapped), before)
        with pytest.raises(AttachError, match="attached already"):
            sm.attach(model, "LN()")
        delta = sm.detach(wrapped)
        torch.testing.assert_close(h.logits(wrapped), before)
        with sm.attached(wrapped, delta):
            torch.testing.assert_close(h.logits(wrapped), found)
        with pytest.raises(AttachError, match="nothing is attached to this BertForSequenceClassification"):
            sm.detach(wrapped)
    other = trained()[1]
    h.same(other, delta)
    assert delta.base == other.base


# name -> what to do with (a wrapped model, a delta, a task, a folder), and what to compare of it
def _deltas(model, delta, task, folder):
    deltas = sm.Deltas(model)
    deltas["a"] = delta
    with deltas.using("a"):
        return h.logits(model)


def _callback(model, delta, task, folder):
    sm.attach(model, RECIPE)
    callback = sm.TrainerCallback()
    callback.on_train_begin(None, type("State", (), {"global_step": 0})(), None, model=model)
    bare(model).save_pretrained(folder / "saved")
    sm.detach(model)
    return sm.Delta.load(folder / "saved").tensors


def _norms():
    model = sm.attach(h.bert(), "LN()")
    shake(trained_parameters(model).values(), 0.3)
    return sm.detach(model)


def _attached(use):
    def run(model, delta, task, folder):
        with sm.attached(model, RECIPE):
            return use(model)

    return run


FEW = {"examples": 8, "batch_size": 4, "tokenizer": h.tokenizer()}
SCORES = {"a": torch.ones(3)}
SELECT = "LN() | Select('fisher', keep=0.5)"


def _rows(model, delta):
    with sm.attached_rows(model, [delta, delta]), sm.rows_from([0, 1, 0]):
        return h.logits(model)


def _refused(call):
    """What a call is refused with."""
    with pytest.raises(sm.SmidgenError) as error:
        call()
    return str(error.value)


def _noted(model):
    """Whether a model has been told what it was quantised from."""
    sm.note_originals(model, h.bert(seed=1))
    return vars(bare(model)).pop("_smidgen_originals").weight(MAP, (16, 16))


def _shared(model):
    """The logits of the reference that TRL's trainers get."""
    pytest.importorskip("trl")
    with sm.shared_reference(model) as reference:
        return h.logits(reference)


USES = {
    "attach": _attached(lambda m: h.logits(m)),
    "attached": _attached(lambda m: h.logits(m)),
    "attached_rows": lambda m, d, task, folder: _rows(m, d),
    "after_step": _attached(lambda m: sm.after_step(m, sm.optimizer(m), 1, 2)),
    "average": lambda m, d, task, folder: sm.average([d, d], model=m).tensors,
    "dare": lambda m, d, task, folder: sm.dare([_norms()] * 2, density=0.5, model=m).tensors,
    "combine": lambda m, d, task, folder: sm.combine(m, resolve(m, SELECT), None, [SCORES, SCORES]),
    "detach": lambda m, d, task, folder: sm.detach(sm.attach(m, d)).tensors,
    "Deltas": _deltas,
    "disabled": lambda m, d, task, folder: h.logits(m),  # above
    "evaluate": lambda m, d, task, folder: sm.evaluate(m, task, delta=d, tokenizer=h.tokenizer()).values,
    "find_sites": lambda m, d, task, folder: sm.find_sites(m),
    "fisher": lambda m, d, task, folder: sm.fisher(m, task, "LN()", **FEW),
    "fit": lambda m, d, task, folder: (
        sm.fit(m, "LN()", task, epochs=1, tokenizer=h.tokenizer(), progress=False).tensors
    ),
    "largest_batch": lambda m, d, task, folder: sm.largest_batch(m, "LN()", 10**9, batch_size=8, length=16),
    "mean_gradients": lambda m, d, task, folder: sm.mean_gradients(m, task, "LN()", **FEW),
    "merge": lambda m, d, task, folder: h.logits(sm.merge(m, d)),
    "optimizer": _attached(lambda m: [g["name"] for g in sm.optimizer(m).param_groups]),
    "parameter_groups": _attached(lambda m: [g["names"] for g in sm.parameter_groups(m)]),
    "penalty": _attached(sm.penalty),
    "plan": lambda m, d, task, folder: sm.plan(m, RECIPE).to_json(),
    "predict": lambda m, d, task, folder: sm.predict(m, ["the film was good"], delta=d, tokenizer=h.tokenizer()),
    "print_trainable_parameters": _attached(sm.print_trainable_parameters),
    "recomputing": _attached(lambda m: sm.recomputing(m).__enter__() is m),
    "score": lambda m, d, task, folder: sm.score(m, SELECT, task, tokenizer=h.tokenizer()),
    "search": lambda m, d, task, folder: (
        sm.search(m, "LN()", task, lr=[1e-3], epochs=1, tokenizer=h.tokenizer(), progress=False).best.scores
    ),
    "select": lambda m, d, task, folder: sm.select(m, SELECT, task, tokenizer=h.tokenizer()).indices,
    "selection_of": lambda m, d, task, folder: (
        sm.selection_of(m, sm.detach(sm.attach(m, "LN() | Select('magnitude', keep=0.5)"))).indices
    ),
    "ties": lambda m, d, task, folder: sm.ties([_norms()] * 2, density=0.5, model=m).tensors,
    "device_fits": lambda m, d, task, folder: [
        fit.to_json() for fit in sm.device_fits(m, ["LN()"], batch_size=2, length=16)
    ],
    "export": lambda m, d, task, folder: sorted(sm.export(m, folder, delta=d, processor=h.tokenizer()).files),
    "note_originals": lambda m, d, task, folder: _noted(m),
    "rebase": lambda m, d, task, folder: _refused(lambda: sm.rebase(d, m)),
    "reference_model": _attached(lambda m: h.logits(sm.reference_model(m))),
    "requantise": lambda m, d, task, folder: _refused(lambda: sm.requantise(m, "LoftQ(rank=2)")),
    "shared_reference": _attached(_shared),
    "write_samples": lambda m, d, task, folder: _refused(lambda: sm.write_samples(m, task, d)),
    # what stands in modules of its own
    "doctor": lambda m, d, task, folder: sm.doctor(m, "LN()").to_json(),
    "TrainerCallback": _callback,
    "Sum": lambda m, d, task, folder: (d + d).on(m).tensors,
    "Delta": lambda m, d, task, folder: sm.Delta.between(m, compiled(h.bert(seed=1)), "LN()").tensors,
    "from_peft": lambda m, d, task, folder: _peft(m, folder),
    "change_of": lambda m, d, task, folder: change_of(m, d).to_json(),
    "components": lambda m, d, task, folder: components(m),
}


def _peft(model, folder):
    delta = sm.detach(sm.attach(model, "LoRA(rank=2)"))
    return from_peft(to_peft(delta, model, folder / "peft"), model).tensors


def test_every_public_function_of_a_model_is_in_the_table():
    public = {name for name in sm.__all__ if callable(getattr(sm, name)) and not inspect.isclass(getattr(sm, name))}
    wanted = {n for n in public if {"model", "base"} & set(inspect.signature(getattr(sm, n)).parameters)}
    assert wanted - set(USES) == set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # TRL's own, at import
@pytest.mark.parametrize("name", USES)
def test_a_wrapped_model_gives_what_the_plain_one_gives(name, tmp_path):
    task = h.task(tmp_path / "data", train=8, held=4)
    delta = trained()[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = USES[name](h.bert(), delta, task, tmp_path / "plain")
        model = compiled()
        with h.untouched(model._orig_mod):
            torch.manual_seed(0)
            found = USES[name](model, delta, task, tmp_path / "wrapped")
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    elif hasattr(wanted, "items") and all(isinstance(v, torch.Tensor) for v in wanted.values()):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    else:
        assert found == wanted


# What is refused


def in_parts(model):
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    return model


def traced(model):
    model.config.return_dict = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, tuple(h.ids().values()))


def on_disk(model, folder):
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def distributed(model):
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


OFFLOADED = r"is offloaded by accelerate: the values of bert\.emb\S+ are not in the module.*without a device_map"
REFUSED = {
    "offloaded": (
        lambda m, folder: cpu_offload(m, torch.device("cpu")),
        OFFLOADED,
    ),
    "on disk": (on_disk, OFFLOADED),
    "traced": (lambda m, folder: traced(m), r"compiled by torch\.jit.*pass the model that it was made of"),
    "in parts": (lambda m, folder: in_parts(m), r"torch\.compile wrapped, bert\.encoder\.layer\.1,.* in place"),
    "distributed": (
        lambda m, folder: distributed(m),
        "by DistributedDataParallel.*attach to the model inside",
    ),
    "nothing": (lambda m, folder: "minilm", r"of type str, 'minilm'; smidgen\.load gives one"),
}
ENTRIES = {
    "attach": lambda m, d, task: sm.attach(m, "LN()"),
    "attach a delta": lambda m, d, task: sm.attach(m, d),
    "attached": lambda m, d, task: sm.attached(m, d + d).__enter__(),
    "Deltas": lambda m, d, task: sm.Deltas(m),
    "fit": lambda m, d, task: sm.fit(m, "LN()", task, tokenizer=h.tokenizer(), progress=False),
    "search": lambda m, d, task: sm.search(m, "LN()", task, tokenizer=h.tokenizer(), progress=False),
    "merge": lambda m, d, task: sm.merge(m, d),
    "evaluate": lambda m, d, task: sm.evaluate(m, task, delta=d, tokenizer=h.tokenizer()),
    "predict": lambda m, d, task: sm.predict(m, ["good"], delta=d, tokenizer=h.tokenizer()),
    "sum": lambda m, d, task: (d + d).on(m),
}


FINE = {("distributed", "merge"), ("distributed", "sum"), ("distributed", "predict")}  # of the model inside


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_nothing_can_be_attached_to_is_refused_in_one_line(kind, tmp_path, group):
    build, said = REFUSED[kind]
    delta, task = trained()[1], h.task(tmp_path / "data", train=8, held=4)
    model = build(h.bert(), tmp_path / "offloaded")
    for name, use in ENTRIES.items():
        if (kind, name) in FINE:
            use(model, delta, task)
            continue
        with pytest.raises(AttachError, match=said) as error:
            use(model, delta, task)
        assert "\n" not in str(error.value), name


def test_a_model_without_values_can_be_looked_at_and_no_more():
    delta, model = trained()[1], h.bert().to("meta")
    assert trained_parameters(sm.attach(model, RECIPE)).keys() == delta.tensors.keys()
    for use in (lambda: sm.detach(model), lambda: sm.attach(h.bert().to("meta"), delta)):
        with pytest.raises(DeltaError, match="on the meta device or offloaded, so its values cannot be read; load it"):
            use()


def test_what_was_attached_before_distribution_is_reached_through_it(group):
    model, delta = trained()
    model = distributed(model)
    h.same(sm.Delta.of(model), delta)
    assert len(sm.optimizer(model).param_groups) == 3
    h.same(sm.detach(model), delta)
    assert torch.equal(h.logits(model), h.logits(h.bert()))
