"""Bytes to a checked request, and a reply to bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf.message import DecodeError
from pydantic import BaseModel, ValidationError

from service.app.fields import faults
from service.errors import InvalidRequest, MalformedBody
from service.rpc.convert import to_dict, to_message
from service.rpc.messages import message
from service.rpc.methods import NULLS, Method

if TYPE_CHECKING:
    from service.app.serving import Pool


ON_LOOP_BYTES_MAX = 64 * 2**10  # parsed in tenths of a millisecond; what is larger is, on a thread


class Asked(NamedTuple):
    path: dict[str, str]
    body: Any  # of the method's own request; None where it has none


def parse(method: Method, raw: bytes) -> Asked:
    """Raises `MalformedBody`, `InvalidRequest`."""
    name = f"{method.rpc}Request"
    try:
        found = message(name).FromString(raw)
    except DecodeError:
        raise MalformedBody(f"the bytes are no {name} of engram.proto, or it is nested too deeply") from None
    given = to_dict(found, asked=True)
    path = {parameter: given.pop(parameter, "") for parameter in method.path}
    nulls = given.pop(NULLS, ()) if method.nulls else ()
    if both := [field for field in nulls if field in given]:
        raise InvalidRequest(f"{', '.join(both)}: both given and among the {NULLS}")
    given |= dict.fromkeys(nulls)
    if method.request is None:
        return Asked(path, None)
    try:
        return Asked(path, method.request.model_validate(given))
    except ValidationError as error:
        raise InvalidRequest(faults(error)) from None
    except RecursionError:
        raise MalformedBody("the request is nested too deeply") from None


async def parsed(pool: Pool, method: Method, raw: bytes) -> Asked:
    """As `parse`, away from the event loop where it takes long. Raises `TooBusy` as well."""
    return parse(method, raw) if len(raw) <= ON_LOOP_BYTES_MAX else await pool.run(parse, method, raw)


def pack(method: Method, reply: Any) -> bytes:
    if method.reply is None:
        return b""
    body = reply.model_dump() if isinstance(reply, BaseModel) else reply
    packed: bytes = to_message(reply_name(method), body).SerializeToString()
    return packed


def reply_name(method: Method) -> str:
    assert method.reply is not None
    return method.reply.__name__
