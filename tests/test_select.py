"""`recipe | Select(...)`: how it is spelled, what it keeps, how tasks are combined, and what fit does with it."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

import smidgen as sm
from smidgen.common.errors import AttachError, DataError, DeltaError, PlanError, RecipeError, TrainError
from smidgen.delta.saved_selection import FILE, Selection
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.budgets import budget, chance_overlap, choose, entries_of, quotas
from smidgen.planning.selection.data_free_scores import random as random_scores
from smidgen.planning.selection.select_term import READY, SCOPES, SCORES, TRAINED
from smidgen.planning.selection.units import candidates, label_units
from smidgen.ports.attachment_record import is_attached, trained_parameters
from smidgen.recipe.recipe import Recipe, parse
from smidgen.testing.cases import shake, tiny
from smidgen.training.run.run_folder import CHECKPOINT
from tests import helpers as h
from tests.test_resume import Interrupted

# Grammar

METHODS = ["LN()", "LN(which='output', terms='gain')", "LoRA(rank=2, target=('query', 'key'))", "IA3()", "Head()",
           "BitFit(norms=False, layers='top:2')", "Full(layers=(0, 5))"]  # fmt: skip
NAMES = {name: getattr(sm, name) for name in ("LN", "LoRA", "IA3", "Head", "BitFit", "Full", "Select")}


def any_select(rng):
    score = rng.choice(SCORES)
    scope = rng.choice(list(SCOPES))
    fields = {"scope": scope, "granularity": rng.choice(SCOPES[scope]), "order": rng.choice(("top", "bottom"))}
    fields["keep"] = rng.choice((0.1, 1, 1.0, 998, 1e-05, rng.random() or 0.5))
    fields["kind"] = rng.choice(("empirical", "true", "expected"))
    fields["warmup"] = rng.randint(1, 99) if score in TRAINED else 0 if score in READY else rng.choice((0, 7))
    fields |= {"examples": rng.choice((1, 1024)), "seed": rng.choice((0, 3))}
    return sm.Select(score, **{name: value for name, value in fields.items() if rng.random() < 0.7 or name == "warmup"})


def any_recipe(rng):
    """Groups joined by +, some of them narrowed; built by Python's own operators."""
    whole = None
    for _ in range(rng.randint(1, 4)):
        group = parse(" + ".join(rng.choices(METHODS, k=rng.randint(1, 3))))
        group = group | any_select_that_goes(rng) if rng.random() < 0.6 else group
        whole = group if whole is None else whole + group
    return whole


def any_select_that_goes(rng):
    while True:
        try:
            return any_select(rng)
        except RecipeError:  # scope and granularity drawn apart
            continue


def test_narrowed_recipes_round_trip_as_text_json_and_python():
    rng = random.Random(0)
    recipes = [any_recipe(rng) for _ in range(300)]
    for recipe in recipes:
        text = str(recipe)
        saved = json.loads(json.dumps(recipe.to_json()))
        for again in (parse(text), Recipe.from_json(saved), eval(text, dict(NAMES)) + Recipe((sm.LN(),))):
            again = again if len(again) == len(recipe) else Recipe(again.terms[:-1], again.narrowed)
            assert repr(again) == repr(recipe), text  # equality alone would not tell keep=1 from keep=1.0
            assert hash(again) == hash(recipe)
        assert sum(len(terms) for terms, _ in recipe.groups()) == len(recipe)
        assert [t for terms, _ in recipe.groups() for t in terms] == list(recipe.whole)
    assert {len(r.narrowed) for r in recipes} >= {0, 1, 2, 3}, "too tame"


def test_precedence_is_that_of_python():
    a, b, s = sm.LN(), sm.IA3(), sm.Select("random")
    assert str(a + b | s) == "LN() + IA3() | Select(score='random')"
    assert parse("LN() + IA3() | Select('random')") == a + b | s == (a + b) | s
    assert parse("LN() + (IA3() | Select('random'))") == a + (b | s) != a + b | s
    assert str(a + (b | s)) == "LN() + (IA3() | Select(score='random'))"
    assert str((a | s) + b) == "(LN() | Select(score='random')) + IA3()"
    assert (a | s) + (b | s) != a + b | s
    assert (a + (b | s)).whole == a + b


