"""How a server is reached."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from smidgen.serving.errors import ServingError


@dataclass(frozen=True)
class HttpOptions:
    """Keys and limits of an HTTP server.

    Attributes:
        keys: whoever gives one of them is let in; empty lets everyone in.
        body: most bytes of a request.
        inputs: most inputs of a request.
        characters: most characters of one text.
        requests: most requests at a time; others are told to come again.
        timeout: seconds after which a request is given up.
        client_timeout: seconds that a client may take to send a request, and may keep an answer waiting.
    """

    keys: frozenset[str] = frozenset()
    body: int = 64 * 2**20
    inputs: int = 256
    characters: int = 100_000
    requests: int = 1024
    timeout: float = 120.0
    client_timeout: float = 60.0

    def lets_in(self, key: str) -> bool:
        """Whether a key is one of them, in time that does not tell how much of it is right."""
        given = key.encode()
        alike = [secrets.compare_digest(given, known.encode()) for known in self.keys]  # all are compared
        return not self.keys or any(alike)


def read_keys(file: Path) -> frozenset[str]:
    """Keys of a file, one a line; blank lines and those that begin with # are left out.

    Raises:
        ServingError: it cannot be read, holds none, or one of fewer than 16 characters.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    keys = frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ServingError(f"{file} holds no key; write one a line, such as from: openssl rand -hex 32")
    if any(len(key) < 16 for key in keys):
        raise ServingError(f"{file} has a key of fewer than 16 characters; use a longer one")
    return keys


def check_host(host: str, keys: Iterable[str]) -> None:
    """Raises ServingError for an address that others reach, without a key."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not list(keys):
        raise ServingError(f"{host} can be reached from other machines, and there is no key: give --api-key-file")
