"""Several deltas on one model: whichever is in use, the model does what it does on a fresh base, bit for bit."""

import copy
import pickle
import random
import sys
from functools import cache

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError
from smidgen.ports.attachment_record import is_attached, trained_parameters
from smidgen.testing.cases import inputs_for, shake, tiny
from tests import helpers as h

# Each with what `attach` takes beside it; some differ in values only, which is the short way.
RECIPES = {
    "ln": ("LN()", {}),
    "ln again": ("LN()", {}),
    "lora": ("LoRA(rank=2)", {}),
    "lora again": ("LoRA(rank=2)", {}),
    "rank 3": ("LoRA(rank=3, layers='top:1')", {}),
    "both": ("LN(which='output') + LoRA(rank=2) + IA3()", {}),
    "base": ("PiSSA(rank=2)", {}),
    "base again": ("PiSSA(rank=2)", {}),
    "dora": ("DoRA(rank=2) + SSF()", {}),
    "adapter": ("Adapter(site='attention', width=3)", {}),
    "prefix": ("Prefix(length=3)", {}),
    "longer": ("Prefix(length=4, mlp=5)", {}),
    "prompt": ("PromptTuning(length=2) + LN()", {}),
    "head": ("Head()", {}),
    "mean": ("LN()", {"pooling": "mean"}),
    "full": ("Full()", {}),
    "part": ("LN() | Select('magnitude', keep=0.3)", {}),
    "other part": ("LN() | Select('random', keep=0.3)", {}),
    "part of lora": ("LoRA(rank=2) | Select('random', keep=0.5)", {}),
}
CODE = sys.modules[sm.Deltas.__module__]


def trained(model, recipe, scale=0.3, seed=1, **options):
    sm.attach(model, recipe, **options)
    shake(trained_parameters(model).values(), scale, seed)
    return sm.detach(model)


@cache
def zoo():
    """Name -> delta of the tiny BERT (float64), and name -> logits of a fresh model with it attached."""
    deltas, outputs = {}, {None: logits(tiny("bert"))}
    for seed, (name, (recipe, options)) in enumerate(RECIPES.items()):
        deltas[name] = trained(tiny("bert"), recipe, seed=seed, **options)
        outputs[name] = logits(sm.attach(tiny("bert"), deltas[name]))
    return deltas, outputs


def logits(model, kind="bert"):
    return h.logits(model, **inputs_for(kind))


def shelf(*names, model=None):
    found = sm.Deltas(tiny("bert") if model is None else model)
    found.update({name: zoo()[0][name] for name in names})
    return found


def check_uses(deltas, order):
    outputs = zoo()[1]
    for step, name in enumerate(order):
        deltas.use(name)
        assert deltas.active == name
        assert torch.equal(logits(deltas.model), outputs[name]), f"step {step}: {order[:step]} -> {name}"


# What a use does


def test_any_sequence_of_uses_gives_what_a_fresh_model_gives():
    deltas, draw = shelf(*RECIPES), random.Random(0)
    assert len({tuple(x.flatten().tolist()) for x in zoo()[1].values()}) == len(RECIPES) + 1
    with h.untouched(deltas.model):
        check_uses(deltas, [*draw.choices([None, *RECIPES], k=80), None])


@pytest.mark.parametrize("lost", ["fill_values", "remove", "put"])
def test_a_switch_that_does_half_of_it_would_be_seen(lost, monkeypatch):
    deltas = shelf("ln", "ln again", "prefix")
    monkeypatch.setattr(CODE, lost, {"fill_values": no_fill, "remove": forget, "put": no_head}[lost])
    with pytest.raises((AssertionError, AttachError)):
        check_uses(deltas, ["ln", "ln again", "prefix", "ln"])


def no_fill(model, delta):
    pass


def forget(model):
    model.__dict__.pop("_smidgen")


def no_head(model, plan, delta):
    sm.attach(model, delta, verify=False)
    for name in delta.head:
        trained_parameters(model)[name].data.zero_()


