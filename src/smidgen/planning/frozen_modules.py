"""What lies below the lowest edit: it never changes, so it stays in eval mode and needs no gradient."""

from __future__ import annotations

from torch import nn

from smidgen.planning.plans import Plan
from smidgen.sites.discovery import find_blocks
from smidgen.sites.module_kinds import reversible_stacks
from smidgen.sites.roles import within


def frozen_prefix(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Modules that are computed before anything trained, in whole; empty if the embeddings are edited.

    Stacks come in order of registration (encoder first): a stack without edits is frozen whole, the first one with
    edits is frozen below its lowest, what comes after it is not. A stack that is computed again on the way back asks
    for train mode in all of its blocks.
    """
    if plan.lowest == "embeddings":
        return []
    lowest: dict[str, int] = {}
    for site in plan.places:
        if site.layer is not None:
            lowest[site.stack] = min(site.layer, lowest.get(site.stack, site.layer))
    stacks = find_blocks(model)
    frozen: list[nn.Module] = _before(model, next(iter(stacks), ""))
    again = reversible_stacks(model)
    for stack, blocks in stacks.items():
        if stack in lowest and any(within(stack, path) for path in again):
            break
        frozen += blocks[: lowest.get(stack, len(blocks))]
        if stack in lowest:
            break
    return frozen


def _before(model: nn.Module, stack: str) -> list[nn.Module]:
    """Leaf modules that are registered before a stack: the embeddings and what belongs to them."""
    found: list[nn.Module] = []
    for path, module in model.named_modules():
        if path == stack:
            return found
        if not any(True for _ in module.children()):
            found.append(module)
    return []
