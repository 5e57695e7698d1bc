"""Delta arithmetic: laws of sums, formulas stated once more as plain loops, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError, DeltaError
from smidgen.delta.arithmetic.merge_rules import drawn, dropped, elected, total
from smidgen.planning.entry import INDICES
from smidgen.planning.initial_values import initial
from smidgen.ports.attachment_record import trained_parameters
from tests import helpers as h

IN_PLACE = ["LN()", "BitFit()", "Full()"]
PART = "LN() | Select('random', keep=0.3)"
ADD_UP = [*IN_PLACE, "IA3()", "SSF()", "LoRA(rank=2)", "LN() + LoRA(rank=2, alpha=8)", PART]


def trained(recipe, seed, model=None, **options):
    """A delta of its own for each seed, on a base that is the same for all."""
    model = sm.attach(h.bert() if model is None else model, recipe, **options)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype)
    return sm.detach(model)


def selected(recipe, seed, keep=0.3):
    return trained(f"{recipe} | Select('random', keep={keep}, seed={seed})", seed)


def plain(delta, model=None):
    """Name -> float64 parameter of the base with a delta folded in."""
    merged = sm.merge(h.bert() if model is None else model, delta)
    return {name: p.detach().double() for name, p in merged.named_parameters()}


def close(found, wanted, skip=(), tolerance=2e-6):
    assert found.keys() == wanted.keys()
    for name in found.keys() - set(skip):
        assert torch.allclose(found[name], wanted[name], rtol=tolerance, atol=tolerance), name


def base():
    return {name: p.detach().double() for name, p in h.bert().named_parameters()}


# Sums


@pytest.mark.parametrize("recipe", ADD_UP)
def test_a_sum_is_the_base_with_both_changes(recipe):
    """Stated on the parameters of merged models, so that it knows nothing of how methods store what they do."""
    a, b = trained(recipe, 1), trained(recipe, 2)
    found, start, first, second = plain((a - 0.5 * b).on(h.bert())), base(), plain(a), plain(b)
    wanted = {}
    for name in start:
        if name in a.head:
            wanted[name] = first[name]
        else:
            wanted[name] = start[name] + (first[name] - start[name]) - 0.5 * (second[name] - start[name])
    close(found, wanted)
    with pytest.raises(AssertionError):
        close(found, {**wanted, **{n: t for n, t in first.items() if n not in a.head}})
    model = h.bert()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in wanted.items():
            parameters[name].copy_(value)
    attached = sm.attach(h.bert(), a - 0.5 * b)
    assert torch.allclose(h.logits(attached), h.logits(model), atol=1e-5)


@pytest.mark.parametrize("recipe", ADD_UP)
def test_what_is_added_and_taken_away_again(recipe):
    a, b = trained(recipe, 1), trained(recipe, 2)
    h.same(((a + b) - b).on(h.bert()), a)
    both = (a + b).on(h.bert())
    close(plain((both - b).on(h.bert())), plain(a))


@pytest.mark.parametrize("recipe", [*ADD_UP, "Adapter(width=4)", "DoRA(rank=2)", "PiSSA(rank=2)"])
def test_once_a_delta_is_itself(recipe):
    a = trained(recipe, 1)
    for same in ((1 * a).on(h.bert()), (2 * a / 2).on(h.bert()), sm.average([a], model=h.bert())):
        h.same(same, a)
        assert (same.recipe, same.head) == (a.recipe, a.head)


def test_zero_times_and_minus():
    a = trained("LN() + LoRA(rank=2)", 1)
    close(plain((0 * a).on(h.bert())), base(), skip=a.head)
    close(plain((a - a).on(h.bert())), base(), skip=a.head)
    close(plain((-a + 2 * a).on(h.bert())), plain(a))


def test_order_and_brackets_do_not_matter():
    a, b, c = (trained("LN()", seed) for seed in (1, 2, 3))
    one, other = (a + b).on(h.bert()), (b + a).on(h.bert())
    h.same(*({n: t for n, t in d.tensors.items() if n not in a.head} for d in (one, other)))
    assert not torch.equal(one.tensors[a.head[0]], other.tensors[a.head[0]])  # the first delta's head
    close(plain(((a + b) + c).on(h.bert())), plain((a + (b + c)).on(h.bert())))


def test_average_and_its_weights():
    a, b = trained("BitFit()", 1), trained("BitFit()", 2)
    first, second = plain(a), plain(b)
    found = plain(sm.average([a, b], weights=[1, 3], model=h.bert(), head="average"))
    close(found, {name: 0.25 * first[name] + 0.75 * second[name] for name in first})
    h.same(sm.average([a, a], model=h.bert()), a)


def test_ranks_are_joined():
    a, b = trained("LoRA(rank=2, alpha=8)", 1), trained("LoRA(rank=3, scaling='rslora')", 2)
    both = (a + b).on(h.bert())
    assert str(both.recipe) == "LoRA(rank=5, alpha=None)"
    start, first, second = base(), plain(a), plain(b)
    close(plain(both), {n: first[n] if n in a.head else first[n] + second[n] - start[n] for n in start})


@pytest.mark.parametrize("recipe", ["LoRA(rank=2) + LN()", "IA3()"])
def test_on_slices_of_a_fused_projection(recipe):
    a, b = (trained(recipe, seed, h.causal("gpt2")) for seed in (1, 2))
    start, found = h.causal("gpt2"), plain((a + b).on(h.causal("gpt2")), h.causal("gpt2"))
    first, second = plain(a, h.causal("gpt2")), plain(b, h.causal("gpt2"))
    close(found, {n: first[n] + second[n] - p.detach().double() for n, p in start.named_parameters()})


def test_on_a_low_precision_base():
    a, b = (trained("LN()", seed, h.bert().bfloat16()) for seed in (1, 2))
    both = (a + b).on(h.bert().bfloat16())
    start = dict(h.bert().bfloat16().named_parameters())
    for name in a.tensors.keys() - set(a.head):
        wanted = a.tensors[name].double() + b.tensors[name].double() - start[name].detach().double()
        assert both.tensors[name].dtype == torch.float32
        assert torch.equal(both.tensors[name], wanted.float())


# Subsets


def test_subsets_give_their_union():
    a, b = selected("LN()", 1), selected("LN()", 2)
    both, start, first, second = (a + b).on(h.bert()), base(), plain(a), plain(b)
    close(plain(both), {n: first[n] if n in a.head else first[n] + second[n] - start[n] for n in start})
    kept = [places(delta) for delta in (a, b, both)]
    assert kept[0] | kept[1] == kept[2]
    assert max(len(kept[0]), len(kept[1])) < len(kept[2]) == both.trained
    assert f"keep={len(kept[2])}" in str(both.recipe)
    h.same(sm.detach(sm.attach(h.bert(), both)), both)


def places(delta):
    """Every (name, place) that a delta stores a value for."""
    found = set()
    for name, tensor in delta.tensors.items():
        if name not in delta.head and not name.endswith(INDICES):
            index = delta.tensors.get(name + INDICES, torch.arange(tensor.numel()))
            found |= {(name, int(i)) for i in index}
    return found


def test_a_part_scaled_keeps_its_recipe():
    a = selected("LN()", 1)
    half = (0.5 * a).on(h.bert())
    assert half.recipe == a.recipe
    assert places(half) == places(a)


# TIES and DARE


def flat(delta):
    """Name -> list of changes in float64, as plain numbers, of what LN or BitFit trains; the head left out."""
    start = base()
    return {n: (t.double() - start[n]).tolist() for n, t in delta.tensors.items() if n not in delta.head}


def ties_by_hand(changes, density, weights):
    """Section 4 of the paper, value by value."""
    trimmed = []
    for change in changes:
        order = sorted(((abs(v), n, i) for n, vs in change.items() for i, v in enumerate(vs)), reverse=True)
        top = {(n, i) for _, n, i in order[: max(1, round(density * len(order)))]}
        trimmed.append({n: [v if (n, i) in top else 0.0 for i, v in enumerate(vs)] for n, vs in change.items()})
    merged = {}
    for name, values in changes[0].items():
        merged[name] = []
        for i in range(len(values)):
            found = [(w, change[name][i]) for w, change in zip(weights, trimmed, strict=True)]
            mass = sum(w * v for w, v in found)
            agree = [(w, v) for w, v in found if v * mass > 0]
            merged[name].append(sum(w * v for w, v in agree) / sum(w for w, _ in agree) if agree else 0.0)
    return merged


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_is_the_formula(density, weights):
    deltas = [trained("LN()", seed) for seed in (1, 2, 3)]
    found = sm.ties(deltas, density, weights, model=h.bert())
    wanted = ties_by_hand([flat(delta) for delta in deltas], density, weights or [1, 1, 1])
    moved = flat(found)
    for name, values in wanted.items():
        assert torch.allclose(torch.tensor(moved[name]), torch.tensor(values), atol=1e-6), name
    other = ties_by_hand([flat(delta) for delta in deltas], 0.6, weights or [1, 1, 1])
    assert any(not torch.allclose(torch.tensor(moved[n]), torch.tensor(v), atol=1e-6) for n, v in other.items())
    h.same(found, sm.detach(sm.attach(h.bert(), found)))


def test_ties_by_numbers():
    """Two tensors, three deltas, worked out by hand: 3 of 6 values are kept, over both tensors."""
    a = {"x": torch.tensor([5.0, -4.0, 0.1, 3.0]), "y": torch.tensor([0.2, 0.3])}
    b = {"x": torch.tensor([-1.0, -6.0, 0.0, 1.0]), "y": torch.tensor([9.0, 8.0])}
    every = {name: torch.ones_like(values, dtype=torch.bool) for name, values in a.items()}
    found = elected(0.5)([1.0, 1.0], [a, b], [every, every])
    assert found["x"].tolist() == [5.0, -5.0, 0.0, 3.0]  # -1 is trimmed, -4 and -6 agree
    assert found["y"].tolist() == [9.0, 8.0]
    opposite = elected(1.0)([1.0, 1.0], [a, {name: -values for name, values in a.items()}], [every, every])
    assert not any(values.any() for values in opposite.values())  # no sign wins


def test_dare_is_the_formula():
    deltas = [trained("BitFit()", seed) for seed in (1, 2)]
    found = sm.dare(deltas, 0.4, [1.0, 2.0], seed=7, model=h.bert())
    changes, moved, stayed, count = [flat(delta) for delta in deltas], flat(found), 0, 0
    for name, values in moved.items():
        wanted = [0.0] * len(values)
        for place, weight in enumerate((1.0, 2.0)):
            kept = drawn(len(values), 0.4, 7, place, name).tolist()
            stayed, count = stayed + sum(kept), count + len(kept)
            for i, keep in enumerate(kept):
                wanted[i] += weight * changes[place][name][i] / 0.4 if keep else 0.0
        assert torch.allclose(torch.tensor(values), torch.tensor(wanted), atol=1e-6), name
    assert abs(stayed / count - 0.4) < 4 * (0.4 * 0.6 / count) ** 0.5


def test_dare_of_everything_is_the_sum_and_seeds_differ():
    a, b = trained("LN()", 1), trained("LN()", 2)
    h.same(sm.dare([a, b], 1.0, model=h.bert()), (a + b).on(h.bert()))
    h.same(sm.dare([a, b], 0.3, seed=1, model=h.bert()), sm.dare([a, b], 0.3, seed=1, model=h.bert()))
    state = torch.get_rng_state()
    with pytest.raises(AssertionError):
        h.same(sm.dare([a, b], 0.3, seed=1, model=h.bert()), sm.dare([a, b], 0.3, seed=2, model=h.bert()))
    assert torch.equal(torch.get_rng_state(), state)


def test_dare_keeps_the_mean():
    values = {"x": torch.ones(20_000, dtype=torch.float64)}
    kept = dropped(0.1, 0)([1.0], [values], [values])["x"]
    assert abs(float(kept.mean()) - 1) < 4 * (9 / 20_000) ** 0.5  # variance (1 - p) / p
    assert torch.equal(total([2.0], [values], [values])["x"], 2 * values["x"])


def test_ties_and_dare_on_gains_and_parts():
    gains = [trained("IA3()", seed) for seed in (1, 2)]
    found = sm.ties(gains, 1.0, model=h.bert())
    for name in found.tensors.keys() - set(found.head):
        changes = [d.tensors[name].double() - 1 for d in gains]
        sign = sum(changes).sign()
        agree = [torch.where(c.sign() == sign, c, 0.0) for c in changes]
        count = sum((c != 0).double() for c in agree)
        assert torch.allclose(found.tensors[name].double(), 1 + sum(agree) / count, atol=1e-6)
    parts = [selected("LN()", seed) for seed in (1, 2)]
    for made in (sm.ties(parts, 0.5, model=h.bert()), sm.dare(parts, 0.5, model=h.bert())):
        assert places(made) == places(parts[0]) | places(parts[1])
    moved = (plain(sm.ties(parts[:1], 0.5, model=h.bert()))[n] != t for n, t in base().items() if n not in made.head)
    assert sum(int(m.sum()) for m in moved) == round(0.5 * parts[0].trained)


# What comes out


@pytest.mark.parametrize("recipe", ["LN() + LoRA(rank=2)", PART])
def test_a_sum_is_a_delta_like_any_other(recipe, tmp_path):
    a, b = trained(recipe, 1), trained(recipe, 2)
    both = (a + 0.5 * b).on(h.bert())
    loaded = sm.Delta.load(both.save(tmp_path / "sum"))
    h.same(loaded, both)
    assert loaded.to_json() == both.to_json()
    model = h.bert()
    with h.untouched(model), sm.attached(model, a + 0.5 * b):
        found = h.logits(model)
    assert torch.equal(h.logits(sm.attach(h.bert(), loaded)), found)
    assert torch.allclose(h.logits(sm.merge(h.bert(), a + 0.5 * b)), found, atol=1e-5)


def test_info_says_what_was_combined():
    a = trained("LN()", 1).with_info(task={"name": "films"}, scores={"accuracy": 1.0}, settings={"max_length": 9})
    b = trained("LN()", 2)
    info = (a - 2 * b).on(h.bert()).info
    assert "scores" not in info  # they were another model's
    assert (info["task"], info["settings"]) == ({"name": "films"}, {"max_length": 9})
    assert (info["combined"]["how"], info["combined"]["head"]) == ("sum", "first")
    assert [part["weight"] for part in info["combined"]["of"]] == [1.0, -2.0]
    assert info["combined"]["of"][0]["info"]["scores"] == {"accuracy": 1.0}
    made = sm.dare([a, b], 0.5, seed=3, model=h.bert()).info["combined"]
    assert (made["how"], made["density"], made["seed"]) == ("DARE", 0.5, 3)


def test_heads():
    a, b = trained("LN()", 1), trained("LN()", 2)
    first, mean = (a + b).on(h.bert()), (a + b).on(h.bert(), head="average")
    for name in a.head:
        assert torch.equal(first.tensors[name], a.tensors[name])
        assert torch.allclose(mean.tensors[name], (a.tensors[name] + b.tensors[name]) / 2)
    with pytest.raises(DeltaError, match="must be above 0"):
        (a - b).on(h.bert(), head="average")
    with pytest.raises(DeltaError, match="neither 'first' nor 'average'"):
        (a + b).on(h.bert(), head="mean")


def test_a_linear_method_starts_at_a_constant():
    """What `linear` promises: the start needs no seed, and half the change is half the change of the weight."""
    for recipe in ("IA3()", "SSF()"):
        for row in sm.plan(h.bert(), recipe).entries:
            h.same(initial(row, 0), initial(row, 1))
    assert any(
        not torch.equal(initial(row, 0)["A"], initial(row, 1)["A"]) for row in sm.plan(h.bert(), "LoRA()").entries
    )


def test_arithmetic_with_other_things():
    a = trained("LN()", 1)
    assert repr(a + a) == f"Sum(2 * {a!r})"
    for wrong in (lambda: a + 1, lambda: a - "x", lambda: a * a, lambda: "x" * (a + a), lambda: 1 + a, lambda: a / "x"):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(DeltaError, match="divided by 0"):
        a / 0
    with pytest.raises(DeltaError, match="not a finite number"):
        float("nan") * a


# Refusals


def line(error, part):
    assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("Adapter(width=4)", "Adapter(width=4) does not add up: what it does is not linear"),
        ("DoRA(rank=2)", "DoRA(rank=2) does not add up"),
        ("PiSSA(rank=2)", "PiSSA(rank=2) does not add up"),
        ("Prefix(length=2)", "does not add up"),
        ("IA3() | Select('random', keep=0.5)", "a part of IA3() does not add up"),
        ("LoRA(rank=2) | Select('random', keep=0.5)", "a part of LoRA(rank=2) does not add up"),
        ("IA3() + SSF()", "their changes multiply"),
        ("SSF() + BitFit()", "their changes multiply"),
        ("LoRA(rank=9)", "the sum would be LoRA(rank=18, alpha=None), which is no recipe for this model"),
    ],
)
def test_methods_that_do_not_add_up(recipe, why):
    a, b = trained(recipe, 1), trained(recipe, 2)
    with pytest.raises(DeltaError) as error:
        (a + b).on(h.bert())
    line(error, why)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("IA3() + BitFit()", "IA3() and BitFit() both act at transformer.h.0.attn.c_attn[key]: their changes multiply"),
        ("IA3() + LoRA(rank=2)", "IA3() and LoRA(rank=2) both act at transformer.h.0.attn.c_attn[value]"),
        ("SSF() + LoRA(rank=2)", "SSF() and LoRA(rank=2) both act at transformer.h.0.attn.c_attn:"),
    ],
)
def test_slices_that_overlap(recipe, why):
    a, b = (trained(recipe, seed, h.causal("gpt2")) for seed in (1, 2))
    with pytest.raises(DeltaError) as error:
        (a + b).on(h.causal("gpt2"))
    line(error, why)


@pytest.mark.parametrize("make", [sm.ties, sm.dare])
def test_single_values_of_a_product(make):
    deltas = [trained("LoRA(rank=2)", seed) for seed in (1, 2)]
    with pytest.raises(DeltaError) as error:
        make(deltas, model=h.bert())
    line(error, "looks at single values, but what LoRA(rank=2) does is not linear in them")


def test_unlike_deltas():
    a = trained("LN()", 1)
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    unlike = {
        "different bases": trained("LN()", 1, h.bert(seed=5)),
        "with labels ('LABEL_0', 'LABEL_1') and ('no', 'yes')": trained("LN()", 1, h.bert(**labels)),
        "LN() and BitFit() train other tensors": trained("BitFit()", 1),
        "LN() and LN(layers=0) train other tensors": trained("LN(layers=0)", 1),
        "LN() and LN() | Select(score='random', keep=0.3, seed=1) train other": selected("LN()", 1),
        "None and 'mean' pooling": trained("LN()", 1, pooling="mean"),
        "with tensors": replace(a, head=a.head[:1]),
    }
    for why, b in unlike.items():
        with pytest.raises(DeltaError) as error:
            (a + b).on(h.bert())
        line(error, why)


def test_the_base_is_checked():
    a, b = trained("LN()", 1), trained("LN()", 2)
    with pytest.raises(DeltaError, match="same shapes but other values"):
        (a + b).on(h.bert(seed=5))
    with pytest.raises(DeltaError, match="same shapes but other values"):
        sm.attach(h.bert(seed=5), a + b)
    assert sm.attach(h.bert(seed=5), a + b, verify=False)
    with pytest.raises(AttachError, match="untouched base"):
        (a + b).on(sm.attach(h.bert(), "LN()"))
    damaged = replace(b, tensors={n: t for n, t in b.tensors.items() if "embeddings" not in n})
    with pytest.raises(DeltaError, match="missing"):
        (a + damaged).on(h.bert())


def test_wrong_weights_and_densities():
    a, b = trained("LN()", 1), trained("LN()", 2)
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(DeltaError, match="must be 2 numbers above 0"):
            sm.average([a, b], weights, model=h.bert())
    with pytest.raises(DeltaError, match="there are no deltas"):
        sm.average([], model=h.bert())
    for make in (sm.ties, sm.dare):
        for density in (0, 1.5, float("nan")):
            with pytest.raises(DeltaError, match="must lie in"):
                make([a, b], density, model=h.bert())
