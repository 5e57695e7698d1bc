"""Metrics: pure functions of (predictions, references).

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
from types import ModuleType
from typing import Any

import numpy as np
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from sklearn import metrics as sk

Values = Sequence[Any]  # one of each example, of the type that a kind of task gives its metrics
BIO = re.compile(r"O|[BI]-.+")


@dataclass(frozen=True)
class Metric:
    """A metric: what computes it, and which way is better.

    Attributes:
        function: (predictions, references) -> value.
        package: imports the optional package that it is computed by, or raises DataError.
    """

    name: str
    function: Callable[[Values, Values], float]
    higher_is_better: bool = True
    package: Callable[[], ModuleType] | None = None


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


def _correlation(function: Callable[..., Sequence[float]], predictions: Values, references: Values) -> float:
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


ACCURACY = Metric("accuracy", accuracy)
F1 = Metric("f1", f1)
F1_MACRO = Metric("f1_macro", f1_macro)
MATTHEWS = Metric("matthews", matthews)
PEARSON = Metric("pearson", pearson)
SPEARMAN = Metric("spearman", spearman)
MSE = Metric("mse", mse, higher_is_better=False)
ENTITY_F1 = Metric("entity_f1", entity_f1)
TOKEN_ACCURACY = Metric("token_accuracy", token_accuracy)
PERPLEXITY = Metric("perplexity", perplexity, higher_is_better=False)
LOSS = Metric("loss", loss, higher_is_better=False)

METRICS: dict[str, Metric] = {}  # those of all registered kinds of task