SPELLINGS = {
    "LN() | Select('random') | Select('random')": "is narrowed already; one Select for each method",
    "(LN() | Select('random')) + IA3() | Select('random')": "is narrowed already",
    "LN() + Select('random')": "Select(score='random') narrows what stands before it: write 'LN() | Select(",
    "Select('random')": "narrows what stands before it",
    "Select('random') | Select('random')": "narrows what stands before it",
    "LN() | IA3()": "IA3() does not narrow; after '|' comes Select(...)",
    "LN() | Select('random') + IA3()": "does not narrow; after '|' comes Select(...)",
    "LN() | Select": "'Select' does not narrow",
    "LN() | 3": "'3' does not narrow",
    "LN() & Select('random')": "only + between methods is, and | Select(...)",
    "LN() | Selct('random')": "did you mean 'Select'?",
    "LN() | Select('fischer')": "did you mean 'fisher'?",
    "LN() | Select('Fisher')": "did you mean 'fisher'?",
    "LN() | Select()": "score",
    "LN() | Select('random', kep=0.1)": "Select has no field 'kep'; did you mean 'keep'?",
    "LN() | Select('random', keep=0)": "keep=0 keeps nothing",
    "LN() | Select('random', keep=0.0)": "keep=0.0 keeps nothing",
    "LN() | Select('random', keep=-3)": "keep=-3 keeps nothing",
    "LN() | Select('random', keep=1.5)": "keep=1.5 is more than there is; a share is at most 1.0",
    "LN() | Select('random', keep=True)": "keep=True must be a share such as 0.1, or a whole number",
    "LN() | Select('random', keep='x')": "keep='x' must be a share",
    "LN() | Select('random', keep=None)": "keep=None must be a share",
    "LN() | Select('random', scope='term', granularity='layer')": "granularity element or tensor, not 'layer'",
    "LN() | Select('random', scope='tensor', granularity='tensor')": "with granularity element, not 'tensor'",
    "LN() | Select('random', granularity='heads')": "did you mean 'head'?",
    "LN() | Select('random', scope='globl')": "did you mean 'global'?",
    "LN() | Select('random', order='botom')": "did you mean 'bottom'?",
    "LN() | Select('fisher', kind='tru')": "did you mean 'true'?",
    "LN() | Select('fisher', examples=0)": "examples=0 must be a whole number of at least 1",
    "LN() | Select('fisher', warmup=-1)": "warmup=-1 must be a whole number of at least 0",
    "LN() | Select('change')": "'change' measures a course of training: give warmup=",
    "LN() | Select('movement')": "'movement' measures a course of training",
    "LN() | Select('random', warmup=5)": "'random' looks at the start alone; leave warmup= out",
    "LN() | Select('magnitude', warmup=5)": "'magnitude' looks at the start alone",
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_wrong_spelling_is_one_clear_line(text):
    with pytest.raises(RecipeError, match=re.escape(SPELLINGS[text])) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_python_refuses_what_the_text_does():
    with pytest.raises(RecipeError, match="does not narrow"):
        sm.LN() | sm.IA3()
    with pytest.raises(RecipeError, match="str does not narrow"):
        sm.LN() | "Select('random')"
    with pytest.raises(RecipeError, match="narrows what stands before it"):
        sm.LN() + sm.Select("random")
    with pytest.raises(RecipeError, match="does not narrow"):
        Recipe.from_json([{"narrow": [sm.LN().to_json()], "by": sm.IA3().to_json()}])


# Budgets

BITFIT_UNITS = {"element": None, "tensor": 18, "layer": 4, "head": 4}  # 2 layers x 2 heads; embedding norm, pooler


def drawn(model, recipe, seed=0):
    """Distinct positive scores for what a recipe narrows, its plan and its first narrowing."""
    plan, generator = resolve(model, recipe), torch.Generator().manual_seed(seed)
    (span, *_) = plan.recipe.narrowed
    rows = [row for row in plan.entries if span.start <= row.index < span.stop]
    scores = {
        row.name(t): 1 + torch.rand(s, dtype=torch.float64, generator=generator) for row in rows for t, s in row.terms
    }
    return plan, span, scores


def rounded(keep, count):
    return keep if isinstance(keep, int) else max(1, math.floor(keep * count + 0.5))


def units_kept(granularity, scores, kept):
    """Number of units that are kept, counted in another way than `label_units` does; each must be kept in whole."""
    if granularity == "element":
        return sum(len(index) for index in kept.values())
    if granularity == "head":
        return len(heads_kept(scores, kept))
    share = {}
    for name, index in kept.items():
        assert len(index) in (0, scores[name].numel()), f"{name} is kept in part"
        share.setdefault(name if granularity == "tensor" else layer_of(name), set()).add(len(index) > 0)
    assert all(len(found) == 1 for found in share.values()), "a layer is kept in part"
    return sum(found == {True} for found in share.values())


def layer_of(name):
    return (re.findall(r"layer\.\d+", name) or [name.rpartition(".")[0]])[0]


def heads_kept(scores, kept, width=8):
    """(layer, head) of BERT's biases."""
    found = {}
    for name, index in kept.items():
        part = re.search(r"layer\.(\d+)\.attention\.self\.(query|key|value)", name)
        assert part or not len(index), f"{name} belongs to no head"
        for head in range(2 if part else 0):
            inside = int(((index >= head * width) & (index < (head + 1) * width)).sum())
            assert inside in (0, width), f"head {head} of {name} is kept in part"
            found.setdefault((part[1], head), []).append(inside > 0)
    assert all(len(set(parts)) == 1 for parts in found.values()), "query, key and value of a head do not go together"
    return {head for head, parts in found.items() if parts[0]}


def check_budget(recipe, granularity, scope, keep, order="top"):
    model = h.bert()
    by = f"Select('random', keep={keep}, granularity='{granularity}', scope='{scope}', order='{order}')"
    plan, span, scores = drawn(model, f"{recipe} | {by}")
    kept = choose(model, plan, span, scores)
    count = BITFIT_UNITS[granularity] or sum(score.numel() for score in scores.values())
    assert units_kept(granularity, scores, kept) == rounded(keep, count)
    for name, index in kept.items():
        assert (index.diff() > 0).all(), name
    return scores, kept


GRAINS = [(grain, scope) for scope, grains in SCOPES.items() for grain in grains]


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0, 1, 3, 1e-9])
@pytest.mark.parametrize(("granularity", "scope"), GRAINS)
def test_a_budget_is_met_exactly(granularity, scope, keep):
    for order in ("top", "bottom"):
        check_budget("BitFit()", granularity, scope, keep, order)


