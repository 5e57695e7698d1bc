"""LoRA's scale and rates."""

import json
import math
from pathlib import Path

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import RecipeError
from smidgen.methods.low_rank.base import LowRank
from smidgen.methods.low_rank.dora import DoRA
from smidgen.methods.low_rank.mos import MoS
from smidgen.methods.low_rank.pissa import PiSSA
from smidgen.methods.low_rank.triadapt import TriAdaptLoRA
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Term
from tests import helpers as h

LOW_RANK = [cls for _, cls in sorted(Term.registry.items()) if issubclass(cls, LowRank)]


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (16, 8.0), (16, None)])
def test_rslora_divides_by_the_root_of_the_rank(rank, alpha):
    wanted = (rank if alpha is None else alpha) / math.sqrt(rank)
    assert sm.LoRA(rank=rank, alpha=alpha, scaling="rslora").scale == wanted
    assert sm.LoRA(rank=rank, alpha=wanted * rank).scale == pytest.approx(wanted)


@pytest.mark.parametrize("rank", [1, 4, 8, 64, 256])
def test_the_default_strength_does_not_follow_the_rank(rank):
    """s = 16 / rank, or 16 / sqrt(rank) for rsLoRA: never a scale that grows with the rank."""
    for cls in (sm.LoRA, DoRA):
        assert cls(rank=rank).scale == 16 / rank
        assert cls(rank=rank, scaling="rslora").scale == pytest.approx(16 / math.sqrt(rank))
    assert MoS(rank=rank).scale == TriAdaptLoRA(rank=rank).scale == 16 / rank
    assert PiSSA(rank=rank).scale == 1  # its authors take alpha = rank


@pytest.mark.parametrize("cls", LOW_RANK, ids=lambda c: c.__name__)
def test_without_a_word_no_scale_grows_with_the_rank(cls):
    scales = [cls(rank=rank).scale for rank in (2, 4, 8, 64, 512)]
    assert scales == sorted(scales, reverse=True)


@pytest.mark.parametrize("rank", [2, 8])
def test_a_file_from_before_keeps_its_strength(rank, tmp_path):
    """alpha was None by default and meant alpha = rank; files list every field, so they say so."""
    old = json.loads((Path(__file__).parent / "data" / "terms_format_1.json").read_text())
    old = [{**term, "rank": rank} for term in old if "alpha" in term]
    assert len(old) == len(LOW_RANK)
    recipe = sm.Recipe.from_json(sorted(old, key=lambda term: term["name"] != "LoRA"))
    assert [term.alpha for term in recipe] == [None] * len(old)
    assert [term.scale for term in recipe] == [1.0] * len(old)
    assert sm.parse(str(recipe)) == recipe
    assert "alpha=None" in str(recipe)
    model = h.bert()
    path = model.bert.encoder.layer[0].attention.self.query
    weight = path.weight.detach().clone()
    sm.attach(model, sm.Recipe(recipe.terms[:1]))
    found = trained_parameters(model)
    (a,), (b,) = (
        [p for n, p in found.items() if n.endswith(s) and "0.attention.self.query" in n] for s in (".A", ".B")
    )
    torch.nn.init.normal_(b)
    delta = sm.Delta.of(model)
    delta.save(tmp_path)
    sm.detach(model)
    merged = sm.merge(model, sm.Delta.load(tmp_path)).bert.encoder.layer[0].attention.self.query.weight
    torch.testing.assert_close(merged, weight + b @ a)


def test_rslora_is_lora_with_another_alpha():
    model = h.bert()
    outputs = []
    for recipe in ("LoRA(rank=4, alpha=8, scaling='rslora')", "LoRA(rank=4, alpha=16)"):
        with sm.attached(model, recipe):
            for name, p in trained_parameters(model).items():
                if name.endswith(".B"):
                    torch.nn.init.ones_(p)
            outputs.append(h.logits(model))
    torch.testing.assert_close(*outputs)


def test_lora_plus_gives_b_a_rate_of_its_own():
    model = h.bert()
    sm.attach(model, "LoRA(rank=2, lr_ratio=16) + LN()")
    groups = {group["name"]: group for group in sm.parameter_groups(model)}
    a, b = groups["LoRA(rank=2, lr_ratio=16)"], groups["LoRA(rank=2, lr_ratio=16) x 16"]
    assert {name[-1] for name in a["names"]} == {"A"}
    assert {name[-1] for name in b["names"]} == {"B"}
    assert b["lr"] == 16 * a["lr"] == 16 * sm.LoRA.lr
    assert groups["LN()"]["lr"] == sm.LN.lr
    assert [g["lr"] for g in sm.parameter_groups(model, lr=1e-4)[:2]] == pytest.approx([1e-4, 1.6e-3])


def test_one_group_where_the_rates_are_equal():
    model = h.bert()
    sm.attach(model, "LoRA(rank=2)")
    assert [group["name"] for group in sm.parameter_groups(model)] == ["LoRA(rank=2)", "head"]


def test_fit_moves_b_further(tmp_path):
    task, options = h.task(tmp_path / "t"), {"epochs": 1, "batch_size": 8, "progress": False, "max_length": 16}
    moved = []
    for ratio in (1, 16):
        delta = sm.fit(h.bert(), f"LoRA(rank=2, lr_ratio={ratio})", task, tokenizer=h.tokenizer(), **options)
        moved.append(sum(float(t.abs().sum()) for name, t in delta.tensors.items() if name.endswith(".B")))
    assert moved[1] > 4 * moved[0]


@pytest.mark.parametrize("text", ["LoRA(scaling='rs')", "LoRA(lr_ratio=0)", "LoRA(lr_ratio=-1.0)"])
def test_bad_fields(text):
    with pytest.raises(RecipeError):
        sm.parse(text)
