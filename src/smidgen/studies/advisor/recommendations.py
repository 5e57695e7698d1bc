"""Recommendation: one recipe, why, and the command that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from smidgen.data.metrics import METRICS
from smidgen.studies.advisor.rungs import Rung
from smidgen.studies.comparison.findings import Against, ArmFound, Findings
from smidgen.studies.comparison.study import Data, Study


@dataclass(frozen=True, eq=False)
class Recommendation:
    """What a budget found.

    Attributes:
        arm: the recommended one.
        why: evidence, in a sentence.
        command: that trains it, word by word.
        rungs: what was run.
        findings: of the last rung.
        budget, seconds: given, and taken.
    """

    arm: ArmFound
    why: str
    command: Sequence[str]
    rungs: Sequence[Rung]
    findings: Findings
    budget: float
    seconds: float

    @property
    def left_out(self) -> list[str]:
        """Arms that were timed, and for which the budget was too short, or whose first run failed."""
        return [arm for arm in self.rungs[0].arms if arm not in self.rungs[1].arms]

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "arm": self.arm.arm, "recipe": self.findings.study.arms[self.arm.arm].recipe, "lr": self.arm.lr,
            "why": self.why, "command": list(self.command), "rungs": [asdict(rung) for rung in self.rungs],
            "left_out": self.left_out,
            "budget": self.budget, "seconds": self.seconds, "findings": self.findings.to_json(),
        }  # fmt: skip


def recommended(found: Findings) -> tuple[ArmFound, str]:
    """The better of two arms; where the test split shows no difference beyond the margin, the one with fewer trained
    values. A difference that so few runs do not make certain is said so.

    An arm of which no run came to its end is left out.
    """
    arms = [arm for arm in found.arms if arm.test is not None]
    by_name = {arm.arm: arm for arm in arms}
    against = next((each for each in found.against if each.task is None and each.arm in by_name), None)
    if len(arms) < 2 or against is None:
        return arms[0], f"{arms[0].arm} is the only one of the last two whose runs came to an end"
    return _chosen(by_name[against.arm], by_name[found.study.against], against, found.study)


def _chosen(one: ArmFound, other: ArmFound, against: Against, study: Study) -> tuple[ArmFound, str]:
    """Of the last two arms."""
    verdict = None if against.equivalence is None else against.equivalence.verdict
    mean, seeds = against.difference.mean, f"{against.difference.pairs} pairs of runs"
    certain = verdict in ("better", "worse")
    if certain or (verdict != "equivalent" and abs(mean) > study.margin):
        best, rest = (one, other) if (mean > 0) == METRICS[one.metric].higher_is_better else (other, one)
        ahead = f"{best.arm} is {100 * abs(mean):.1f} points ahead of {rest.arm} on the test split"
        return best, f"{ahead}, certain by {seeds} (95 %)" if certain else f"{ahead}, which {seeds} do not make certain"
    points = f"{100 * mean:+.1f}".replace("-", "−")
    small, large = sorted((one, other), key=lambda arm: arm.costs.get("trained_values") or 0.0)
    told = (
        f"are equal within {100 * study.margin:g} points" if verdict == "equivalent"
        else "cannot be told apart by so few runs"
    )  # fmt: skip
    sizes = [f"{arm.costs.get('trained_values') or 0:,.0f}" for arm in (small, large)]
    return small, (
        f"{one.arm} and {other.arm} {told} on the test split ({one.arm} {points} points, {seeds}); {small.arm} trains "
        f"{sizes[0]} values, {large.arm} {sizes[1]}"
    )


def tuning_command(study: Study, data: Data, arm: str, rate: str, lr: float) -> list[str]:
    """`smidgen tune` with what was found, to put --out behind."""
    found = study.arms[arm]
    words = ["smidgen", "tune", "--model", study.models[0], "--data", data.data, "--recipe", found.recipe]
    words += [f"--{rate.replace('_', '-')}", f"{lr:g}"]
    given = {**study.settings, "pooling": found.pooling, "label": data.label, "kind": data.kind, "metric": data.metric}
    for name, value in given.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for column in data.text or ():
        words += ["--text", column]
    return [*words, "--out", "delta"]