def test_the_base_comes_back_as_the_very_objects():
    deltas = shelf("both", "full", "prompt", "part", "mean")
    before = dict(deltas.model.named_parameters())
    with h.untouched(deltas.model):
        for name in deltas:
            deltas.use(name)
        assert deltas.model.classifier.weight is not before["classifier.weight"]
        deltas.use(None)
        deltas.use(None)
    assert {n: id(p) for n, p in deltas.model.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert deltas.active is None


def test_a_base_that_comes_back_as_a_copy_would_be_seen(monkeypatch):
    def copied(model):
        sm.detach(model)
        model.classifier.weight = torch.nn.Parameter(model.classifier.weight.detach().clone())

    deltas = shelf("ln")
    monkeypatch.setattr(CODE, "remove", copied)
    with pytest.raises(AssertionError, match="classifier.weight"), h.untouched(deltas.model):
        check_uses(deltas, ["ln", None])


def test_no_use_changes_a_delta():
    deltas = shelf("ln", "ln again", "lora", "part", "full")
    before = copy.deepcopy(dict(deltas))
    for name in (*deltas, *deltas):
        deltas.use(name)
        shake(trained_parameters(deltas.model).values(), 0.3)
    for name, delta in deltas.items():
        assert delta is zoo()[0][name]
        h.same(delta, before[name])
        deltas.use(name)  # and what was done to the model's copies is gone
        assert torch.equal(logits(deltas.model), zoo()[1][name])


def test_masters_that_share_memory_with_the_delta_would_be_seen(monkeypatch):
    def alias(model, delta):
        for name, parameter in trained_parameters(model).items():
            parameter.data = delta.tensors[name]

    delta = trained(tiny("bert"), "LN()")
    deltas = shelf("ln")
    deltas["mine"] = delta
    before = copy.deepcopy(delta)
    monkeypatch.setattr(CODE, "fill_values", alias)
    deltas.use("ln")
    deltas.use("mine")
    shake(trained_parameters(deltas.model).values(), 0.3)
    with pytest.raises(AssertionError):
        h.same(delta, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_other_architectures(kind):
    model, expected = tiny(kind), {}
    deltas = sm.Deltas(model)
    for seed, recipe in enumerate(
        ("LN()", "LoRA(rank=2)", "Prefix(length=2)", "PromptTuning(length=2)", "LN()", "Full()")
    ):
        name = f"{recipe} {seed}"
        deltas[name] = trained(model, recipe, seed=seed)
        expected[name] = logits(sm.attach(tiny(kind), deltas[name]), kind)
    with h.untouched(model):
        for name in random.Random(1).choices(list(deltas), k=20):
            deltas.use(name)
            assert torch.equal(logits(model, kind), expected[name])
        deltas.use(None)


def test_in_inference_mode_and_out_of_it():
    deltas = shelf("ln", "ln again", "prefix")
    with torch.inference_mode():
        deltas["part"] = zoo()[0]["part"]
        check_uses(deltas, ["ln", "prefix", "part"])
    assert not any(p.is_inference() for p in deltas.model.parameters())
    check_uses(deltas, ["ln", "ln again", None])


def test_modes_stay_and_edits_follow():
    deltas = shelf("ln", "lora")
    deltas.model.train()
    deltas.model.bert.encoder.layer[0].eval()
    modes = {n: m.training for n, m in deltas.model.named_modules()}
    for name in ("ln", "lora"):
        deltas.use(name)
        assert {n: m.training for n, m in deltas.model.named_modules() if n in modes} == modes
    assert not deltas.model.bert.encoder.layer[0].attention.self.query.edits["0"].training
    assert deltas.model.bert.encoder.layer[1].attention.self.query.edits["0"].training


def test_what_is_in_use_can_be_merged():
    deltas = shelf("ln", "prefix")
    deltas.use("ln")
    merged = sm.merge(deltas.model)
    assert not is_attached(merged)
    torch.testing.assert_close(logits(merged), zoo()[1]["ln"], rtol=0, atol=1e-12)
    check_uses(deltas, ["ln", "prefix"])


# The mapping


def test_it_is_a_mapping_of_deltas(tmp_path):
    ln, lora = zoo()[0]["ln"], zoo()[0]["lora"]
    deltas = sm.Deltas(tiny("bert"))
    assert (len(deltas), deltas.active, repr(deltas)) == (0, None, "Deltas(none; in use: None)")
    deltas["a"] = ln
    deltas["b"] = lora.save(tmp_path / "b")
    deltas["c"] = str(tmp_path / "b")
    deltas["d"] = ln + 0.5 * zoo()[0]["ln again"]
    assert list(deltas) == ["a", "b", "c", "d"]
    assert deltas["a"] is ln
    h.same(deltas["b"], lora)
    h.same(deltas["c"], lora)
    h.same(deltas["d"], (ln + 0.5 * zoo()[0]["ln again"]).on(tiny("bert")))
    deltas.use("d")
    assert torch.equal(logits(deltas.model), logits(sm.attach(tiny("bert"), deltas["d"])))
    assert repr(deltas) == "Deltas('a', 'b', 'c', 'd'; in use: 'd')"
    del deltas["a"]
    assert deltas.pop("b") is not lora
    assert (list(deltas), len(deltas), "a" in deltas, deltas.get("a")) == (["c", "d"], 2, False, None)
    deltas["c"] = ln
    assert deltas["c"] is ln


def test_names():
    deltas = shelf("prefix", "prompt")
    deltas.use("prompt")
    with pytest.raises(DeltaError, match=r"no delta is called 'prefx'; found: prefix, prompt; did you mean 'prefix'\?"):
        deltas.use("prefx")
    with pytest.raises(DeltaError, match="no delta is called 'x'; found: none"), sm.Deltas(tiny("bert")).using("x"):
        pass
    assert deltas.active == "prompt"
    with pytest.raises(KeyError, match="prefx"):
        deltas["prefx"]
    with pytest.raises(KeyError, match="prefx"):
        del deltas["prefx"]
    with pytest.raises(DeltaError, match="a delta's name is a string, not None"):
        deltas[None] = zoo()[0]["ln"]


def test_one_in_use_stays():
    deltas = shelf("ln", "lora", "prefix")
    deltas.use("ln")
    with deltas.using("lora"), deltas.using("prefix"):
        for name in deltas:
            with pytest.raises(AttachError, match=f"'{name}' is in use; call use"):
                del deltas[name]
            with pytest.raises(AttachError, match=f"'{name}' is in use; call use"):
                deltas[name] = zoo()[0]["head"]
    del deltas["lora"]
    deltas.use(None)
    deltas.clear()
    assert not deltas


def test_all_are_let_go_or_none():
    deltas = shelf("ln", "lora", "adapter")
    deltas.use("lora")
    with pytest.raises(AttachError, match="'lora' is in use"):
        deltas.clear()
    assert len(deltas) == 3
    deltas.use(None)
    deltas.clear()
    assert len(deltas) == 0


def test_one_more_while_another_is_in_use():
    deltas = shelf("ln")
    deltas.use("ln")
    deltas["prefix"] = zoo()[0]["prefix"]
    assert deltas.active == "ln"
    with pytest.raises(DeltaError):
        deltas["other"] = trained(h.bert().double(), "LN()")
    assert list(deltas) == ["ln", "prefix"]
    check_uses(deltas, [deltas.active, "prefix"])


def test_using_gives_back_what_was_before():
    deltas, outputs = shelf("ln", "ln again", "prefix"), zoo()[1]
    with h.untouched(deltas.model):
        with deltas.using("ln") as model:
            assert model is deltas.model
            with deltas.using(None):
                assert torch.equal(logits(model), outputs[None])
            with pytest.raises(ZeroDivisionError), deltas.using("prefix"):
                deltas.use("ln again")
                raise ZeroDivisionError
            assert torch.equal(logits(model), outputs["ln"])
            with pytest.raises(DeltaError), deltas.using("nothing"):
                pass
            assert deltas.active == "ln"
        assert deltas.active is None


# What is refused


def test_a_model_that_something_else_is_attached_to():
    model = sm.attach(tiny("bert"), "LN()")
    with pytest.raises(AttachError, match=r"LN\(\) is attached already; detach it first"):
        sm.Deltas(model)
    sm.detach(model)
    deltas = shelf("lora", model=model)
    deltas.use("lora")
    with pytest.raises(AttachError, match=r"LoRA\(rank=2\) is attached already; detach it first"):
        sm.attach(model, "LN()")
    with pytest.raises(AttachError, match=r"LoRA\(rank=2\) is attached already"):
        shelf(model=model)
    h.same(sm.detach(model), zoo()[0]["lora"])
    assert deltas.active is None
    sm.attach(model, "LN()")
    for use in (lambda: deltas.use("lora"), lambda: deltas.use(None), lambda: deltas.update(ln=zoo()[0]["ln"])):
        with pytest.raises(AttachError, match=r"LN\(\) is attached already"):
            use()
    sm.detach(model)
    check_uses(deltas, ["lora", None])


def test_two_on_one_model_take_turns():
    model = tiny("bert")
    one, two = shelf("ln", model=model), shelf("prefix", model=model)
    one.use("ln")
    with pytest.raises(AttachError, match="attached already"):
        two.use("prefix")
    one.use(None)
    check_uses(two, ["prefix", None])


def test_a_delta_of_another_base_or_head():
    deltas = shelf("ln")
    with h.untouched(deltas.model):
        with pytest.raises(DeltaError, match="same shapes but other values"):
            other = tiny("bert")
            shake(other.parameters(), 1e-3)
            deltas["other"] = trained(other, "LN()")
        with pytest.raises(DeltaError, match="this model is a bert"):
            deltas["other"] = trained(tiny("gpt2"), "LN()")
        wide = tiny("bert")
        wide.classifier = torch.nn.Linear(32, 5).double()
        wide.config.num_labels = 5
        with pytest.raises(DeltaError, match=r"classifier.weight has shape \(3, .*\(5, 32\).*smidgen\.load\(name, del"):
            deltas["wide"] = trained(wide, "LN()")
        with pytest.raises(DeltaError, match="not a folder"):
            deltas["gone"] = "no/such/folder"
        with pytest.raises(DeltaError, match="only like recipes add up"):
            deltas["sum"] = zoo()[0]["ln"] + zoo()[0]["lora"]
    assert list(deltas) == ["ln"]


def test_a_place_that_cannot_be_edited_is_told_when_the_delta_is_put_in():
    deltas = shelf("ln")
    deltas.model.bert.encoder.layer[0].attention.self.edits = None
    with pytest.raises(AttachError, match="already has an attribute 'edits'"):
        deltas["prefix"] = zoo()[0]["prefix"]
    assert list(deltas) == ["ln"]
    assert not is_attached(deltas.model)


def test_a_place_that_cannot_be_edited_any_more_leaves_the_base():
    deltas = shelf("ln", "prefix")
    deltas.use("ln")
    deltas.model.bert.encoder.layer[0].attention.self.edits = None
    with pytest.raises(AttachError, match="already has an attribute 'edits'"):
        deltas.use("prefix")
    assert not is_attached(deltas.model)
    check_uses(deltas, [None, "ln"])


def test_training_what_is_in_use(tmp_path):
    task = h.task(tmp_path)
    model = h.bert()
    deltas = sm.Deltas(model)
    deltas["ln"] = sm.fit(model, "LN()", task, tokenizer=h.tokenizer(), epochs=1, progress=False)
    deltas.use("ln")
    with pytest.raises(AttachError, match=r"LN\(\) is attached already; detach it first"):
        sm.fit(model, "LN()", task, tokenizer=h.tokenizer(), epochs=1, progress=False)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(**h.ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
    with deltas.using(None):
        more = sm.fit(model, "LN()", task, tokenizer=h.tokenizer(), epochs=1, progress=False)
    h.same(more, deltas["ln"])
    h.same(sm.Delta.of(model), deltas["ln"])


def test_inside_disabled():
    deltas = shelf("ln", "lora")
    deltas.use("ln")
    with sm.disabled(deltas.model):
        assert torch.equal(logits(deltas.model), zoo()[1][None])
        with pytest.raises(AttachError, match=r"no switch inside smidgen\.disabled"):
            deltas.use("lora")
    check_uses(deltas, ["ln", "lora"])


# Copies, dtypes, devices, compiled code


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["both", "prefix", "prompt", "mean", "part", "adapter"])
def test_a_copy_of_the_model_and_of_all_of_it(how, name):
    deltas, outputs = shelf("ln", name), zoo()[1]
    deltas.use(name)
    model = how(deltas.model)
    assert torch.equal(logits(model), outputs[name])
    with pytest.raises(AttachError, match="attached already"):
        sm.Deltas(model)
    twin = how(deltas)
    deltas.use("ln")
    assert torch.equal(logits(model), outputs[name])
    h.same(sm.detach(model), deltas[name])
    assert torch.equal(logits(model), outputs[None])
    assert twin.active == name
    check_uses(twin, [name, "ln", None, name])
    check_uses(deltas, ["ln"])


def test_a_cast_is_noticed():
    deltas = shelf("ln", "lora")
    deltas.use("ln")
    deltas.model.half()
    for name in ("ln", "lora", None):
        with pytest.raises(AttachError, match="the attached model was cast to float16"):
            deltas.use(name)
    deltas = shelf("ln")
    deltas.model.float()
    with pytest.raises(AttachError, match="cast to float32 after 'ln' was checked against it in float64; put it in"):
        deltas.use("ln")
    with pytest.raises(DeltaError, match="loaded in float32, so it cannot be verified"):
        deltas["ln"] = deltas["ln"]
    assert not is_attached(deltas.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_base_of_low_precision(dtype):
    model = tiny("bert").to(dtype)
    deltas, expected = sm.Deltas(model), {None: logits(model)}
    for seed, recipe in enumerate(("LN()", "LoRA(rank=2)", "BitFit()", "LN(terms='gain')", "Prefix(length=2)", "LN()")):
        deltas[f"{recipe} {seed}"] = trained(model, recipe, 0.1, seed)
        expected[f"{recipe} {seed}"] = logits(sm.attach(copy.deepcopy(model), deltas[f"{recipe} {seed}"]))
    with h.untouched(model):
        for name in [*random.Random(2).choices(list(expected), k=20), None]:
            deltas.use(name)
            assert torch.equal(logits(model), expected[name])
            assert all(p.dtype == torch.float32 for p in (trained_parameters(model).values() if name else ()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device")
def test_moved_to_a_device_while_in_use():
    deltas = shelf("ln", "ln again", "prefix", "part")
    deltas.use("ln")
    model = deltas.model.to("cuda")
    inputs = {key: value.to("cuda") for key, value in inputs_for("bert").items()}
    for name in ("ln", "ln again", "prefix", "part", None):
        deltas.use(name)
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
        torch.testing.assert_close(h.logits(model, **inputs).cpu(), zoo()[1][name])


def check_compiled(order=("ln", "ln again", "prefix", None, "lora", "ln")):
    deltas = shelf("ln", "ln again", "prefix", "lora")
    compiled = torch.compile(deltas.model, backend="eager")
    for name in order:
        deltas.use(name)
        assert torch.equal(logits(compiled), zoo()[1][name])


def test_compiled_code_notices_a_switch():
    check_compiled()


def test_compiled_code_that_is_not_told_would_be_seen(monkeypatch):
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    with pytest.raises(AssertionError):
        check_compiled()


def test_compiled_code_is_kept_where_only_values_differ():
    deltas, graphs = shelf("ln", "ln again"), []
    compiled = torch.compile(deltas.model, backend=lambda module, inputs: graphs.append(0) or module.forward)
    deltas.use("ln")
    logits(compiled)
    count = len(graphs)
    for name in ("ln again", "ln"):
        deltas.use(name)
        assert torch.equal(logits(compiled), zoo()[1][name])
    assert count == len(graphs) > 0
