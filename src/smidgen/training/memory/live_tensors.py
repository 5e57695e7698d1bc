"""Live: the bytes of all tensors alive, and the most that were alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Inside, the storage of every tensor that an operator makes is counted from its birth to its end.

    Works on tensors without content too. What an operator allocates and frees within itself is not seen.

    Attributes:
        now: bytes alive.
        high: the most bytes alive at once since the start, or since it was set to `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.high = 0
        self._sizes: dict[int, int] = {}

    def add(self, *tensors: Tensor) -> None:
        """Count the storages of tensors, each once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata  # its address, which is used again only after `_drop`
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.high = max(self.high, self.now)
                weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operator and count what it gives."""
        result = func(*args, **(kwargs or {}))
        self.add(*(value for value in tree_iter(result) if isinstance(value, Tensor)))
        return result
