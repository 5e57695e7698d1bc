"""Select: the term behind `|` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from smidgen.common.errors import RecipeError
from smidgen.methods.base import Method
from smidgen.methods.field_checks import at_least, one_of
from smidgen.recipe.recipe import Filter, Term

SCORES = ("fisher", "gradient", "change", "movement", "scout", "magnitude", "random")
SCOUT = "scout"
SHUFFLED = "shuffled"
TRAINED = ("change", "movement", "scout")  # a course of training is what they measure
READY = ("magnitude", "random")  # of the start alone: no data
GRANULARITIES = ("element", "tensor", "layer", "head")
SCOPES = {"global": GRANULARITIES, "term": ("element", "tensor"), "tensor": ("element",)}


@dataclass(frozen=True)
class Select(Filter):
    """Keep only the best-scored part of what the methods before `|` would train; the rest stays at its start.

    ValizadehAslani and Liang 2024, LayerNorm as the key component, arXiv:2403.20284 (a tenth of LayerNorm by Fisher).
    Sung et al. 2021, Training Neural Networks with Fixed Sparse Masks, arXiv:2111.09839, section 3 (fisher).
    Sanh et al. 2020, Movement Pruning, arXiv:2005.07683, section 3 (movement). Ansell et al. 2022, Composable Sparse
    Fine-Tuning, arXiv:2110.07560, section 3 (change). Guo et al. 2021 and others use magnitude and random as controls.

        fisher:     mean over examples of (d log p / d theta)^2, exact for each example
        gradient:   |mean over examples of d log p / d theta|
        change:     |theta_w - theta_0| after w = `warmup` training steps
        movement:   sum over w = `warmup` training steps of -theta * d loss / d theta
        scout:      (phi_w - phi_0)^2 of the tensors phi of another method, trained in the same places (LoFiT's gains)
        magnitude:  |theta_0|
        random:     uniform, by `seed`: one draw for each unit, whatever its size

    Fields:
        score: one of the above; a larger unit's score is the mean over its values.
        keep: a share (0.1) or a whole number (998) of units; met exactly.
        granularity: the unit: "element", "tensor", "layer", or "head" (of attention).
        scope: where units compete: "global", or "term" (gains and biases apart) or "tensor", each with its share.
        order: "top"; or a control: "bottom" for the worst-scored, "shuffled" for as many of each tensor as "top" keeps,
            drawn by `seed` (single values only), which tells the choice of values from the choice of tensors.
        examples, kind: of fisher and gradient: how many examples of train, and "empirical", "true" or "expected".
        warmup: training steps of the whole recipe before scoring; then everything goes back to its start. LoRA's A has
            no gradient while B is 0, so without a warm-up no value of A is chosen by fisher.
        seed: of random and shuffled, of the choice of examples and of the warm-up's batches.

    Departures: the papers mask gradients; here the kept values are leaves of their own, so that neither weight decay
    nor momentum moves the rest. After a warm-up the papers keep the trained head; here the head goes back too.
    """

    score: str
    keep: float | int = 0.1
    granularity: str = "element"
    scope: str = "global"
    order: str = "top"
    examples: int = 1024
    kind: str = "empirical"
    warmup: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("Select", "score", self.score, SCORES)
        one_of("Select", "granularity", self.granularity, GRANULARITIES)
        one_of("Select", "scope", self.scope, tuple(SCOPES))
        one_of("Select", "order", self.order, ("top", "bottom", SHUFFLED))
        one_of("Select", "kind", self.kind, ("empirical", "true", "expected"))
        at_least("Select", "examples", self.examples, 1)
        at_least("Select", "warmup", self.warmup, 0)
        at_least("Select", "seed", self.seed, 0)
        _check_keep(self.keep)
        if self.granularity not in SCOPES[self.scope]:
            raise RecipeError(
                f"Select: scope={self.scope!r} goes with granularity {' or '.join(SCOPES[self.scope])}, "
                f"not {self.granularity!r}"
            )
        if self.order == SHUFFLED and self.granularity != "element":
            raise RecipeError(f"Select: order='shuffled' draws single values, not granularity={self.granularity!r}")
        if self.score in TRAINED and not self.warmup:
            raise RecipeError(
                f"Select: {self.score!r} measures a course of training: give warmup= its steps, such as 50"
            )
        if self.score in READY and self.warmup:
            raise RecipeError(f"Select: {self.score!r} looks at the start alone; leave warmup= out")

    def refuses(self, term: Term) -> str | None:
        """A scout is for methods that have one."""
        if self.score != SCOUT:
            return None
        assert isinstance(term, Method)
        if term.scout() is None:
            return f"Select('scout'): {term} has no method that looks for it; use 'fisher' or 'change'"
        return None

    @property
    def needs_data(self) -> bool:
        """Whether the score is computed from examples."""
        return self.score not in READY


def _check_keep(keep: float | int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise RecipeError(f"Select: keep={keep!r} must be a share such as 0.1, or a whole number of units")
    if not keep > 0:
        raise RecipeError(f"Select: keep={keep!r} keeps nothing; give a share above 0, or a whole number from 1")
    if isinstance(keep, float) and keep > 1:
        raise RecipeError(f"Select: keep={keep!r} is more than there is; a share is at most 1.0, a count has no point")
