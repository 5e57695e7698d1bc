"""The training loop. Its state is a few tensors and numbers, so that a run can stop and go on at any step."""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from accelerate.utils import set_seed
from torch import Tensor, nn

from smidgen.common.byte_sizes import parse_bytes
from smidgen.common.errors import DivergedError, TrainError
from smidgen.common.folder_lock import folder_lock_held
from smidgen.common.memory import give_back_memory, memory_guard
from smidgen.common.wrappers import bare
from smidgen.data.encoded import Encoded
from smidgen.data.kinds.base import Batch
from smidgen.delta.attaching import attach, detach
from smidgen.delta.content_hash import tensor_digests
from smidgen.delta.delta import Delta
from smidgen.delta.saved_selection import Selection
from smidgen.efficiency.activation_checkpointing import recomputing
from smidgen.efficiency.packing.isolation_check import check_kind
from smidgen.efficiency.prefix_cache.within_block import frozen_within_block
from smidgen.efficiency.sharded_base import ShardedBase
from smidgen.importance.selecting import select
from smidgen.inference.evaluation import Scores, compute_scores, write_examples
from smidgen.inference.forward_pass import run_examples
from smidgen.inference.processors import processor_of
from smidgen.ports.attachment_record import attachment, base_tensors, trained_parameters
from smidgen.sites.module_kinds import reversible_stacks
from smidgen.steps.divergence import remedy
from smidgen.steps.gradient_checks import FEW, MANY, Watch, check_depends, snapshot
from smidgen.steps.growth import assign
from smidgen.steps.loss_computation import At, Beside, loss_of
from smidgen.steps.micro_batches import MicroBatch, first_row, rows_in, split_batch
from smidgen.steps.objectives import BATCH, reduction_of
from smidgen.steps.optimizer_groups import optimizer
from smidgen.steps.other_batches import Source
from smidgen.training.memory.batch_size import StepShape, batch_and_bytes
from smidgen.training.run.batch_coupling import READS_OTHERS, check_coupling, check_reading
from smidgen.training.run.batch_feed import Feed
from smidgen.training.run.callbacks import Callbacks, Growth, MetricsLog, RunStatus
from smidgen.training.run.checkpoint import pack, unpack
from smidgen.training.run.forward_shortcuts import shortcuts
from smidgen.training.run.interrupts import Interrupts
from smidgen.training.run.model_guard import borrowed
from smidgen.training.run.prefix_cache_policy import Conditions
from smidgen.training.run.processes import Processes, accelerator_of
from smidgen.training.run.progress import Choices, Progress, State, Validation
from smidgen.training.run.progress_bar import Bar
from smidgen.training.run.prompt_budget import check_lengths, longest
from smidgen.training.run.run_folder import RunFolder
from smidgen.training.run.run_record import asked, choices, outcome
from smidgen.training.run.run_spec import RunSpec
from smidgen.training.run.settings import PACK, Settings
from smidgen.training.run.shard_limits import COMPUTE_TOGETHER, check_sharded


class NoValidationWarning(UserWarning):
    """There is no validation split, so the last state is kept and not the best."""


@dataclass(frozen=True)
class BatchShare:
    """Of the batch that processes share: its examples, and what its mean is taken over; None if it is not shared."""

    examples: int
    total: float | None = None


