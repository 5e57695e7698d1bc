"""StudyCell: where the arms of a study are compared: one model, one task, one number of examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from smidgen.data.processor import Processor
from smidgen.data.resplitting import with_examples
from smidgen.data.task import Task
from smidgen.delta.fingerprint import Fingerprint
from smidgen.inference.loading import load
from smidgen.sites.new_tensors import new_names
from smidgen.sites.task_head import head_names
from smidgen.studies.comparison.run_store import Result, RunStore
from smidgen.studies.comparison.study import Study
from smidgen.studies.runners.runner import Runner
from smidgen.training.run.settings import Settings

Told = Callable[[Result], None]


@dataclass(frozen=True, eq=False)
class StudyCell:
    """Where arms are compared with each other.

    Attributes:
        source: the task with all its examples.
        examples: to learn from; None for all.
        runner: where the runs are made.
        told: is given each result as it comes, also those of earlier calls.
        tested: whether the best rates are tested.
    """

    study: Study
    store: RunStore
    model: str
    source: Task
    examples: int | None
    runner: Runner
    told: Told
    tested: bool = True

    @cached_property
    def tasks(self) -> dict[int, Task]:
        """Seed -> the task with the examples that it draws."""
        seeds, count = self.study.seeds, self.examples
        return {seed: self.source if count is None else with_examples(self.source, count, seed) for seed in seeds}

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, Processor]:
        """The base with a head for the task, and what makes its inputs."""
        return load(self.model, task=self.source, dtype=self.study.dtype, seed=self.study.seeds[0])

    @cached_property
    def heads(self) -> dict[int, dict[str, Tensor]]:
        """Seed -> what the tensors that no checkpoint has start from."""
        found = {}
        for seed in self.study.seeds:
            model, _ = load(self.model, task=self.source, dtype=self.study.dtype, seed=seed)
            found[seed] = {name: model.get_parameter(name).detach().clone() for name in new_names(model) or ()}
        return found

    @cached_property
    def content(self) -> str:
        """Digest of the base, head apart."""
        model, _ = self.loaded
        return Fingerprint.of(model, head_names(model)).values

    @cached_property
    def settings(self) -> Settings:
        """What is the same for all runs."""
        return Settings.of(self.study.settings)
