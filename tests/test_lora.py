"""LoRA's scale and rates."""

import math

import pytest
import torch

import smidgen as sm
from smidgen.attachment import trained_parameters
from smidgen.errors import RecipeError
from tests import helpers as h


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (16, 8.0), (16, None)])
def test_rslora_divides_by_the_root_of_the_rank(rank, alpha):
    wanted = (rank if alpha is None else alpha) / math.sqrt(rank)
    assert sm.LoRA(rank=rank, alpha=alpha, scaling="rslora").scale == wanted
    assert sm.LoRA(rank=rank, alpha=wanted * rank).scale == pytest.approx(wanted)


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
