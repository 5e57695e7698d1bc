"""Where a route asks the server: in threads, so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

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
        """What a future will hold. Raises TimeoutError if it takes too long."""
        return await asyncio.wait_for(asyncio.wrap_future(future), self.options.timeout)


Asking = Annotated[Asked, Depends(Asked)]
