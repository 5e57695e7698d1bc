"""The vectors that stand among the tokens of a text, and the edits at an embedding that hold them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smidgen.common.dtypes import master_dtype
from smidgen.common.errors import AttachError
from smidgen.methods.capabilities import AddsTokens, Tensors
from smidgen.ports.by_row.layouts import Layouts
from smidgen.ports.edit import Edit, Edits
from smidgen.ports.forward_state import state


class InputEdit(Edit):
    """Vectors that one method adds to a text."""

    def tokens(self, dtype: torch.dtype) -> Tensor:
        """Vectors (1, length, width), or (B, length, width) in a mixed batch."""
        method = self.method
        assert isinstance(method, AddsTokens)  # the plan has seen to it

        def function(p: Tensors) -> Tensor:
            return method.tokens(method.settle(p, self.site), self.site).to(dtype)[None]

        return self.by_row(function, master_dtype(dtype))


class InputEdits(Edits[InputEdit]):
    """The edits at one embedding.

    Attributes:
        names: arguments of the model that takes token ids.
        at: number of the text's tokens before the prompt.
        blank: the id that stands in its place.
        limit: of positions, None if there is none.
        taken_out: whether the model's output is given back without the prompt.
    """

    def __init__(self, names: tuple[str, ...], at: int, blank: int, limit: int | None, taken_out: bool) -> None:
        super().__init__()
        self.names, self.at, self.blank, self.limit, self.taken_out = names, at, blank, limit, taken_out

    def prompt(self, dtype: torch.dtype) -> Tensor | None:
        """The vectors of all edits that are on, (1, n, width), or (B, n, width) in a mixed batch."""
        found = [edit.tokens(dtype) for edit in self.all() if edit.enabled]
        return torch.cat(found, 1) if found else None


class InputLayouts(Layouts[InputEdits], InputEdits):
    """Layout -> its edits at one embedding."""

    def fresh(self) -> InputEdits:
        """An empty place at the same embedding."""
        return InputEdits(self.names, self.at, self.blank, self.limit, self.taken_out)

    def prompt(self, dtype: torch.dtype) -> Tensor | None:
        """The vectors of each row, (B, n, width); None where no row has any.

        Raises:
            AttachError: some rows have other numbers of vectors than others.
        """
        now = state()
        blocks = now.mixed().blocks
        layouts = [self.of(block.layout) for block in blocks]
        if not any(layouts):
            return None
        found = []
        for block, edits in zip(blocks, layouts, strict=True):
            with now.on(block):
                found.append(None if edits is None else edits.prompt(dtype))
        lengths = {0 if vectors is None else vectors.shape[1] for vectors in found}
        if len(lengths) > 1:
            raise AttachError(f"rows of one batch have prompts of {sorted(lengths)} vectors; they go one after another")
        return torch.cat([vectors for vectors in found if vectors is not None])


def input_edits_of(embedding: nn.Module) -> InputEdits:
    """The edits at an embedding that has some."""
    edits = embedding.edits
    assert isinstance(edits, InputEdits)
    return edits


def current_prompt(embedding: nn.Module) -> Tensor | None:
    """The vectors that are on at an embedding that has edits, in the dtype of its table."""
    assert isinstance(embedding, nn.Embedding)
    return input_edits_of(embedding).prompt(embedding.weight.dtype)
