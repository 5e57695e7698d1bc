"""Tagging: lists of words, each with one of several tags."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from datasets import Dataset, List, Value
from torch import Tensor

from smidgen.data.columns import Columns, LabelType
from smidgen.data.encoded import Encoded
from smidgen.data.kinds.base import Answer, Outputs, Pair, Question
from smidgen.data.kinds.text_kind import TextKind
from smidgen.data.labels import IGNORED, LabelPlace, Labels, named_labels, tag_ids
from smidgen.data.metrics import ENTITY_F1, TOKEN_ACCURACY
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.text.encoding import encode_chunks, encode_words, text_length


class Tagging(TextKind):
    """Lists of words, each with one of several tags; the first token of a word has its tag."""

    name = "tokens"
    model_class = "AutoModelForTokenClassification"
    metrics = (ENTITY_F1, TOKEN_ACCURACY)
    usual = ("entity_f1", "token_accuracy")
    labels_at = LabelPlace.POSITION
    uncountable = "label sequences"
    reads_tagged = True
    unpackable = "models that tag tokens look both ways and take a row for one text"
    holds = LabelType.TAGS
    label_dtype = None
    lists = True

    def label_set(self, rows: Dataset, columns: Columns) -> Labels:
        """Declared names, else those that occur."""
        return named_labels(rows, columns, tags=True)

    def label_ids(self, rows: Dataset, split: str, columns: Columns, labels: Labels) -> Sequence[object]:
        """Lists of ids, one for each word."""
        return tag_ids(rows, split, columns, labels)

    def label_feature(self) -> object:
        """Lists of whole numbers."""
        return List(Value("int64"))

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Token ids, cut on the right; labels at the first token of each word."""
        tokenizer = tokenizer_in(processor, self.name)
        length = text_length(tokenizer, max_length)
        return encode_chunks(
            rows, length, partial(encode_words, tokenizer=tokenizer, text=text, label=label, length=length)
        )

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Names of the words' tags; logits (B, T, C)."""
        predicted = outputs.logits.argmax(-1)
        if labels is None:
            return [(row, None) for row in predicted.tolist()]
        return [_named(row, label, names) for row, label in zip(predicted, labels, strict=True)]

    def asked(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The words."""
        return tuple(columns[:1])

    def cell_type(self, columns: Sequence[str]) -> type:
        """Lists of words."""
        return list

    def answers(self, question: Question) -> list[Answer]:
        """One label per word, words of a text parted by white space; a word's label is its first token's."""
        words = [text.split() if isinstance(text, str) else text for text in question.inputs]
        numbers = [list(range(len(row))) for row in words]
        outputs = question.run({"text": words, "labels": numbers})
        found = []
        for text, row, (logits, labels) in zip(question.inputs, numbers, outputs, strict=True):
            assert labels is not None
            best = zip(labels.tolist(), logits.argmax(-1).tolist(), strict=True)
            tags = {word: question.names[label] for word, label in best if word != IGNORED}
            found.append(Answer(text if isinstance(text, str) else " ".join(text), [tags.get(n, "O") for n in row]))
        return found


def _named(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[list[str], list[str]]:
    kept = labels != IGNORED
    return [names[i] for i in predicted[kept].tolist()], [names[i] for i in labels[kept].tolist()]
