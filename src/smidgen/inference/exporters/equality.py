"""Whether an exported file computes what the attached model does, on inputs of several shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smidgen.common.errors import DeltaError, ModelError
from smidgen.common.module_modes import evaluating
from smidgen.data.processor import Processor
from smidgen.inference.sample_inputs import fitting_inputs, input_candidates

SHAPES = ((2, 8), (1, 5), (3, 12))  # rows and tokens of the batches
PADDED = 2  # tokens of the last row that are padding, in batches of several rows
# What rounding to a type may cost, as a share of the largest output.
ROUNDING = {"float32": 0.0, "float16": 1e-2, "bfloat16": 5e-2, "q8_0": 5e-2}

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Equality:
    """The largest difference between the outputs of an exported file and those of the attached model."""

    difference: float
    tolerance: float
    largest: float  # output of the attached model
    on: str

    def __str__(self) -> str:
        return (
            f"{self.on}: largest difference {self.difference:.2g} (at most {self.tolerance:.2g}; "
            f"largest output {self.largest:.3g})"
        )

    def check(self) -> None:
        """Raises DeltaError if the difference is larger than allowed, or not a number."""
        if not self.difference <= self.tolerance:
            raise DeltaError(
                f"not exported: {self.on} differ from the attached model by {self.difference:.2g}, more than "
                f"{self.tolerance:.2g}"
            )


def check_batches(model: nn.Module, processor: Processor | None = None) -> list[Inputs]:
    """Made-up inputs of several shapes, with padding where the model knows a mask.

    Args:
        processor: whose inputs they are; without one, a model that tells two texts gets their types.

    Raises:
        DeltaError: nothing could be made that the model runs on.
    """
    try:
        first = fitting_inputs(model)
    except ModelError as error:
        raise DeltaError(f"an export of {type(model).__name__} cannot be checked: {str(error).split(';')[0]}") from None
    found = [next((c for c in input_candidates(model, r, n) if set(c) == set(first)), first) for r, n in SHAPES]
    names = getattr(processor, "model_input_names", ["token_type_ids"])
    if "token_type_ids" in {*names} & {*inspect.signature(model.forward).parameters} and "input_ids" in first:
        found = [{**batch, "token_type_ids": _types(model, batch["input_ids"])} for batch in found]
    dtype = next(model.parameters()).dtype
    return [_padded({k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}) for batch in found]


def _types(model: nn.Module, ids: Tensor) -> Tensor:
    """The second half of each row is of a second text, if the model tells two."""
    kinds = int(getattr(getattr(model, "config", None), "type_vocab_size", 1))
    return (torch.arange(ids.shape[1]) * 2 >= ids.shape[1]).long().expand(ids.shape).contiguous() * min(kinds - 1, 1)


def _padded(batch: Inputs) -> Inputs:
    mask = batch.get("attention_mask")
    if mask is None or len(mask) < 2:
        return batch
    mask = mask.clone()
    mask[-1, -PADDED:] = 0
    return {**batch, "attention_mask": mask}


def tensor_outputs(model: nn.Module, batches: Iterable[Inputs]) -> list[Outputs]:
    """Every floating tensor that the model gives for each batch, in eval mode."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        return [_tensors(model(**{k: v.to(device) for k, v in batch.items()})) for batch in batches]


def _tensors(output: object) -> Outputs:
    items = output.items() if isinstance(output, Mapping) else [("output", output)]
    return {k: v.float().cpu() for k, v in items if isinstance(v, Tensor) and v.is_floating_point()}


def compare_outputs(
    run: Callable[[Inputs], Outputs], wanted: Sequence[Outputs], batches: Sequence[Inputs], on: str,
    tolerance: float, rounding: float = 0.0,
) -> Equality:  # fmt: skip
    """Run an exported model on the batches and compare; padding is left out.

    Args:
        run: inputs -> outputs by name, of which those that the attached model has count.
        on: what is compared, in words.
        tolerance: of float32.
        rounding: what more is allowed, as a share of the largest output.

    Raises:
        DeltaError: an output is missing or of another shape.
    """
    worst, largest = 0.0, 0.0
    for batch, expected in zip(batches, wanted, strict=True):
        found = run(batch)
        for name, value in expected.items():
            other = found.get(name)
            if other is None or other.shape != value.shape:
                shape = "missing" if other is None else f"{tuple(other.shape)}, not {tuple(value.shape)}"
                raise DeltaError(f"not exported: its output {name!r} is {shape}")
            kept = _kept(value, batch.get("attention_mask"))
            gap = float((other - value).abs()[kept].max())
            worst = gap if gap != gap else max(worst, gap)
            largest = max(largest, float(value[kept].abs().max()))
    shapes = ", ".join(" x ".join(map(str, next(iter(batch.values())).shape)) for batch in batches)
    return Equality(worst, max(tolerance, rounding * largest), largest, f"{on} ({', '.join(wanted[0])}; {shapes})")


def _kept(value: Tensor, mask: Tensor | None) -> Tensor:
    """Which entries of an output are no padding."""
    if mask is None or value.dim() < 2 or value.shape[:2] != mask.shape:
        return torch.ones_like(value, dtype=torch.bool)
    return mask.bool().cpu().reshape(*mask.shape, *(1 for _ in value.shape[2:])).expand(value.shape)
