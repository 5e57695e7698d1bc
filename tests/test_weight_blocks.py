"""Hydra, MiSS and BAT: their formulas in plain loops, counts that were published, and HF PEFT's own layers."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForSequenceClassification

import smidgen as sm
from smidgen.common.errors import RecipeError
from smidgen.methods.low_rank.bat import BAT
from smidgen.methods.low_rank.hydra import Hydra
from smidgen.methods.low_rank.lora import LoRA
from smidgen.methods.low_rank.miss import MiSS
from smidgen.ports.attachment_record import trained_parameters
from smidgen.sites.site import LinearSite
from smidgen.testing.suite import case
from tests import helpers as h


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def site(width_in, width_out):
    """A linear site of these widths."""
    model = h.bert().double()
    found = next(
        entry.site
        for entry in sm.plan(model, "LoRA(rank=2, target='linear')").entries
        if isinstance(entry.site, LinearSite)
    )
    return replace(found, width_in=width_in, width_out=width_out)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Hydra


def hydra_tensors(rank, sequential, wide=6, out=4):
    return {"A": drawn(rank, wide), "B": drawn(out, rank), "C": drawn(sequential, out), "D": drawn(out, sequential)}


def test_hydra_is_the_formula_and_folds_exactly():
    method, place = Hydra(rank=2, sequential=3, alpha=3.0), site(6, 4)
    p, W, b, x = hydra_tensors(2, 3), drawn(4, 6), drawn(4), drawn(5, 6)
    found = method.after(p, x, F.linear(x, W, b), place)
    for row, value in zip(x, found, strict=True):
        given = W @ row + b
        wanted = given + 1.5 * p["B"] @ (p["A"] @ row) + 1.5 * p["D"] @ (p["C"] @ given)
        torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(F.linear(x, *method.merge(p, W, b, place)), found)


def test_hydra_without_the_branch_behind_is_lora():
    place, W, x = site(6, 4), drawn(4, 6), drawn(5, 6)
    p = {key: value for key, value in hydra_tensors(2, 1).items() if key in "AB"}
    y = x @ W.T
    hydra, lora = Hydra(rank=2, sequential=0, alpha=3.0), LoRA(rank=2, alpha=3.0)
    assert torch.equal(hydra.after(p, x, y, place), lora.after(p, x, y, place))
    assert hydra.init(place).keys() == {"A", "B"}


def test_the_branch_behind_stays_within_what_the_weight_reads():
    """D C W reads no input that W does not; a parallel branch does."""
    W = drawn(4, 2) @ drawn(2, 6)
    outside = torch.linalg.svd(W).Vh[2:]  # inputs that W does not read
    p, place = hydra_tensors(2, 3), site(6, 4)
    behind, _ = Hydra(rank=0, sequential=3).merge(p, W, None, place)
    torch.testing.assert_close((behind - W) @ outside.T, torch.zeros(4, 4, dtype=torch.float64))
    both, _ = Hydra(rank=2, sequential=3).merge(p, W, None, place)
    assert ((both - W) @ outside.T).abs().max() > 0.1


def roberta_base():
    with torch.device("meta"):
        return RobertaForSequenceClassification(RobertaConfig(vocab_size=50265))


def test_hydra_has_the_papers_count():
    """0.33 M on RoBERTa-base: 12 maps of 3,072 to 768, ranks 4 and 8."""
    assert sm.plan(roberta_base(), "Hydra()").trained == 12 * (4 * (3072 + 768) + 8 * 2 * 768) == 331_776


# MiSS


@pytest.mark.parametrize(("wide", "mini"), [(6, None), (8, None), (7, None), (6, 2)])
def test_miss_is_the_formula_group_by_group(wide, mini):
    method, place = MiSS(rank=3, mini=mini), site(wide, 4)
    D, W, x = drawn(3, mini or 4), drawn(4, wide), drawn(5, wide)
    whole = torch.stack([D[:, o % (mini or 4)] for o in range(4)], dim=1)
    wanted = W.clone()
    for o in range(4):
        for i in range(wide):
            wanted[o, i] += whole[i % 3, o]
    merged, _ = method.merge({"D": D}, W, None, place)
    torch.testing.assert_close(merged, wanted)
    torch.testing.assert_close(method.after({"D": D}, x, x @ W.T, place), x @ wanted.T)
    assert torch.linalg.matrix_rank(merged - W) <= 3


# BAT


def test_bat_is_the_formula_block_by_block():
    method, place = BAT(rank=2), site(6, 4)
    M, W, b, x = drawn(2, 2, 2), drawn(4, 6), drawn(4), drawn(5, 6)
    wanted = W.clone()
    for j in range(2):
        for k in range(3):
            block = W[2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
            wanted[2 * j : 2 * j + 2, 2 * k : 2 * k + 2] = block + block @ M[j] + M[j]
    merged, bias = method.merge({"M": M}, W, b, place)
    torch.testing.assert_close(merged, wanted)
    assert bias is b
    found = method.after_with({"M": M}, x, F.linear(x, W, b), {"weight": W, "bias": b}, place)
    torch.testing.assert_close(found, F.linear(x, wanted, b))


def test_bat_changes_a_map_by_more_than_its_rank():
    W, place = drawn(12, 12), site(12, 12)
    changes = [
        method.merge({symbol: drawn(*shape)}, W, None, place)[0] - W
        for method, symbol, shape in ((BAT(rank=2), "M", (6, 2, 2)), (MiSS(rank=2), "D", (2, 12)))
    ]
    assert [int(torch.linalg.matrix_rank(change)) for change in changes] == [12, 2]


@pytest.mark.parametrize(
    ("recipe", "values"), [("MiSS(rank=8)", 8), ("BAT(rank=8)", 8), ("MiSS(rank=8, mini=16)", None)]
)
def test_counts_are_those_of_half_a_lora(recipe, values):
    """rank x width_out at each map: half of LoRA's where a map is square."""
    plan = sm.plan(roberta_base(), recipe)
    per_block = 4 * 768 + 3072 + 768
    assert plan.trained == 12 * (8 * per_block if values else 6 * 8 * 16)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("MiSS(rank=4, target=('query', 'value'))", {"init_weights": True}),
        ("MiSS(rank=4, mini=8, target=('query', 'value'))", {"init_weights": "mini", "mini_r": 8}),
        ("BAT(rank=4, target=('query', 'value'))", {"init_weights": "bat"}),
    ],
)
def test_hf_peft_computes_the_same(recipe, options):
    peft = pytest.importorskip("peft")
    subject = case(recipe)
    theirs = case(recipe).model
    subject.attach(perturb=0.1)
    config = peft.MissConfig(r=4, target_modules=["query", "value"], **options)
    wrapped = peft.get_peft_model(theirs, config).eval()
    values = trained_parameters(subject.model)
    with torch.no_grad():
        for name, block in wrapped.named_parameters():
            if "miss_block" in name:
                path = name.removeprefix("base_model.model.").partition(".miss_block")[0]
                (ours,) = (value for key, value in values.items() if key.startswith(f"{path}.edits."))
                block.copy_(ours)
        for name in ("classifier.weight", "classifier.bias"):
            wrapped.base_model.model.get_parameter(name).copy_(values[name])
    torch.testing.assert_close(subject.run(wrapped), subject.run(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("Hydra(rank=0, sequential=0)", "rank=0 and sequential=0 leave nothing to train"),
        ("Hydra(rank=-1)", "Hydra: rank=-1 must be"),
        ("Hydra(sequential=99)", "sequential=99 is above the width of what .* gives"),
        ("MiSS(rank=99)", "rank=99 is above the inputs of"),
        ("MiSS(mini=7)", "mini=7 does not divide the 16 outputs"),
        ("MiSS(alpha=2)", "the formula has no strength; leave it out"),
        ("BAT(rank=5)", r"rank=5 does not divide both sides of .* \(16 x 16\)"),
        ("BAT(alpha=2)", "the formula has no strength"),
    ],
)
def test_what_cannot_be_is_one_line(recipe, said):
    with pytest.raises(RecipeError, match=said) as error:
        sm.attach(h.bert(), recipe)
    assert "\n" not in str(error.value)
