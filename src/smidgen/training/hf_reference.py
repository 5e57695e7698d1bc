"""The reference model of TRL's trainers: the base of an attached model, in the base's own tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from smidgen.common.errors import TrainError
from smidgen.common.wrappers import bare
from smidgen.delta.attaching import remove
from smidgen.ports.attachment_record import attachment
from smidgen.ports.in_place.shared_parameters import shared_copy
from smidgen.steps.step import BASE, START

LOADER = "create_model_from_path"  # what a trainer of TRL loads its reference with


def reference_model(model: nn.Module, of: str = BASE) -> nn.Module:
    """The base of an attached model as a frozen model of its own, for `DPOTrainer(model, ref_model=...)`.

    No second copy: its parameters are the base's very tensors, and follow where those are moved.

    Args:
        of: "base", or "start": the model with what is attached as it is now, of which the trained values are copied.

    Raises:
        AttachError: nothing is attached.
        TrainError: `of` is another word.
    """
    attachment(model)
    if of == BASE:
        twin = shared_copy(bare(model), same=True)
        remove(twin)
    elif of == START:
        twin = shared_copy(bare(model))
    else:
        raise TrainError(f"of={of!r}: the reference is {BASE!r} or {START!r}")
    return twin.eval().requires_grad_(False)


@contextmanager
def shared_reference(model: nn.Module, of: str = BASE) -> Iterator[nn.Module]:
    """Trainers of TRL that are made inside get `reference_model(model, of)` where they would load the base again.

    For GRPOTrainer and RLOOTrainer, which take no reference; DPOTrainer and KTOTrainer have `ref_model=` and may be
    made here as well.

        with sm.shared_reference(model):
            trainer = GRPOTrainer(model, reward, args=GRPOConfig(beta=0.04), ...)

    Raises:
        AttachError: nothing is attached.
        TrainError: TRL is missing, or does not load its reference in the known way; `of` is another word.
    """
    reference = reference_model(model, of)
    name = getattr(getattr(bare(model), "config", None), "_name_or_path", "")
    homes = _homes()
    loaders = [getattr(home, LOADER) for home in homes]
    try:
        for home, load in zip(homes, loaders, strict=True):
            setattr(home, LOADER, _loading(name, reference, load))
        yield reference
    finally:
        for home, load in zip(homes, loaders, strict=True):
            setattr(home, LOADER, load)


def _loading(name: str, reference: nn.Module, load: Any) -> Any:
    """A loader that answers for the attached model's name, and loads every other model."""

    def loads(model_id: str, *args: object, **kwargs: object) -> object:
        return reference if model_id == name else load(model_id, *args, **kwargs)

    return loads


def _homes() -> list[Any]:
    """TRL's modules with trainers that have a reference."""
    try:
        import trl
        from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, rloo_trainer
    except ImportError as error:
        raise TrainError(f"shared_reference is for TRL's trainers: pip install trl ({error})") from error
    homes = [dpo_trainer, grpo_trainer, kto_trainer, rloo_trainer]
    if strange := [home.__name__ for home in homes if not hasattr(home, LOADER)]:
        raise TrainError(
            f"TRL {trl.__version__} does not load a reference by {LOADER} in {', '.join(strange)}; give "
            "ref_model=smidgen.reference_model(model) where the trainer takes it"
        )
    return homes
