"""The operations: one table that REST, the client over HTTP, the client in process and gRPC all go by.

Rules:
- A name is OpenAPI's operationId, the RPC's name (there in CamelCase) and what a client's transport is asked for. It
  never changes.
- A table's row takes one message and gives one. What streams, or is no JSON, is in `STREAMS` and has a way of its own
  in each transport.
- `request` of a GET or DELETE is its query; of the others it is the JSON body, and None is the same as an empty one.
- Nothing here brings torch: a client of a server does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from service.app.fields import AtVersion, Name, faults
from service.app.kernel_schemas import KernelList
from service.app.key_schemas import KeyList, KeyRequest, NewKey
from service.app.memory_schemas import (
    CountReply,
    CountRequest,
    DeleteOne,
    DeleteReply,
    DeleteRequest,
    GetReply,
    GetRequest,
    MemoryInfo,
    PatchReply,
    PatchRequest,
    PayloadIndex,
    PayloadIndexList,
    ScrollReply,
    ScrollRequest,
)
from service.app.recall_schemas import RecallReply
from service.app.reencode_schemas import ReencodeRequest
from service.app.reports import Diagnostics
from service.app.schemas import (
    CollectionConfig,
    CollectionInfo,
    CollectionList,
    EncoderList,
    OperationList,
    RecallRequest,
    StoreReply,
    StoreRequest,
    TrainRequest,
)
from service.app.schemas import Operation as OperationInfo
from service.app.sizing_schemas import Sizing, SizingRequest
from service.app.snapshot_schemas import (
    RestoreRequest,
    ScheduleRequest,
    SnapshotInfo,
    SnapshotList,
    SnapshotSchedule,
)
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from service.app.engine import Engine

Path = Mapping[str, str]


@dataclass(frozen=True)
class Route:
    """`path` names its parameters in braces; a `memories/{id}` may hold slashes, which are escaped."""

    name: str
    method: str
    path: str


@dataclass(frozen=True)
class Operation(Route):
    """`call(engine, path, request)` takes an instance of `request` (None where that is None) and gives one of `reply`
    (None: nothing is answered). It raises what the engine raises. `reads`: it changes nothing, and may be asked again.
    `keyed`: it may be asked again under the same `idempotency_key`.
    """

    request: type[BaseModel] | None
    reply: type[Any] | None
    call: Callable[[Engine, Path, Any], Any]
    reads: bool = False
    keyed: bool = False


_name: TypeAdapter[str] = TypeAdapter(Name)


def _create_collection(engine: Engine, path: Path, request: CollectionConfig) -> CollectionInfo:
    name = path["collection"]
    try:
        _name.validate_python(name)
    except ValidationError as error:
        raise InvalidRequest(f"{name}: {faults(error)}") from None
    return engine.create_collection(name, request)


_COLLECTION = "/v1/collections/{collection}"
_SNAPSHOTS = _COLLECTION + "/snapshots"
_MEMORIES = _COLLECTION + "/memories"

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "list_encoders", "GET", "/v1/encoders", None, EncoderList,
            lambda engine, path, _: engine.encoders(), reads=True,
        ),
        # --- collections ---
        Operation("create_collection", "PUT", _COLLECTION, CollectionConfig, CollectionInfo, _create_collection),
        Operation(
            "list_collections", "GET", "/v1/collections", None, CollectionList,
            lambda engine, path, _: engine.collections(), reads=True,
        ),
        Operation(
            "get_collection", "GET", _COLLECTION, None, CollectionInfo,
            lambda engine, path, _: engine.collection(path["collection"]), reads=True,
        ),
        Operation(
            "get_diagnostics", "GET", _COLLECTION + "/diagnostics", None, Diagnostics,
            lambda engine, path, _: engine.diagnostics(path["collection"]), reads=True,
        ),
        Operation(
            "size", "POST", _COLLECTION + "/diagnostics/sizing", SizingRequest, Sizing,
            lambda engine, path, request: engine.size(path["collection"], request), reads=True,
        ),
        Operation(
            "delete_collection", "DELETE", _COLLECTION, None, None,
            lambda engine, path, _: engine.delete_collection(path["collection"]),
        ),
        Operation(
            "train", "POST", _COLLECTION + "/train", TrainRequest, OperationInfo,
            lambda engine, path, request: engine.train(path["collection"], request),
        ),
        Operation(
            "reencode", "POST", _COLLECTION + "/spaces/{space}/reencode", ReencodeRequest, OperationInfo,
            lambda engine, path, request: engine.reencode(path["collection"], path["space"], request),
        ),
        Operation(
            "list_kernels", "GET", _COLLECTION + "/kernels", None, KernelList,
            lambda engine, path, _: engine.kernels(path["collection"]), reads=True,
        ),
        Operation(
            "retire_kernel", "DELETE", _COLLECTION + "/kernels/{kernel}", None, None,
            lambda engine, path, _: engine.retire_kernel(path["collection"], path["kernel"]),
        ),
        Operation(
            "list_payload_indexes", "GET", _COLLECTION + "/payload_indexes", None, PayloadIndexList,
            lambda engine, path, _: engine.payload_indexes(path["collection"]), reads=True,
        ),
        Operation(
            "put_payload_index", "PUT", _COLLECTION + "/payload_indexes/{key}", None, PayloadIndex,
            lambda engine, path, _: engine.put_payload_index(path["collection"], path["key"]),
        ),
        Operation(
            "delete_payload_index", "DELETE", _COLLECTION + "/payload_indexes/{key}", None, None,
            lambda engine, path, _: engine.delete_payload_index(path["collection"], path["key"]),
        ),
        # --- snapshots ---
        Operation(
            "create_snapshot", "POST", _SNAPSHOTS, None, OperationInfo,
            lambda engine, path, _: engine.create_snapshot(path["collection"]),
        ),
        Operation(
            "list_snapshots", "GET", _SNAPSHOTS, None, SnapshotList,
            lambda engine, path, _: engine.snapshots(path["collection"]), reads=True,
        ),
        Operation(
            "get_snapshot", "GET", _SNAPSHOTS + "/{snapshot}", None, SnapshotInfo,
            lambda engine, path, _: engine.snapshot(path["collection"], path["snapshot"]), reads=True,
        ),
        Operation(
            "delete_snapshot", "DELETE", _SNAPSHOTS + "/{snapshot}", None, None,
            lambda engine, path, _: engine.delete_snapshot(path["collection"], path["snapshot"]),
        ),
        Operation(
            "restore_snapshot", "POST", _SNAPSHOTS + "/{snapshot}/restore", RestoreRequest, OperationInfo,
            lambda engine, path, request: engine.restore(path["collection"], path["snapshot"], request),
        ),
        Operation(
            "put_snapshot_schedule", "PUT", _COLLECTION + "/snapshot_schedule", ScheduleRequest, SnapshotSchedule,
            lambda engine, path, request: engine.put_snapshot_schedule(path["collection"], request),
        ),
        Operation(
            "get_snapshot_schedule", "GET", _COLLECTION + "/snapshot_schedule", None, SnapshotSchedule,
            lambda engine, path, _: engine.snapshot_schedule(path["collection"]), reads=True,
        ),
        Operation(
            "delete_snapshot_schedule", "DELETE", _COLLECTION + "/snapshot_schedule", None, None,
            lambda engine, path, _: engine.delete_snapshot_schedule(path["collection"]),
        ),
        # --- store and recall ---
        Operation(
            "store", "POST", _COLLECTION + "/store", StoreRequest, StoreReply,
            lambda engine, path, request: engine.store(path["collection"], request), keyed=True,
        ),
        Operation(
            "recall", "POST", _COLLECTION + "/recall", RecallRequest, RecallReply,
            lambda engine, path, request: engine.recall(path["collection"], request), reads=True,
        ),
        # --- memories ---
        Operation(
            "get_memories", "POST", _MEMORIES + "/get", GetRequest, GetReply,
            lambda engine, path, request: engine.memories(path["collection"], request), reads=True,
        ),
        Operation(
            "scroll", "POST", _MEMORIES + "/scroll", ScrollRequest, ScrollReply,
            lambda engine, path, request: engine.scroll(path["collection"], request), reads=True,
        ),
        Operation(
            "delete_memories", "POST", _MEMORIES + "/delete", DeleteRequest, DeleteReply,
            lambda engine, path, request: engine.delete(path["collection"], request),
        ),
        Operation(
            "count", "POST", _MEMORIES + "/count", CountRequest, CountReply,
            lambda engine, path, request: engine.count(path["collection"], request), reads=True,
        ),
        Operation(
            "get_memory", "GET", _MEMORIES + "/{id}", AtVersion, MemoryInfo,
            lambda engine, path, request: engine.memory(path["collection"], path["id"], request), reads=True,
        ),
        Operation(
            "patch_memory", "PATCH", _MEMORIES + "/{id}", PatchRequest, PatchReply,
            lambda engine, path, request: engine.patch(path["collection"], path["id"], request), keyed=True,
        ),
        Operation(
            "delete_memory", "DELETE", _MEMORIES + "/{id}", DeleteOne, DeleteReply,
            lambda engine, path, request: engine.delete_memories(
                path["collection"], [path["id"]], request.if_version
            ),
        ),
        # --- operations ---
        Operation(
            "list_operations", "GET", "/v1/operations", None, OperationList,
            lambda engine, path, _: engine.operations(), reads=True,
        ),
        Operation(
            "get_operation", "GET", "/v1/operations/{id}", None, OperationInfo,
            lambda engine, path, _: engine.operation(path["id"]), reads=True,
        ),
        Operation(
            "cancel_operation", "DELETE", "/v1/operations/{id}", None, OperationInfo,
            lambda engine, path, _: engine.cancel(path["id"]),
        ),
        Operation(
            "retry_operation", "POST", "/v1/operations/{id}/retry", None, OperationInfo,
            lambda engine, path, _: engine.retry(path["id"]),
        ),
        # --- keys ---
        Operation(
            "create_key", "POST", "/v1/keys", KeyRequest, NewKey,
            lambda engine, path, request: engine.keys.create(request),
        ),
        Operation(
            "list_keys", "GET", "/v1/keys", None, KeyList, lambda engine, path, _: engine.keys.listed(), reads=True
        ),
        Operation(
            "revoke_key", "DELETE", "/v1/keys/{id}", None, None,
            lambda engine, path, _: engine.keys.revoke(path["id"]),
        ),
    )
}  # fmt: skip

STREAMS: dict[str, Route] = {
    route.name: route
    for route in (
        Route("get_content", "GET", _MEMORIES + "/{id}/content"),  # bytes of their own media type
        Route("import_rows", "POST", _COLLECTION + "/import"),  # rows in, lines of what becomes of them out
        Route("export", "GET", _COLLECTION + "/export"),
        Route("get_snapshot_content", "GET", _SNAPSHOTS + "/{snapshot}/content"),  # a tar, of any size
        Route("put_snapshot_content", "PUT", _SNAPSHOTS + "/{snapshot}/content"),
    )
}
