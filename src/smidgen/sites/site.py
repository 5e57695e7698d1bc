"""A site: one place in a model that can be tuned, with its role, widths and layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from smidgen.sites.fused_rows import Rows
from smidgen.sites.module_kinds import is_bias

_ATTENTION = ("attention", "query", "key", "value", "attention_out")


ROLES = ("embedding", *_ATTENTION, "ff_in", "ff_out", "ff", "block", "norm", "final", "qk", "output")


@dataclass(frozen=True)
class Site:
    """A module that owns parameters, some output rows of one (`rows`), a sublayer (`entry`), or heads (`heads`).

    A slice has its one own role (query, key, value, ff_in) and nothing else; what covers the whole fused map
    (attention, ff, block) is on the whole site, so that no role selects the same weights twice. `axis` is where the
    module's input and output have their widths; methods see them last.

    Attributes:
        affine: of a norm, whether its output is (gain + `offset`) * something + bias by channel, so that what scales
            and shifts the output folds into the two.
    """

    path: str
    kind: str
    roles: frozenset[str]
    terms: tuple[tuple[str, tuple[int, ...]], ...]
    layer: int | None = None
    depth: int = 0
    stack: str = ""
    width_in: int = 0
    width_out: int = 0
    rows: Rows | None = None
    transposed: bool = False
    gain: str | None = None
    bias: str | None = None
    entry: str = ""
    heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    axis: int = -1
    affine: bool = False
    offset: float = 0.0

    @property
    def name(self) -> str:
        """The path, with the part in brackets for a slice: `h.0.attn.c_attn[query]`, `mlp.Wi[ff_in1]`."""
        if self.rows is None:
            return self.path
        (role,) = self.roles
        return f"{self.path}[{role}{self.rows.start // self.width_out if role == 'ff_in' else ''}]"

    @property
    def biases(self) -> tuple[str, ...]:
        """The terms that are biases: that of the map or norm, and those that a module has beside its maps."""
        return tuple(term for term, _ in self.terms if term == self.bias or is_bias(term))


def module_at(model: nn.Module, path: str) -> nn.Module:
    """`get_submodule` for a path that is known to exist: a switch of deltas looks up a hundred."""
    found: Any = model
    for name in path.split(".") if path else ():
        found = found._modules[name]
    module: nn.Module = found
    return module