def test_a_budget_that_is_one_off_would_be_seen(monkeypatch):
    monkeypatch.setattr(
        sys.modules["smidgen.planning.selection.budgets"], "budget", lambda by, count: min(count, budget(by, count) + 1)
    )
    for granularity in BITFIT_UNITS:
        with pytest.raises(AssertionError):
            check_budget("BitFit()", granularity, "global", 2)


@pytest.mark.parametrize("granularity", BITFIT_UNITS)
def test_the_best_units_are_kept(granularity):
    """No unit outside has a higher mean score than one inside; the score of each value decides, not its sum."""
    scores, kept = check_budget("BitFit()", granularity, "global", 3)
    inside, outside = [], []
    for name, score in scores.items():
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[kept[name]] = True
        if granularity == "element":
            inside += score.flatten()[mask].tolist()
            outside += score.flatten()[~mask].tolist()
        elif granularity == "tensor":
            (inside if mask.any() else outside).append(float(score.mean()))
    if granularity in ("layer", "head"):
        pattern = r"layer\.\d+" if granularity == "layer" else r"layer\.\d+\.attention\.self"
        means = {}
        for name, score in scores.items():
            part = re.findall(pattern, name) or ([name.rpartition(".")[0]] if granularity == "layer" else [])
            for head in range(2 if granularity == "head" else 1):
                values = score[head * 8 : head * 8 + 8] if granularity == "head" else score
                taken = bool(len(kept[name])) if granularity == "layer" else head * 8 in kept[name].tolist()
                for key in part:
                    means.setdefault((key, head), ([], taken))[0].append(values)
        for values, taken in means.values():
            (inside if taken else outside).append(float(torch.cat(values).mean()))
    assert min(inside) > max(outside)


def test_scopes_give_each_group_its_share():
    scores, kept = check_budget("LN()", "element", "tensor", 0.1)
    assert [len(index) for index in kept.values()] == [2] * 6 + [1] * 4, "16 of 10 tensors of 16, the first ones more"
    scores, kept = check_budget("LN()", "element", "term", 0.1)
    for end in ("weight", "bias"):
        gains = torch.cat([scores[n][kept[n]] for n in kept if n.endswith(end)])
        rest = torch.cat([scores[n] for n in kept if n.endswith(end)]).sort(descending=True).values
        assert torch.equal(gains.sort(descending=True).values, rest[:8]), "the best 8 of 80, gains and biases apart"
    scores = {name: score + 9 * name.endswith("weight") for name, score in scores.items()}
    for scope, wanted in (("global", 16), ("term", 8)):
        plan, span, _ = drawn(h.bert(), f"LN() | Select('random', keep=0.1, scope='{scope}')")
        found = choose(h.bert(), plan, span, scores)
        assert sum(len(i) for n, i in found.items() if n.endswith("weight")) == wanted


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.floats(0, 1))
def test_quotas_are_by_largest_remainder(sizes, share):
    total = round(share * sum(sizes))
    given = quotas(sizes, total)
    assert sum(given) == total
    exact = [total * size / sum(sizes) for size in sizes]
    assert all(0 <= g <= size and abs(g - e) < 1 for g, e, size in zip(given, exact, sizes, strict=True))
    more = [e - math.floor(e) for g, e in zip(given, exact, strict=True) if g > e]
    less = [e - math.floor(e) for g, e in zip(given, exact, strict=True) if g < e]
    assert not more or not less or min(more) >= max(less)


def test_ties_go_to_what_comes_first_in_the_plan():
    for order in ("top", "bottom"):
        plan, span, scores = drawn(h.bert(), f"LN() | Select('random', keep=20, order='{order}')")
        kept = choose(h.bert(), plan, span, {name: torch.ones_like(score) for name, score in scores.items()})
        first, second, *rest = kept
        assert kept[first].tolist() == list(range(16))
        assert kept[second].tolist() == list(range(4))
        assert not any(len(kept[name]) for name in rest)


UNEQUAL = [  # recipe, granularity, scope, seeds; tensors differ in size by a factor of 20 and more
    ("Full()", "tensor", "global", 200),
    ("LN() + LoRA(rank=3, target='linear')", "tensor", "term", 200),
    ("Full()", "layer", "global", 200),
    ("Full(layers=0) + LoRA(rank=2)", "head", "global", 50),
    ("LN(layers=0)", "element", "tensor", 200),
]


@pytest.mark.parametrize(("recipe", "granularity", "scope", "draws"), UNEQUAL)
def test_random_is_uniform_over_units_of_unequal_size(recipe, granularity, scope, draws):
    """How often each unit is kept over seeds, against equal chances within its scope: a chi-squared test."""
    model, keep = h.bert(), 0.25
    by = f"granularity='{granularity}', scope='{scope}', keep={keep}"
    plan = resolve(model, f"{recipe} | Select('random', {by})")
    (span,) = plan.recipe.narrowed
    found = candidates(entries_of(plan, span))
    unit, count = label_units(model, found, granularity)
    group = dict.fromkeys(range(count), 0)
    for c, part in zip(found, unit.split([c.size for c in found]), strict=True):
        for u in set(part.tolist()) - {-1}:
            kind = c.entry.term_kinds[c.term] if scope == "term" else c.name if scope == "tensor" else 0
            group[u] = kind
    times = torch.zeros(count, dtype=torch.float64)
    for seed in range(draws):
        now = replace(span, by=replace(span.by, seed=seed))
        scores = random_scores(model, plan, now, 0)
        kept = choose(model, plan, now, scores)
        mask = torch.cat([torch.zeros(c.size).index_fill(0, kept[c.name], 1) for c in found])
        times[unit[mask.bool()].unique()] += 1
    statistic, freedom = 0.0, 0
    for kind in set(group.values()):
        own = times[[u for u in range(count) if group[u] == kind]]
        n, share = len(own), float(own.mean() / draws)
        if 0 < share < 1:  # without replacement: the variance of a count is draws * p * (1 - p), correlation -1/(n - 1)
            statistic += float((own - own.mean()).square().sum()) / (draws * share * (1 - share)) * (n - 1) / n
            freedom += n - 1
    assert freedom > 0
    assert chi2.sf(statistic, freedom) > 1e-3, f"chi-squared {statistic:.0f} with {freedom} degrees of freedom"


