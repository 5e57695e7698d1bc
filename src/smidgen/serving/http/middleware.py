"""What every request goes through: an id, a log line, its count, a key, the size of its body, how many there are."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import MutableMapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smidgen.serving.http.errors import GONE, error_response
from smidgen.serving.http.measures import Measures
from smidgen.serving.http.options import HttpOptions

LOG = logging.getLogger("smidgen.requests")
OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico")  # without a key
GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """Gives each request an id (X-Request-ID), writes one line of JSON for it, and counts it."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self.app, self.measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        number = given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        begin, status = time.perf_counter(), GONE
        state: MutableMapping[str, object] = scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = number
            await send(message)

        self.measures.open.inc()
        try:
            await self.app(scope, receive, sending)
        finally:
            self.measures.open.dec()
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "other")
            self.measures.requests.labels(route, str(status)).inc()
            self.measures.seconds.labels(route).observe(seconds)
            line = {"id": number, "method": scope["method"], "route": route, "status": status,
                    "ms": round(1e3 * seconds, 1), "delta": state.get("delta"),
                    "rows": state.get("rows", 0)}  # fmt: skip
            LOG.info(json.dumps(line))


class Gate:
    """Lets in who has a key, as many as there may be, with bodies that are small enough."""

    def __init__(self, app: ASGIApp, options: HttpOptions) -> None:
        self.app, self.options, self.inside = app, options, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not self.options.lets_in(key if scheme.lower() == "bearer" else ""):
            answer = error_response(401, "invalid_api_key", "give a key: Authorization: Bearer KEY")
            await answer(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.options.body:
            await error_response(413, "body_too_large", self._too_large)(scope, receive, send)
            return
        if self.inside >= self.options.requests:
            answer = error_response(429, "too_many_requests", f"{self.inside} requests are being answered; come again")
            await answer(scope, receive, send)
            return
        self.inside += 1
        try:
            await self.app(scope, self._limited(scope, receive), send)
        finally:
            self.inside -= 1

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.options.body} bytes"

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """The body, piece by piece, up to the limit: a length may be missing, or a lie. It may also never end."""
        seen, ended = 0, False

        async def receiving() -> Message:
            nonlocal seen, ended
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:
                late = scope["state"].get("late", False)
                raise HTTPException(408 if late else GONE, "the body is not whole")  # for the log: nobody hears it
            seen, ended = seen + len(message.get("body", b"")), not message.get("more_body", False)
            if seen > self.options.body:
                raise HTTPException(413, self._too_large)
            return message

        return receiving
