"""requantise: the alternating steps of LoftQ and QPiSSA, which write a base's codes before anything is attached."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smidgen.common.errors import PlanError
from smidgen.common.wrappers import bare
from smidgen.methods.capabilities import Merges, StartsFromOriginal
from smidgen.planning.entry import Entry
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import refuse_attached
from smidgen.recipe.recipe import Recipe, Term
from smidgen.sites.quantised.maps import own_weight, rewrite
from smidgen.sites.quantised.originals import originals_closed, originals_of
from smidgen.sites.weight_view import put_back, seen_from

STARTS = ("zero", "pissa")


def requantise(
    model: nn.Module, recipe: str | Term | Recipe, *, steps: int = 5, start: str = "zero"
) -> dict[str, tuple[float, ...]]:
    """Write codes into a quantised base that leave to `LoftQ` in the recipe what it can make up for.

    Each step quantises W less the product of low rank so far, and takes the product anew from what is lost then (Li et
    al. 2023, arXiv:2310.08659, algorithm 1). A quantiser scales by the largest value of a block, so a step can be worse
    than the one before: the best is kept. The base is another one afterwards, with a fingerprint of its own: save it
    with the delta (`model.save_pretrained`). Attach the recipe next.

    Args:
        model: a quantised base with nothing attached, from `smidgen.load`.
        recipe: with LoftQ; other terms are left aside.
        steps: how many times.
        start: what the first step leaves out of W: "zero", nothing, as LoftQ; "pissa", the principal part of W, as
            Meng et al. 2024 (arXiv:2404.02948, section 4) do for a quantised PiSSA.

    Returns:
        Path of each map -> after 0, 1, ... steps, the least error so far: |W - Q - s B A| over |W|. After 0 steps, that
        of the base as it was, without any product.

    Raises:
        PlanError: nothing in the recipe starts at what was lost, or the base is not quantised.
    """
    refuse_attached(model)
    model = bare(model)
    if type(steps) is not int or steps < 1:
        raise PlanError(f"steps={steps!r} must be a whole number of at least 1")
    if start not in STARTS:
        raise PlanError(f"start={start!r} is not one of {', '.join(STARTS)}")
    plan = resolve(model, recipe)
    maps: dict[str, list[Entry]] = {}
    for entry in plan.entries:
        if (
            isinstance(entry.method, StartsFromOriginal)
            and own_weight(model.get_submodule(entry.site.path)) is not None
        ):
            maps.setdefault(entry.site.path, []).append(entry)
    originals = originals_of(model, plan.recipe)
    if originals is None or not maps:
        raise PlanError(f"{plan.recipe} starts nowhere at what was lost: it takes LoftQ(...) and a quantised base")
    found = {}
    with originals_closed(model), torch.no_grad():
        for path, entries in maps.items():
            module = model.get_submodule(path)
            weight = own_weight(module)
            assert weight is not None
            original = originals.weight(path, (weight.shape[0], weight.shape[1])).to(weight)
            found[path] = _alternate(module, original, entries, steps, start)
    return found


def _alternate(module: nn.Module, original: Tensor, entries: list[Entry], steps: int, start: str) -> tuple[float, ...]:
    """Write the best codes into one map; the least errors so far."""

    def quantised(left: Tensor) -> Tensor:
        rewrite(module, left)
        weight = own_weight(module)
        assert weight is not None
        return weight

    length = original.norm()
    weight = own_weight(module)
    assert weight is not None
    errors, best, least = [float((original - weight).norm() / length)], original, float("inf")
    product = torch.zeros_like(original)
    if start == "pissa":
        product = _product(entries, original, torch.zeros_like(original))
    for _ in range(steps):
        left = original - product
        weight = quantised(left)
        product = _product(entries, original, weight)
        error = float((original - weight - product).norm() / length)
        if error < least:
            best, least = left, error
        errors.append(min(errors[-1], error))
    quantised(best)
    return tuple(errors)


def _product(entries: list[Entry], original: Tensor, weight: Tensor) -> Tensor:
    """What the methods start with on a base of this weight, as a change of the weight; their sites share no rows."""
    product = torch.zeros_like(original)
    for entry in entries:
        method, site = entry.method, entry.site
        assert isinstance(method, StartsFromOriginal)
        assert isinstance(method, Merges)
        p = method.from_original({}, seen_from(site, weight, None), seen_from(site, original, None)["weight"], site)
        part = seen_from(site, product, None)["weight"]
        product, _ = put_back(site, (product, None), method.merge(p, part, None, site))
    return product
