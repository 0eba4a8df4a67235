"""The REST API: thin routes over the engine. What a route does not do here, it does not do.

CPU-bound work runs on a bounded pool of threads; the event loop only parses bodies and writes replies.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import RedirectResponse
from starlette.routing import Route

from service.api import bodies, problems, snapshots
from service.api.edge import Edge
from service.api.transfer import Transfers
from service.app import serving
from service.app.access import CALLER, check
from service.app.engine import Engine
from service.app.fields import KEY_MAX, AtVersion
from service.app.filter_schemas import FilterSpec
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
from service.app.needs import need_of
from service.app.recall_schemas import RecallReply
from service.app.reencode_schemas import ReencodeRequest
from service.app.reports import Diagnostics
from service.app.schemas import (
    CollectionConfig,
    CollectionInfo,
    CollectionList,
    EncoderList,
    MemoryInput,
    Operation,
    OperationList,
    ProblemDetails,
    RecallRequest,
    StoreReply,
    StoreRequest,
    TrainRequest,
)
from service.app.serving import Pool
from service.app.sizing_schemas import Sizing, SizingRequest
from service.app.snapshot_schemas import RestoreRequest, ScheduleRequest, SnapshotInfo, SnapshotList, SnapshotSchedule
from service.app.transfer_schemas import MEDIA_TYPES, ExportRequest, Format, ImportOptions

ID_MAX = 512  # characters of a memory's id

DESCRIPTION = (
    "Associative memory: store images and text, recall them whole from a fragment, and be told when nothing fits."
)
CollectionName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
SnapshotName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
Id = Annotated[str, Path(min_length=1, max_length=ID_MAX)]
PayloadKey = Annotated[str, Path(min_length=1, max_length=KEY_MAX)]


# Coroutines, though they await nothing: a plain function would be sent to a thread for every request.
async def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


async def _pool(request: Request) -> Pool:
    pool: Pool = request.app.state.pool
    return pool


async def _transfers(request: Request) -> Transfers:
    transfers: Transfers = request.app.state.transfers
    return transfers


Engine_ = Annotated[Engine, Depends(_engine)]
Transfers_ = Annotated[Transfers, Depends(_transfers)]
Pool_ = Annotated[Pool, Depends(_pool)]


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


def _body(model: type[BaseModel], form: dict[str, Any] | None = None, required: bool = True) -> dict[str, Any]:
    """What the OpenAPI document says of a body that a route reads by itself."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    if form is not None:
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": form}}
    return {"requestBody": {"required": required, "content": content}}


FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
JSON_TEXT = {"type": "string", "description": "JSON"}
STORE_FORM = {
    "image": FILE,
    "text": {"type": "string"},
    "id": {"type": "string"},
    "payload": JSON_TEXT,
    "vectors": JSON_TEXT,
    "expires_at": {"type": "string", "format": "date-time"},
    "if_version": JSON_TEXT,
    "memories": {"type": "string", "description": 'JSON, as in the JSON body; an image is {"part": its part\'s name}'},
    "wait": JSON_TEXT,
    "timeout_s": JSON_TEXT,
    "idempotency_key": {"type": "string"},
}
PATCH_FORM = {
    "image": FILE, "text": {"type": "string"}, "payload": JSON_TEXT, "payload_mode": {"type": "string"},
    "vectors": JSON_TEXT, "expires_at": {"type": "string", "format": "date-time"}, "if_version": JSON_TEXT,
    "idempotency_key": {"type": "string"},
}  # fmt: skip
RECALL_FORM = {
    "image": FILE,
    "mask": FILE,
    "text": {"type": "string"},
    "id": {"type": "string"},
    "vectors": JSON_TEXT,
    "cues": JSON_TEXT,
} | {name: JSON_TEXT for name in RecallRequest.model_fields if name not in ("cue", "cues")}

KEYED: dict[str, Any] = {
    "parameters": [
        {
            "name": bodies.KEY_HEADER, "in": "header", "required": False,
            "description": "one for each request: the same request again within a day is done once, and answered alike",
            "schema": {"type": "string", "minLength": 1, "maxLength": KEY_MAX},
        }
    ]
}  # fmt: skip
PROBLEM: dict[str, Any] = {
    "description": "A problem (RFC 9457)",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}},
}


