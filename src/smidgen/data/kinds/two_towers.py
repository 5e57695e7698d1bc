"""TwoTowers: two texts, each read by itself, whose mean vectors are compared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from smidgen.common.errors import DataError
from smidgen.data.columns import PAIRS, check_text_types, only_column
from smidgen.data.encoded import Cells, Encoded, Example, tokens_of
from smidgen.data.kinds.base import Answer, Batch, Collate, Question, TaskKind, label_answers
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.text.collate import Collator
from smidgen.data.text.encoding import Part, encode_chunks, encode_texts, text_length

SECOND = "second_"  # before the keys of the second text
KNOWN = (*PAIRS, ("anchor", "positive"), ("query", "passage"), ("question", "answer"), ("query", "document"))


@dataclass
class TowerOutput:
    """What two towers say of a batch.

    Attributes:
        logits: (B, 1), cosines of the two vectors.
        vectors: (B, 2, d), of length 1.
        keys: (B, 2), whole numbers that are equal where texts are.
        loss: a number; None without labels, where these are needed.
    """

    logits: Tensor
    vectors: Tensor
    keys: Tensor
    loss: Tensor | None = None


class TwoTowers(TaskKind, abstract=True):
    """Two texts; a text's vector is the mean of its tokens' last hidden states (Reimers and Gurevych 2019,
    arXiv:1908.10084, section 3). The model is called once for the first texts and once for the second ones."""

    model_class = "AutoModel"
    normal = True
    passes = 2
    unsteered = "a pair is two texts, and states are kept of one"
    plain_cells = True
    unpackable = "two texts are compared by the means of their rows"
    label_dtype: ClassVar[torch.dtype | None] = torch.float32

    def two_columns(self, rows: Dataset, text: Sequence[str] | None) -> tuple[str, ...]:
        """What is given, or two columns known by name. Raises DataError if there is no such pair."""
        there = rows.column_names
        found = tuple(text) if text else only_column([p for p in KNOWN if set(p) <= set(there)], there, "text")
        if len(found) != 2:
            raise DataError(f"{self.name} compares two text columns, found {len(found)}: {', '.join(found)}")
        check_text_types(rows, self.name, found)
        return found

    def width(self, labels: Sequence[str]) -> int | None:
        """One cosine."""
        return 1

    def head_options(self, labels: Sequence[str]) -> dict[str, object]:
        """There is no head."""
        return {}

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Token ids of both texts, each cut on the right; lengths are those of the longer ones."""
        tokenizer = tokenizer_in(processor, self.name)
        length = text_length(tokenizer, max_length)

        def both(cells: Cells) -> Part:
            first, cut, _ = encode_texts(cells, tokenizer, text[:1], label, length)
            second, also, _ = encode_texts(cells, tokenizer, text[1:], None, length)
            named = ({SECOND + key: value for key, value in example.items()} for example in second)
            return [{**one, **other} for one, other in zip(first, named, strict=True)], cut + also, 0

        found = encode_chunks(rows, length, both)
        return Encoded(list(found), length, found.truncated, lengths=[self.length(example) for example in found])

    def length(self, example: Mapping[str, object]) -> int:
        """Tokens of the longer text."""
        return max(len(tokens_of(example)), len(tokens_of(example, f"{SECOND}input_ids")))

    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """Pads first texts and second texts, each to their longest."""
        tokenizer = tokenizer_in(processor, self.name)
        return TowerCollator(Collator.of(tokenizer, self.label_dtype, multiple=multiple, model=model))

    def model_inputs(self, batch: Mapping[str, Tensor]) -> Batch:
        """The first texts."""
        return {key: value for key, value in batch.items() if key != "labels" and not key.startswith(SECOND)}

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> TowerOutput:
        """Vectors, their cosine, what tells texts apart, and the loss."""
        second = {key.removeprefix(SECOND): value for key, value in batch.items() if key.startswith(SECOND)}
        vectors = torch.stack([mean_vector(model, self.model_inputs(batch)), mean_vector(model, second)], 1)
        keys = torch.stack([_key(batch, ""), _key(batch, SECOND)], 1)
        outputs = TowerOutput((vectors[:, 0] * vectors[:, 1]).sum(-1, keepdim=True), vectors, keys)
        outputs.loss = self.loss(outputs, batch)
        return outputs

    @abstractmethod
    def loss(self, outputs: TowerOutput, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The loss of a batch, None without the labels that it needs."""

    def answers(self, question: Question) -> list[Answer]:
        """Cosines."""
        return label_answers(question, list(map(str, question.inputs)))


@dataclass(frozen=True)
class TowerCollator:
    """Pads the texts of pairs: `input_ids`, ... (B, T) of the first, `second_input_ids`, ... (B, U) of the second."""

    collate: Collator

    def __call__(self, examples: list[Example]) -> Batch:
        """A batch, labels (B,) among it if the examples have them."""
        first = [{k: v for k, v in example.items() if not k.startswith(SECOND)} for example in examples]
        second = [{k.removeprefix(SECOND): v for k, v in e.items() if k.startswith(SECOND)} for e in examples]
        return {**self.collate(first), **{SECOND + key: value for key, value in self.collate(second).items()}}


def mean_vector(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over tokens that are no padding, of length 1, in float32: (B, d)."""
    states = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"][..., None].to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def _key(batch: Mapping[str, Tensor], start: str) -> Tensor:
    """(B,), equal for equal texts, however they are padded."""
    ids, mask = batch[f"{start}input_ids"], batch[f"{start}attention_mask"]
    place = mask.cumsum(1) * mask  # 1, 2, ... at tokens, whatever side is padded
    mixed = (ids + 1) * (place * 2_654_435_761 + 97)
    return ((mixed ^ (mixed >> 15)) * 2_246_822_519 * mask).sum(1)
