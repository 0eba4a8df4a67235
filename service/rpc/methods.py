"""The calls of the service: those of the table of operations, and what gRPC has besides.

A new operation of the table is a call here by itself. Bytes and streams have a row in `BESIDE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, RootModel, WithJsonSchema

from service.app.fields import BASE64, Reply, Request
from service.app.operations import OPERATIONS, STREAMS
from service.app.schemas import MEMORY_REF, StoredItem
from service.app.snapshot_schemas import SnapshotInfo
from service.app.transfer_schemas import Event, ExportRequest, Format, ImportOptions

if TYPE_CHECKING:
    from service.app.engine import Engine


NULLS = "nulls"
"""Of a request that changes something in part: the names of its fields that are null."""


def rpc_name(operation: str) -> str:
    """The call of an operation: `get_memories` is `GetMemories`."""
    return "".join(part.capitalize() for part in operation.split("_"))


Bytes = Annotated[bytes, WithJsonSchema(BASE64)]


class Content(Reply):
    data: Bytes
    media_type: str


class StoreStreamRequest(Request):
    """The first message names the collection; each brings memories, one or many."""

    memories: list[Any] = Field(default_factory=list, json_schema_extra={"items": MEMORY_REF})
    wait: bool = Field(default=True, description="of the first message")


class StoreStreamReply(Reply):
    """The answers to the memories that follow those answered before, in their order: a bad one is reported under its
    position and the rest are stored.
    """

    first: int = Field(description="the position in the stream of the memory that the first result is of")
    results: list[StoredItem]
    version: int | None
    operation_id: str | None = Field(description="of what is still being encoded")


class ImportRowsRequest(ImportOptions):
    """The first message has the collection, the format and the options; each has a part of the file, of any size."""

    format: Format = "ndjson"
    rows: Bytes = b""


class ImportRowsReply(RootModel[Annotated[Event, Field(discriminator="event")]]):
    """What becomes of the rows: `started`, `progress`, a `refused` one each, and at the end `done` or `failed`."""


class ExportReply(Reply):
    """The next part of the file."""

    rows: Bytes


class SnapshotContent(Reply):
    """The next part of the file, a tar."""

    data: Bytes


class PutSnapshotContentRequest(Request):
    """The first message has the collection and the snapshot's name; each has a part of the file, of any size."""

    data: Bytes = b""


@dataclass(frozen=True)
class Method:
    """`path`: the request's fields that REST has in its path. `call`: as an operation's; None where it streams.
    `as_operation`: whose rights it needs. `nulls`: it says of what it names as null that it is, which removes it.
    """

    name: str
    about: str
    path: tuple[str, ...]
    request: type[BaseModel] | None
    reply: type[Any] | None
    call: Callable[[Engine, Mapping[str, str], Any], Any] | None
    as_operation: str
    client_streams: bool = False
    server_streams: bool = False
    nulls: bool = False

    @property
    def rpc(self) -> str:
        return rpc_name(self.name)


def _path(path: str) -> tuple[str, ...]:
    return tuple(re.findall(r"{(\w+)}", path))


def _content(data: bytes, media_type: str) -> Content:
    return Content(data=data, media_type=media_type)


def _about(stream: str) -> str:
    return f"{STREAMS[stream].method} {STREAMS[stream].path}"


BESIDE = (
    Method(
        "get_content", _about("get_content"), ("collection", "id"), None, Content,
        lambda engine, path, _: _content(*engine.content(path["collection"], path["id"])),
        "get_content",
    ),
    Method(
        "store_stream", "Store memories as they come, with an answer to each as soon as it is stored.",
        ("collection",), StoreStreamRequest, StoreStreamReply, None, "store", client_streams=True, server_streams=True,
    ),
    Method(
        "import_rows", _about("import_rows"), ("collection",), ImportRowsRequest, ImportRowsReply, None, "import_rows",
        client_streams=True, server_streams=True,
    ),
    Method(
        "export", _about("export"), ("collection",), ExportRequest, ExportReply, None, "export", server_streams=True,
    ),
    Method(
        "get_snapshot_content", _about("get_snapshot_content"), ("collection", "snapshot"), None, SnapshotContent, None,
        "get_snapshot_content", server_streams=True,
    ),
    Method(
        "put_snapshot_content", _about("put_snapshot_content"), ("collection", "snapshot"), PutSnapshotContentRequest,
        SnapshotInfo, None, "put_snapshot_content", client_streams=True,
    ),
)  # fmt: skip

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(
            Method(
                op.name, f"{op.method} {op.path}", _path(op.path), op.request, op.reply, op.call, op.name,
                nulls=op.method == "PATCH",
            )
            for op in OPERATIONS.values()
        ),
        *BESIDE,
    )
}  # fmt: skip
