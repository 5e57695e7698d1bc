"""A server process: uvicorn, until it is told to stop."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from smidgen.serving.errors import ServingError
from smidgen.serving.http.app import create_app
from smidgen.serving.http.options import HttpOptions, check_host
from smidgen.serving.http.timed_protocol import protocol_within
from smidgen.serving.server import Server


def serve_http(server: Server, host: str, port: int, options: HttpOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what has been taken.

    Args:
        port: 0 for any that is free.
        say: told where it listens.

    Raises:
        ServingError: the port is taken, or the address can be reached by others and there is no key.
    """
    check_host(host, options.keys)
    listening = _listen(host, port)
    where = listening.getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    say(f"http://{shown}:{where[1]}")
    log = logging.getLogger("smidgen.requests")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    _Process(uvicorn_config(server, options)).run(sockets=[listening])


def uvicorn_config(server: Server, options: HttpOptions) -> uvicorn.Config:
    """How uvicorn serves."""
    return uvicorn.Config(
        create_app(server, options), http=protocol_within(options.client_timeout), log_level="warning",
        access_log=False, timeout_graceful_shutdown=30, server_header=False,
        timeout_keep_alive=75,  # longer than clients keep a connection that they do not use
    )  # fmt: skip


class _Process(uvicorn.Server):
    """A signal stops it and is not raised again behind the end: all is answered, so the exit status is 0."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; a second Ctrl-C waits for nothing."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ServingError if it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)  # before it is said: who connects at once waits, and is not refused
    except (OSError, OverflowError) as error:
        raise ServingError(f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    return found
