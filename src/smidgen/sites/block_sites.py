"""Blocks and stacks as sites: hidden states on their way from block to block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from smidgen.sites.discovery import find_blocks, shares_layers
from smidgen.sites.site import BlockSite, NormSite, Site, StackSite


def find_block_sites(model: nn.Module, sites: Sequence[Site]) -> list[BlockSite]:
    """Each block whose width its norms tell, in order; none in a model that applies a block more than once."""
    if shares_layers(model):
        return []
    found: list[BlockSite] = []
    for stack, paths, widths in _stacks(model, sites):
        blocks = enumerate(zip(paths, widths, strict=True))
        found += [
            BlockSite(path, layer=layer, depth=len(paths), stack=stack, width=width, blocks=paths)
            for layer, (path, width) in blocks
            if width
        ]
    return found


def find_stack_sites(model: nn.Module, sites: Sequence[Site]) -> list[StackSite]:
    """Each stack of blocks of one width."""
    if shares_layers(model):
        return []
    return [
        StackSite(paths[-1], layer=0, depth=len(paths), stack=stack, width=widths[0], blocks=paths)
        for stack, paths, widths in _stacks(model, sites)
        if widths[0] and len(set(widths)) == 1
    ]


def _stacks(model: nn.Module, sites: Sequence[Site]) -> list[tuple[str, tuple[str, ...], list[int]]]:
    """Path of each stack, paths of its blocks, and the width of each one's first norm; 0 for one that has none."""
    paths = {id(module): path for path, module in model.named_modules()}
    norms: dict[tuple[str, int | None], int] = {}
    for site in sites:
        if isinstance(site, NormSite) and "qk" not in site.roles:
            norms.setdefault((site.stack, site.layer), site.width_out)
    return [
        (stack, tuple(paths[id(block)] for block in blocks), [norms.get((stack, i), 0) for i in range(len(blocks))])
        for stack, blocks in find_blocks(model).items()
    ]
