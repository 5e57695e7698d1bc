"""The training loop. Its state is a few tensors and numbers, so that a run can stop and go on at any step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from torch import Tensor, nn

from smidgen.common.byte_sizes import parse_bytes
from smidgen.common.errors import DivergedError, TrainError
from smidgen.common.folder_lock import folder_lock_held
from smidgen.common.memory import give_back_memory, memory_guard
from smidgen.common.wrappers import bare, check_model
from smidgen.data.processor import Processor
from smidgen.data.task import Task
from smidgen.delta.attaching import attach, detach, disabled
from smidgen.delta.delta import Delta
from smidgen.delta.saved_selection import Selection
from smidgen.efficiency.activation_checkpointing import recomputing
from smidgen.efficiency.packing.isolation_check import check_kind
from smidgen.efficiency.prefix_cache.shared_caches import Kept
from smidgen.efficiency.prefix_cache.within_block import resting_modules
from smidgen.importance.selecting import select
from smidgen.inference.evaluation import Scores, compute_scores
from smidgen.inference.forward_pass import run_examples
from smidgen.inference.processors import processor_of
from smidgen.ports.attachment_record import attachment, trained_parameters
from smidgen.recipe.recipe import Recipe
from smidgen.steps.gradient_checks import FEW, MANY, Watch, check_depends, snapshot
from smidgen.steps.growth import after_step, assign
from smidgen.steps.micro_batches import pieces
from smidgen.steps.objectives import Objective
from smidgen.steps.optimizer_groups import optimizer
from smidgen.steps.penalties import penalised
from smidgen.training.memory.batch_size import batch_and_bytes
from smidgen.training.run.batch_coupling import check_coupling
from smidgen.training.run.batch_feed import Feed
from smidgen.training.run.checkpoint import pack, unpack
from smidgen.training.run.forward_shortcuts import shortcuts
from smidgen.training.run.interrupts import Interrupts
from smidgen.training.run.model_guard import borrowed
from smidgen.training.run.progress_bar import Bar
from smidgen.training.run.prompt_budget import check_lengths, longest
from smidgen.training.run.run_folder import RunFolder, State
from smidgen.training.run.run_record import asked, outcome, selection_record
from smidgen.training.run.settings import PACK, Settings

UNTESTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Loop:
    """One run of `fit`."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, task: Task, settings: Settings, objective: Objective,
        out: str | os.PathLike[str] | None, processor: Processor | None, progress: bool | None,
        selection: Selection | None = None, shared: Kept | None = None,
    ) -> None:  # fmt: skip
        self.accelerator = Accelerator()
        if self.accelerator.distributed_type in UNTESTED:
            kind = self.accelerator.distributed_type.value
            raise TrainError(f"{kind} is not supported yet; use one process or DDP (accelerate launch --multi_gpu)")
        if settings.batching == PACK:
            check_kind(task.kind)
        check_coupling(task.task_kind, settings, self.accelerator.num_processes)
        check_model(model)
        self.model, self.recipe, self.task, self.settings = bare(model), recipe, task, settings
        self.selection, self.shared, self.objective = selection, shared, objective.on(task.kind)
        self.processor = processor or processor_of(model, task.task_kind)
        self.main, self.world = self.accelerator.is_main_process, self.accelerator.num_processes
        self.folder = RunFolder(out, writer=self.main)
        self.show = progress if self.main else False
        self.state = State({}, {"step": 0, "epochs": 0, "best": None, "best_epoch": None, "history": []})

    def fit(self) -> Delta:
        """Open or resume the run, train, and give back the best state; the model is left as it came."""
        wanted = asked(
            self.model,
            self.recipe,
            self.task,
            self.settings,
            self.objective,
            self.selection,
            self.folder.hashed_by,
        )
        self.folder.open(wanted)
        if self.folder.finished and self.folder.path is not None:
            return Delta.load(self.folder.path)
        with folder_lock_held(self.folder.path if self.main else None):
            return self._fit(wanted)

    def _fit(self, wanted: Mapping[str, Any]) -> Delta:
        record = self.folder.open(wanted)  # again: another process may have come between
        if self.folder.finished and self.folder.path is not None:
            return Delta.load(self.folder.path)
        earlier = record["chosen"] if record else {}
        limit = earlier.get("max_length", self.settings.max_length)
        limit = longest(self.model, self.recipe, self.processor) if limit is None else limit
        self.rows = self.task.encode(self.processor, "train", max_length=limit)
        self.held = self.task.encode(self.processor, "validation", max_length=limit)
        check_lengths(self.model, self.recipe, [*self.rows.lengths, *self.held.lengths])
        self.collate = self.task.collator(self.processor, model=self.model)
        rank, device = self.accelerator.process_index, self.accelerator.device
        self.mine = [self.held[i] for i in range(rank, len(self.held), self.world)]
        self.feed = Feed(self.rows, self.collate, self.settings, rank, self.world, device)
        self.total = self.feed.steps
        with borrowed(self.model):
            self.selection = self._selected()
            options: Any = {"pooling": self.settings.pooling, "seed": self.settings.seed, "selection": self.selection}
            room, size = self._room(earlier)
            attach(self.model, self.recipe, **options)
            self.feed = self.feed.ready(self.model.to(device))
            with recomputing(self.model) if self.settings.recompute else nullcontext():
                splits = (self.model, (self.rows, self.mine), self.collate)
                shared: Any = (earlier, self.folder.path, self.shared, self.task.task_kind.unsteered)
                (self.around, self.around_held), why = shortcuts(*splits, room, *shared)
                decided = selection_record(self.model, self.settings, self.rows, self.total, self.world)
                self.chosen = self.folder.agreed(wanted, {**decided, **why, "rows_at_once": size}, record)
                self.folder.keep(self.selection)
                return self._train()

    def _room(self, earlier: Mapping[str, Any]) -> tuple[Settings, int]:
        """Settings whose cache fits beside a step, and how many rows of a batch are computed at once."""
        s = self.settings
        if s.max_memory is None:
            return s, s.batch_size
        if self.accelerator.device.type == "cpu":
            give_back_memory()
        length = self.rows.max_length if s.batching == PACK else max(self.rows.lengths)
        most = int(earlier.get("rows_at_once", s.batch_size))
        shape = {"length": length, "pooling": s.pooling, "recompute": s.recompute}
        limit = parse_bytes(s.max_memory)
        passes = self.task.task_kind.passes
        size, need = batch_and_bytes(self.model, self.recipe, limit, most, passes=passes, **shape)
        return replace(s, cache_bytes=min(s.cache_bytes, (limit - need) // 2)), size

    def _selected(self) -> Selection | None:
        """What to keep, for a recipe with Select: given, of an earlier start, or chosen now."""
        if self.selection is not None or not self.recipe.narrowed:
            return self.selection
        s, model = self.settings, self.model.to(self.accelerator.device).eval()
        options: Any = {"seed": s.seed, "pooling": s.pooling, "batch_size": s.batch_size, "lr": s.lr}
        options |= {"head_lr": s.head_lr, "max_length": self.rows.max_length, "objective": self.objective}
        kept = self.folder.kept()
        return kept or select(model, self.recipe, self.task, processor=self.processor, **options)

    def _train(self) -> Delta:
        s = self.settings
        self.optimizer = optimizer(self.model, s.lr, s.head_lr, s.weight_decay)
        self.rates = [self.chosen["lr"][group["name"]] for group in self.optimizer.param_groups]
        self.prepared = self.accelerator.prepare_model(self.model)
        self.watch, self.best = Watch(self.model), snapshot(self.model)
        set_seed(s.seed + self.accelerator.process_index)
        self._dry_run()
        self._resume()
        self.trained = list(trained_parameters(self.model).values())
        step = self.state.numbers["step"]
        with Bar(self.total, step, self.show, str(self.recipe)) as self.bar, Interrupts() as self.interrupts:
            for epoch in range(self.state.numbers["epochs"], s.epochs):
                self._epoch(epoch)
        return self._finish()

    def _epoch(self, epoch: int) -> None:
        numbers = self.state.numbers
        self._train_mode()
        for places, batch in self.feed.epoch(epoch, skip=numbers["step"] - self.feed.before(epoch)):
            self._step(places, batch)
            due = numbers["step"] % self.chosen["checkpoint_steps"] == 0 or self.interrupts.seen
            if due and numbers["step"] < self.feed.before(epoch + 1):
                self._checkpoint()
        self._validate(epoch)
        self._checkpoint()

    def _train_mode(self) -> None:
        self.model.train()
        for module in self.resting:
            module.eval()

    def _step(self, places: Sequence[int], batch: dict[str, Any]) -> None:
        numbers, value = self.state.numbers, 0.0
        factor = self.settings.rate(numbers["step"], self.total)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with memory_guard(self.settings.batch_size, self.settings.batch_tokens):
            for some, part, weight in pieces(places, batch, self.chosen["rows_at_once"], self.task.kind):
                with self.around(some, part):
                    loss = self._loss(self.prepared, part) * weight
                    value += float(loss.detach())
                    if not math.isfinite(value):
                        raise DivergedError(
                            f"the loss is {value} at step {numbers['step']}, lr {self.rates[0] * factor:.2g}; "
                            "try a lower lr, or look at the data of this step"
                        )
                    self.accelerator.backward(loss)
        self.watch.saw(self.model)
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.settings.clip))
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient is {norm} at step {numbers['step']}, lr {self.rates[0] * factor:.2g}; try a lower lr, "
                "look at the data of this step, or, if the base is in float16, load it in bfloat16 or float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        numbers["step"] += 1
        if after_step(self.model, self.optimizer, numbers["step"], self.total, self.settings.seed):
            self.prepared = self.accelerator.prepare_model(self.model)
            self.trained = list(trained_parameters(self.model).values())
        self.bar.step(value, len(places) * self.world)
        if numbers["step"] % 10 == 0 or numbers["step"] == self.total:
            rate = round(self.bar.rate, 1)
            self.folder.log({"step": numbers["step"], "loss": value, "lr": factor * self.rates[0], "rate": rate})
        if numbers["step"] in (min(FEW, self.total), MANY) and self.total > 1:
            self.watch.moved(self.model, numbers["step"])

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        reference, kind = None, self.task.task_kind
        if self.objective.needs_reference:
            with disabled(self.model), torch.no_grad():
                reference = kind.forward(self.model, batch)
        return penalised(self.objective(kind.forward(model, batch), batch, reference), self.model)

    def _dry_run(self) -> None:
        """One forward and backward pass in eval mode: every trained tensor must be reached."""
        self.model.eval()
        rows = [self.rows[i] for i in range(min(2, len(self.rows)))]
        batch = {k: v.to(self.accelerator.device) for k, v in self.collate(rows).items()}
        self.resting = resting_modules(self.model, attachment(self.model).plan, self.task.task_kind.model_inputs(batch))
        loss = self._loss(self.model, batch)
        check_depends(self.model, loss)
        loss.backward()
        self.watch.first(self.model)
        self.optimizer.zero_grad(set_to_none=True)

    def _validate(self, epoch: int) -> None:
        result = self._held_out()
        numbers = self.state.numbers
        entry = {"epoch": epoch + 1, "step": numbers["step"], "validation": result.values}
        self.folder.log(entry)
        numbers["history"].append(entry)
        numbers["epochs"] = epoch + 1
        self.bar.validated(result.metric, result.value)
        best = numbers["best"]
        if best is None or math.isnan(best) or result.better > best:
            numbers["best"], numbers["best_epoch"] = result.better, epoch + 1
            self.best = snapshot(self.model)

    def _held_out(self) -> Scores:
        rank, size = self.accelerator.process_index, self.settings.batch_size
        size = size if self.settings.max_memory is None else self.chosen["rows_at_once"]
        with memory_guard(self.settings.batch_size):
            outputs = run_examples(self.model, self.mine, self.task, self.processor, size, self.around_held)
        numbered = gather_object([(rank + k * self.world, pair) for k, pair in enumerate(outputs)])
        return compute_scores(self.task, [pair for _, pair in sorted(numbered, key=lambda item: item[0])])

    def _checkpoint(self) -> None:
        tensors = pack(self.model, self.best, self.optimizer, self.accelerator)
        self.folder.checkpoint(State(tensors, self.state.numbers))
        self.interrupts.check()

    def _resume(self) -> None:
        state = self.folder.resume()
        if state is not None:
            self.state.numbers = state.numbers
            self.best = unpack(state.tensors, self.model, self.optimizer, self.accelerator)

    def _finish(self) -> Delta:
        if self.total > 1:
            self.watch.moved(self.model, self.total)
            self.watch.report(self.model, self.total)
        assign(self.model, self.best)
        said = outcome(self.task, self.settings, self.rows.max_length, self.state.numbers, self.selection)
        delta = replace(detach(self.model), labels=tuple(self.task.labels)).with_info(**said, steps=self.total)
        if self.folder.path is not None and self.main:
            delta.save(self.folder.path)
            self.folder.finish()
        self.accelerator.wait_for_everyone()
        return delta
