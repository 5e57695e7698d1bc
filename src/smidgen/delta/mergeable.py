"""Whether an edit folds into a weight."""

from __future__ import annotations

from collections.abc import Iterable

from smidgen.methods.base import Method, adds
from smidgen.methods.capabilities import Merges
from smidgen.recipe.recipe import Term


def folds(recipe: Iterable[Term], pooling: str | None) -> bool:
    """Whether all of a trained result states a merged weight or trains in place; a single site may still refuse."""
    adding = (term for term in recipe if isinstance(term, Method) and adds(type(term)))
    return pooling is None and all(isinstance(term, Merges) for term in adding)