@pytest.mark.parametrize(("recipe", "granularity", "scope", "draws"), UNEQUAL)
def test_the_overlap_by_chance_is_that_of_random_draws(recipe, granularity, scope, draws):
    """Also where units differ in size, so that a share of values would say something else."""
    model, by = h.bert(), f"granularity='{granularity}', scope='{scope}', keep=0.25"
    plan = resolve(model, f"{recipe} | Select('random', {by})")
    (span,) = plan.recipe.narrowed
    both, single = [], []
    for seed in range(0, draws, 2):
        drawn = (replace(span, by=replace(span.by, seed=seed + i)) for i in range(2))
        one, other = (choose(model, plan, now, random_scores(model, plan, now, 0)) for now in drawn)
        both.append(sum(len(set(one[name].tolist()) & set(other[name].tolist())) for name in one))
        single.append(sum(len(index) for index in one.values()))
    error = stdev(both) / mean(single) / len(both) ** 0.5
    assert abs(mean(both) / mean(single) - chance_overlap(model, plan, span)) < 4 * error + 1e-3


@pytest.mark.parametrize("scope", SCOPES)
def test_bottom_is_what_top_leaves(scope):
    _, top = check_budget("LN()", "element", scope, 0.5, "top")
    _, bottom = check_budget("LN()", "element", scope, 0.5, "bottom")
    for name in top:
        assert sorted([*top[name].tolist(), *bottom[name].tolist()]) == list(range(16))


def test_a_count_of_more_than_there_is():
    model = h.bert()
    with h.untouched(model):
        with pytest.raises(PlanError, match=r"keep=161 is more than the 160 elements that there are"):
            sm.attach(model, "LN() | Select('random', keep=161)")
        with pytest.raises(PlanError, match=r"keep=5 is more than the 4 heads"):
            sm.attach(model, "BitFit() | Select('random', keep=5, granularity='head')")
    sm.attach(model, "LN() | Select('random', keep=160)")


def test_nothing_to_choose_from():
    model = h.bert()
    with h.untouched(model), pytest.raises(PlanError, match="has nothing to choose from.*nothing but the head"):
        sm.attach(model, "Head() | Select('random')")
    with pytest.raises(RecipeError, match="has nothing to choose; write 'LN.. . Select"):
        sm.select(model, "LN()")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s, n: s.update({n: torch.full((16,), math.nan)}), "the score of {} is not finite"),
        (lambda s, n: s.update({n: torch.full((16,), -math.inf)}), "the score of {} is not finite"),
        (lambda s, n: s.update({n: torch.ones(15)}), r"the score of {} has shape \(15,\), the tensor \(16,\)"),
        (lambda s, n: s.pop(n), "there is no score for {}; the scores are those of another recipe"),
    ],
)
def test_scores_that_cannot_be_ranked(damage, said):
    _, _, scores = drawn(h.bert(), "LN() | Select('random')")
    name = list(scores)[3]
    damage(scores, name)
    with pytest.raises(DataError, match=said.format(re.escape(name))):
        sm.select(h.bert(), "LN() | Select('fisher')", scores=scores)


def test_values_without_effect_are_said():
    _, _, scores = drawn(h.bert(), "LN() | Select('random')")
    for name in list(scores)[2:]:
        scores[name].zero_()
    with pytest.warns(sm.SelectionWarning, match=r"kept 8 of 40 elements whose score is 0.*warmup"):
        sm.select(h.bert(), "LN() | Select('fisher', keep=40)", scores=scores)
    sm.select(h.bert(), "LN() | Select('fisher', keep=32)", scores=scores)
    sm.select(h.bert(), "LN() | Select('fisher', keep=40, order='bottom')", scores=scores)  # zeros are asked for


# Heads


def one_head(model, recipe, layer, head, marked):
    """Masks when the scores of one head are the highest; `marked` says which tensor's part is raised."""
    plan, span, scores = drawn(model, recipe)
    name, part = marked
    scores[name][part] += 50
    kept = choose(model, plan, span, scores)
    found = {}
    for key, index in kept.items():
        mask = torch.zeros(scores[key].numel(), dtype=torch.bool)
        mask[index] = True
        if mask.any():
            found[key] = mask.view(scores[key].shape)
    assert all(f".{layer}." in key for key in found)
    return found


