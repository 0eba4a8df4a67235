"""How requests reach an engine over gRPC: the client's protocol on a channel.

Rules:
- Requests and replies are the same dictionaries as over HTTP; vectors travel packed.
- A refusal is the `EngramError` that the trailing metadata names; no exception of grpc's passes.
- A request that no message can hold is refused here, in the words of the API; in a store, that memory alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import orjson

from engram.transport import GRPC, WAIT_MAX_S, Body, imported, no_server
from service.app.transfer_schemas import MEDIA_TYPES
from service.errors import BodyTooLarge, EngramError, InvalidRequest, TimedOut, Unreachable
from service.rpc.convert import to_dict, to_message
from service.rpc.messages import Stub, message
from service.rpc.methods import NULLS, rpc_name
from service.rpc.problems import error_in

OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # 4 MiB otherwise; the server bounds what it gives
    ("grpc.max_send_message_length", -1),  # the server's bound is the one that counts
]

PART_BYTES = 2**20  # of rows, in one message

Refused = dict[int, Body]
"""By position in a store: the answer to a memory that was not sent."""


class GrpcTransport:
    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self._metadata = _metadata(api_key)
        self._channel = grpc.insecure_channel(_target(url), options=OPTIONS)
        self._stub = Stub(self._channel)

    def call(
        self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: float | None = None
    ) -> Body:
        request, refused = _packed(operation, path, body or {})
        if request is None:  # nothing is left to send; whether the collection is there is still to be said
            self._ask("get_collection", to_message("GetCollectionRequest", path), timeout_s)
            return _unpacked(None, refused)
        return _unpacked(self._ask(operation, request, timeout_s), refused)

    def content(self, collection: str, memory_id: str, *, timeout_s: float | None = None) -> bytes:
        request = to_message("GetContentRequest", {"collection": collection, "id": memory_id})
        data: bytes = self._ask("get_content", request, timeout_s).data
        return data

    def import_rows(
        self, collection: str, media_type: str, rows: bytes, options: Body, *, timeout_s: float | None = None
    ) -> list[Body]:
        with _translated(self.url, "import_rows", timeout_s):
            asked = iter(_parts(collection, media_type, rows, options))
            replies = self._stub.ImportRows(asked, metadata=self._metadata)
            return imported([to_dict(reply, asked=False) for reply in replies])

    def export(self, collection: str, options: Body, *, timeout_s: float | None = None) -> Generator[bytes, None, None]:
        with _translated(self.url, "export", timeout_s):
            replies = self._stub.Export(_exported(collection, options), metadata=self._metadata)
            try:
                for reply in replies:
                    yield reply.rows
            finally:
                replies.cancel()

    def download(self, collection: str, snapshot_id: str, write: Callable[[bytes], object]) -> None:
        with _translated(self.url, "get_snapshot_content", None):
            asked = to_message("GetSnapshotContentRequest", {"collection": collection, "snapshot": snapshot_id})
            replies = self._stub.GetSnapshotContent(asked, metadata=self._metadata)
            try:
                for reply in replies:
                    write(reply.data)
            finally:
                replies.cancel()

    def upload(self, collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Body:
        with _translated(self.url, "put_snapshot_content", None):
            messages = _snapshot_messages(collection, snapshot_id, pieces)
            return to_dict(self._stub.PutSnapshotContent(messages, metadata=self._metadata), asked=False)

    def close(self) -> None:
        self._channel.close()

    def _ask(self, operation: str, request: Any, timeout_s: float | None) -> Any:
        call = getattr(self._stub, rpc_name(operation))
        with _translated(self.url, operation, timeout_s):
            return call(request, timeout=timeout_s or WAIT_MAX_S, metadata=self._metadata)


class AsyncGrpcTransport:
    """Its channel is opened when it is first asked for anything: it belongs to the event loop that asks."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self._target = _target(url)
        self._metadata = _metadata(api_key)
        self._channel: Any = None
        self._stub: Stub | None = None

    async def call(
        self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: float | None = None
    ) -> Body:
        request, refused = _packed(operation, path, body or {})
        if request is None:
            await self._ask("get_collection", to_message("GetCollectionRequest", path), timeout_s)
            return _unpacked(None, refused)
        return _unpacked(await self._ask(operation, request, timeout_s), refused)

    async def content(self, collection: str, memory_id: str, *, timeout_s: float | None = None) -> bytes:
        request = to_message("GetContentRequest", {"collection": collection, "id": memory_id})
        data: bytes = (await self._ask("get_content", request, timeout_s)).data
        return data

    async def import_rows(
        self, collection: str, media_type: str, rows: bytes, options: Body, *, timeout_s: float | None = None
    ) -> list[Body]:
        with _translated(self.url, "import_rows", timeout_s):
            asked = _parts(collection, media_type, rows, options)
            replies = self._opened().ImportRows(iter(asked), metadata=self._metadata)
            return imported([to_dict(reply, asked=False) async for reply in replies])

    async def export(
        self, collection: str, options: Body, *, timeout_s: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        with _translated(self.url, "export", timeout_s):
            replies = self._opened().Export(_exported(collection, options), metadata=self._metadata)
            try:
                async for reply in replies:
                    yield reply.rows
            finally:
                replies.cancel()

    async def download(self, collection: str, snapshot_id: str, write: Callable[[bytes], object]) -> None:
        with _translated(self.url, "get_snapshot_content", None):
            asked = to_message("GetSnapshotContentRequest", {"collection": collection, "snapshot": snapshot_id})
            replies = self._opened().GetSnapshotContent(asked, metadata=self._metadata)
            try:
                async for reply in replies:
                    await asyncio.to_thread(write, reply.data)
            finally:
                replies.cancel()

    async def upload(self, collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Body:
        async def messages() -> AsyncIterator[Any]:
            sent = _snapshot_messages(collection, snapshot_id, pieces)
            while (part := await asyncio.to_thread(next, sent, None)) is not None:
                yield part

        with _translated(self.url, "put_snapshot_content", None):
            reply = await self._opened().PutSnapshotContent(messages(), metadata=self._metadata)
            return to_dict(reply, asked=False)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def _ask(self, operation: str, request: Any, timeout_s: float | None) -> Any:
        call = getattr(self._opened(), rpc_name(operation))
        with _translated(self.url, operation, timeout_s):
            return await call(request, timeout=timeout_s or WAIT_MAX_S, metadata=self._metadata)

    def _opened(self) -> Stub:
        if self._stub is None:
            self._channel = grpc.aio.insecure_channel(self._target, options=OPTIONS)
            self._stub = Stub(self._channel)
        return self._stub


def _parts(collection: str, media_type: str, rows: bytes, options: Body) -> list[Any]:
    """The messages of an import; refused before any is sent where the options are none."""
    form = next((form for form, kind in MEDIA_TYPES.items() if kind == media_type), media_type)
    first = to_message("ImportRowsRequest", {**options, "collection": collection, "format": form})
    parts = [rows[start : start + PART_BYTES] for start in range(0, len(rows), PART_BYTES)]
    return [first, *(to_message("ImportRowsRequest", {"rows": part}) for part in parts)]


def _exported(collection: str, options: Body) -> Any:
    chosen = {**options, "filter": orjson.loads(options["filter"])} if "filter" in options else options
    return to_message("ExportRequest", {**chosen, "collection": collection})


def _snapshot_messages(collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Iterator[Any]:
    yield to_message("PutSnapshotContentRequest", {"collection": collection, "snapshot": snapshot_id})
    for piece in pieces:
        yield to_message("PutSnapshotContentRequest", {"data": piece})


def _target(url: str) -> str:
    """Where the channel goes. Raises `Unavailable` for what is no address."""
    address = url.removeprefix(GRPC).rstrip("/")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise no_server(f"{url!r} is not an address: one is like grpc://127.0.0.1:8001")
    return address


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _packed(operation: str, path: Mapping[str, str], body: Body) -> tuple[Any, Refused]:
    """The request, and the memories of a store that it could not hold; None where it would hold no other."""
    name = f"{rpc_name(operation)}Request"
    if operation != "store" or not isinstance(body.get("memories"), list):
        nulls = [field for field, value in body.items() if value is None]
        if nulls and NULLS in message(name).DESCRIPTOR.fields_by_name:
            body = {**body, NULLS: nulls}
        return to_message(name, {**body, **path}), {}
    refused: Refused = {}
    memories = []
    for position, memory in enumerate(body["memories"]):
        try:
            memories.append(to_message("MemoryInput", memory))
        except InvalidRequest as error:
            memory_id = memory.get("id") if isinstance(memory, Mapping) else None
            problem = {"code": error.code, "detail": error.detail}
            known = memory_id if isinstance(memory_id, str) else None
            refused[position] = {"id": known, "status": "error", "warnings": [], "error": problem}
    if refused and not memories:
        return None, refused
    request = to_message(name, {**{key: value for key, value in body.items() if key != "memories"}, **path})
    request.memories.extend(memories)
    return request, refused


def _unpacked(reply: Any, refused: Refused) -> Body:
    body = {"version": None, "results": [], "operation_id": None} if reply is None else to_dict(reply, asked=False)
    for position in sorted(refused):
        body["results"].insert(position, refused[position])
    return body


@contextmanager
def _translated(url: str, operation: str, timeout_s: float | None) -> Iterator[None]:
    """grpc's errors as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise _error(error, url, operation, timeout_s) from None
    except (ValueError, grpc.aio.UsageError):
        raise no_server(f"the client of {url} is closed") from None


def _error(error: Any, url: str, operation: str, timeout_s: float | None) -> EngramError:
    """The error that a refused call's metadata names; gRPC's own refusals in the words of the API."""
    told = error_in(error.trailing_metadata() or ())
    if told is not None:
        return told
    code, detail = error.code(), str(error.details())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut(f"{url} did not answer {operation} in {timeout_s or WAIT_MAX_S:g} s")
    if code is grpc.StatusCode.UNAVAILABLE:
        refused = "failed to connect" in detail
        said = "no server answers at {}; start one with: engram serve" if refused else "the connection to {} broke: {}"
        return Unreachable(said.format(url, detail))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in detail:
        return BodyTooLarge(f"the server takes no message of this size: {detail}")
    return no_server(f"{url} answered {operation} with {code.name}: {detail}")
