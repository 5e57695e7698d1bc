"""Scores of a kind of task: which metrics fit, and their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from smidgen.common.errors import DataError, nearest
from smidgen.data.kinds.base import kind_named
from smidgen.data.metrics import BIO, ENTITY_F1, F1, METRICS, Values, f1_macro, is_bio


def default_metric(kind: str) -> str:
    """The metric of a kind of task unless another is chosen."""
    return kind_named(kind).usual[0]


def check_metric(metric: str, kind: str, labels: Sequence[str] = ()) -> None:
    """Raises DataError if there is no such metric, if it is for another kind, if its package is not installed, or if
    its labels are not BIO names."""
    fitting = [m.name for m in kind_named(kind).metrics]
    if metric not in fitting:
        what = f"is not for {kind}" if metric in METRICS else "is unknown"
        hint = nearest(metric, fitting) or f"; there are {', '.join(fitting)}"
        raise DataError(f"metric {metric!r} {what}{hint}")
    package = METRICS[metric].package
    if package is not None:
        package()
    if metric == ENTITY_F1.name and not is_bio(labels):
        odd = next(label for label in labels if not BIO.fullmatch(label))
        raise DataError(f"entity_f1 needs labels O, B-type, I-type and found {odd!r}; use metric='token_accuracy'")


def compute_metric(
    kind: str, metric: str, predictions: Values, references: Values, labels: Sequence[str] = ()
) -> dict[str, float]:
    """The chosen metric first, then the usual ones of the kind. nan means undefined (constant predictions).

    With more than two `labels`, f1 is the macro average, whichever of them occur.

    Raises:
        DataError: an unknown or unfitting metric, no examples, lengths that differ.
    """
    check_metric(metric, kind, labels)
    if len(predictions) != len(references) or not len(references):
        raise DataError(f"cannot score {len(predictions)} predictions against {len(references)} references")
    names = dict.fromkeys((metric, *kind_named(kind).usual))
    if not is_bio(labels):
        names.pop(ENTITY_F1.name, None)
    return {name: _function(name, labels)(predictions, references) for name in names}


def _function(name: str, labels: Sequence[str]) -> Callable[[Values, Values], float]:
    return f1_macro if name == F1.name and len(labels) > 2 else METRICS[name].function
