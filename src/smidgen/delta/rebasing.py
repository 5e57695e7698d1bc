"""rebase: a delta for a base of the same weights that is stored in another way, on demand alone."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from smidgen.common.errors import DeltaError
from smidgen.common.wrappers import bare
from smidgen.delta.compatibility import head_held
from smidgen.delta.delta import Delta
from smidgen.delta.fingerprint import Fingerprint


class RebasedWarning(UserWarning):
    """A delta was put on a base whose maps compute something else than those of its training."""


def rebase(delta: Delta, model: nn.Module) -> Delta:
    """The same values, for a base of the same weights that is stored in more or fewer bits.

    What was trained on 4 bits has also learnt to make up for their error, so on the base of 16 bits it is another
    function: measure it there (`smidgen.evaluate`). On a base of real numbers the weights are compared: stored as then,
    they have to give the very codes and scales of the training. In the other directions only names and shapes are.

    Args:
        model: the base to put it on, with nothing attached.

    Raises:
        DeltaError: another architecture, names, shapes or weights, or a base stored as in the training.

    Warns:
        RebasedWarning: always, with both ways of storing.
    """
    inside, then = bare(model), delta.base
    held = head_held(inside, delta)
    now = Fingerprint.of(inside, held)
    what = f"this delta was trained on {then.name or then.architecture!r} in {then.quantised or then.dtype}"
    if now.quantised == then.quantised:
        raise DeltaError(f"{what}, and so is the base: attach it as it is")
    if (now.architecture, now.structure) != (then.architecture, then.structure):
        raise DeltaError(f"{what}; this {now.architecture} has other tensors or shapes")
    compared = not now.quantised
    if compared:
        as_then = Fingerprint.of(inside, held, getattr(torch, then.dtype), stored_as=then)
        if as_then.content != then.content:
            raise DeltaError(
                f"{what}; this base's weights, made of {now.dtype} values and stored so, give other codes: another "
                f"checkpoint, or one that was read in another dtype than {then.dtype}"
            )
    warnings.warn(
        f"{what} and goes on the base in {now.quantised or now.dtype}, which computes something else"
        + ("" if compared else "; whether its weights are the same cannot be told from codes")
        + ": evaluate it there",
        RebasedWarning,
        stacklevel=2,
    )
    return replace(delta, base=now, info={**delta.info, "rebased_from": then.to_json()})