def test_heads_of_a_fused_transposed_projection():
    """GPT-2: columns of c_attn (in, 3 * out), entries of its bias, rows of c_proj (in, out)."""
    recipe = "Full() | Select('random', keep=1, granularity='head')"
    base = "transformer.h.1.attn"
    raised = (f"{base}.c_attn.weight", (slice(None), slice(24, 32)))  # key of head 1
    found = one_head(h.causal("gpt2"), recipe, 1, 1, raised)
    columns = torch.zeros(48, dtype=torch.bool)
    for start in (8, 24, 40):
        columns[start : start + 8] = True
    assert set(found) == {f"{base}.{t}" for t in ("c_attn.weight", "c_attn.bias", "c_proj.weight")}
    assert torch.equal(found[f"{base}.c_attn.weight"], columns.expand(16, 48))
    assert torch.equal(found[f"{base}.c_attn.bias"], columns)
    assert torch.equal(found[f"{base}.c_proj.weight"], (torch.arange(16) >= 8)[:, None].expand(16, 16))


def test_heads_with_grouped_queries():
    """Llama, 4 heads, 2 of them for key and value: a unit is a group of queries with its key and value."""
    base = "model.layers.0.self_attn"
    raised = (f"{base}.v_proj.weight", slice(8, 16))
    found = one_head(tiny("llama"), "Full() | Select('random', keep=1, granularity='head')", 0, 1, raised)
    late = (torch.arange(32) >= 16)[:, None].expand(32, 32)
    assert torch.equal(found[f"{base}.q_proj.weight"], late)
    assert torch.equal(found[f"{base}.o_proj.weight"], late.T)
    for part in ("k_proj", "v_proj"):
        assert torch.equal(found[f"{base}.{part}.weight"], (torch.arange(16) >= 8)[:, None].expand(16, 32))
    assert len(found) == 4


def test_heads_of_added_matrices():
    """B has a row for each output of query and value; A belongs to no head, but that of the output map has columns."""
    recipe = "LoRA(rank=3, target=('query', 'value', 'attention_out')) | Select('random', keep=1, granularity='head')"
    for kind, base in (("bert", "bert.encoder.layer.1.attention"), ("gpt2", "transformer.h.1.attn")):
        model = h.bert() if kind == "bert" else h.causal("gpt2")
        value = f"{base}.self.value.edits.0.B" if kind == "bert" else f"{base}.c_attn.edits.0-value.B"
        query = value.replace("value", "query")
        out = f"{base}.output.dense.edits.0.A" if kind == "bert" else f"{base}.c_proj.edits.0.A"
        found = one_head(model, recipe, 1, 1, (value, slice(8, 16)))
        assert set(found) == {value, query, out}
        rows = (torch.arange(16) >= 8)[:, None].expand(16, 3)
        assert torch.equal(found[value], rows)
        assert torch.equal(found[query], rows)
        assert torch.equal(found[out], rows.T)


def test_norms_belong_to_no_head():
    model = h.bert()
    with h.untouched(model), pytest.raises(PlanError, match=r"granularity='head' needs tensors of query.*norms belong"):
        sm.attach(model, "LN() | Select('random', granularity='head')")
    found = sm.select(model, "LN() + BitFit(norms=False) | Select('random', keep=2, granularity='head')")
    assert found.kept == 2 * 3 * 8
    assert not any(len(index) for name, index in found.indices.items() if "LayerNorm" in name)


# Scores that need no data


def test_random_is_by_seed_and_by_tensor_alone():
    found = {}
    for recipe in (
        "LN() | Select('random')",
        "(LN() | Select('random')) + LoRA(rank=2)",
        "IA3() + (LN() | Select('random'))",
        "(LN(which='output') | Select('magnitude')) + (LN(which='embedding') | Select('random'))",
    ):
        found[recipe] = sm.select(h.bert(), recipe)
    plain, *others = found.values()
    for name, index in plain.indices.items():
        assert torch.equal(others[0].indices[name], index)
        assert torch.equal(others[1].indices[name], index)
    other = sm.select(h.bert(), "LN() | Select('random', seed=1)")
    assert plain.overlap(other) < 0.6
    first = sm.score(h.bert(), "LN() | Select('random')")
    assert len({tuple(score.tolist()) for score in first.values()}) == 10, "no two tensors have the same numbers"
    narrower = sm.score(h.bert(), "LN(which='embedding') | Select('random')")
    assert all(torch.equal(first[name], score) for name, score in narrower.items())


def test_magnitude_is_of_the_start():
    model = h.bert()
    found = sm.score(model, "LN() + LoRA(rank=2) | Select('magnitude')", seed=3)
    own = dict(model.named_parameters())
    with sm.attached(model, "LN() + LoRA(rank=2)", seed=3):
        for name, p in sm.Delta.of(model).tensors.items():
            if not name.startswith("classifier"):
                assert torch.equal(found[name], (own.get(name, p)).abs())


def test_a_selection_is_of_the_base():
    model = sm.attach(h.bert(), "LN()")
    shake(model.parameters(), 0.1)
    for call in (sm.select, sm.score):
        with pytest.raises(AttachError, match="something is attached already, and scores are those of the base"):
            call(model, "LN() | Select('magnitude')")


# Scores from data


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return h.task(tmp_path_factory.mktemp("select"), train=24, held=8)


def select(task, recipe, model=None, **options):
    return sm.select(model or h.bert(), recipe, task, tokenizer=h.tokenizer(), **options)


