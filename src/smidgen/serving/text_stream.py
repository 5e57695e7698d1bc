"""A text token by token: nothing is given out that a later token could change, or that belongs to a stop string."""

from __future__ import annotations

from typing import Protocol


class Decodes(Protocol):
    """A tokenizer."""

    def decode(self, token_ids: list[int], **options: object) -> str:
        """Ids to text."""


UNFINISHED = "�"  # what stands for a character of which some bytes are missing yet


class TextStream:
    """Text of tokens as they come.

    Attributes:
        whole: what is written so far, without a stop string; of a text that ended, all of it.
    """

    def __init__(self, tokenizer: Decodes, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.whole, self._given, self._ended = "", 0, False

    def add(self, token: int) -> tuple[str, bool]:
        """One more token: the text that may be given out now, and whether a stop string ended it."""
        self.ids.append(token)
        self.whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        places = [place for text in self.stop if (place := self.whole.find(text)) >= 0]
        if places:
            self.whole, self._ended = self.whole[: min(places)], True
            return self._out(len(self.whole)), True
        return self._out(len(self.whole) - self._open()), False

    def end(self) -> str:
        """What was held back."""
        return self._out(len(self.whole))

    def _open(self) -> int:
        """Characters at the end that may still become others, or a stop string."""
        if self.whole.endswith(UNFINISHED):
            return len(self.whole) - len(self.whole.rstrip(UNFINISHED))
        begun = [n for text in self.stop for n in range(1, len(text)) if self.whole.endswith(text[:n])]
        return max(begun, default=0)

    def _out(self, end: int) -> str:
        piece, self._given = self.whole[self._given : end], max(end, self._given)
        return piece
