"""Whether an edit folds into a weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def folds(recipe: Iterable[Any], pooling: str | None) -> bool:
    """Whether all of a trained result states a merged weight or trains in place; a single site may still refuse."""
    return pooling is None and all(term.overrides("merge") or not term.overrides("acts") for term in recipe)
