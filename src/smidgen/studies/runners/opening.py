"""Runners by what `on` says: "local", or a place of Ray's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

from smidgen.common.errors import TrainError, nearest
from smidgen.studies.runners.local import on_this_machine
from smidgen.studies.runners.ray_runner import on_ray
from smidgen.studies.runners.runner import Runner

LOCAL = "local"
Opener = Callable[[str, int, bool | None], AbstractContextManager[Runner]]
OPENERS: Mapping[str, Opener] = MappingProxyType({LOCAL: on_this_machine, "ray": on_ray, "auto": on_ray})


def opened(on: str, jobs: int, progress: bool | None) -> AbstractContextManager[Runner]:
    """A runner, for the length of a `with`.

    Args:
        on: "local"; "ray" for processes of Ray on this machine, "auto" or "ray://host:port" for a cluster that runs.
        jobs: so many trials at once, where that is not the cluster's to say.
        progress: whether a bar is shown; None: on a terminal.

    Raises:
        TrainError: there is no such place, or it cannot be reached.
    """
    name = on.partition("://")[0]
    if name not in OPENERS or (name != "ray" and on != name):
        raise TrainError(f"on={on!r}: local, ray, auto, or the ray:// address of a cluster{nearest(on, OPENERS)}")
    return OPENERS[name](on, jobs, progress)