async def _allowed(request: Request) -> None:
    """Raises `Forbidden` where the key does not give what the route needs."""
    allow(request, request.scope["route"].name)


def allow(request: Request, operation: str) -> None:
    check(CALLER.get(), need_of(operation), request.path_params.get("collection"))


v1 = APIRouter(prefix="/v1", responses={"default": PROBLEM}, dependencies=[Depends(_allowed)])


@v1.get("/encoders", tags=["encoders"])
async def list_encoders(engine: Engine_, pool: Pool_) -> EncoderList:
    """The encoders there are: what each takes and gives, and whether its weights are here. None is loaded."""
    return await pool.run(engine.encoders)


# --- collections ------------------------------------------------------------------------------------------------------


@v1.put(
    "/collections/{collection}",
    status_code=201,
    tags=["collections"],
    openapi_extra=_body(CollectionConfig, required=False),
)
async def create_collection(
    collection: CollectionName, request: Request, engine: Engine_, pool: Pool_
) -> CollectionInfo:
    """Create a collection; without a body it gets the default spaces."""
    config = await bodies.read(request, CollectionConfig) if await request.body() else CollectionConfig()
    return await pool.run(engine.create_collection, collection, config)


@v1.get("/collections", tags=["collections"])
async def list_collections(engine: Engine_, pool: Pool_) -> CollectionList:
    return await pool.run(engine.collections)


@v1.get("/collections/{collection}", tags=["collections"])
async def get_collection(collection: CollectionName, engine: Engine_, pool: Pool_) -> CollectionInfo:
    """What the collection is: its spaces with their encoders, its calibration, its size."""
    return await pool.run(engine.collection, collection)


@v1.get("/collections/{collection}/diagnostics", tags=["collections"])
async def get_diagnostics(collection: CollectionName, engine: Engine_, pool: Pool_) -> Diagnostics:
    """How well the memories are told apart, what β rests on, what is nearly stored twice, and what it all holds."""
    return await pool.run(engine.diagnostics, collection)


@v1.post("/collections/{collection}/diagnostics/sizing", tags=["collections"], openapi_extra=_body(SizingRequest))
async def size(collection: CollectionName, request: Request, engine: Engine_, pool: Pool_) -> Sizing:
    """What so many memories would need, before they are stored: RAM, disk, an index, and the time to load and build."""
    return await pool.run(engine.size, collection, await bodies.read(request, SizingRequest))


@v1.delete("/collections/{collection}", status_code=204, tags=["collections"])
async def delete_collection(collection: CollectionName, engine: Engine_, pool: Pool_) -> None:
    await pool.run(engine.delete_collection, collection)


@v1.post("/collections/{collection}/train", status_code=202, tags=["collections"], openapi_extra=_body(TrainRequest))
async def train(collection: CollectionName, request: Request, engine: Engine_, pool: Pool_) -> Operation:
    """Calibrate the gate again, now, or train a kernel: an operation."""
    return await pool.run(engine.train, collection, await bodies.read(request, TrainRequest))


@v1.post(
    "/collections/{collection}/spaces/{space}/reencode",
    status_code=202,
    tags=["collections"],
    openapi_extra=_body(ReencodeRequest, required=False),
)
async def reencode(collection: CollectionName, space: str, request: Request, engine: Engine_, pool: Pool_) -> Operation:
    """Encode a space again from the kept originals, by another encoder or by the one there is now: an operation. Until
    it ends, recalls and stores go by the former.
    """
    body = await bodies.read(request, ReencodeRequest) if await request.body() else ReencodeRequest()
    return await pool.run(engine.reencode, collection, space, body)


@v1.get("/collections/{collection}/kernels", tags=["collections"])
async def list_kernels(collection: CollectionName, engine: Engine_, pool: Pool_) -> KernelList:
    """The kernels that were trained, in use or not, with how each was trained and what became of it."""
    return await pool.run(engine.kernels, collection)


@v1.delete("/collections/{collection}/kernels/{kernel}", status_code=204, tags=["collections"])
async def retire_kernel(collection: CollectionName, kernel: str, engine: Engine_, pool: Pool_) -> None:
    """Go on without a kernel that is in use; its record stays."""
    await pool.run(engine.retire_kernel, collection, kernel)


