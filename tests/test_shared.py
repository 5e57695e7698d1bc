"""Tensors shared by sites: owned once, counted once, and their gradient is the sum over the sites."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import smidgen as sm
from smidgen.common.errors import PlanError, RecipeError
from smidgen.importance.targets import find_targets
from smidgen.methods.functional import kronecker_sum
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.ports.edit import Edit
from smidgen.recipe.recipe import Term
from smidgen.studies.experiments.model_components import components, part_of
from smidgen.testing.cases import inputs_for, shake, tiny


def t5_base():
    with torch.device("meta"):
        return T5ForConditionalGeneration(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))


@pytest.mark.parametrize(
    ("recipe", "values"),
    [("Compacter(site='feed_forward') + LN()", 104_704), ("Compacter() + LN()", 161_728)],
)
def test_compacter_has_the_counts_of_its_paper(recipe, values):
    assert sm.plan(t5_base(), recipe).trained == values  # arXiv:2106.04647, abstract: 0.047 %


def test_kronecker_sum_is_torch_kron():
    left, right = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    wanted = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    torch.testing.assert_close(kronecker_sum(left, right), wanted)
    assert not torch.allclose(kronecker_sum(right, left), wanted)  # the order matters


def test_compacter_is_its_formula_in_a_plain_loop():
    site = next(row.site for row in sm.plan(tiny("bert"), "Compacter(width=8)").entries if row.site.kind == "attention")
    method = sm.parse("Compacter(width=8, blocks=4, rank=2)").terms[0]
    p = {
        k: torch.randn(v.shape, dtype=torch.float64) for k, v in {**method.init(site), **method.shared([site])}.items()
    }
    f = torch.randn(5, 32, dtype=torch.float64)
    D = sum(torch.kron(p["S"][i], p["s"][i] @ p["t"][i]) for i in range(4))
    U = sum(torch.kron(p["S"][i], p["v"][i] @ p["w"][i]) for i in range(4))
    wanted = f + torch.nn.functional.gelu(f @ D + p["d"], approximate="tanh") @ U + p["u"]
    torch.testing.assert_close(method.after(p, f, f, site), wanted)


def test_a_shared_tensor_is_one_parameter_with_the_gradient_of_all_sites():
    model = sm.attach(tiny("bert"), "Compacter(width=8)")
    shake(trained_parameters(model).values())
    names = [name for name in model.state_dict() if name.endswith(".S")]
    assert names == ["edits.0-all.S"]
    edits = [m for m in model.modules() if isinstance(m, Edit) and m.pool]
    assert len(edits) == 4
    assert len({id(edit.tensors()["S"]) for edit in edits}) == 1
    shared = trained_parameters(model)["edits.0-all.S"]
    (whole,) = torch.autograd.grad(model(**inputs_for("bert")).logits.sum(), shared)
    parts = torch.zeros_like(whole)
    for edit in edits:  # each site alone sees the leaf, the others a copy
        edit.pool, pool = (copy.deepcopy(edit.pool[0]),), edit.pool
        leaf = edit.pool[0].S
        parts += torch.autograd.grad(model(**inputs_for("bert")).logits.sum(), leaf)[0]
        edit.pool = pool
    torch.testing.assert_close(parts, whole)


def test_shards_are_public_or_private():
    model = sm.attach(tiny("bert"), "MoS(rank=3, equivalent=2, private=1, shards=2, target='query')")
    p = trained_parameters(model)
    (name,) = (n for n in p if n.endswith(".P"))
    edits = [m for m in model.modules() if isinstance(m, Edit) and m.pool]
    used = [set(edit.I.tolist()) for edit in edits]
    public = (2 - 1) * 2 * 2
    assert all(len(places) == 3 * 2 for places in used)
    private = [{i for i in places if i >= public} for places in used]
    assert not private[0] & private[1]
    assert all(len(places) == 2 for places in private)
    assert used[0] & used[1], "no shard is shared"
    assert any(not torch.equal(edit.I, edit.J) for edit in edits), "A and B are drawn together"
    assert p[name].shape == (2 * 2 * 2, 32 // 2)


def test_mos_with_only_private_rows_is_lora_bit_for_bit():
    mos = sm.attach(tiny("bert"), "MoS(rank=2, equivalent=2, private=2, shards=1, target='query')")
    lora = sm.attach(tiny("bert"), "LoRA(rank=2, target='query')")
    shake(trained_parameters(mos).values())
    pools, pairs = trained_parameters(mos), trained_parameters(lora)
    P, Q = (next(t for n, t in pools.items() if n.endswith(end)) for end in (".P", ".Q"))
    with torch.no_grad():
        edits = [m for m in mos.modules() if isinstance(m, Edit) and m.pool]
        for layer, edit in enumerate(edits):
            for name, t in pairs.items():
                if f"layer.{layer}." in name:
                    t.copy_(P[edit.I] if name.endswith(".A") else Q[edit.J].T)
        for name in [n for n in pools if n in pairs]:
            pairs[name].copy_(pools[name])
    inputs = inputs_for("bert")
    assert torch.equal(mos.eval()(**inputs).logits, lora.eval()(**inputs).logits)


@pytest.mark.parametrize(("rank", "shards"), [(2, 1), (3, 2), (3, 4)])
def test_mos_trains_as_many_values_as_lora_of_the_equivalent_rank(rank, shards):
    model = tiny("bert")
    mos = sm.plan(model, f"MoS(rank={rank}, shards={shards}, equivalent=2)").trained
    assert mos == sm.plan(model, "LoRA(rank=2)").trained


def test_shared_indices_come_back_from_the_file_whatever_the_seed(tmp_path):
    model = tiny("bert")
    sm.attach(model, "MoS(rank=3)", seed=5)
    shake(trained_parameters(model).values())
    before = model.eval()(**inputs_for("bert")).logits
    delta = sm.detach(model)
    delta.save(tmp_path)
    sm.attach(model, sm.Delta.load(tmp_path))
    assert torch.equal(model.eval()(**inputs_for("bert")).logits, before)
    sm.detach(model)
    with sm.attached(model, "MoS(rank=3)", seed=6):
        other = [edit.I for edit in model.modules() if hasattr(edit, "I")]
    assert any(not torch.equal(a.int(), b) for a, b in zip(other, _indices(delta), strict=True))


def _indices(delta):
    return [t for name, t in delta.tensors.items() if name.endswith(".I.indices")]


def test_what_is_shared_is_scored_example_by_example():
    _, rest = find_targets(sm.attach(tiny("bert"), "Compacter(width=8, layers=1)"))
    assert rest == ["edits.0-all.S"]  # a rule that looks at one module would miss the other sites


def test_reports_know_what_is_shared():
    model = tiny("bert")
    parts = components(model)
    names = sm.plan(model, "Compacter(width=8)").shapes
    found = {part_of(parts, name)[0].component for name in names if ".edits." in f".{name}"}
    assert found == {"attention out", "ff out", "other"}


def test_every_method_is_reached_by_its_name():
    for name, cls in Term.registry.items():
        assert getattr(sm, name) is cls
        assert cls.__module__.partition(".")[0] != "smidgen" or name in dir(sm), name
    with pytest.raises(AttributeError, match="No smidgen attribute LoRa"):
        _ = sm.LoRa


def test_a_part_of_what_is_shared_can_be_kept(tmp_path):
    model = tiny("bert")
    sm.attach(model, "Compacter(width=8, blocks=2) | Select('random', keep=0.5)")
    shake(trained_parameters(model).values())
    before = model.eval()(**inputs_for("bert")).logits
    sm.detach(model).save(tmp_path)
    sm.attach(model, sm.Delta.load(tmp_path))
    assert torch.equal(model(**inputs_for("bert")).logits, before)


def test_a_bare_model_owns_what_is_shared_and_gives_it_back():
    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48))
    sm.attach(model, "Compacter(width=8) + PromptTuning(length=3)")
    assert "edits.0-all.S" in dict(attachment(model).trained())
    sm.detach(model)
    assert not hasattr(model, "edits")


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ("Compacter(width=10, blocks=4)", RecipeError, "blocks=4 does not divide width=10"),
        ("Compacter(width=9, blocks=3)", PlanError, "blocks=3 does not divide the width"),
        ("MoS(shards=3)", PlanError, "shards=3 does not divide the width 32"),
        ("MoS(rank=8)", PlanError, "at most 3 works"),
        ("MoS(private=3)", RecipeError, "at most 2 works"),
        ("MoS(private=2)", RecipeError, "rank must be 2, not 4"),
    ],
)
def test_sizes_that_do_not_fit_are_one_clear_line(recipe, error, words):
    with pytest.raises(error, match=words) as caught:
        sm.plan(tiny("bert"), recipe)
    assert "\n" not in str(caught.value)
