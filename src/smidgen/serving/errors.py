"""What can go wrong with a request: each is told by its class, so that HTTP gives it the right status."""

from __future__ import annotations

from smidgen.common.errors import SmidgenError


class ServingError(SmidgenError):
    """A request that cannot be answered, or a server that is used in a wrong way."""


class UnknownDeltaError(ServingError):
    """No delta has this name."""


class QueueFullError(ServingError):
    """As many requests are waiting as may."""


class ClosedError(ServingError):
    """The server takes no more requests."""
