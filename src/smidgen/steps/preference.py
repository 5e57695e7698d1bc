"""Learning from pairs of answers, of which one is preferred."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from smidgen.common.errors import SmidgenError, TrainError
from smidgen.data.kinds.base import Outputs, TaskKind
from smidgen.data.labels import IGNORED, LabelPlace
from smidgen.data.task import Task
from smidgen.steps.objectives import Needs, Objective
from smidgen.steps.step import BASE, TRAIN, Batch, Batches, Reference, Step


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7), mean over pairs:

        loss = -log sigmoid(beta * (log p(w) - log p_ref(w) - log p(l) + log p_ref(l)))

    w is the preferred answer, l the other one; log p, in nats, is summed over an answer's labelled tokens. `fit` trains
    on the preferred ones (prompt and completion); the same prompts with the other ones are a task of their own:

        sm.fit(model, "LN()", preferred, objective=sm.DPO(rejected=other, beta=0.1))

    Fields:
        rejected: a task whose train split has, row by row, the answers that are not preferred.
        beta: how strongly the reference holds.
        reference: "base", the model with its edits off, or a delta (of supervised training, say).

    Raises:
        SmidgenError: beta is not positive, or the task's labels are no tokens.
        TrainError: a pair lacks one of its answers, or they answer different prompts.
    """

    rejected: Task
    beta: float = 0.1
    reference: Reference = BASE

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise SmidgenError(f"DPO: beta={self.beta!r} must be above 0")

    def needs(self, kind: TaskKind) -> Needs:
        """The partners of the rows that are trained on, and the reference."""
        if kind.labels_at is LabelPlace.EXAMPLE:
            raise SmidgenError(f"DPO compares texts by the probability of their tokens; a {kind.name} task has none")
        return Needs(
            references={"reference": self.reference}, batches={"rejected": Batches(self.rejected, aligned=True)}
        )

    def loss(self, step: Step) -> Tensor:
        """Equation 7."""
        _check_prompts(step)
        preferred, other = (_gain(step, name) for name in (TRAIN, "rejected"))
        return -F.logsigmoid(self.beta * (preferred - other)).mean()


def _check_prompts(step: Step) -> None:
    """Raises TrainError if a row's two answers do not follow the same tokens, as where one file is in another order."""
    preferred, other = (_prompts(step.batches[name], step.kind) for name in (TRAIN, "rejected"))
    if wrong := [i for i, (one, two) in enumerate(zip(preferred, other, strict=True)) if one != two]:
        raise TrainError(
            f"{len(wrong)} of {len(preferred)} pairs of a batch answer different prompts, first row {wrong[0]}; the "
            "rows of DPO's rejected task must be those of the trained one, in the same order and with the same splits"
        )


def _prompts(batch: Batch, kind: TaskKind) -> list[list[int]]:
    """What stands before each row's answer: in front of its first label, or all that an encoder reads."""
    ids, read = batch["input_ids"], batch["attention_mask"].bool()
    if kind.labels_at is LabelPlace.NEXT:
        read = read & ((batch["labels"] != IGNORED).cumsum(1) == 0)
    return [row[kept].tolist() for row, kept in zip(ids, read, strict=True)]


def _gain(step: Step, batch: str) -> Tensor:
    """log p - log p_ref of each answer, (B,)."""
    labels = step.batches[batch]["labels"]
    tuned, reference = step.outputs(batch), step.reference("reference", batch)
    return log_probability(tuned, labels, step.kind) - log_probability(reference, labels, step.kind)


def log_probability(outputs: Outputs, labels: Tensor, kind: TaskKind) -> Tensor:
    """Log-probability of the labels of each row, summed over its tokens, (B,), in nats.

    Args:
        outputs: with `logits` (B, T, V).
        labels: (B, T), -100 where there is none.
    """
    logits, labels = kind.aligned(outputs.logits.float(), labels)
    found = -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return found.sum(1)
