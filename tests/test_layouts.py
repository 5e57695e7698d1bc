"""Blocks laid out in ways of their own: which rows are whose, and every method that fits acts, learns and merges."""

from contextlib import nullcontext

import pytest
import torch
import transformers as T

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError, RecipeError
from smidgen.planning.resolution import resolve
from smidgen.planning.selection.units import _number
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.in_place.untying import UntiedWarning
from smidgen.sites.attention_modules import no_interface
from smidgen.sites.discovery import find_sites
from smidgen.sites.fused_rows import Rows
from smidgen.sites.sublayers import find_sublayers
from smidgen.testing.suite import shake
from tests.odd_layouts import ODD, SIZES, odd, output

ROLES = ("query", "key", "value", "attention_out", "ff_in", "ff_out")
KINDS = ("attention", "cross_attention", "feed_forward")


def logits(model, name):
    with torch.no_grad():
        return output(model, name)


def of_role(model, role):
    return [site for site in find_sites(model) if role in site.roles and site.kind == "linear"]


def entered(name, kind):
    """The width of what enters a sublayer: Zamba's attention sees the embeddings again, beside the hidden states."""
    return 32 if (name, kind) == ("zamba", "attention") else 16


@pytest.mark.parametrize("name", ODD)
def test_every_part_is_found(name):
    model = odd(name)
    assert tuple(len(of_role(model, role)) for role in ROLES) == ODD[name][2]
    sublayers = find_sublayers(model)
    assert tuple(sum(site.kind == kind for site in sublayers) for kind in KINDS) == ODD[name][3]
    assert all((site.width_in, site.width_out) == (entered(name, site.kind), 16) for site in sublayers)
    assert len({site.path for site in sublayers}) == len(sublayers)


# Rows of fused projections, stated once more as loops over heads


def by_head(heads, *parts):
    """parts: rows of query, key and value in the block of one key head -> rows of each part."""
    found = [[] for _ in parts]
    row = 0
    for _ in range(heads):
        for part, count in zip(found, parts, strict=True):
            for _ in range(count):
                part.append(row)
                row += 1
    return found


def codegen():
    query, value, key = by_head(4, 4, 4, 4)
    return query, key, value


GOLDEN = {
    "gpt_neox": by_head(4, 4, 4, 4),
    "bloom": by_head(4, 4, 4, 4),
    "falcon, one key": by_head(1, 16, 4, 4),
    "falcon, all keys": by_head(4, 4, 4, 4),
    "falcon, groups": by_head(2, 8, 4, 4),
    "gpt_bigcode": by_head(4, 4, 4, 4),
    "gpt_bigcode, one key": by_head(1, 16, 4, 4),
    "mpt": by_head(1, 16, 16, 16),
    "persimmon": by_head(4, 4, 4, 4),
    "codegen": codegen(),
    "deberta": by_head(4, 4, 4, 4),
    "dbrx": by_head(1, 16, 8, 8),
    "deepseek": [None, *by_head(4, 6, 5)],
    "deepseek, query from a latent": [None, *by_head(4, 6, 5)],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_rows_are_those_of_loops_over_heads(name):
    model = odd(name)
    for role, rows in zip(("query", "key", "value"), GOLDEN[name], strict=True):
        for site in of_role(model, role):
            if rows is None:
                assert site.rows is None
                continue
            total = model.get_submodule(site.path).weight.shape[0]
            assert site.rows.numbers(total).tolist() == rows
            assert site.width_out == len(rows)


@pytest.mark.parametrize("name", GOLDEN)
def test_rows_do_what_their_role_says(name):
    """Queries of zero and keys of zero both attend to everything alike; values of zero leave nothing."""
    mixed = {}
    for role in (None, "query", "key", "value"):
        model = odd(name)
        for module in model.modules():
            for bias in ("q_bias", "v_bias"):  # DeBERTa adds them behind the projection
                if bias in module._parameters:
                    module._parameters[bias].data.zero_()
        site = of_role(model, role or "query")[0]

        def wipe(module, args, output, site=site):
            rows = range(site.width_out) if site.rows is None else site.rows.numbers(output.shape[-1])
            return output.index_fill(-1, torch.as_tensor(list(rows)), 0.0)

        if role:
            model.get_submodule(site.path).register_forward_hook(wipe)
        out = model.get_submodule(of_role(model, "attention_out")[0].path)
        seen = []
        out.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        logits(model, name)
        mixed[role] = seen[0]
    assert mixed["value"].abs().max() == 0 < mixed["query"].abs().max()
    assert not torch.allclose(mixed["query"], mixed[None])
    if "deepseek" not in name:  # there a part of each key comes from elsewhere
        torch.testing.assert_close(mixed["query"], mixed["key"], rtol=1e-9, atol=1e-9)


def test_what_is_put_is_what_is_taken():
    rows, whole = Rows(2, 5, 3), torch.arange(2 * 18 * 4.0).view(2, 18, 4)
    places = [head * 6 + i for head in range(3) for i in (2, 3, 4)]
    assert torch.equal(rows.take(whole, 1), whole[:, places])
    assert rows.numbers(18).tolist() == places
    expected = whole.clone()
    expected[:, places] = -1.0
    assert torch.equal(rows.put(whole, torch.full((2, 9, 4), -1.0), 1), expected)
    assert torch.equal(rows.put(whole, rows.take(whole, 1), -2), whole)
    assert (rows.length, rows.overlaps(Rows(4, 6, 3)), rows.overlaps(Rows(5, 6, 3))) == (9, True, False)


# Methods


def loss(model, name):
    found = output(model, name)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=found.dtype)
    return (found * weights).sum()


