"""A method of one's own: scale the output of every query and value map. docs/new-method.md explains each line."""

import os
from dataclasses import dataclass
from typing import ClassVar

import torch

import smidgen as sm
from smidgen.testing import check_method, run_check


@dataclass(frozen=True)
class OutScale(sm.Method):
    """Scale the outputs of linear maps.

    Lian et al. 2022, Scaling and Shifting Your Features, arXiv:2210.08823, section 3.2 (without the shift).

        y = s * (W x + b)        W_merged = diag(s) W,  b_merged = s * b

    Shapes:
        s: (width_out,)  ones
    Departures: the paper scales after every operation; here at two.
    """

    lr: ClassVar[float] = 3e-3

    def acts(self, site):
        return site.kind == "linear" and bool(site.roles & {"query", "value"})

    def init(self, site):
        return {"s": torch.ones(site.width_out)}

    def after(self, p, x, y, site):
        return p["s"] * y

    def merge(self, p, weight, bias, site):
        return p["s"][:, None] * weight, None if bias is None else p["s"] * bias


print("checks run:", run_check("merges", OutScale(), "bert") if "SMIDGEN_EXAMPLE_FAST" in os.environ else check_method(OutScale()))