def gradients(model, task, places, recipe="LN()"):
    """Gradient of the mean loss of some examples with respect to what a recipe trains."""
    tokenizer = h.tokenizer()
    rows = task.encode(tokenizer, "train")
    with sm.attached(model, recipe):
        trained = {n: p for n, p in trained_parameters(model).items() if not n.startswith("classifier")}
        model(**task.collator(tokenizer)([rows[i] for i in places])).loss.backward()
        return {n: (p.detach().clone(), p.grad.clone()) for n, p in trained.items()}


def test_the_scores_are_their_formulas(task):
    model = h.bert().double()
    every = gradients(model, task, range(24))
    one_by_one = [gradients(model, task, [i]) for i in range(24)]
    options = {"tokenizer": h.tokenizer(), "batch_size": 24}
    found = {s: sm.score(model, f"LN() | Select('{s}')", task, **options) for s in ("gradient", "fisher")}
    found |= {
        s: sm.score(model, f"LN() | Select('{s}', warmup=1)", task, lr=1e-3, **options) for s in ("change", "movement")
    }
    for name, (start, gradient) in every.items():
        squares = torch.stack([grads[name][1] ** 2 for grads in one_by_one]).mean(0)
        torch.testing.assert_close(found["fisher"][name], squares, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found["gradient"][name], gradient.abs(), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found["movement"][name], -start * gradient, rtol=1e-8, atol=1e-12)
        large = gradient.abs() > 1e-4  # AdamW's first step is as long as the rate where the gradient is above eps
        torch.testing.assert_close(found["change"][name][large], torch.full_like(start, 1e-3)[large], rtol=1e-2, atol=0)


def test_no_value_of_a_is_chosen_before_b_moves(task):
    """LoRA's A has no gradient while B is 0."""

    def share(**options):
        text = "".join(f", {k}={v}" for k, v in options.items())
        found = select(task, f"LoRA(rank=2) | Select('fisher'{text})")
        return {end: sum(len(i) for n, i in found.indices.items() if n.endswith(end)) for end in "AB"}

    assert share(keep=0.25) == {"A": 0, "B": 64}
    assert share(keep=0.25, warmup=10)["A"] > 0
    with pytest.warns(sm.SelectionWarning, match=r"kept 32 of 160 elements whose score is 0.*LoRA's A"):
        assert share(keep=160) == {"A": 32, "B": 128}


