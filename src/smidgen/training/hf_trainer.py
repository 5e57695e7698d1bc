"""Under transformers.Trainer: save and resume deltas, and watch that every trained tensor moves."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback as Base
from transformers import TrainerControl, TrainerState, TrainingArguments

from smidgen.common.atomic_files import write_files
from smidgen.common.errors import TrainError
from smidgen.common.hook_types import Args, Kwargs
from smidgen.common.wrappers import bare
from smidgen.delta.delta import Delta
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.ports.observers import stand_in, watch_calls
from smidgen.ports.placement import refuse_save
from smidgen.steps.gradient_checks import FEW, MANY, Watch, check_depends, check_finite, reached_in_eval
from smidgen.steps.growth import after_step
from smidgen.steps.penalties import penalty


class TrainerCallback(Base):
    """For `Trainer(model=attached_model, optimizers=(sm.optimizer(model), None), callbacks=[sm.TrainerCallback()])`.

    A checkpoint holds a delta (`checkpoint-N/delta.safetensors`, ...) and the trained tensors under their names in
    the model as `model.safetensors`, from which Trainer itself resumes and reloads its best. The rest of the base is
    not written again. Methods that grow do so; Trainer cannot resume them, because it loads tensors of other shapes.

    Args:
        penalised: that your `compute_loss` adds `smidgen.penalty(model)`, for methods that have a penalty.

    Raises (while training):
        TrainError: a trained tensor gets no gradient, or stands still after five steps; a penalty that is not added.
        DivergedError: a trained value is not finite any more.
        AttachError: nothing is attached to the model.
    """

    def __init__(self, penalised: bool = False) -> None:
        self.penalised = penalised
        self.watch: Watch | None = None
        self.hooks: tuple[RemovableHandle, ...] = ()
        self.batch: tuple[Args, Kwargs] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where the tensors stand; let Trainer save."""
        model: nn.Module = bare(kwargs["model"])
        attachment(model)
        if not self.penalised and penalty(model) is not None:
            raise TrainError(
                f"{attachment(model).plan.recipe} adds a penalty to the loss, which Trainer does not: use smidgen.fit, "
                "or add smidgen.penalty(model) in compute_loss and say TrainerCallback(penalised=True)"
            )
        self.watch, self.first = Watch(model), state.global_step
        self.hooks = tuple(watch_calls(model, before=self._keep, after=_depends))
        attachment(model).handles.extend(self.hooks)  # go with what is attached, should no step follow
        stand_in(model, "save_pretrained", functools.partial(save_trained, model))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the first step: every trained tensor has a gradient, or has one where nothing is left to chance
        (layerdrop); under float16's loss scaling it may overflow."""
        model = kwargs["model"]
        self.watch = self.watch or Watch(model)
        if state.global_step == self.first:
            self._drop()
            missed = [name for name, p in trained_parameters(model).items() if p.grad is None]
            also = reached_in_eval(model, missed, self.batch[0], self.batch[1]) if missed and self.batch else ()
            self.watch.first(model, finite=not args.fp16, reached=also)
            self.batch = None
        self.watch.saw(model)

    def _keep(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Forward pre-hook: the first batch."""
        self.batch = self.batch or (args, kwargs)

    def _drop(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = ()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """All values are finite; events; after a few steps, or at the end of a shorter run: every tensor has moved."""
        check_finite(kwargs["model"], state.global_step)
        after_step(kwargs["model"], kwargs["optimizer"], state.global_step, state.max_steps, args.seed)
        steps, last = state.global_step - self.first, state.max_steps - self.first
        if self.watch and steps > 1 and steps in (min(FEW, last), MANY):
            self.watch.moved(kwargs["model"], steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what was never used. From here on saving the attached model whole is refused again."""
        self._drop()
        model = bare(kwargs["model"])
        if self.watch:
            self.watch.report(model, state.global_step - self.first)
        stand_in(model, "save_pretrained", functools.partial(refuse_save, model))


def _depends(model: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
    """Forward hook, until the first step."""
    if model.training and torch.is_grad_enabled():
        check_depends(model, output)


def save_trained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *args: object,
    state_dict: Mapping[str, Tensor] | None = None,
    **kwargs: object,
) -> None:
    """Stands in for save_pretrained while Trainer trains."""
    folder = Path(save_directory)
    Delta.of(model).save(folder)
    trained = {id(p) for p in trained_parameters(model).values()}
    tensors: dict[str, Tensor] = {
        name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if id(p) in trained
    }
    write_files(folder, {"model.safetensors": save(tensors, {"format": "pt"})})
