"""Whether a model keeps packed examples apart: measured on a few, before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from smidgen.common.errors import TrainError
from smidgen.data.encoded import Example
from smidgen.data.kinds.base import Collate, kind_named
from smidgen.efficiency.packing.packer import Packer
from smidgen.efficiency.prefix_cache.equivalence_check import allowed, gap
from smidgen.efficiency.prefix_cache.recorded_pass import in_eval_mode, result_of
from smidgen.efficiency.prefix_cache.token_layout import Rows

_FEW = 4
_BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


def check_kind(kind: str) -> None:
    """Raises TrainError for tasks whose examples cannot share a row."""
    why = kind_named(kind).unpackable
    if why is not None:
        raise TrainError(f"batching='pack' is for causal-lm and chat, not {kind}: {why}; use batching='length'")


def packer_for(model: nn.Module, rows: Rows, lengths: Sequence[int], collate: Collate, capacity: int) -> Packer:
    """A packer with which packed examples have the logits and the loss that they have alone.

    Positions that begin again are tried first, then a whole attention mask. Two rows are compared: the longest example
    that others have room beside, with the shortest ones before it, and behind it.

    Args:
        lengths: tokens of each example.
        capacity: tokens of a packed row.

    Raises:
        TrainError: with neither; the model cannot be trained on packed rows.
    """
    places = _few(lengths, capacity)
    if len(places) < 2:  # no two examples fit into one row
        return Packer()
    examples = [rows[i] for i in places]
    with in_eval_mode(model):
        alone = [result_of(model(**_on(model, collate([example]))))[0][0] for example in examples]
        loss = result_of(model(**_on(model, collate(examples))))[1]
        reasons = []
        for packer in (Packer(), Packer(mask=alone[0].dtype)):
            reasons.append(_differs(model, packer, examples, alone, loss))
            if reasons[-1] is None:
                return packer
    raise TrainError(
        "batching='pack' needs a model that keeps packed examples apart; "
        f"with {type(model).__name__} {reasons[0]}; use batching='length'"
    )


def _differs(
    model: nn.Module, packer: Packer, examples: list[Example], alone: list[Tensor], loss: Tensor | None
) -> str | None:
    """In what way packed examples differ from those alone; None if only by rounding."""
    for order in (range(len(examples)), range(len(examples))[::-1]):
        try:
            found, mean = result_of(model(**_on(model, packer([[examples[i] for i in order]]))))
        except torch.OutOfMemoryError:
            raise
        except _BROKEN as error:
            return f"a forward pass on them fails ({next(iter(str(error).splitlines()), type(error).__name__)})"
        limit = allowed(found.dtype, found.device.type)
        off = gap(found[0], torch.cat([alone[i] for i in order]))
        if not off <= limit:
            return f"their logits differ from those alone by {off:.2g} of their scale (allowed {limit:.0e})"
        if loss is None or mean is None or not abs(float(mean - loss)) <= limit * max(1.0, abs(float(loss))):
            return f"their loss is {mean}, that of the same examples padded {loss}"
    return None


def _few(lengths: Sequence[int], capacity: int) -> list[int]:
    """Numbers of a few examples that fit into one row: the shortest, then the longest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    room = capacity - lengths[order[0]]
    longest = next((i for i in reversed(order[1:]) if lengths[i] <= room), None)
    if longest is None:
        return []
    room -= lengths[longest]
    few = [order[0]]
    for i in order[1:_FEW]:
        if i != longest and lengths[i] <= room:
            few.append(i)
            room -= lengths[i]
    return [*few, longest]


def _on(model: nn.Module, batch: Mapping[str, Tensor | bool]) -> dict[str, Tensor | bool]:
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
