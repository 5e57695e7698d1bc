"""A method of one's own: scale the output of query and value maps. docs/new-method.md explains each line."""

import os
from dataclasses import dataclass

import torch

import smidgen as sm
from smidgen.testing.suite import CHECKS, run_check


@dataclass(frozen=True)
class OutScale(sm.Method):
    """Scale the outputs of linear maps.

    Lian et al. 2022, Scaling and Shifting Your Features, arXiv:2210.08823, section 3 (without the shift).
        y = s * (W x + b)        W_merged = diag(s) W,  b_merged = s * b
    Shapes:
        s: (width_out,)  ones
    Departures: the paper scales and shifts after every operation.
    """

    def acts(self, site):
        return site.kind == "linear" and not site.roles.isdisjoint(("query", "value"))

    def init(self, site):
        return {"s": torch.ones(site.width_out)}

    def after(self, p, x, y, site):
        return p["s"] * y

    def merge(self, p, weight, bias, site):
        return p["s"][:, None] * weight, None if bias is None else p["s"] * bias


for check in ("acts", "merges") if "SMIDGEN_EXAMPLE_FAST" in os.environ else CHECKS:
    run_check(check, OutScale(), "llama")
model, _ = sm.load("minilm")
print(str(sm.plan(model, sm.parse("OutScale() + LN()"))).splitlines()[-1])
