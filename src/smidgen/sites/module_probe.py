"""What a module's own forward does, told from what it gives: a clone with small random tensors is run.

The clone has the module's class and settings, float64 tensors on the CPU and no hooks, so the module may live
anywhere, on the meta device as well. A result is kept for each class, settings and shapes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

SMALL = {"in_features": 5, "out_features": 3, "nx": 5, "nf": 3}
CLOSE = 1e-4  # relative and absolute


@dataclass(frozen=True)
class Affine:
    """A norm's output as a function of its tensors: (gain + offset) * something + bias.

    Attributes:
        axis: of its input and output that has the gain's channels.
        offset: 1 for a norm whose gain is kept as its distance from 1 (Gemma, Nemotron), else 0.
        normalises: whether twice the input gives the same output.
    """

    axis: int
    offset: float
    normalises: bool


_affine: dict[object, Affine | None] = {}
_plain: dict[object, bool] = {}


def is_plain_map(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear or Conv1D computes W x + b and no more, whatever its forward looks like."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    key = _key(module)
    if key not in _plain:
        _plain[key] = _is_plain(module)
    return _plain[key]


def affine(module: nn.Module) -> Affine | None:
    """The form of a module with one or two tensors of one shape, a gain and perhaps a bias; None if it has no such."""
    key = _key(module)
    if key not in _affine:
        found = (_form(module, shape, axis) for shape, axis in _inputs(module))
        _affine[key] = next((form for form in found if form), None)
    return _affine[key]


def acts_as_bias(term: str) -> bool:
    """Whether a norm's parameter is added rather than multiplied."""
    return term in ("bias", "beta")


def _key(module: nn.Module) -> object:
    """What the result of a module's forward can depend on, its tensors' values apart."""
    simple = (int, float, bool, str, torch.Size, tuple, type(None))
    settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, simple) and k[0] != "_")
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
    return type(module), str(settings), shapes


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b with its weight and bias, by trial on random inputs of two shapes."""
    terms = dict(module.named_parameters(recurse=False))
    # what stands in children, or in tensors of other names, may be zero now and grow
    if next(module.children(), None) is not None or not terms.keys() <= {"weight", "bias"}:
        return False
    stored = (5, 3) if isinstance(module, Conv1D) else (3, 5)
    values = {name: _random(stored if name == "weight" else (3,), seed) for seed, name in enumerate(terms)}
    weight = values["weight"].T if isinstance(module, Conv1D) else values["weight"]
    for shape in ((2, 4, 5), (7, 5)):
        x = _random(shape, 7)
        y = _run(module, values, x, SMALL)
        if y is None or not _close(y, F.linear(x, weight, values.get("bias"))):
            return False
    return True


def _inputs(module: nn.Module) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes of input to try, and where the channels are in them: last, or behind the batch, in text and images."""
    shape = next((tuple(p.shape) for p in module.parameters(recurse=False)), ())
    if not shape or len(shape) > 2:
        return
    n, m = _others(shape)
    yield (2, n, *shape), -1
    if len(shape) == 1:
        yield (2, n, m, *shape), -1
        yield (2, *shape, n), 1
        yield (2, *shape, n, m), 1


def _others(shape: Sequence[int]) -> tuple[int, int]:
    """Two small sizes that are not among these."""
    one, other, *_ = (size for size in (3, 4, 6, 8) if size not in shape)
    return one, other


def _form(module: nn.Module, shape: tuple[int, ...], axis: int) -> Affine | None:
    """The form for inputs of one shape, from outputs with gain and bias 0, gain 1, and both at random."""
    terms = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    gains = [name for name in terms if not acts_as_bias(name)]
    if len(gains) != 1 or len(set(terms.values())) != 1 or not _takes_one(module):
        return None
    x = 1 + _random(shape, 3)
    zeros = {name: torch.zeros(size, dtype=torch.float64, device="cpu") for name, size in terms.items()}
    ones = zeros | {gains[0]: torch.ones_like(zeros[gains[0]])}
    drawn = {name: _random(size, seed) for seed, (name, size) in enumerate(terms.items())}
    low, high, found = (_run(module, values, x) for values in (zeros, ones, drawn))
    double = _run(module, drawn, 2 * x)
    if low is None or high is None or found is None or double is None or found.shape != x.shape:
        return None
    unit = high - low
    offset = 0.0 if _close(low, torch.zeros_like(low)) else 1.0
    gain, bias = (_along(drawn.get(name), axis, x.ndim) for name in (gains[0], _bias_of(terms)))
    right = _close(low, offset * unit) and _close(found, (gain + offset) * unit + bias)
    return Affine(axis, offset, _close(found, double)) if right and not _close(unit, 0 * unit) else None


def _bias_of(terms: Mapping[str, object]) -> str:
    return next((name for name in terms if acts_as_bias(name)), "")


def _along(values: Tensor | None, axis: int, ndim: int) -> Tensor | float:
    """A norm's tensor, to be multiplied with an output of `ndim` axes."""
    if values is None:
        return 0.0
    return values if axis == -1 else values.view(-1, *[1] * (ndim - 2))


def _takes_one(module: nn.Module) -> bool:
    """Whether a forward takes the input and nothing else: a mask or a gate changes what comes out."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.kind not in kinds for p in inspect.signature(type(module).forward).parameters.values()) == 2


def _random(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=CLOSE, atol=CLOSE)


def _run(
    module: nn.Module, values: Mapping[str, Tensor], x: Tensor, settings: Mapping[str, int] | None = None
) -> Tensor | None:
    """What the class's forward gives with other tensors in a clone; None if it gives no tensor or cannot be run."""
    clone: object = type(module).__new__(type(module))
    clone.__dict__.update(vars(module))
    clone.__dict__.update({k: v for k, v in (settings or {}).items() if k in vars(module)})
    clone.__dict__["_parameters"] = {**dict.fromkeys(module._parameters), **values}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = type(module).forward(clone, x.clone())
        except Exception:  # whatever a forward of somebody's own raises on such an input
            return None
    return found if isinstance(found, Tensor) else None
