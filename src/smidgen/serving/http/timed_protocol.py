"""A connection whose client may keep the server waiting for so long, and no longer.

uvicorn itself waits for ever: for the rest of a request, and for a client to take what it was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from smidgen.serving.http.errors import CODES, error_response


class Timer:
    """Calls something once, later, unless it is stopped."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Begin to wait, if it does not wait already."""
        if self.handle is None:
            self.handle = asyncio.get_running_loop().call_later(seconds, self.call)

    def stop(self) -> None:
        """Wait no more."""
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that cuts off whoever is too slow.

    A request has `limit` seconds from its first byte, or the connection's start, to its last byte; what is late is told
    so (408). While an answer is sent, the seconds in which the client takes less than there is are added up, and at
    `limit` the connection is cut; seconds that the answer takes to be made are not among them.
    """

    limit = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request; hear of every byte that is not taken at once."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._late, self._stalled = Timer(self._give_up), Timer(transport.abort)
        self._since = self._spent = 0.0
        self._answered: object = None
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request."""
        super().data_received(data)
        self._await_request()

    def on_response_complete(self) -> None:
        """A part of the next request may be here already."""
        super().on_response_complete()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        self._late.stop()
        self._stalled.stop()

    def pause_writing(self) -> None:
        """The client takes no more for now."""
        super().pause_writing()
        if self.cycle is not self._answered:
            self._answered, self._spent = self.cycle, 0.0
        self._since = self.loop.time()
        self._stalled.start(self.limit - self._spent)

    def resume_writing(self) -> None:
        """All that there was is taken."""
        super().resume_writing()
        self._spent += self.loop.time() - self._since
        self._stalled.stop()

    def _await_request(self) -> None:
        """Start to wait if a request has begun, end it if it is here."""
        idle = self.conn.their_state is h11.IDLE
        begun = idle and (self.cycle is None or bool(self.conn.trailing_data[0]))
        if begun or self.conn.their_state is h11.SEND_BODY:
            self._late.start(self.limit)
        else:
            self._late.stop()

    def _give_up(self) -> None:
        """The request is late: say so where nothing was said yet, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.scope["state"]["late"] = self.cycle.disconnected = True  # what the app says is not sent
        answer = error_response(408, CODES[408], f"the request was not here within {self.limit:g} seconds")
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=408, headers=headers),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def protocol_within(seconds: float) -> type[TimedProtocol]:
    """A protocol with a limit of its own, as uvicorn takes it."""

    class Timed(TimedProtocol):
        """See there."""

        limit = seconds

    return Timed
