"""An objective as somebody else would write it: public names only, nothing of it in the library.

New labels are learned from few rows, while on rows to keep the answers stay near those of an earlier delta. Both
batches are looked at as a whole: the examples that the reference is surest of count most.
"""

from dataclasses import dataclass

import torch.nn.functional as F

import smidgen as sm


@dataclass(frozen=True)
class KeepAnswers(sm.Objective):
    """Task loss plus `weight` times a distillation loss on rows to keep, its examples weighted over the batch.

    loss = task(train) + weight * sum_i w_i KL(p_reference || p)(retain_i),  w = softmax over the batch of certainty
    """

    retain: sm.Task
    teacher: sm.Delta
    weight: float = 1.0

    reduction = "batch"

    def needs(self, kind):
        """Rows to keep without their labels, and the earlier delta."""
        retain = sm.Batches(self.retain, labelled=False)
        return sm.Needs(references={"teacher": self.teacher}, batches={"retain": retain})

    def loss(self, step):
        """One number."""
        wanted = F.log_softmax(step.reference("teacher", "retain").logits, -1)
        found = F.log_softmax(step.outputs("retain").logits, -1)
        certainty = wanted.max(-1).values.softmax(0)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)
        return step.outputs().loss + self.weight * (certainty * divergence).sum()
