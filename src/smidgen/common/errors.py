"""Errors: a user's mistake is one clear line that says what was wrong, what was found and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SmidgenError(ValueError):
    """A user's mistake. The command line prints its one line and exits with status 2."""


class RecipeError(SmidgenError):
    """A recipe that cannot be read, or a method's field out of range."""


class PlanError(SmidgenError):
    """A recipe that does not fit the model."""


class AttachError(SmidgenError):
    """Something that cannot be attached, or an attached model used in a way that would ruin it."""


class DeltaError(SmidgenError):
    """A delta that is damaged, or that belongs to another base."""


class WriteError(DeltaError):
    """A file that cannot be written: the folder cannot be, or the disk is full."""


class ModelError(SmidgenError):
    """A model that cannot be found or loaded."""


class DataError(SmidgenError):
    """Data that cannot be found, read or used for the task."""


class TrainError(SmidgenError):
    """Training that went wrong, or that would have been without effect."""


class StudyError(SmidgenError):
    """A study that cannot be made: a grid, an arm, a results folder."""


class DivergedError(TrainError):
    """The loss is not finite any more."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or an empty string if nothing is near."""
    known = {str(choice).lower(): str(choice) for choice in choices}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {known[found[0]]!r}?" if found else ""
