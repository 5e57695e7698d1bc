"""The demo: what LayerNorms alone can do on BBC news, next to a mere head."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from smidgen.data.task import Task
from smidgen.delta.delta import Delta
from smidgen.inference.evaluation import evaluate
from smidgen.inference.loading import load
from smidgen.inference.prediction import Prediction, predict
from smidgen.planning.resolution import resolve
from smidgen.recipe.recipe import as_recipe
from smidgen.training.fitting import fit
from smidgen.training.run.run_folder import RUN

MODEL, DATA = "minilm", "bbc-news"
LIMIT = {"train": 480, "validation": 100, "test": 300}
EPOCHS, LENGTH = 3, 64
ARMS = (("LN()", "mean"), ("Head()", "mean"), ("Head()", "first"))
INTRO = f"""
    {MODEL} (22.7 million values) learns to sort BBC news into 5 topics from {LIMIT["train"]} articles and is tested
    on {LIMIT["test"]} others: its 13 LayerNorms (9,984 values) and a head are trained, or a head alone.
"""
NOISE = f"With {LIMIT['test']} test articles, differences below about 4 points say little."
SENTENCES = (
    "The striker scored twice in extra time to put the home side into the final.",
    "Shares fell sharply after the bank said that its profits would be lower than expected.",
    "The new phone can record video for three hours and has a better camera.",
)


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison; `seconds` is None if its run was begun earlier."""

    name: str
    accuracy: float
    trained: int
    head: int
    file_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Demonstration:
    """What the demo shows: the arms, and predictions by the LN delta that was read back from disk."""

    arms: list[Arm]
    predictions: list[Prediction]
    remark: str = NOISE

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def run_demo(out: str | os.PathLike[str], say: Callable[[str], None] = print) -> Demonstration:
    """Train the arms on a part of BBC news, LN's delta into `out`; load that from disk and use it.

    Args:
        out: folder of LN's run; a demo that was stopped goes on there.
        say: gets a line before each arm.
    """
    task = Task.load(DATA, limit=LIMIT)
    model, processor = load(MODEL, task=task)
    arms = []
    for recipe, pooling in ARMS:
        say(f"training {recipe}, pooling {pooling} ...")
        arms.append(_arm(model, task, recipe, pooling, out if recipe == "LN()" else None))
    delta = Delta.load(out)
    base, processor = load(MODEL, delta=delta)
    return Demonstration(arms, predict(base, SENTENCES, delta=delta, processor=processor))


def _arm(model: PreTrainedModel, task: Task, recipe: str, pooling: str, out: str | os.PathLike[str] | None) -> Arm:
    plan = resolve(model, as_recipe(recipe), pooling)
    begun = out is not None and (Path(out) / RUN).exists()
    start = time.perf_counter()
    delta = fit(model, recipe, task, out=out, pooling=pooling, epochs=EPOCHS, max_length=LENGTH)
    seconds = None if begun else time.perf_counter() - start
    accuracy = evaluate(model, task, delta=delta).values["accuracy"]
    return Arm(f"{recipe}, {pooling}", accuracy, plan.trained, plan.head_values, plan.file_bytes, seconds)