@v1.get("/collections/{collection}/payload_indexes", tags=["collections"])
async def list_payload_indexes(collection: CollectionName, engine: Engine_, pool: Pool_) -> PayloadIndexList:
    """The keys of payloads that are indexed, with what each takes."""
    return await pool.run(engine.payload_indexes, collection)


@v1.put("/collections/{collection}/payload_indexes/{key:path}", tags=["collections"])
async def put_payload_index(collection: CollectionName, key: PayloadKey, engine: Engine_, pool: Pool_) -> PayloadIndex:
    """Index a payload's key, written as in filters: the first filtered recall need not read every payload, filters on
    indexed keys are counted in memory, and the few memories that they keep are found without reading the others.
    """
    return await pool.run(engine.put_payload_index, collection, key)


@v1.delete("/collections/{collection}/payload_indexes/{key:path}", status_code=204, tags=["collections"])
async def delete_payload_index(collection: CollectionName, key: PayloadKey, engine: Engine_, pool: Pool_) -> None:
    await pool.run(engine.delete_payload_index, collection, key)


# --- snapshots --------------------------------------------------------------------------------------------------------

SNAPSHOTS = "/collections/{collection}/snapshots"
TAR_CONTENT = {snapshots.TAR: {"schema": FILE}}


@v1.post(SNAPSHOTS, status_code=202, tags=["snapshots"])
async def create_snapshot(collection: CollectionName, engine: Engine_, pool: Pool_) -> Operation:
    """Write the collection, as it is at one version, to one file while it answers: an operation, whose result is the
    snapshot.
    """
    return await pool.run(engine.create_snapshot, collection)


@v1.get(SNAPSHOTS, tags=["snapshots"])
async def list_snapshots(collection: CollectionName, engine: Engine_, pool: Pool_) -> SnapshotList:
    """Those kept under a collection's name, the oldest first, whether the collection is still there or not."""
    return await pool.run(engine.snapshots, collection)


@v1.get(SNAPSHOTS + "/{snapshot}", tags=["snapshots"])
async def get_snapshot(
    collection: CollectionName, snapshot: SnapshotName, engine: Engine_, pool: Pool_
) -> SnapshotInfo:
    return await pool.run(engine.snapshot, collection, snapshot)


@v1.get(
    SNAPSHOTS + "/{snapshot}/content",
    tags=["snapshots"],
    response_class=Response,
    responses={200: {"content": TAR_CONTENT, "description": "The file: an uncompressed tar"}},
)
async def get_snapshot_content(
    collection: CollectionName, snapshot: SnapshotName, engine: Engine_, pool: Pool_
) -> Response:
    """The snapshot's file."""
    return await snapshots.send(pool.run, engine, collection, snapshot)


@v1.put(
    SNAPSHOTS + "/{snapshot}/content",
    status_code=201,
    tags=["snapshots"],
    openapi_extra={"requestBody": {"required": True, "content": TAR_CONTENT}},
)
async def put_snapshot_content(
    collection: CollectionName, snapshot: SnapshotName, request: Request, engine: Engine_, pool: Pool_
) -> SnapshotInfo:
    """Bring a snapshot's file from elsewhere, under a name of yours. It is read to its end before it is kept; one that
    is there already is kept once.
    """
    return await snapshots.receive(pool.run, engine, collection, snapshot, request)


@v1.delete(SNAPSHOTS + "/{snapshot}", status_code=204, tags=["snapshots"])
async def delete_snapshot(collection: CollectionName, snapshot: SnapshotName, engine: Engine_, pool: Pool_) -> None:
    await pool.run(engine.delete_snapshot, collection, snapshot)


@v1.post(
    SNAPSHOTS + "/{snapshot}/restore",
    status_code=202,
    tags=["snapshots"],
    openapi_extra=_body(RestoreRequest, required=False),
)
async def restore_snapshot(
    collection: CollectionName, snapshot: SnapshotName, request: Request, engine: Engine_, pool: Pool_
) -> Operation:
    """Make a collection of a snapshot, under this name or another one: an operation. Until it ends the former
    collection answers, then they change places at once. Over one that holds memories it needs `replace`.
    """
    body = await bodies.read(request, RestoreRequest) if await request.body() else RestoreRequest()
    return await pool.run(engine.restore, collection, snapshot, body)


