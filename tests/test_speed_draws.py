"""Faster dropout: the same distribution, drawn otherwise."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import smidgen as sm
from smidgen.efficiency.fast_dropout import FastDropout, kept
from tests import helpers as h


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p):
    torch.manual_seed(0)
    mask, scale = kept(torch.Size((1000, 1001)), p)
    share = 1 - mask.double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / 1e6) ** 0.5
    assert abs((1 - 1 / scale) - p) < 1e-5
    assert set(mask.unique().tolist()) == {0, 1}


def test_neighbours_are_independent():
    """The four elements that one draw of 64 bits decides on, and those of neighbouring draws."""
    torch.manual_seed(0)
    mask = kept(torch.Size((1_000_000,)), 0.5)[0].double() - 0.5
    for lag in range(1, 9):
        assert abs((mask[lag:] * mask[:-lag]).mean().item() * 4) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_and_gradients_are_those_of_the_mask(dtype):
    x = (torch.rand(300, 50, dtype=dtype) + 0.1).requires_grad_()
    with FastDropout():
        y = torch.nn.Dropout(0.3)(x)
    fell = y == 0
    assert 0.25 < fell.float().mean() < 0.35
    assert y.dtype == dtype
    torch.testing.assert_close(
        y[~fell], (x / 0.7)[~fell].to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0
    )
    y.sum().backward()
    assert torch.equal(x.grad == 0, fell)
    assert x.grad.unique().numel() == 2


def test_generator_decides():
    x = torch.ones(64, 64)

    def draw(seed):
        torch.manual_seed(seed)
        with FastDropout():
            return F.dropout(x, 0.2)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends_and_eval_are_left_to_torch(p):
    x = torch.ones(8, 8)
    with FastDropout():
        assert torch.equal(F.dropout(x, p), F.dropout(x, p))
        assert torch.equal(F.dropout(x, 0.5, training=False), x)


@pytest.mark.parametrize("mask", ["bool", "float", None])
def test_attention_means_the_same(mask):
    """Mean over many draws against attention without dropout, as near as torch's own is."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    given = {"bool": torch.ones(2, 1, 5, 5).bool().tril(), "float": torch.randn(2, 2, 5, 5).double(), None: None}[mask]
    wanted = F.scaled_dot_product_attention(query, key, value, given)

    def off(context, scale=None):
        with context:
            drawn = [F.scaled_dot_product_attention(query, key, value, given, 0.3, scale=scale) for _ in range(3000)]
        return (torch.stack(drawn).mean(0) - wanted).abs().max().item()

    assert off(FastDropout()) < 2 * off(nullcontext()) + 0.05
    assert off(FastDropout(), scale=2.0) > 0.2


def test_attention_without_dropout_is_torchs_own():
    query, key, value = (torch.randn(2, 2, 5, 4) for _ in range(3))
    with FastDropout():
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, value, is_causal=True))


def test_fit_can_do_without(tmp_path):
    """Another draw gives another delta; without dropout both are one."""
    task = h.task(tmp_path)
    options = {"epochs": 1, "batch_size": 8, "progress": False, "max_length": 16, "tokenizer": h.tokenizer()}

    def fitted(dropout, **more):
        return sm.fit(h.bert(dropout=dropout), "LN()", task, **options, **more).tensors

    same = [fitted(0.0), fitted(0.0, fast_dropout=False)]
    other = [fitted(0.3), fitted(0.3, fast_dropout=False), fitted(0.3)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert all(torch.equal(other[0][name], other[2][name]) for name in other[0])
    assert any(not torch.equal(other[0][name], other[1][name]) for name in other[0])
