"""Errors as OpenAI's clients read them, each with its status."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from smidgen.common.errors import SmidgenError, WriteError
from smidgen.serving.errors import ClosedError, QueueFullError, UnknownDeltaError

LOG = logging.getLogger("smidgen.serving")

# class of an error -> status and code; the first that fits
STATUS: Mapping[type[Exception], tuple[int, str]] = {
    UnknownDeltaError: (404, "model_not_found"),
    QueueFullError: (429, "queue_full"),
    ClosedError: (503, "stopping"),
    WriteError: (507, "not_saved"),
    SmidgenError: (422, "invalid_request"),
    TimeoutError: (504, "timeout"),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GONE = 499  # in the log: the client has gone
CODES = {400: "bad_request", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "too_slow",
         413: "body_too_large", 422: "invalid_request", 429: "too_many_requests", 503: "stopping"}  # fmt: skip


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    code: str


class ErrorResponse(BaseModel):
    """The form of every error."""

    error: ErrorBody


MEANINGS = {
    400: "an option that is not supported, or no JSON", 401: "no key, or a wrong one", 404: "no such delta",
    408: "the request did not come in time",
    413: "the body is too large", 422: "it does not fit", 429: "too many requests; come again",
    500: "a fault of the server", 503: "the server is stopping", 504: "it took too long",
    507: "the delta cannot be saved",
}  # fmt: skip
RESPONSES: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorResponse, "description": what} for status, what in MEANINGS.items()
}


def error_response(status: int, code: str, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(status)
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status, headers)


def told(error: BaseException) -> tuple[int, str, str]:
    """Status, code and message of an error."""
    for cls, (status, code) in STATUS.items():
        if isinstance(error, cls):
            return status, code, str(error) or "it took too long"
    if isinstance(error, OSError) and error.errno in FULL:
        return 507, "not_saved", f"the server cannot write: {error.strerror}"
    LOG.error("a request failed", exc_info=error)
    return 500, "server_error", f"the server failed ({type(error).__name__}); its log says more"


def add_handlers(app: FastAPI) -> None:
    """Let an app answer errors so."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        status, code, message = told(error)
        return error_response(status, code, message)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, "bad_request", "the body is no JSON")
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return error_response(422, "invalid_request", f"{place}: {first['msg']}" if place else first["msg"])

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, OSError):  # a large body is written to a temporary file as it comes
            return await known(request, error.__cause__)
        code = CODES.get(error.status_code, "error")
        answer = error_response(error.status_code, code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    app.add_exception_handler(SmidgenError, known)
    app.add_exception_handler(OSError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, known)
