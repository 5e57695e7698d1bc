"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from smidgen.common.errors import DataError
from smidgen.data.kinds.base import TaskKind
from smidgen.data.metrics import METRICS, is_bio
from smidgen.data.scoring import check_metric, compute_metric, default_metric

PREDICTED = [1, 1, 0, 0, 1, 0]
TRUE = [1, 0, 0, 1, 1, 0]  # tp 2, fp 1, fn 1, tn 2
BIO = ("O", "B-PER", "I-PER", "B-LOC")


def value(name: str, predictions: list, references: list) -> float:
    return METRICS[name].function(predictions, references)


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("accuracy", PREDICTED, TRUE, 4 / 6),
        ("f1", PREDICTED, TRUE, 2 * 2 / (2 * 2 + 1 + 1)),
        ("f1", [0, 0], [0, 1], 0.0),
        ("f1", [0, 1, 2], [0, 1, 1], (1 + 2 / 3 + 0) / 3),
        ("f1_macro", [1, 1, 1, 0], [1, 1, 0, 0], (0.8 + 2 / 3) / 2),
        ("matthews", PREDICTED, TRUE, (2 * 2 - 1 * 1) / 9),
        ("matthews", [1, 1, 1], [1, 0, 1], 0.0),
        ("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 7.0], 5 / math.sqrt(2 * 38 / 3)),
        ("spearman", [1.0, 2.0, 3.0, 4.0], [1.0, 9.0, 8.0, 100.0], 1 - 6 * 2 / (4 * 15)),
        ("mse", [1.0, 2.0], [2.0, 4.0], 2.5),
        ("token_accuracy", [["O", "B-PER"], ["O"]], [["O", "O"], ["O"]], 2 / 3),
        ("perplexity", [math.log(4) * 2, 0.0], [2, 2], 2.0),
        ("perplexity", [1e6], [1], math.inf),
        ("loss", [3.0, 1.0], [1, 3], 1.0),
    ],
)
def test_value(name: str, predictions: list, references: list, expected: float) -> None:
    assert value(name, predictions, references) == pytest.approx(expected)


def test_entities_count_only_if_type_and_ends_are_right() -> None:
    references = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER"]]
    predictions = [["B-PER", "O", "O", "B-LOC"], ["O", "B-PER"]]  # 2 of 3 found, 2 of 3 right
    assert value("entity_f1", predictions, references) == pytest.approx(2 / 3)
    assert value("entity_f1", [["O", "O", "O", "O"], ["O", "O"]], references) == 0.0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("constant", [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0]])
def test_undefined_correlation_is_nan(name: str, constant: list[float]) -> None:
    assert math.isnan(value(name, constant, [1.0, 2.0, 3.0][: len(constant)]))


def test_nearly_constant_predictions_do_not_warn() -> None:
    assert abs(value("pearson", [1.0, 1.0 + 1e-15, 1.0], [1.0, 2.0, 3.0])) <= 1


def test_chosen_metric_comes_first_then_the_usual_ones() -> None:
    scores = compute_metric("classification", "matthews", PREDICTED, TRUE, ("no", "yes"))
    assert list(scores) == ["matthews", "accuracy", "f1"]
    assert compute_metric("regression", "mse", [1.0, 2.0], [1.0, 3.0])["mse"] == 0.5
    assert list(compute_metric("tokens", "entity_f1", [["O"]], [["O"]], BIO)) == ["entity_f1", "token_accuracy"]
    assert list(compute_metric("causal-lm", "loss", [1.0], [1])) == ["loss", "perplexity"]


def test_f1_is_macro_when_there_are_three_labels_even_if_two_occur() -> None:
    expected = value("f1_macro", PREDICTED, TRUE)
    assert compute_metric("classification", "f1", [1, 1, 1, 0], [1, 1, 0, 0], "abc")["f1"] == pytest.approx(
        (0.8 + 2 / 3) / 2
    )
    assert compute_metric("classification", "f1", PREDICTED, TRUE, "abc")["f1"] == pytest.approx(expected)
    assert compute_metric("classification", "f1", [1, 1, 1, 0], [1, 1, 0, 0], "ab")["f1"] == pytest.approx(0.8)


def test_tags_that_are_no_entities_have_no_entity_f1() -> None:
    assert list(compute_metric("tokens", "token_accuracy", [["NOUN"]], [["NOUN"]], ("NOUN", "VERB"))) == [
        "token_accuracy"
    ]
    assert is_bio(BIO)
    assert not is_bio(("NOUN", "O"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_metric("acuracy", "classification"), "unknown; did you mean 'accuracy'"),
        (lambda: check_metric("pearson", "classification"), "not for classification; there are accuracy"),
        (lambda: check_metric("entity_f1", "tokens", ("NOUN",)), "found 'NOUN'; use metric='token_accuracy'"),
        (lambda: compute_metric("regression", "mse", [1.0], [1.0, 2.0]), "1 predictions against 2 references"),
        (lambda: compute_metric("regression", "mse", [], []), "0 predictions against 0"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_table_is_consistent() -> None:
    for name, kind in TaskKind.registry.items():
        assert default_metric(name) == kind.usual[0]
        assert {*kind.usual} <= {metric.name for metric in kind.metrics}
        assert all(METRICS[metric.name] is metric for metric in kind.metrics)
    assert {m.name for m in METRICS.values() if not m.higher_is_better} == {"mse", "perplexity", "loss"}
