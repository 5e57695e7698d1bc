"""How far each component of a model is from where it began: cells of component, layer and term, over several runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from smidgen.common.errors import ModelError, nearest
from smidgen.common.json_numbers import plain, restored
from smidgen.common.wrappers import bare
from smidgen.sites.fused_rows import Rows
from smidgen.sites.task_head import head_names
from smidgen.studies.experiments.change_measures import CAVEAT, MEASURES, measure
from smidgen.studies.experiments.model_components import (
    ComponentPart,
    Key,
    check_components,
    components,
    grouped,
    known_components,
)

Values = NDArray[np.float64]
Weights = nn.Module | Mapping[str, Tensor]


class RunInfo(TypedDict, total=False):
    """What is known of a training."""

    scores: Mapping[str, float] | None
    best_epoch: int | None
    steps: int | None
    lr_steps: float | None


@dataclass(frozen=True)
class Run:
    """One fine-tuned model: what it was trained on, and what is known of the training (scores, steps, lr_steps)."""

    task: str = ""
    seed: int = 0
    info: RunInfo = field(default_factory=RunInfo)


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        mean: over the tasks of the mean over each task's seeds.
        seeds: standard deviation between seeds, root mean square over the tasks; nan with one seed.
        tasks: standard deviation between the means of the tasks; nan with one task.
        tensors: tensors that went in; those without a value (nan) are left out of the mean.
    """

    mean: float
    seeds: float
    tasks: float
    tensors: int

    @property
    def spread(self) -> float:
        """Between tasks where there are several, else between seeds."""
        return self.seeds if np.isnan(self.tasks) else self.tasks


@dataclass(frozen=True, eq=False)
class Changes:
    """Changes of every part in every run.

    Attributes:
        model: name of the base.
        recipe: what was trained, "" if that is not known.
        parts: what `components` found in the base, head left out: it begins at random, at a learning rate of its own.
        runs: one entry per fine-tuned model.
        values: (runs, parts, measures), measures in the order of `MEASURES`; nan where a measure is undefined.
    """

    model: str
    recipe: str
    parts: tuple[ComponentPart, ...]
    runs: tuple[Run, ...]
    values: Values
    caveat: str = CAVEAT

    def table(self, measure: str, by: Sequence[str] = ("component",)) -> dict[Key, Cell]:
        """Key (of the fields of a part named by `by`) -> cell, in the order of the components.

        A tensor gives one number, and a cell is the plain mean of its tensors' numbers, as in the published plots.
        `by` is of "component", "term", "stack", "layer", "name".
        """
        numbers = self.values[:, :, _column(measure)]
        return {key: self._cell(numbers[:, members]) for key, members in grouped(self.parts, by).items()}

    def ranking(self, measure: str) -> list[str]:
        """Components from the largest change to the smallest; those without a number are left out."""
        cells = {key[0]: cell.mean for key, cell in self.table(measure).items() if not np.isnan(cell.mean)}
        return sorted(cells, key=lambda name: -cells[name])

    @property
    def components(self) -> list[str]:
        """The components that were compared."""
        return known_components(self.parts)

    def only(self, wanted: Sequence[str]) -> Changes:
        """The same for some components. Raises ModelError, naming the nearest, if there is no such component."""
        check_components(wanted, self.parts)
        kept = [i for i, part in enumerate(self.parts) if part.component in wanted]
        return replace(self, parts=tuple(self.parts[i] for i in kept), values=self.values[:, kept])

    def to_json(self) -> dict[str, object]:
        """Everything, as plain data: every tensor's numbers, the cells per component and the rankings."""
        cells = {m: {str(k[0]): asdict(c) for k, c in self.table(m).items()} for m in MEASURES}
        whole: dict[str, object] = {
            "model": self.model,
            "recipe": self.recipe,
            "measures": MEASURES,
            "caveat": self.caveat,
        }
        whole |= {"rankings": {m: self.ranking(m) for m in MEASURES}, "components": cells}
        whole |= {"runs": [asdict(run) for run in self.runs], "parts": [asdict(part) for part in self.parts]}
        return plain({**whole, "values": self.values.tolist()})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Changes:
        """The inverse of `to_json`."""
        parts = (ComponentPart(**{**p, "rows": Rows(*p["rows"]) if p["rows"] else None}) for p in data["parts"])
        values = [[[restored(x) for x in part] for part in run] for run in data["values"]]
        runs = tuple(Run(**run) for run in data["runs"])
        return cls(data["model"], data["recipe"], tuple(parts), runs, np.array(values), data["caveat"])

    def _cell(self, numbers: Values) -> Cell:
        """numbers: (runs, tensors of the cell)."""
        with warnings.catch_warnings():  # the mean of nothing is nan, which is what it is
            warnings.simplefilter("ignore", RuntimeWarning)
            of_run = np.nanmean(numbers, axis=1)
            tasks = [
                of_run[[run.task == task for run in self.runs]] for task in dict.fromkeys(r.task for r in self.runs)
            ]
            means = np.array([np.nanmean(found) for found in tasks])
            variances = [np.var(found, ddof=1) for found in tasks if len(found) > 1]
            between = float(np.std(means, ddof=1)) if len(means) > 1 else np.nan
            seeds = float(np.sqrt(np.mean(variances))) if variances else np.nan
            return Cell(float(np.nanmean(means)), seeds, between, int((~np.isnan(numbers)).any(axis=0).sum()))


