"""The one place where errors become `application/problem+json` (RFC 9457). No traceback leaves the server."""

from __future__ import annotations

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from service.app.fields import faults
from service.errors import EngramError, InvalidRequest, MalformedBody, MethodNotAllowed, NotFound, RateLimited

log = structlog.get_logger()


def as_response(error: EngramError) -> Response:
    body: dict[str, object] = {
        "type": f"urn:engram:problem:{error.code}", "title": error.title, "status": error.status,
        "code": error.code, "detail": error.detail,
    }  # fmt: skip
    if error.errors:
        body["errors"] = [{"item": e.item, "code": e.code, "detail": e.detail} for e in error.errors]
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if isinstance(error, RateLimited) and error.allowance is not None:
        names = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
        headers |= {name: str(value) for name, value in zip(names, error.allowance, strict=True)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(body), error.status, headers, media_type="application/problem+json")


def from_validation(error: ValidationError | RequestValidationError) -> EngramError:
    """A body that is not JSON is malformed (400); one that is, but not what was asked for, is invalid (422)."""
    for fault in error.errors():
        if fault["type"] == "json_invalid":
            return MalformedBody(str(fault["msg"]))
    return InvalidRequest(faults(error))


def install(app: FastAPI) -> None:
    @app.exception_handler(EngramError)
    async def engram_error(request: Request, error: EngramError) -> Response:
        if error.status >= 500:
            log.warning("request failed", path=request.url.path, code=error.code, detail=error.detail)
        return as_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return as_response(from_validation(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return as_response(NotFound(f"there is nothing at {request.url.path}"))
        if error.status_code == 405:
            refused = as_response(MethodNotAllowed(f"{request.url.path} does not take {request.method}"))
            refused.headers.update(error.headers or {})
            return refused
        translated = MalformedBody(str(error.detail)) if error.status_code == 400 else InvalidRequest(str(error.detail))
        response = as_response(translated)
        response.status_code = error.status_code
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("unexpected error", path=request.url.path, exc_info=error)
        return as_response(EngramError("the server met an error of its own; its log has the details"))