SCHEDULE = "/collections/{collection}/snapshot_schedule"


@v1.put(SCHEDULE, tags=["snapshots"], openapi_extra=_body(ScheduleRequest))
async def put_snapshot_schedule(
    collection: CollectionName, request: Request, engine: Engine_, pool: Pool_
) -> SnapshotSchedule:
    """Have snapshots made at set times, the first one at once. Of those only the newest are kept; no other snapshot is
    ever removed.
    """
    body = await bodies.read(request, ScheduleRequest)
    return await pool.run(engine.put_snapshot_schedule, collection, body)


@v1.get(SCHEDULE, tags=["snapshots"])
async def get_snapshot_schedule(collection: CollectionName, engine: Engine_, pool: Pool_) -> SnapshotSchedule:
    """When the last was made, or why not, and when the next is due."""
    return await pool.run(engine.snapshot_schedule, collection)


@v1.delete(SCHEDULE, status_code=204, tags=["snapshots"])
async def delete_snapshot_schedule(collection: CollectionName, engine: Engine_, pool: Pool_) -> None:
    """What was made stays."""
    await pool.run(engine.delete_snapshot_schedule, collection)


# --- store and recall -------------------------------------------------------------------------------------------------


@v1.post(
    "/collections/{collection}/store",
    tags=["memories"],
    response_model=StoreReply,
    responses={202: {"model": StoreReply, "description": "Accepted and on disk; encoding goes on as an operation"}},
    openapi_extra=_body(StoreRequest, STORE_FORM) | KEYED,
)
async def store(collection: CollectionName, request: Request, engine: Engine_, pool: Pool_) -> Response:
    """Store memories. A bad item is reported under its position and the rest are stored."""
    body = bodies.keyed(request, await bodies.read_store(request))
    reply = await serving.store(engine, pool, collection, body)
    return _json(reply, 202 if reply.operation_id else 200)


async def recall(request: Request) -> Response:
    """Recall memories from a cue: a text, an image (with a mask of what is missing), vectors, or several at once."""
    allow(request, "recall")
    engine: Engine = request.app.state.engine
    pool: Pool = request.app.state.pool
    collection = request.path_params["collection"]
    reply = await serving.recall(engine, pool, collection, await bodies.read_recall(request))
    return Response(orjson.dumps(reply), media_type="application/json")


# FastAPI's dispatch takes a recall over vectors 0.13 ms of the event loop, a plain route 0.01: so a plain route answers
# (see `create_app`), and FastAPI is told of it for the document.
RECALL = "/collections/{collection}/recall"
v1.add_api_route(
    RECALL,
    recall,
    methods=["POST"],
    tags=["memories"],
    response_model=RecallReply,
    openapi_extra={
        **_body(RecallRequest, RECALL_FORM),
        "parameters": [{"name": "collection", "in": "path", "required": True, "schema": {"type": "string"}}],
    },
)


# --- in bulk ----------------------------------------------------------------------------------------------------------

ROWS = {kind: {"schema": {"type": "string"}} for kind in MEDIA_TYPES.values()}


