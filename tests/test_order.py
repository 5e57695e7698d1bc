"""Several methods at one module act from left to right: a later one sees what the earlier ones did; so does `merge`."""

import pytest
import torch

import smidgen as sm
from smidgen.ports.attachment_record import trained_parameters
from smidgen.testing.suite import shake
from tests import helpers as h

QUERY, OUT = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.output.dense"


def lora(p, i, x):
    return x @ p[f"{i}.A"].T @ p[f"{i}.B"].T


def lora_then_ssf(W, b, p, x):
    return p["1.g"] * (x @ W.T + b + lora(p, 0, x)) + p["1.t"]


def ssf_then_lora(W, b, p, x):
    return p["0.g"] * (x @ W.T + b) + p["0.t"] + lora(p, 1, x)


def gain_then_offset(W, b, p, x):
    return (x + p["1.v"]) * (1 + p["0.A"]) @ W.T + b


def offset_then_gain(W, b, p, x):
    return (x * (1 + p["1.A"]) + p["0.v"]) @ W.T + b


SSF = "SSF(target='query', norms=False)"
ORDERS = {
    f"LoRA(rank=2, alpha=2) + {SSF}": (QUERY, lora_then_ssf),
    f"{SSF} + LoRA(rank=2, alpha=2)": (QUERY, ssf_then_lora),
    "LoFiT(form='gain') + LoFiT()": (OUT, gain_then_offset),
    "LoFiT() + LoFiT(form='gain')": (OUT, offset_then_gain),
}


def check(recipe, path, formula):
    """The module, attached and merged, is what the formula says."""
    model = h.bert().double()
    module = model.get_submodule(path)
    W, b = module.weight.detach().clone(), module.bias.detach().clone()
    sm.attach(model, recipe)
    shake(trained_parameters(model).values(), 0.5)
    trained = trained_parameters(model).items()
    p = {name.removeprefix(f"{path}.edits."): value.detach() for name, value in trained if name.startswith(path)}
    x = torch.randn(3, W.shape[1], dtype=W.dtype, generator=torch.Generator().manual_seed(1))
    wanted = formula(W, b, p, x)
    torch.testing.assert_close(module(x), wanted)
    torch.testing.assert_close(sm.merge(model).get_submodule(path)(x), wanted)


@pytest.mark.parametrize("recipe", ORDERS)
def test_left_to_right(recipe):
    check(recipe, *ORDERS[recipe])


@pytest.mark.parametrize("recipe", ORDERS)
def test_the_other_order_would_be_seen(recipe):
    path, _ = ORDERS[recipe]
    first, second = recipe.split(" + ")
    _, other = ORDERS[f"{second} + {first}"]

    def renumbered(W, b, p, x):
        return other(W, b, {f"{1 - int(name[0])}{name[1:]}": value for name, value in p.items()}, x)

    with pytest.raises(AssertionError, match="not close"):
        check(recipe, path, renumbered)