@pytest.mark.parametrize("by", ["'fisher', warmup=3", "'change', warmup=3", "'movement', warmup=3", "'gradient'"])
def test_select_leaves_model_and_generators_alone(by, task):
    model = h.bert(dropout=0.2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with h.untouched(model):
        first = select(task, f"LN() + LoRA(rank=2, dropout=0.1) | Select({by})", model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = select(task, f"LN() + LoRA(rank=2, dropout=0.1) | Select({by})", model)
    assert first.digest == again.digest
    assert first.info == again.info == {"task": task.name, "data": task.fingerprint}
    other = select(task, f"LN() + LoRA(rank=2, dropout=0.1) | Select({by}, seed=1, examples=5)", model)
    assert other.digest != first.digest


def test_data_is_asked_for(task):
    model = h.bert()
    with h.untouched(model):
        with pytest.raises(PlanError, match=r"needs data to choose: use fit, or attach\(.*smidgen\.select\("):
            sm.attach(model, "LN() | Select('fisher')")
        with pytest.raises(DataError, match="needs data to choose by: give task="):
            sm.select(model, "LN() | Select('fisher')")
    model.train()
    with pytest.raises(DataError, match=r"call model\.eval\(\)"):
        select(task, "LN() | Select('fisher')", h.bert(dropout=0.1).train())


def test_a_warm_up_that_diverges_is_said(task):
    model = h.bert()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[0] = math.nan
    with pytest.raises(TrainError, match="the loss is nan at step 0 of the warm-up for Select"):
        select(task, "LN(which='output') | Select('change', warmup=2)", model)
    assert not is_attached(model)


# Several tasks


def scores_of_tasks(count=3, sign=False, recipe="LN() | Select('fisher', keep=0.2)"):
    model = h.bert()
    made = [drawn(model, recipe, seed) for seed in range(count)]
    plan, span, _ = made[0]
    tasks = [{n: s - (2.5 if sign else 1) for n, s in scores.items()} for _, _, scores in made]
    return model, plan, span, [{n: s * 10**i for n, s in scores.items()} for i, scores in enumerate(tasks)]


def kept(model, plan, span, scores):
    return {(name, i) for name, index in choose(model, plan, span, scores).items() for i in index.tolist()}


WAYS = ("mean", "rank", "union")
CASES = [
    "LN() | Select('fisher', keep=0.2)",
    "LN() | Select('fisher', keep=0.2, order='bottom')",
    "LN() | Select('fisher', keep=0.2, scope='term')",
    "LN() | Select('fisher', keep=4, granularity='tensor')",
]


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize("sign", [False, True], ids=["positive", "negative"])
@pytest.mark.parametrize("how", WAYS)
def test_one_task_combined_is_itself(how, sign, recipe):
    model, plan, span, (scores, *_) = scores_of_tasks(1, sign, recipe)
    assert kept(model, plan, span, sm.combine(model, plan, span, [scores], how)) == kept(model, plan, span, scores)
    assert sm.combine(model, plan, span, [scores, scores], how).keys() == scores.keys()


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize("how", WAYS)
def test_tasks_in_any_order_give_the_same(how, recipe):
    model, plan, span, (a, b, c) = scores_of_tasks(recipe=recipe)
    found = {frozenset(kept(model, plan, span, sm.combine(model, plan, span, t, how))) for t in ([a, b, c], [c, a, b])}
    (only,) = found
    assert len(only) == len(kept(model, plan, span, a)), "the budget is met"


@pytest.mark.parametrize("sign", [False, True], ids=["positive", "negative"])
@pytest.mark.parametrize("recipe", CASES)
def test_a_union_keeps_what_all_keep_and_nothing_that_none_does(recipe, sign):
    model, plan, span, tasks = scores_of_tasks(sign=sign, recipe=recipe)
    mixed = [{n: tasks[0][n] + 0.3 * s / 10**i for n, s in scores.items()} for i, scores in enumerate(tasks)]
    each = [kept(model, plan, span, scores) for scores in mixed]
    union = kept(model, plan, span, sm.combine(model, plan, span, mixed, "union"))
    assert set.intersection(*each) <= union <= set.union(*each)
    assert set.intersection(*each) != union, "the tasks are too alike to tell"


def test_a_large_task_does_not_drown_a_small_one():
    model, plan, span, (a, b, _) = scores_of_tasks()
    for how in WAYS:
        small = sm.combine(model, plan, span, [a, {n: s * 1e6 for n, s in b.items()}], how)
        large = sm.combine(model, plan, span, [a, b], how)
        assert kept(model, plan, span, small) == kept(model, plan, span, large), how


def test_what_cannot_be_combined():
    model, plan, span, (a, b, _) = scores_of_tasks()
    with pytest.raises(RecipeError, match="'ranks' is not one of union, rank, mean; did you mean 'rank'?"):
        sm.combine(model, plan, span, [a], "ranks")
    with pytest.raises(RecipeError, match="no scores to combine"):
        sm.combine(model, plan, span, [])
    b.pop(next(iter(b)))
    with pytest.raises(DataError, match="scores of different tensors"):
        sm.combine(model, plan, span, [a, b])


def test_overlap():
    a = sm.select(h.bert(), "LN() | Select('random', keep=40)")
    b = sm.select(h.bert(), "LN() | Select('random', keep=40, seed=1)")
    top, bottom = (sm.select(h.bert(), f"LN() | Select('magnitude', keep=0.5, order='{o}')") for o in ("top", "bottom"))
    assert a.overlap(a) == 1
    assert a.overlap(b) == b.overlap(a)
    assert 0 < a.overlap(b) < 1
    assert top.overlap(bottom) == 0
    everything = sm.select(h.bert(), "LN() | Select('random', keep=1.0)")
    assert everything.overlap(a) == 1
    assert everything.kept == everything.candidates == 160
    with pytest.raises(DeltaError, match="cannot compare selections of LN"):
        a.overlap(sm.select(h.bert(), "LN(which='output') | Select('random')"))


def test_shuffled_keeps_the_count_of_each_tensor():
    found = sm.select(h.bert(), "LN() | Select('random', keep=40)")
    other = found.shuffled(0)
    assert {n: len(i) for n, i in other.indices.items()} == {n: len(i) for n, i in found.indices.items()}
    assert other.digest == found.shuffled(0).digest != found.digest
    assert other.digest != found.shuffled(1).digest
    assert other.info["shuffled"] == 0
    assert all((index.diff() > 0).all() for index in other.indices.values())
    sm.attach(h.bert(), "LN()", selection=other)


# fit

SETTINGS = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "checkpoint_steps": 2, "progress": False}
BY = ["'fisher'", "'gradient'", "'change', warmup=3", "'movement', warmup=3", "'magnitude'", "'random'"]


def fit(task, recipe, model=None, **options):
    return sm.fit(model or h.bert(), recipe, task, tokenizer=h.tokenizer(), **{**SETTINGS, **options})


def chosen(delta):
    return {name: t.tolist() for name, t in delta.tensors.items() if name.endswith(".indices")}


@pytest.mark.parametrize("by", BY)
def test_fit_trains_the_budget_and_the_same_again(by, task):
    recipe, model = f"LN() | Select({by}, keep=0.25)", h.bert()
    with h.untouched(model):
        delta = fit(task, recipe, model)
    assert delta.trained == 40
    assert delta.head_values == 34
    assert delta.info["selection"] == {"task": task.name, "data": task.fingerprint}
    torch.rand(5)
    h.same(fit(task, recipe), delta)
    found = select(task, recipe, batch_size=8, lr=1e-2)
    assert {n: i.tolist() for n, i in found.indices.items() if 0 < len(i) < 16} == {
        n.removesuffix(".indices"): i for n, i in chosen(delta).items()
    }, "fit keeps what select keeps"


def test_fit_with_a_selection_by_hand(task):
    found = sm.select(h.bert(), "LN() | Select('random', keep=30)").shuffled(3)
    one, other = (fit(task, recipe, selection=found) for recipe in ("LN()", "LN() | Select('random', keep=30)"))
    h.same(one, other)
    assert one.recipe == found.recipe
    assert one.trained == 30
    assert one.info["selection"] == {"shuffled": 3}
    for name, index in chosen(one).items():
        assert index == found.indices[name.removesuffix(".indices")].tolist()
    model = h.bert()
    with h.untouched(model):
        with pytest.raises(AttachError, match=r"the selection is of another recipe: LN\(\), not LN\(terms='gain'\)"):
            fit(task, "LN(terms='gain')", model, selection=found)
        with pytest.raises(AttachError, match="the selection is of another recipe"):
            fit(task, "LN(terms='gain') | Select('random')", model, selection=found)


def test_a_kept_selection_is_used_again(task, tmp_path, monkeypatch):
    recipe, out = "LN() | Select('fisher', keep=0.25, warmup=2)", tmp_path / "run"
    whole = fit(task, recipe, objective=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        fit(task, recipe, out=out, objective=Interrupted([8]))
    assert (out / FILE).is_file()
    assert (out / CHECKPOINT).is_file()
    monkeypatch.setattr(sys.modules["smidgen.training.run.loop"], "select", None)
    h.same(fit(task, recipe, out=out, objective=Interrupted()), whole)
    assert not (out / FILE).exists(), "the delta has the indices"
    h.same(fit(task, recipe, out=out, objective=Interrupted()), whole)


def test_stopped_between_the_selection_and_the_first_step(task, tmp_path, monkeypatch):
    recipe, out, loop = "LN() | Select('gradient', keep=30)", tmp_path / "run", sys.modules["smidgen.training.run.loop"]

    def stopped(self):
        raise KeyboardInterrupt

    whole = fit(task, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_train", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit(task, recipe, out=out)
    found = Selection.load(out)
    swapped = found.shuffled(0)
    swapped.save(out)
    monkeypatch.setattr(loop, "select", None)
    resumed = fit(task, recipe, out=out)
    assert resumed.trained == 30
    assert chosen(resumed) != chosen(whole), "what was kept counts, not what would be chosen now"


def test_another_selection_is_another_run(task, tmp_path):
    found = sm.select(h.bert(), "LN() | Select('random', keep=30)")
    with pytest.raises(KeyboardInterrupt):
        fit(task, "LN()", out=tmp_path / "run", selection=found, objective=Interrupted([5]))
    for other in (found.shuffled(1), None):
        with pytest.raises(TrainError, match="holds another run: (selection|recipe) was"):
            fit(task, "LN()", out=tmp_path / "run", selection=other, objective=Interrupted())
    with pytest.raises(TrainError, match="holds another run: selection was"):
        fit(task, found.recipe, out=tmp_path / "run", objective=Interrupted())
    resumed = fit(task, "LN()", out=tmp_path / "run", selection=found, objective=Interrupted())
    h.same(resumed, fit(task, "LN()", selection=found, objective=Interrupted()))


def test_the_selection_of_a_delta_is_the_one_that_it_was_trained_with(task):
    recipe = "(LN() | Select('fisher', keep=0.25)) + (LoRA(rank=2) | Select('random', keep=40))"
    delta, found = fit(task, recipe), select(task, recipe, batch_size=8, lr=1e-2)
    again = sm.selection_of(h.bert(), delta)
    assert again.digest == found.digest
    assert (again.recipe, again.base, dict(again.shapes)) == (found.recipe, found.base, dict(found.shapes))
    assert again.overlap(found) == found.overlap(again) == 1
    assert all(index.dtype == torch.int64 for index in again.indices.values())
    h.same(fit(task, recipe, selection=again), delta)
    with pytest.raises(DeltaError, match="other values"):
        sm.selection_of(h.bert(seed=1), delta)
    with pytest.raises(RecipeError, match="nothing to choose"):
        sm.selection_of(h.bert(), fit(task, "LN()"))


def test_one_value_and_all_of_them_are_two_runs(task, tmp_path):
    """1 == 1.0 in Python and in JSON, but one is a count and the other a share."""
    assert fit(task, "LN() | Select('random', keep=1)", out=tmp_path / "run").trained == 1
    with pytest.raises(TrainError, match="holds another run: recipe was"):
        fit(task, "LN() | Select('random', keep=1.0)", out=tmp_path / "run")
    assert fit(task, "LN() | Select('random', keep=1.0)").trained == 160


def test_a_selection_carries_over_to_another_task(task, tmp_path):
    """The whole way: scores of two tasks, one selection, a third task."""
    model, recipe = h.bert(), sm.parse("LN() | Select('fisher', keep=0.2)")
    others = [h.task(tmp_path / name, train=12, held=4) for name in ("a", "b")]
    plan = sm.plan(model, recipe)
    scores = [sm.score(model, recipe, other, tokenizer=h.tokenizer()) for other in others]
    merged = sm.combine(model, plan, recipe.narrowed[0], scores, "union")
    delta = fit(task, recipe, selection=sm.select(model, recipe, scores=merged))
    assert delta.trained == 32


def test_shuffled_keeps_as_many_of_each_tensor_at_places_of_its_own():
    top, drawn, again, other = (
        sm.select(h.bert(), f"LN() | Select('magnitude', keep=0.1, order={order!r}, seed={seed})")
        for order, seed in (("top", 0), ("shuffled", 0), ("shuffled", 0), ("shuffled", 1))
    )
    counts = {name: len(index) for name, index in top.indices.items()}
    assert len(set(counts.values())) > 1
    for found in (drawn, other):
        assert {name: len(index) for name, index in found.indices.items()} == counts
        for index in found.indices.values():
            assert (index.diff() > 0).all()
    assert all(drawn.indices[name].equal(again.indices[name]) for name in counts)
    assert top.overlap(drawn) < 0.5
    assert drawn.overlap(other) < 0.5
    with pytest.raises(RecipeError, match="order='shuffled' draws single values, not granularity='layer'"):
        sm.parse("LN() | Select('magnitude', granularity='layer', order='shuffled')")
