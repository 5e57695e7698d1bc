"""The weights that a quantised base was made of, read again where a start needs them, and let go of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smidgen.common.errors import PlanError
from smidgen.common.wrappers import bare
from smidgen.sites.quantised.maps import scheme_of

UNKNOWN = (
    "needs the weights that this base was quantised from, and nothing says where they are: load it with "
    "smidgen.load(..., quantize={scheme!r}), or name them with smidgen.note_originals(model, float_model)"
)


class Originals:
    """A base in real numbers, read when a weight is first asked for."""

    def __init__(self, read: Callable[[], nn.Module]) -> None:
        self.read = read
        self._model: nn.Module | None = None

    def weight(self, path: str, shape: tuple[int, int]) -> Tensor:
        """(width_out, width_in), in float32.

        Raises:
            PlanError: no such map, or one of another shape.
        """
        self._model = self.read() if self._model is None else self._model
        try:
            module = self._model.get_submodule(path)
            found = module.get_parameter("weight").detach().float()
        except AttributeError:
            raise PlanError(f"the weights to start from have no map {path}") from None
        found = found.T if isinstance(module, Conv1D) else found
        if tuple(found.shape) != shape:
            raise PlanError(f"the weights to start from have {tuple(found.shape)} at {path}, the base {shape}")
        return found

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None

    def __getstate__(self) -> dict[str, object]:
        return {"read": self.read, "_model": None}


class InMemory:
    """Gives a model that is in memory already, without being part of the one that it belongs to."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> nn.Module:
        """The model."""
        return self.model

    def __deepcopy__(self, memo: object) -> InMemory:
        return self


def note_originals(model: nn.Module, source: nn.Module | Callable[[], nn.Module]) -> None:
    """Say what a quantised base was quantised from: a model of the same names in real numbers, or how to read it.

    `smidgen.load(..., quantize=)` has done so.
    """
    read = InMemory(source) if isinstance(source, nn.Module) else source
    bare(model)._smidgen_originals = Originals(read)  # type: ignore[assignment]


def originals_of(model: nn.Module, who: object) -> Originals | None:
    """The originals of a quantised base, None for a base of real numbers.

    Raises:
        PlanError: it is not known where they are.
    """
    scheme = scheme_of(model)
    if not scheme:
        return None
    found = vars(bare(model)).get("_smidgen_originals")
    if not isinstance(found, Originals):
        raise PlanError(f"{who} {UNKNOWN.format(scheme=scheme)}")
    return found


@contextmanager
def originals_closed(model: nn.Module) -> Iterator[None]:
    """Whatever is read of the originals inside is let go of afterwards."""
    try:
        yield
    finally:
        found = vars(model).get("_smidgen_originals")
        if isinstance(found, Originals):
            found.close()