class Loop:
    """One run of `fit`.

    Attributes:
        run: what was asked for.
        progress: how far it is.
    """

    def __init__(self, run: RunSpec) -> None:
        self.accelerator = accelerator_of()
        self.processes = Processes(self.accelerator)
        if run.settings.batching == PACK:
            check_kind(run.task.kind)
        check_coupling(run.task.task_kind, run.settings, self.processes.count)
        self.run = run = run.checked()
        if again := reversible_stacks(bare(run.model)):
            raise TrainError(
                f"{type(next(iter(again.values()))).__name__} trains on texts whose length is a multiple of its chunks "
                "alone, and fit's batches have any; attach, and train it in a loop of your own (smidgen.optimizer)"
            )
        self.model, self.task, self.settings, self.objective = run.model, run.task, run.settings, run.objective
        self.selection, self.kind = run.selection, run.task.task_kind
        self.reduction = reduction_of(self.objective, self.kind)
        self.processor = run.processor or processor_of(run.model, self.kind)
        self.folder = RunFolder(run.out, writer=self.processes.main)
        self.progress = Progress()
        check_reading(self.objective, self.kind, self.settings, self.processes.count)
        self.shards: ShardedBase | None = None
        if self.processes.sharded:
            check_sharded(self.objective, self.task)

    def fit(self) -> Delta:
        """Open or resume the run, train, and give back the best state; the model is left as it came."""
        wanted = {} if self.folder.path is None else asked(self.run, self.folder.hashed_by)
        self.processes.from_main(lambda: self.folder.open(wanted))
        if (delta := self.processes.from_main(self._finished)) is not None:
            return delta
        with folder_lock_held(self.folder.path if self.processes.main else None):
            return self._fit(wanted)

    def history(self) -> list[Validation]:
        """The validations of the run, also of one that was finished before."""
        return self.progress.history or self.folder.history()

    def _fit(self, wanted: Mapping[str, object]) -> Delta:
        """Everything that is known once the folder is this run's alone."""
        earlier = self.processes.from_main(lambda: self.folder.open(wanted))  # again: a run may have come between
        if (delta := self.processes.from_main(self._finished)) is not None:
            return delta
        self._encode(self.settings.max_length if earlier is None else earlier.max_length)
        processes = self.processes
        self.feed = Feed(self.rows, self.collate, self.settings, processes.rank, processes.count, processes.device)
        self.total = self.feed.steps
        with borrowed(self.model):
            self.selection = self._selected()
            fitting, size = self._fit_memory(earlier)
            with self._lent():
                return self._fit_attached(wanted, fitting, size, earlier)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """The recipe on the model; or on another of the same base, in shards until the run has come to its end."""
        if not self.processes.sharded:
            self._attach()
            self._check_same()
            self.model.to(self.processes.device)
            yield
            return
        base, self.shards = self.model, ShardedBase(self.model, self.processes.device, self.processes.count)
        self.model = self.shards.model
        try:
            self._attach()
            self._check_same()
            self.shards.shard()
            yield
        except DivergedError:  # which every process raises, so that all are here to gather
            self.shards.gather()
            raise
        except BaseException as error:
            if self.shards.parted:
                error.add_note("The base is left in shards, its own parameters empty: load it anew.")
            raise
        finally:
            self.model, self.shards = base, None

    def _check_same(self) -> None:
        """Raises TrainError if processes have not the same frozen tensors, recipe and rows."""
        if self.processes.count > 1:
            trained = trained_parameters(self.model)
            frozen = {name: tensor for name, tensor in base_tensors(self.run.model).items() if name not in trained}
            digests = tensor_digests(frozen, attachment(self.model).dtype)
            base = hashlib.sha256(b"".join(name.encode() + digest for name, digest in sorted(digests.items())))
            said = {"recipe": str(self.run.recipe), "base": base.hexdigest(), "task": self.task.fingerprint}
            self.processes.check_same(said)

    def _fit_attached(
        self, wanted: Mapping[str, object], fitting: Settings, size: int, earlier: Choices | None
    ) -> Delta:
        """With the recipe on."""
        self.feed = self.feed.ready(self.model)
        s, device = self.settings, self.processes.device
        source = Source(s.seed, s.batch_size, self.rows.max_length, device)
        self.beside = Beside.of(self.objective, self.model, self.task, self.processor, source)
        with recomputing(self.model) if s.recompute else nullcontext():
            self._decide(wanted, fitting, size, earlier)
            return self._train()

    def _encode(self, limit: int | None) -> None:
        """The rows of both splits; `limit`: most tokens of an example, None for the model's own."""
        limit = longest(self.model, self.run.recipe, self.processor) if limit is None else limit
        self.rows = self.task.encode(self.processor, "train", max_length=limit)
        held: Encoded | None = None
        if "validation" in self.task.splits:
            held = self.task.encode(self.processor, "validation", max_length=limit)
        else:
            why = self.task.notes.get("validation", "is missing")
            warnings.warn(
                f"the validation split of {self.task.name} {why}: the state after the last epoch is kept, with no "
                "scores",
                NoValidationWarning,
                stacklevel=5,
            )
        check_lengths(self.model, self.run.recipe, [*self.rows.lengths, *(held.lengths if held else ())])
        self.collate = self.task.collator(self.processor, model=self.model)
        self.held = held
        self.mine = self.processes.share(held) if held else []
        self.own = len(self.mine)
        if held and self.processes.sharded and self.own * self.processes.count < len(held):
            self.mine = [*self.mine, held[0]]  # all run equally many passes

    def _attach(self) -> None:
        """Put the recipe on, where it starts or where the given start stands."""
        s = self.settings
        if self.run.start is not None:
            attach(self.model, self.run.start)
        else:
            attach(self.model, self.run.recipe, pooling=s.pooling, seed=s.seed, selection=self.selection)

    def _decide(self, wanted: Mapping[str, object], fitting: Settings, size: int, earlier: Choices | None) -> None:
        """What settings left open, now or at an earlier start."""
        before = {} if earlier is None else {"cache": earlier.cache, "rows": earlier.rows}
        splits = (self.rows,) if self.held is None else (self.rows, self.mine)
        unsteered = self.kind.unsteered or (READS_OTHERS if self.beside.batches else None)
        unsteered = COMPUTE_TOGETHER if self.processes.sharded else unsteered
        given = Conditions(self.collate, fitting, self.folder.path, self.run.shared)
        made, why = shortcuts(self.model, splits, given, before, unsteered)
        self.around, self.around_held = made[0], made[-1]
        fresh = choices(self.model, self.run, self.rows, self.total, self.processes.count)
        fresh = replace(fresh, cache=why["cache"], rows=why["rows"], rows_at_once=size)
        self.chosen = self.processes.from_main(lambda: self.folder.agreed(wanted, fresh, earlier))
        at_once = self.settings.batch_size if self.chosen.rows_at_once is None else self.chosen.rows_at_once
        self.at_once = sys.maxsize if self.reduction == BATCH else at_once
        self.folder.keep(self.selection)

    def _fit_memory(self, earlier: Choices | None) -> tuple[Settings, int]:
        """Settings whose cache fits beside a step, and how many rows of a batch are computed at once."""
        s = self.settings
        if s.max_memory is None:
            return s, s.batch_size
        if self.processes.device.type == "cpu":
            give_back_memory()
        longest_row = max(self.rows.lengths)
        length = self.rows.max_length or longest_row if s.batching == PACK else longest_row
        most = s.batch_size if earlier is None or earlier.rows_at_once is None else earlier.rows_at_once
        shape = StepShape(length, s.pooling, s.recompute)
        limit = parse_bytes(s.max_memory)
        size, need = batch_and_bytes(self.model, self.run.recipe, limit, most, shape)
        if self.reduction == BATCH and (size < s.batch_size or s.batch_tokens is not None):
            raise TrainError(
                f"{type(self.objective).__name__} couples the {s.batch_size} examples of a batch, of which max_memory "
                f"leaves room for {size}; set batch_size={size}, or max_memory to more"
            )
        return replace(s, cache_bytes=min(s.cache_bytes, (limit - need) // 2)), size

    def _selected(self) -> Selection | None:
        """What to keep, for a recipe with Select: given, of an earlier start, or chosen now."""
        if self.selection is not None or not self.run.recipe.narrowed or self.run.start is not None:
            return self.selection
        s, model = self.settings, self.model.to(self.processes.device).eval()
        kept = self.processes.from_main(self.folder.kept)
        found = kept or select(
            model,
            self.run.recipe,
            self.task,
            processor=self.processor,
            seed=s.seed,
            pooling=s.pooling,
            batch_size=s.batch_size,
            lr=s.lr,
            head_lr=s.head_lr,
            max_length=self.rows.max_length,
            objective=self.objective,
        )
        return self.processes.from_main(lambda: found)

    def _train(self) -> Delta:
        """From the first step, or the last checkpoint, to the end."""
        s = self.settings
        self.optimizer = optimizer(self.model, s.lr, s.head_lr, s.weight_decay)
        self.rates = [self.chosen.lr[group["name"]] for group in self.optimizer.param_groups]
        self.prepared = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # no wrapper: see Processes
        self.watch, self.best = Watch(self.model), snapshot(self.model)
        set_seed(s.seed + self.processes.rank)
        self._dry_run()
        self._resume()
        self.trained = list(trained_parameters(self.model).values())
        self.processes.same(self.trained)
        self.status = RunStatus(
            self.model, self.run.recipe, self.task, s, self.optimizer, self.total, self.progress, lr=self.rates[0]
        )
        show, label = self.run.progress if self.processes.main else False, str(self.run.recipe)
        with Bar(self.total, self.progress.step, show, label) as bar, Interrupts() as self.interrupts:
            own = (Growth(), bar, MetricsLog(self.folder.log, lambda: bar.rate))
            self.callbacks = Callbacks(own, self.run.callbacks, self._save)
            for epoch in range(self.progress.epochs, s.epochs):
                self._epoch(epoch)
        return self._finish()

    def _epoch(self, epoch: int) -> None:
        """What is left of an epoch, with its validation."""
        progress = self.progress
        self._train_mode()
        for places, batch in self.feed.epoch(epoch, skip=progress.step - self.feed.before(epoch)):
            self._step(places, batch)
            due = progress.step % self.chosen.checkpoint_steps == 0 or self.interrupted
            if due and progress.step < self.feed.before(epoch + 1):
                self._checkpoint()
        self._validate(epoch)
        self.callbacks.tell("epoch", self.status)
        self._checkpoint()

    def _train_mode(self) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()

    def _step(self, places: Sequence[int], batch: Batch) -> None:
        """One optimiser step, with what is checked and told of it."""
        progress, value = self.progress, 0.0
        factor = self.settings.rate(progress.step, self.total)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        part = self._part(places, batch)
        with memory_guard(self.settings.batch_size, self.settings.batch_tokens):
            for micro_batch in self._micro_batches(places, batch, part):
                with self.around(micro_batch.places, micro_batch.batch):
                    loss = self._loss(self.prepared, micro_batch.batch, self._at(micro_batch))
                    value += float(loss.detach()) if micro_batch.share else 0.0
                    if self.processes.count == 1:
                        self._check_loss(value, factor)
                    self.accelerator.backward(loss)
        if self.processes.count > 1:
            self.processes.add_gradients(self.trained)
            (value,) = self.processes.total(value)
            self._check_loss(value, factor)
        self.watch.saw(self.model)
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.settings.clip))
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient is {norm} at step {progress.step}, lr {self.rates[0] * factor:.2g}; {self._remedy()}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        self._told(value, factor * self.rates[0], part.examples)
        if progress.step in (min(FEW, self.total), MANY) and self.total > 1:
            self.watch.moved(self.model, progress.step)

    def _part(self, places: Sequence[int], batch: Batch) -> BatchShare:
        """What the other processes have of the batch."""
        if self.processes.count == 1:
            return BatchShare(len(places))
        weight = sum(self.kind.loss_weights(batch, rows_in(batch))) if places else 0
        total, examples, interrupts = self.processes.total(weight, len(places), self.interrupts.seen)
        self.interrupted_together = interrupts > 0
        return BatchShare(int(examples), total)

    @property
    def interrupted(self) -> bool:
        """Whether to stop; several processes stop behind the same step."""
        return self.interrupts.seen if self.processes.count == 1 else self.interrupted_together

    def _micro_batches(self, places: Sequence[int], batch: Batch, part: BatchShare) -> Iterable[MicroBatch]:
        """This process's share of a batch, as much at a time as memory allows."""
        found: Iterable[MicroBatch] = ()
        if places:
            found = split_batch(places, batch, self.at_once, self.task.kind, self.reduction, part.total)
        if not self.processes.sharded:
            return found
        found = list(found)
        more = self.processes.most(len(found)) - len(found)  # for others, which need this process's part of the base
        return [*found, *[first_row(places or (0,), batch)] * more]

    def _check_loss(self, value: float, factor: float) -> None:
        """Raises DivergedError if the loss of a step is not finite."""
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss is {value} at step {self.progress.step}, lr {self.rates[0] * factor:.2g}; {self._remedy()}"
            )

    def _at(self, micro_batch: MicroBatch) -> At:
        """Where the loss of a micro-batch stands."""
        return At(self.progress.step, self.total, micro_batch.weight, micro_batch.share, micro_batch.places)

    def _remedy(self) -> str:
        return remedy(self.model, self.accelerator.mixed_precision)

    def _told(self, loss: float, lr: float, examples: int) -> None:
        """Tell of a step; what was put in place of trained tensors is trained from here on."""
        status = self.status
        status.loss, status.lr, status.examples, status.replaced = loss, lr, examples, False
        self.callbacks.tell("step", status)
        if status.replaced:
            self.trained = list(trained_parameters(self.model).values())

    def _loss(self, model: nn.Module, batch: Batch, at: At | None = None) -> Tensor:
        return loss_of(model, batch, self.objective, self.beside, at)

    def _dry_run(self) -> None:
        """One forward and backward pass in eval mode: every trained tensor must be reached."""
        self.model.eval()
        rows = [self.rows[i] for i in range(min(2, len(self.rows)))]
        batch = {k: v.to(self.processes.device) for k, v in self.collate(rows).items()}
        self.frozen = frozen_within_block(
            self.model, attachment(self.model).plan, self.task.task_kind.model_inputs(batch)
        )
        loss = self._loss(self.model, batch, At(places=range(len(rows))))
        check_depends(self.model, loss)
        loss.backward()
        self.watch.first(self.model)
        self.optimizer.zero_grad(set_to_none=True)

    def _validate(self, epoch: int) -> None:
        """Count the epoch, and keep its state if it is the best so far; without a split to tell, it is."""
        progress = self.progress
        result = None if self.held is None else self._held_out()
        progress.epochs = epoch + 1
        if result is None:
            self.best = snapshot(self.model)
            return
        progress.history.append(Validation(epoch + 1, progress.step, result.values))
        if progress.best is None or math.isnan(progress.best) or result.better > progress.best:
            progress.best, progress.best_epoch = result.better, epoch + 1
            self.best = snapshot(self.model)
        self.callbacks.tell("validation", self.status, result)

    def _held_out(self) -> Scores:
        size = self.settings.batch_size
        size = size if self.settings.max_memory is None else min(size, self.at_once)
        with memory_guard(self.settings.batch_size):
            outputs = run_examples(self.model, self.mine, self.task, self.processor, size, self.around_held)
            new = self.chosen.max_new_tokens or 0
            written = write_examples(self.model, self.mine, self.task, self.processor, size, new)
        joined = self.processes.joined
        return compute_scores(self.task, joined(outputs[: self.own]), joined(written[: self.own]))

    def _write(self) -> None:
        tensors = pack(self.model, self.best, self.optimizer, self.accelerator)
        self.folder.checkpoint(State(tensors, self.progress))

    def _checkpoint(self) -> None:
        self._write()
        if self.interrupted:
            raise KeyboardInterrupt

    def _save(self) -> str:
        """Save what a failed callback interrupts, and say what became of it."""
        if self.folder.path is None:
            return "nothing is saved, as there is no out="
        if self.folder.finished:
            return f"the delta is in {self.folder.path}"
        if self.processes.count > 1:
            return f"{self.folder.path} holds the last checkpoint"
        self._write()
        return f"the run is saved in {self.folder.path}, and the same call goes on from there"

    def _resume(self) -> None:
        state = self.processes.from_main(self.folder.resume)
        if state is not None:
            self.progress = state.progress
            self.best = unpack(state.tensors, self.model, self.optimizer, self.accelerator)

    def _finished(self) -> Delta | None:
        """The delta of a run that came to its end before, perhaps killed while it cleaned up."""
        if self.folder.path is None or not self.folder.finished:
            return None
        self.folder.finish()
        return Delta.load(self.folder.path)

    def _finish(self) -> Delta:
        """The best state as a delta, saved."""
        if self.total > 1:
            self.watch.moved(self.model, self.total)
            self.watch.report(self.model, self.total)
        if self.shards is not None:
            self.shards.gather()
        assign(self.model, self.best)
        said = outcome(self.run, self.chosen, self.progress, self.total, self.selection)
        delta = replace(detach(self.model), labels=tuple(self.task.labels)).with_info(**said)
        self.processes.from_main(lambda: self._keep(delta))
        self.callbacks.tell("round", self.status, delta)
        return delta

    def _keep(self, delta: Delta) -> None:
        """Save what came of the run."""
        if self.folder.path is not None:
            delta.save(self.folder.path)
            self.folder.finish()
