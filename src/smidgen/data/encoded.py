"""Encoded: the examples of a split as a model's collator takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


class Encoded(Sequence[dict[str, Any]]):
    """Examples as dicts, of plain lists for texts: input_ids, attention_mask, token_type_ids if the tokenizer has them,
    labels; images and sounds are what their collator reads.

    Attributes:
        max_length: the most tokens an example may have; None where examples have no tokens.
        truncated: number of examples that were longer and were cut.
        dropped: causal-lm: examples left out, as nothing to learn was left; tokens: words without any token
            left.
        lengths: size of each example, by which batches are sorted: tokens, or what `lengths` gives.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        max_length: int | None,
        truncated: int = 0,
        dropped: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self._examples, self.max_length, self.truncated, self.dropped = examples, max_length, truncated, dropped
        self.lengths = [len(e["input_ids"]) for e in examples] if lengths is None else list(lengths)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._examples)

    def __repr__(self) -> str:
        return f"Encoded({len(self)} examples, max_length={self.max_length}, truncated={self.truncated})"
