"""How many positions a plan's prompts take."""

from __future__ import annotations

import torch

from smidgen.methods.base import Method
from smidgen.methods.capabilities import AddsTokens
from smidgen.sites.site import InputSite


def prompt_length(method: Method, site: InputSite) -> int:
    """How many vectors a method adds."""
    assert isinstance(method, AddsTokens)  # or it would have no row here
    with torch.device("meta"):
        return len(method.tokens(method.settle(method.init(site), site), site))
