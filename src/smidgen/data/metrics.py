"""Metrics: pure functions of (predictions, references), and which of them are usual for a kind of task.

Classification compares label ids, regression numbers, tokens lists of label names per sentence. For a causal
language model the predictions are summed negative log-likelihoods and the references the numbers of tokens
they are sums over.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from sklearn import metrics as sk

from smidgen.common.errors import DataError, nearest

Values = Sequence[Any]
BIO = re.compile(r"O|[BI]-.+")


@dataclass(frozen=True)
class Metric:
    """A metric: what computes it, which way is better, and the kinds of task it is for."""

    name: str
    function: Callable[[Values, Values], float]
    higher_is_better: bool
    kinds: tuple[str, ...]


def accuracy(predictions: Values, references: Values) -> float:
    """Share of equal ids."""
    return float(sk.accuracy_score(references, predictions))


def f1(predictions: Values, references: Values) -> float:
    """F1 of class 1 if all ids are 0 or 1, else the macro average. No true positive is 0."""
    if not {*predictions, *references} <= {0, 1}:
        return f1_macro(predictions, references)
    return float(sk.f1_score(references, predictions, zero_division=0))


def f1_macro(predictions: Values, references: Values) -> float:
    """Mean of the F1 of every class that occurs in predictions or references."""
    return float(sk.f1_score(references, predictions, average="macro", zero_division=0))


def matthews(predictions: Values, references: Values) -> float:
    """Matthews correlation; 0 if all predictions or all references are one class, which is its limit
    there."""
    if len(set(predictions)) < 2 or len(set(references)) < 2:
        return 0.0
    return float(sk.matthews_corrcoef(references, predictions))


def pearson(predictions: Values, references: Values) -> float:
    """Linear correlation; nan (undefined) if predictions or references are constant."""
    return _correlation(stats.pearsonr, predictions, references)


def spearman(predictions: Values, references: Values) -> float:
    """Rank correlation; nan (undefined) if predictions or references are constant."""
    return _correlation(stats.spearmanr, predictions, references)


def _correlation(function: Callable[..., Any], predictions: Values, references: Values) -> float:
    x, y = np.asarray(predictions, float), np.asarray(references, float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of nearly constant input; the number is still defined
        return float(function(x, y)[0])


def mse(predictions: Values, references: Values) -> float:
    """Mean squared error."""
    return float(np.mean((np.asarray(predictions, float) - np.asarray(references, float)) ** 2))


def entity_f1(predictions: Values, references: Values) -> float:
    """F1 of whole entities (type and both ends right) over sentences of BIO label names, as CoNLL counts
    them."""
    return float(seqeval_f1(list(references), list(predictions), zero_division=0))


def token_accuracy(predictions: Values, references: Values) -> float:
    """Share of words with the right label, over all sentences together."""
    pairs = [pair for p, r in zip(predictions, references, strict=True) for pair in zip(p, r, strict=True)]
    return sum(p == r for p, r in pairs) / len(pairs) if pairs else math.nan


def loss(predictions: Values, references: Values) -> float:
    """Mean negative log-likelihood per token, in nats; nan if there are no tokens."""
    tokens = sum(references)
    return float(sum(predictions) / tokens) if tokens else math.nan


def perplexity(predictions: Values, references: Values) -> float:
    """exp of the mean negative log-likelihood per token; inf if that overflows."""
    try:
        return math.exp(loss(predictions, references))
    except OverflowError:
        return math.inf


def is_bio(labels: Sequence[str]) -> bool:
    """Whether label names mark entities as O, B-type and I-type."""
    return all(BIO.fullmatch(label) for label in labels)


_ALL = [
    Metric("accuracy", accuracy, True, ("classification",)),
    Metric("f1", f1, True, ("classification",)),
    Metric("f1_macro", f1_macro, True, ("classification",)),
    Metric("matthews", matthews, True, ("classification",)),
    Metric("pearson", pearson, True, ("regression",)),
    Metric("spearman", spearman, True, ("regression",)),
    Metric("mse", mse, False, ("regression",)),
    Metric("entity_f1", entity_f1, True, ("tokens",)),
    Metric("token_accuracy", token_accuracy, True, ("tokens",)),
    Metric("perplexity", perplexity, False, ("causal-lm",)),
    Metric("loss", loss, False, ("causal-lm",)),
]
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
USUAL: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
    "tokens": ("entity_f1", "token_accuracy"),
    "causal-lm": ("perplexity", "loss"),
}


def default_metric(kind: str) -> str:
    """The metric of a kind of task unless another is chosen."""
    return USUAL[kind][0]


def check_metric(metric: str, kind: str, labels: Sequence[str] = ()) -> None:
    """Raises DataError if there is no such metric, if it is for another kind, or if its labels are not BIO
    names."""
    fitting = [m.name for m in METRICS.values() if kind in m.kinds]
    if metric not in fitting:
        what = f"is not for {kind}" if metric in METRICS else "is unknown"
        hint = nearest(metric, fitting) or f"; there are {', '.join(fitting)}"
        raise DataError(f"metric {metric!r} {what}{hint}")
    if metric == "entity_f1" and not is_bio(labels):
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
    names = dict.fromkeys((metric, *USUAL[kind]))
    if not is_bio(labels):
        names.pop("entity_f1", None)
    return {name: _function(name, labels)(predictions, references) for name in names}


def _function(name: str, labels: Sequence[str]) -> Callable[[Values, Values], float]:
    return f1_macro if name == "f1" and len(labels) > 2 else METRICS[name].function
