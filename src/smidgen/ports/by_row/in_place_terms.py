"""What LN, BitFit and the like train in place, row by row.

The module computes with neutral terms, a gain of 1 and no bias, and a hook puts each row's in:

    norm: something * (gain_row + offset) + bias_row
    bias: (module without its bias) + bias_row
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.dtypes import master_dtype
from smidgen.common.hook_types import Args, first_of, like
from smidgen.planning.entry import Entry
from smidgen.ports.forward_state import Mix, state
from smidgen.sites.site import LinearSite, NormSite, module_at
from smidgen.sites.weight_view import channels_back, channels_last

InPlace = NormSite | LinearSite


def why_not_in_place(entry: Entry) -> str | None:
    """Why rows cannot have different values of what is trained in place; None if they can."""
    site, terms = entry.site, {term for term, _ in entry.terms}
    if entry.subsets:
        return "parts of tensors are trained, at places of their own"
    if isinstance(site, NormSite) and site.affine and terms <= {site.gain, site.bias}:
        return None
    if isinstance(site, LinearSite) and terms == {site.bias} and site.rows is None:
        return None
    return f"{', '.join(sorted(terms))} of {type(site).__name__} are trained in place"


class NeutralTerms:
    """The terms of one module, set aside and neutral in their place.

    Attributes:
        own: term -> the base's value (width,), in master precision.
    """

    def __init__(self, model: nn.Module, site: InPlace) -> None:
        self.site, self.module = site, module_at(model, site.path)
        names = (site.gain, site.bias) if isinstance(site, NormSite) else (site.bias,)
        terms = [term for term in names if term is not None and self.module._parameters.get(term) is not None]
        self.originals: dict[str, nn.Parameter] = {term: self.module._parameters[term] for term in terms}  # type: ignore[misc]
        self.own = {t: p.detach().to(master_dtype(p.dtype)) for t, p in self.originals.items()}
        self.handle: RemovableHandle | None = None

    def place(self) -> None:
        """Put the neutral terms and the hook on."""
        for term, original in self.originals.items():
            gain = isinstance(self.site, NormSite) and term == self.site.gain
            value = 1 - self.site.offset if gain and isinstance(self.site, NormSite) else 0.0
            self.module._parameters[term] = nn.Parameter(torch.full_like(original, value), requires_grad=False)
        self.handle = self.module.register_forward_hook(partial(terms_by_row, self), prepend=True)

    def remove(self) -> None:
        """The very originals again."""
        if self.handle is not None:
            self.handle.remove()
        for term, original in self.originals.items():
            self.module._parameters[term] = original

    def by_row(self, mix: Mix, term: str) -> Tensor:
        """A term of each row, (B, width); (width,) where all rows have the base's."""
        name, own = f"{self.site.path}.{term}", self.own[term]
        if not any(name in block.tables for block in mix.blocks):
            return own
        pieces = [block.tables[name] if name in block.tables else own.expand(block.size, -1) for block in mix.blocks]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def terms_by_row(terms: NeutralTerms, module: nn.Module, args: Args, output: object) -> object:
    """Forward hook, first of all, of a norm or a map whose terms are neutral."""
    y, rest = first_of(output)
    site, mix = terms.site, state().mixed()
    mix.check(y, site.path)
    y = channels_last(site, y)
    found: dict[str | None, Tensor] = {}
    for term in terms.originals:
        value = terms.by_row(mix, term)
        found[term] = value.view(len(value), *[1] * (y.ndim - 2), -1) if value.ndim == 2 else value
    gain, bias = found.get(getattr(site, "gain", None)), found.get(site.bias)
    if isinstance(site, NormSite) and gain is not None and site.offset:
        gain = gain + site.offset
    changed = y if gain is None else y * gain
    changed = changed if bias is None else changed + bias
    return like(output, channels_back(site, changed.to(y.dtype)), rest)
