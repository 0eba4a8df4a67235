"""Errors of the engine as gRPC's status, and what goes with it.

Rules:
- The status code is the nearest of gRPC's; the message is the error's detail.
- Trailing metadata carries the rest: `engram-problem-bin`, a `ProblemDetails` with the stable `code` and what is wrong
  with each item; `retry-after`, in seconds, where REST has Retry-After.
- Both have bounds: a client refuses trailers of more than 8 KiB by default, and with them the whole answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from service.errors import EngramError, ItemError, error_classes
from service.rpc.messages import message

PROBLEM = "engram-problem-bin"
RETRY_AFTER = "retry-after"
DETAIL_MAX = 1_000  # characters; a faulty request names ten faults at most
ITEMS_BYTES_MAX = 3_000

BY_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.INVALID_ARGUMENT,  # of HTTP alone: a call has no method
    409: grpc.StatusCode.FAILED_PRECONDITION,
    412: grpc.StatusCode.ABORTED,  # read again, and try again
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    507: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
BY_CODE = {
    "collection_exists": grpc.StatusCode.ALREADY_EXISTS,
    "duplicate": grpc.StatusCode.ALREADY_EXISTS,
}

ProblemDetails = message("ProblemDetails")


def status_of(error: EngramError) -> grpc.StatusCode:
    return BY_CODE.get(error.code) or BY_STATUS.get(error.status, grpc.StatusCode.UNKNOWN)


def trailers(error: EngramError) -> tuple[tuple[str, str | bytes], ...]:
    problem = ProblemDetails(
        type=f"urn:engram:problem:{error.code}", title=error.title, status=error.status, code=error.code,
        detail=error.detail[:DETAIL_MAX],
    )  # fmt: skip
    size = 0
    for each in error.errors:
        size += len(each.detail.encode()) + len(each.code) + 16
        if size > ITEMS_BYTES_MAX:
            break
        problem.errors.add(item=each.item, code=each.code, detail=each.detail)
    carried: tuple[tuple[str, str | bytes], ...] = ((PROBLEM, problem.SerializeToString()),)
    return carried if error.retry_after_s is None else (*carried, (RETRY_AFTER, str(error.retry_after_s)))


def error_in(metadata: Iterable[tuple[str, str | bytes]]) -> EngramError | None:
    """The error that trailing metadata tells of; a code unknown here keeps its words under `EngramError`."""
    found: dict[str, Any] = dict(metadata)
    if PROBLEM not in found:
        return None
    problem = ProblemDetails.FromString(found[PROBLEM])
    items = tuple(ItemError(each.item, each.code, each.detail) for each in problem.errors)
    retry = str(found.get(RETRY_AFTER, ""))
    retry_after_s = int(retry) if retry.isdigit() else None
    known = error_classes().get(problem.code)
    if known is not None:
        return known(problem.detail, errors=items, retry_after_s=retry_after_s)
    error = EngramError(problem.detail, errors=items, retry_after_s=retry_after_s)
    error.status, error.code, error.title = problem.status, problem.code, problem.title
    return error