def compare_changes(
    base: Weights,
    tuned: Weights,
    *,
    lr_steps: float | None = None,
    model: nn.Module | None = None,
    run: Run | None = None,
) -> Changes:
    """How far `tuned` is from `base`, part by part; the heads are left out.

    Args:
        base, tuned: models, or state dicts of one; names may differ by the base model's prefix.
        lr_steps: sum over the steps of the learning rate, for the measure "per_lr"; None if it is not known.
        model: tells the components; by default whichever of the two is a model.
        run: what is known of the tuned one.

    Raises:
        ModelError: neither is a model, the two differ in architecture, or nothing changed.
    """
    base, tuned, model = bare(base), bare(tuned), bare(model)
    shape = model or next((m for m in (base, tuned) if isinstance(m, nn.Module)), None)
    if shape is None:
        raise ModelError("two state dicts do not tell which tensor is what: pass model= as well, such as the base")
    old, new = _aligned(base, shape), _aligned(tuned, shape)
    heads = {_short(name, shape) for m in (shape, base, tuned) if isinstance(m, nn.Module) for name in head_names(m)}
    parts = [p for p in components(shape) if _short(p.name, shape) not in heads]
    # a pooler comes and goes with the class that a checkpoint is loaded as
    parts = [p for p in parts if p.component != "pooler" or {_short(p.name, shape)} <= old.keys() & new.keys()]
    _check_alike(parts, old, new, shape)
    found = []
    for part in parts:
        name = _short(part.name, shape)
        found.append(measure(part.of(old[name]), part.of(new[name]), lr_steps))
    values = np.array([found], dtype=np.float64)
    if not values[0, :, 0].any():
        raise ModelError(f"nothing changed: all {len(parts)} tensors are equal; is the tuned model the base itself?")
    config = getattr(shape, "config", None)
    name = str(getattr(config, "_name_or_path", "") or type(shape).__name__)
    return Changes(name, "", tuple(parts), (run or Run(),), values)


def join_changes(found: Sequence[Changes]) -> Changes:
    """Several runs on one base as one result; a part that a run lacks (a pooler) is nan there."""
    parts = list(dict.fromkeys(part for one in found for part in one.parts))
    values = np.full((sum(len(one.runs) for one in found), len(parts), len(MEASURES)), np.nan)
    at, row = {part: i for i, part in enumerate(parts)}, 0
    for one in found:
        values[row : row + len(one.runs), [at[part] for part in one.parts]] = one.values
        row += len(one.runs)
    return replace(found[0], parts=tuple(parts), runs=tuple(r for one in found for r in one.runs), values=values)


def _column(name: str) -> int:
    if name not in MEASURES:
        raise ModelError(f"no measure {name!r}{nearest(name, MEASURES)}; there are {', '.join(MEASURES)}")
    return list(MEASURES).index(name)


def _short(name: str, model: nn.Module) -> str:
    """The name as the base model alone has it."""
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _aligned(weights: Weights, shape: nn.Module) -> dict[str, Tensor]:
    if isinstance(weights, nn.Module):
        return {_short(n, weights): p for n, p in weights.named_parameters(remove_duplicate=False)}
    return {_short(n, shape): t for n, t in weights.items()}


def _check_alike(
    parts: Sequence[ComponentPart], old: Mapping[str, Tensor], new: Mapping[str, Tensor], shape: nn.Module
) -> None:
    for name in (_short(part.name, shape) for part in parts):
        sizes = [tuple(side[name].shape) if name in side else None for side in (old, new)]
        if sizes[0] != sizes[1] or sizes[0] is None:
            said = " and ".join(
                f"{list(s) if s else 'missing'} in the {w}" for s, w in zip(sizes, ("base", "tuned"), strict=True)
            )
            raise ModelError(f"the two models are not of one architecture: {name} is {said}")