@v1.post(
    "/collections/{collection}/import",
    tags=["in bulk"],
    response_class=Response,
    responses={
        200: {
            "description": "Lines of JSON: started, progress, a refused row each, and done or failed at the end",
            "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        }
    },
    openapi_extra={"requestBody": {"required": True, "content": ROWS}},
)
async def import_rows(
    collection: CollectionName,
    request: Request,
    engine: Engine_,
    transfers: Transfers_,
    options: Annotated[ImportOptions, Query()],
) -> Response:
    """Store rows that are sent as NDJSON, Parquet or an Arrow stream: any number, in bounded memory. `durable_row` says
    from where to go on with `from_row` after a lost connection.
    """
    return await transfers.import_rows(engine, collection, request, options)


@v1.get(
    "/collections/{collection}/export",
    tags=["in bulk"],
    response_class=Response,
    responses={200: {"description": "Rows, behind a header that says what made their vectors", "content": ROWS}},
)
async def export(
    collection: CollectionName,
    engine: Engine_,
    transfers: Transfers_,
    format: Annotated[Format, Query()] = "ndjson",
    vectors: Annotated[bool, Query(description="with the vectors of every space")] = True,
    content: Annotated[bool, Query(description="with the originals' bytes")] = False,
    filter: Annotated[str | None, Query(description="as JSON: export what it keeps")] = None,
) -> Response:
    """All memories, or those that a filter keeps, as they are at one version."""
    chosen = {} if filter is None else {"filter": bodies.validate(FilterSpec, filter.encode())}
    request = ExportRequest(format=format, vectors=vectors, content=content, **chosen)
    return await transfers.export(partial(engine.export, collection, request), f"{collection}.{format}")


# --- memories ---------------------------------------------------------------------------------------------------------


@v1.post("/collections/{collection}/memories/get", tags=["memories"], openapi_extra=_body(GetRequest))
async def get_memories(collection: CollectionName, request: Request, engine: Engine_, pool: Pool_) -> GetReply:
    """Many at once; ids that are not there are left out of the answer."""
    return await pool.run(engine.memories, collection, await bodies.read(request, GetRequest))


@v1.post(
    "/collections/{collection}/memories/scroll", tags=["memories"], openapi_extra=_body(ScrollRequest, required=False)
)
async def scroll(collection: CollectionName, request: Request, engine: Engine_, pool: Pool_) -> ScrollReply:
    """A page of memories, in the order in which they were first stored; all of them, or those that a filter keeps."""
    body = await bodies.read(request, ScrollRequest) if await request.body() else ScrollRequest()
    return await pool.run(engine.scroll, collection, body)


@v1.post("/collections/{collection}/memories/delete", tags=["memories"], openapi_extra=_body(DeleteRequest))
async def delete_memories(collection: CollectionName, request: Request, engine: Engine_, pool: Pool_) -> DeleteReply:
    """Delete memories by id, or all that a filter keeps; ids that are not there are left out of the answer."""
    return await pool.run(engine.delete, collection, await bodies.read(request, DeleteRequest))


@v1.post(
    "/collections/{collection}/memories/count", tags=["memories"], openapi_extra=_body(CountRequest, required=False)
)
async def count(collection: CollectionName, request: Request, engine: Engine_, pool: Pool_) -> CountReply:
    """How many memories there are, or a filter keeps: exactly."""
    body = await bodies.read(request, CountRequest) if await request.body() else CountRequest()
    return await pool.run(engine.count, collection, body)


@v1.get(
    "/collections/{collection}/memories/{id:path}/content",
    tags=["memories"],
    response_class=Response,
    responses={200: {"content": {"image/*": {}}, "description": "The bytes as they were stored"}},
)
async def get_content(collection: CollectionName, id: Id, engine: Engine_, pool: Pool_) -> Response:
    """The original bytes."""
    data, media_type = await pool.run(engine.content, collection, id)
    # The bytes are a stranger's: a browser must show them as the image they were checked to be, or not at all.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "inline"}
    return Response(data, media_type=media_type, headers=headers)


@v1.get("/collections/{collection}/memories/{id:path}", tags=["memories"])
async def get_memory(
    collection: CollectionName, id: Id, at: Annotated[AtVersion, Query()], engine: Engine_, pool: Pool_
) -> MemoryInfo:
    return await pool.run(engine.memory, collection, id, at)


@v1.patch(
    "/collections/{collection}/memories/{id:path}",
    tags=["memories"],
    openapi_extra=_body(PatchRequest, PATCH_FORM) | KEYED,
)
async def patch_memory(
    collection: CollectionName, id: Id, request: Request, engine: Engine_, pool: Pool_
) -> PatchReply:
    """Change a memory in part: what is absent stays. Only the spaces that a changed part fills are encoded again."""
    body = bodies.keyed(request, await bodies.read_patch(request))
    return await pool.run(engine.patch, collection, id, body)


@v1.delete("/collections/{collection}/memories/{id:path}", tags=["memories"])
async def delete_memory(
    collection: CollectionName, id: Id, when: Annotated[DeleteOne, Query()], engine: Engine_, pool: Pool_
) -> DeleteReply:
    return await pool.run(engine.delete_memories, collection, [id], when.if_version)


# --- operations -------------------------------------------------------------------------------------------------------


@v1.get("/operations", tags=["operations"])
async def list_operations(engine: Engine_, pool: Pool_) -> OperationList:
    """The last hundred."""
    return await pool.run(engine.operations)


@v1.get("/operations/{id}", tags=["operations"])
async def get_operation(id: Annotated[str, Path(max_length=64)], engine: Engine_, pool: Pool_) -> Operation:
    return await pool.run(engine.operation, id)


@v1.delete("/operations/{id}", tags=["operations"])
async def cancel_operation(id: Annotated[str, Path(max_length=64)], engine: Engine_, pool: Pool_) -> Operation:
    """Cancel: what it has done so far is kept."""
    return await pool.run(engine.cancel, id)


@v1.post("/operations/{id}/retry", status_code=202, tags=["operations"])
async def retry_operation(id: Annotated[str, Path(max_length=64)], engine: Engine_, pool: Pool_) -> Operation:
    """Queue one again that failed, died or was cancelled: what it has done stays done."""
    return await pool.run(engine.retry, id)


# --- keys -------------------------------------------------------------------------------------------------------------


@v1.post("/keys", status_code=201, tags=["keys"], openapi_extra=_body(KeyRequest))
async def create_key(request: Request, engine: Engine_, pool: Pool_) -> NewKey:
    """Make an API key; it is in this reply and nowhere else. Once there is one, every request needs a key."""
    return await pool.run(engine.keys.create, await bodies.read(request, KeyRequest))


@v1.get("/keys", tags=["keys"])
async def list_keys(engine: Engine_, pool: Pool_) -> KeyList:
    """The keys that were made, revoked ones among them; never the keys themselves."""
    return await pool.run(engine.keys.listed)


@v1.delete("/keys/{id}", status_code=204, tags=["keys"])
async def revoke_key(id: Annotated[str, Path(max_length=64)], engine: Engine_, pool: Pool_) -> None:
    """Refuse a key from now on."""
    await pool.run(engine.keys.revoke, id)


# --- the server itself ------------------------------------------------------------------------------------------------

system = APIRouter(tags=["system"])


@system.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    return RedirectResponse("/docs")


@system.get("/livez")
async def livez() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@system.get("/readyz", responses={503: PROBLEM})
async def readyz(engine: Engine_, pool: Pool_) -> dict[str, str]:
    """Every collection is loaded, its encoders have run once, and storage answers; else the detail says how far it
    is.
    """
    await pool.run(engine.check_ready)
    return {"status": "ready"}


@system.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, "default": PROBLEM},
    dependencies=[Depends(_allowed)],
)
async def get_metrics(engine: Engine_) -> Response:
    """For Prometheus."""
    return Response(generate_latest(engine.resources.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _operation_id(route: APIRoute) -> str:
    """The operation's name in the table (`service.app.operations`): a route's function is called what it does."""
    return route.name


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that routes read by themselves among its schemas."""
    document = FastAPI.openapi(app)
    template = "#/components/schemas/{model}"
    models = (
        CollectionConfig, CountRequest, DeleteRequest, GetRequest, KeyRequest, MemoryInput, PatchRequest,
        ProblemDetails, RecallRequest, ReencodeRequest, RestoreRequest, ScheduleRequest, ScrollRequest, SizingRequest,
        StoreRequest, TrainRequest,
    )  # fmt: skip
    read = [(model, "validation") for model in models]
    _, definitions = models_json_schema(read, ref_template=template)  # type: ignore[arg-type]
    document["components"]["schemas"].update(definitions["$defs"])
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]  # the key is asked for where the server has one
    return document


def create_app(engine: Engine | None, pool: Pool | None = None, *, body_bytes_max: int | None = None) -> FastAPI:
    """The application over an engine (None only to generate the OpenAPI document), by default with its own pool."""
    app = FastAPI(title="Engram", version="1", description=DESCRIPTION, generate_unique_id_function=_operation_id)
    app.state.engine = engine
    app.state.pool = pool or Pool()
    app.state.transfers = Transfers()
    app.router.routes.append(Route(v1.prefix + RECALL, recall, methods=["POST"]))
    app.include_router(v1)
    app.include_router(system)
    problems.install(app)
    app.openapi = partial(_document, app)  # type: ignore[method-assign]

    app.add_middleware(Edge, engine=engine, body_bytes_max=body_bytes_max)
    return app
