"""LayerDrop (Fan et al. 2019, arXiv:1909.11556) where a step is counted: every layer is computed, which is the most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class EveryLayer(TorchDispatchMode):
    """Draws of one number, `torch.rand([])`, by which models in training skip a layer, are 1: none is skipped.

    A tensor without content could not tell, and the step could not be counted.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operator, or draw what computes the layer."""
        if func is torch.ops.aten.rand.default and not args[0]:  # its size: of no dimension
            return torch.tensor(1.0)
        return func(*args, **(kwargs or {}))
