"""Reading request bodies: JSON straight into the schema, or multipart forms for files.

A form's fields are the schema's own: files are `image` and `mask` (or, in `store`, parts that `memories` name as
`{"image": {"part": "name"}}`); every other field is JSON, or plain text where it is not.
"""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from service.api.problems import from_validation
from service.app.fields import BATCH_MAX, IdempotencyKey, faults
from service.app.memory_schemas import PatchRequest
from service.app.schemas import RecallRequest, StoreRequest
from service.errors import InvalidRequest, MalformedBody

M = TypeVar("M", bound=BaseModel)

_key: TypeAdapter[str] = TypeAdapter(IdempotencyKey)

FIELD_BYTES_MAX = 16 * 2**20  # one non-file field of a form: a batch's JSON; the whole body has a bound of its own
PLAIN = ("text", "id", "expires_at", "idempotency_key", "group_by")  # fields that are text, whatever it looks like
CUE_FIELDS = ("text", "image", "mask", "vectors", "id")
MEMORY_FIELDS = ("id", "image", "text", "vectors", "payload", "expires_at", "if_version")
KEY_HEADER = "Idempotency-Key"


async def read(request: Request, model: type[M]) -> M:
    """The request's JSON body as `model`. Raises `MalformedBody`, `InvalidRequest`."""
    return validate(model, await request.body())


def validate(model: type[M], body: bytes | dict[str, Any]) -> M:
    try:
        return model.model_validate_json(body) if isinstance(body, bytes) else model.model_validate(body)
    except ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None


async def read_recall(request: Request) -> RecallRequest:
    if not _is_form(request):
        return await read(request, RecallRequest)
    fields = await _fields(request)
    cue = {name: fields.pop(name) for name in CUE_FIELDS if name in fields}
    return validate(RecallRequest, {**fields, "cue": cue} if cue else fields)


K = TypeVar("K", StoreRequest, PatchRequest)


def keyed(request: Request, body: K) -> K:
    """The body with the key that the request's header gives it. Raises `InvalidRequest`."""
    key = request.headers.get(KEY_HEADER)
    if key is None or key == body.idempotency_key:
        return body
    if body.idempotency_key is not None:
        raise InvalidRequest(f"the header {KEY_HEADER} and idempotency_key are two keys; send one")
    try:
        checked = _key.validate_python(key)
    except ValidationError as error:
        raise InvalidRequest(f"{KEY_HEADER}: {faults(error)}") from None
    return body.model_copy(update={"idempotency_key": checked})


async def read_patch(request: Request) -> PatchRequest:
    return (
        await read(request, PatchRequest) if not _is_form(request) else validate(PatchRequest, await _fields(request))
    )


async def read_store(request: Request) -> StoreRequest:
    if not _is_form(request):
        return await read(request, StoreRequest)
    fields = await _fields(request)
    memory = {name: fields.pop(name) for name in MEMORY_FIELDS if name in fields}
    if "memories" not in fields:
        fields["memories"] = [memory] if memory else []
    elif memory:
        raise InvalidRequest(f"send either memories or one memory's own fields ({', '.join(memory)}), not both")
    memories = fields["memories"]
    parts = {name: fields.pop(name) for name in list(fields) if _is_file(fields[name])}
    for item in memories if isinstance(memories, list) else ():
        image = item.get("image") if isinstance(item, dict) else None
        if isinstance(image, dict) and image.keys() == {"part"}:
            # A part that is missing stays as it is, and that item alone is refused.
            item["image"] = parts.get(str(image["part"]), image)
    return validate(StoreRequest, fields)


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith("multipart/form-data")


def _is_file(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("base64"), bytes)


async def _fields(request: Request) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    async with request.form(max_files=BATCH_MAX, max_fields=BATCH_MAX, max_part_size=FIELD_BYTES_MAX) as form:
        for name, value in form.multi_items():
            if name in fields:
                raise InvalidRequest(f"the form has two parts named {name}")
            if isinstance(value, UploadFile):
                fields[name] = {"base64": await value.read()}
            elif name in PLAIN:
                fields[name] = value
            else:
                try:
                    fields[name] = orjson.loads(value)
                except orjson.JSONDecodeError:
                    fields[name] = value
    return fields
