"""Kinds of task: registration, what does not fit, and that a kind of one's own is told from the columns."""

from __future__ import annotations

import pytest
from transformers import AutoModelForSequenceClassification

import smidgen as sm
from smidgen.common.errors import DataError
from smidgen.data.kinds.base import TaskKind, kind_named
from smidgen.data.kinds.classification import Classification
from smidgen.data.metrics import ACCURACY, Metric
from tests import helpers as h


@pytest.fixture
def registry():
    before = dict(TaskKind.registry)
    yield TaskKind.registry
    TaskKind.registry.clear()
    TaskKind.registry.update(before)


def test_an_unknown_kind_names_the_nearest(tmp_path):
    with pytest.raises(DataError, match="unknown kind 'clasification'.*did you mean 'classification'"):
        h.task(tmp_path, kind="clasification")


def test_a_kind_without_name_or_docstring_is_refused(registry):
    with pytest.raises(TypeError, match="needs a name, for kind=, and a docstring"):
        type("Nameless", (Classification,), {"__doc__": "Text."})
    with pytest.raises(TypeError, match="needs a name, for kind=, and a docstring"):
        type("Undocumented", (Classification,), {"name": "undocumented", "__doc__": None})


def test_two_kinds_or_metrics_of_one_name_are_refused(registry):
    with pytest.raises(TypeError, match="two kinds of task are named 'regression': Regression and Other"):
        type("Other", (Classification,), {"name": "regression", "__doc__": "Another."})
    metrics = (Metric("accuracy", lambda predictions, references: 0.0), *Classification.metrics[1:])
    with pytest.raises(TypeError, match="two metrics are named 'accuracy'"):
        type("Other", (Classification,), {"name": "other", "__doc__": "Another.", "metrics": metrics})
    assert kind_named("classification").metrics[0] is ACCURACY


def test_a_kind_that_lacks_what_it_must_say_is_refused(registry):
    with pytest.raises(TypeError, match=r"Half, a kind of task, does not define collator, encode, pairs, model_class"):

        class Half(TaskKind):
            """Half a kind."""

            name = "half"
            metrics = ()
            usual = ()

            def columns(self, rows, text, label):
                """None."""

    assert "half" not in TaskKind.registry


def test_a_kind_of_ones_own_is_asked_before_those_that_claim_any_label(registry, tmp_path):
    class Shouted(Classification):
        """Classification of texts that are written in a column SHOUT."""

        name = "shouted"
        general = False

        def claims(self, rows, text, label):
            return self._columns(rows, ("SHOUT",), "label", "") if "SHOUT" in rows.column_names else None

    def make(count, start=0):
        return [{"SHOUT": row["text"].upper(), "label": row["label"]} for row in h.rows(count, start)]

    task = h.task(tmp_path / "own", make=make)
    assert (task.kind, task.text, task.label) == ("shouted", ("SHOUT",), "label")
    assert h.task(tmp_path / "plain").kind == "classification"
    assert sm.evaluate(h.bert(), task, tokenizer=h.tokenizer()).metric == "accuracy"


def test_a_processor_that_reads_no_texts_is_refused(tmp_path):
    class Camera:
        pass

    task = h.task(tmp_path)
    with pytest.raises(DataError, match="a classification task reads texts, which Camera does not") as caught:
        task.encode(Camera(), "train")
    assert "\n" not in str(caught.value)


def test_processor_and_tokenizer_are_one_argument(tmp_path):
    task, model = h.task(tmp_path), h.bert()
    both = [sm.evaluate(model, task, **{name: h.tokenizer()}).values for name in ("processor", "tokenizer")]
    assert both[0] == both[1]
    with pytest.raises(DataError, match="two names of one argument"):
        sm.evaluate(model, task, processor=h.tokenizer(), tokenizer=h.tokenizer())


def test_a_processor_that_holds_a_tokenizer_does(tmp_path):
    class Several:
        tokenizer = h.tokenizer()

    task = h.task(tmp_path)
    assert task.encode(Several(), "train")[0] == task.encode(h.tokenizer(), "train")[0]


def test_every_kind_names_a_class_of_transformers():
    import transformers

    for kind in TaskKind.registry.values():
        assert hasattr(transformers, kind.model_class), kind.name
        assert hasattr(transformers, kind.processor_class), kind.name
    assert kind_named("classification").model_class == AutoModelForSequenceClassification.__name__
