"""Encoded: the examples of a split as a model's collator takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, overload

Example = dict[str, object]  # plain lists for texts; for images and sounds what their collator reads
Column = list[Any]  # cells of one column, whose type its Dataset alone knows
Cells = dict[str, Column]


class CellRows:
    """Columns as the rows of a Dataset are read by kinds with plain cells: counted, and cut out as columns."""

    def __init__(self, columns: Cells) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice) -> Cells:
        return {name: values[rows] for name, values in self.columns.items()}


class Encoded(Sequence[Example]):
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
        examples: Sequence[Example],
        max_length: int | None,
        truncated: int = 0,
        dropped: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self._examples, self.max_length, self.truncated, self.dropped = examples, max_length, truncated, dropped
        self.lengths = [len(tokens_of(e)) for e in examples] if lengths is None else list(lengths)

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def __repr__(self) -> str:
        return f"Encoded({len(self)} examples, max_length={self.max_length}, truncated={self.truncated})"


def tokens_of(example: Mapping[str, object], key: str = "input_ids") -> Sequence[int]:
    """The whole numbers that an example of a text has under a key."""
    return cast("Sequence[int]", example[key])
