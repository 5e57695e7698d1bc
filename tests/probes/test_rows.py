"""Probe: 8 rows of one batch, 8 different tensors of a method of one's own, equal to one at a time; no line in src/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smidgen as sm
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Term
from smidgen.testing.cases import shake
from tests import helpers as h
from tests.probes.own_row_method import Swivel

SOURCE = Path(sm.__file__).parent
Term.registry.pop("Swivel")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(Term.registry, "Swivel", Swivel)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_eight_rows_of_eight(name):
    model = {"bert": h.bert, "llama": h.causal, "gpt2": lambda: h.causal("gpt2")}[name]().double()
    deltas, batch = [], h.ids(rows=8)
    for seed in range(8):
        sm.attach(model, Swivel())
        shake(trained_parameters(model).values(), 0.5, seed=seed)
        deltas.append(sm.detach(model))
    alone = []
    for row, delta in enumerate(deltas):
        with sm.attached(model, delta), torch.no_grad():
            alone.append(model(**{k: v[row : row + 1] for k, v in batch.items()}).logits[0])
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    with h.untouched(model), sm.attached_rows(model, [deltas[i] for i in order]), torch.no_grad():
        with sm.rows_from([order.index(i) for i in range(8)]):
            mixed = model(**batch).logits
        with sm.rows_from([order.index(0)] * 8):
            other = model(**batch).logits
    text = batch["attention_mask"].bool() if mixed.ndim == 3 else slice(None)
    assert torch.allclose(mixed[text], torch.stack(alone)[text], atol=1e-12)
    assert not torch.allclose(mixed[1:], other[1:])


def test_no_line_in_src_knows_it():
    assert not [path for path in SOURCE.rglob("*.py") if "Swivel" in path.read_text()]
