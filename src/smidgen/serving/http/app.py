"""The app: routes, middleware and the page, around one Server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

import anyio.to_thread
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from smidgen.common.version import __version__
from smidgen.serving.errors import ClosedError
from smidgen.serving.http import answer_routes, delta_routes, openai_routes
from smidgen.serving.http.errors import add_handlers
from smidgen.serving.http.measures import Measures
from smidgen.serving.http.middleware import Gate, RequestLog
from smidgen.serving.http.options import HttpOptions
from smidgen.serving.server import Server

THREADS = 160  # that wait for answers; each holds a request, and none of them computes


def create_app(server: Server, options: HttpOptions | None = None) -> FastAPI:
    """An ASGI app that answers for a server, and closes it at its end."""
    options = options or HttpOptions()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        await anyio.to_thread.run_sync(server.close)

    app = FastAPI(title="smidgen", version=__version__, lifespan=lifespan, redoc_url=None,
                  description="One model answers for many deltas.")  # fmt: skip
    app.state.server, app.state.options = server, options
    measures = Measures(server)
    app.add_middleware(Gate, options=options)
    app.add_middleware(RequestLog, measures=measures)
    add_handlers(app)
    for part in (answer_routes, openai_routes, delta_routes):
        app.include_router(part.router)
    page = files("smidgen.serving.http").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page)

    @app.get("/healthz", tags=["state"])
    async def alive() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["state"], responses={503: {"description": "it takes no requests"}})
    async def ready() -> JSONResponse:
        """Whether it takes requests."""
        if server.engine.closing:
            raise ClosedError("the server is stopping and takes no more requests")
        return JSONResponse({"status": "ready", "deltas": len(server.bank), "needs_key": bool(options.keys)})

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    return app
