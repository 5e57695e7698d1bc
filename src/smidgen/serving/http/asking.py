"""Where a route asks the server: in threads, so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from smidgen.serving.http.errors import GONE
from smidgen.serving.http.options import HttpOptions
from smidgen.serving.server import Server

P = ParamSpec("P")
Found = TypeVar("Found")


class Asked:
    """The server of an app, with its options, for one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.server: Server = request.app.state.server
        self.options: HttpOptions = request.app.state.options

    def about(self, delta: str, rows: int = 0) -> None:
        """Note in the request's log line which delta it is about, and how many rows are asked for."""
        self.request.state.delta, self.request.state.rows = delta[:128], rows

    async def run(self, function: Callable[P, Found], *args: P.args, **kwargs: P.kwargs) -> Found:
        """A call of the server in a thread. Raises TimeoutError if it takes too long."""
        return await asyncio.wait_for(run_in_threadpool(function, *args, **kwargs), self.options.timeout)

    async def result(self, future: Future[Any]) -> Any:
        """What a future will hold.

        Raises:
            TimeoutError: it takes too long.
            HTTPException: whoever asked has gone.
        """
        done, gone = asyncio.wrap_future(future), asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait((done, gone), timeout=self.options.timeout, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            if gone.done():
                raise HTTPException(GONE, "whoever asked has gone")
            raise TimeoutError
        finally:
            done.cancel()
            gone.cancel()

    async def _gone(self) -> None:
        """Waits until the client goes; its request is whole by now."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


Asking = Annotated[Asked, Depends(Asked)]