RECIPES = ("LoRA(rank=2, target={roles})", "IA3()")
ON_SLICES = ("DoRA(rank=2, target={roles})", "PiSSA(rank=2, target={roles})", "SSF(target={roles}, shift=False)")
PAIRS = [*((name, recipe) for name in ODD for recipe in RECIPES), *((n, r) for n in GOLDEN for r in ON_SLICES)]


def target(name):
    return tuple(role for role, count in zip(ROLES, ODD[name][2], strict=True) if count)


@pytest.mark.parametrize(("name", "recipe"), PAIRS)
def test_methods_on_linear_maps_act_learn_and_merge(name, recipe):
    model = odd(name)
    before = logits(model, name)
    sm.attach(model, recipe.format(roles=target(name)))
    values = {n: p for n, p in trained_parameters(model).items() if ".edits." in n}
    shake(values.values(), 0.1)
    after = logits(model, name)
    assert not torch.allclose(after, before, rtol=1e-4, atol=1e-6)
    # Zamba's attentions have modules of their own with one weight
    with pytest.warns(UntiedWarning) if name == "zamba" else nullcontext():
        merged = sm.merge(model)
    torch.testing.assert_close(logits(merged, name), after, rtol=1e-8, atol=1e-8)
    loss(model, name).backward()
    still = [n for n, p in values.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still
    sm.detach(model)
    assert torch.equal(logits(model, name), before)


@pytest.mark.parametrize("name", ODD)
def test_counts_are_the_closed_form(name):
    """rank * (in + out) for each part of each map; IA3: keys, values and what enters the second feed-forward map."""
    model = odd(name)
    sites = [site for role in target(name) for site in of_role(model, role)]
    plan = resolve(model, f"LoRA(rank=2, target={target(name)})")
    assert plan.trained == sum(2 * (s.width_in + s.width_out) for s in sites)
    outer, inner = ([s for s in sites if s.roles & set(roles)] for roles in (("key", "value"), ("ff_out",)))
    assert resolve(model, "IA3()").trained == sum(s.width_out for s in outer) + sum(s.width_in for s in inner)


@pytest.mark.parametrize("form", ["sequential", "parallel"])
@pytest.mark.parametrize("name", ODD)
def test_an_adapter_stands_at_every_sublayer(name, form):
    model = odd(name)
    kinds = tuple(kind for kind, count in zip(KINDS, ODD[name][3], strict=True) if count)
    before = logits(model, name)
    if form == "parallel" and name in ("led", "prophetnet"):
        # what enters has its axes turned, or several streams side by side
        with pytest.raises(AttachError, match="a sublayer that was entered with .* the form 'sequential' works"):
            logits(sm.attach(model, f"Adapter({kinds}, form={form!r})"), name)
        return
    sm.attach(model, f"Adapter({kinds}, width=3, form={form!r}, activation='tanh')")
    values = {n: p for n, p in trained_parameters(model).items() if ".edits." in n}
    columns = [entered(name, kind) if form == "parallel" else 16 for kind in KINDS]
    counts = (count * (3 * (c + 16) + 3 + 16) for count, c in zip(ODD[name][3], columns, strict=True))
    assert sum(p.numel() for p in values.values()) == sum(counts)
    torch.testing.assert_close(logits(model, name), before, rtol=1e-9, atol=1e-9)
    shake(values.values(), 0.3)
    assert not torch.allclose(logits(model, name), before)
    loss(model, name).backward()
    assert not [n for n, p in values.items() if p.grad is None or not p.grad.abs().max() > 0]
    sm.detach(model)
    assert torch.equal(logits(model, name), before)


@pytest.mark.parametrize("name", ODD)
def test_a_prefix_reaches_every_attention_or_is_refused(name):
    model = odd(name)
    lacking = no_interface(model, [*find_sites(model), *find_sublayers(model)])
    if lacking:
        with pytest.raises(PlanError, match=f"{lacking[0]}.* does not go through transformers' AttentionInterface"):
            sm.attach(model, "Prefix(3)")
        return
    before = logits(model, name)
    sm.attach(model, "Prefix(3)")
    values = {n: p for n, p in trained_parameters(model).items() if ".edits." in n}
    assert len(values) == 2 * sum(ODD[name][3][:2])
    shake(values.values(), 1.0)
    assert not torch.allclose(logits(model, name), before)
    loss(model, name).backward()
    assert not [n for n, p in values.items() if p.grad is None or not p.grad.abs().max() > 0]
    sm.detach(model)
    assert torch.equal(logits(model, name), before)


def test_a_text_that_keys_would_not_reach_is_no_place_for_a_prefix():
    """GIT's text has an attention of its own code; only its image tower would get keys, which a text does not enter."""
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    model = T.GitForCausalLM(T.GitConfig(**SIZES, vision_config=vision))
    with pytest.raises(PlanError, match="Prefix.*GitSelfAttention in git.encoder.layer does not go .* choose a method"):
        sm.attach(model, "Prefix(3)")
    assert resolve(model, "LoRA()").entries


def test_a_gate_with_one_output_is_left_out_of_all_linear_maps():
    """A product of two matrices of rank 8 has no place in a weight of rank 1; by its name it can have one of rank 1."""
    model = odd("qwen2_moe")
    paths = {row.site.path.rpartition(".")[2] for row in resolve(model, "LoRA(target='linear')").entries}
    assert "shared_expert_gate" not in paths
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= paths
    assert len(resolve(model, "LoRA(rank=1, target='shared_expert_gate')").entries) == 2
    with pytest.raises(RecipeError, match="at most 1 works, or exclude='shared_expert_gate'"):
        resolve(model, "LoRA(rank=2, target=('linear', 'shared_expert_gate'))")


def test_heads_of_rows_by_head():
    """A row of GPT-NeoX's fused bias belongs to the head of its block, whichever part it is of."""
    found = torch.full((48,), -1)
    for site in (s for s in find_sites(odd("gpt_neox")) if s.rows and s.layer == 0):
        _number(found, 0, site.rows, 4)
    assert found.tolist() == [row // 12 for row in range(48)]


@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_an_adapter_reads_what_entered_with_the_same_tokens(form):
    """Pegasus-X enters its attention with the text and then with global tokens, and leaves it the other way round."""
    model = odd("pegasus_x")
    entered, seen = [], []
    block = model.model.encoder.layers[0].self_attn
    block.q_proj.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    sm.attach(model, f"Adapter('attention', layers=0, width=3, form={form!r})")
    edit = block.out_proj.edits["0"]
    after = edit.after
    edit.after = lambda x, y, base=None: (seen.append((x, y)), after(x, y, base))[1]
    logits(model, "pegasus_x")
    assert len(entered) == len(seen) == 2
    wanted = entered[::-1] if form == "parallel" else [y for _, y in seen]
    assert all(torch.equal(x, other) for (x, _), other in zip(seen, wanted, strict=True))
