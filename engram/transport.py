"""How requests reach an engine: one small protocol, called or awaited, and both over HTTP.

Rules:
- Requests and replies are dictionaries of the API's shape (`service/app/schemas.py`); binary content in a request is
  `bytes`, in a reply base64 text or bytes.
- A refusal is the `EngramError` whose `code` the server sent; no httpx exception passes.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx
import orjson

from service.app.operations import OPERATIONS, STREAMS, Route
from service.errors import EngramError, InvalidRequest, ItemError, TimedOut, Unavailable, Unreachable, error_classes

Body = dict[str, Any]

GRPC = "grpc://"
DEFAULT_URL = "http://127.0.0.1:8000"
WAIT_MARGIN_S = 10.0  # a server whose own wait ends answers 202: time for it to say so
WAIT_MAX_S = 600.0  # the server's own bound on a wait
STREAM_BYTES = 2**20  # of an export, taken at once
PIECE_BYTES = 2**20  # of a snapshot, taken at once
MULTIPART_BYTES_MIN = 2**20  # pictures above this go as file parts: base64 makes them a third larger


class Transport(Protocol):
    def call(
        self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: float | None = None
    ) -> Body:
        """Ask for an operation of the table; its reply, {} where there is none. Raises `TimedOut` after `timeout_s`,
        and `Unreachable` where nobody answers.
        """
        ...

    def content(self, collection: str, memory_id: str, *, timeout_s: float | None = None) -> bytes: ...

    def import_rows(
        self, collection: str, media_type: str, rows: bytes, options: Body, *, timeout_s: float | None = None
    ) -> list[Body]:
        """Send rows of a media type; what is said of them, line by line, the last being `done`. `timeout_s` is between
        two lines.
        """
        ...

    def export(self, collection: str, options: Body, *, timeout_s: float | None = None) -> Generator[bytes, None, None]:
        """Rows, chunk by chunk. To be read to its end or closed."""
        ...

    def download(self, collection: str, snapshot_id: str, write: Callable[[bytes], object]) -> None:
        """A snapshot's file, piece by piece."""
        ...

    def upload(self, collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Body: ...
    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """As `Transport`, awaited."""

    async def call(
        self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: float | None = None
    ) -> Body: ...
    async def content(self, collection: str, memory_id: str, *, timeout_s: float | None = None) -> bytes: ...
    async def import_rows(
        self, collection: str, media_type: str, rows: bytes, options: Body, *, timeout_s: float | None = None
    ) -> list[Body]: ...
    def export(
        self, collection: str, options: Body, *, timeout_s: float | None = None
    ) -> AsyncGenerator[bytes, None]: ...

    async def download(self, collection: str, snapshot_id: str, write: Callable[[bytes], object]) -> None: ...
    async def upload(self, collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Body: ...
    async def close(self) -> None: ...


class HttpTransport:
    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        with _translated(self.url):
            self._http = httpx.Client(base_url=self.url, headers=_headers(api_key), timeout=WAIT_MAX_S)

    def call(
        self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: float | None = None
    ) -> Body:
        return _body(operation, self._send(OPERATIONS[operation], path, body, timeout_s))

    def content(self, collection: str, memory_id: str, *, timeout_s: float | None = None) -> bytes:
        path = {"collection": collection, "id": memory_id}
        return self._send(STREAMS["get_content"], path, None, timeout_s).content

    def import_rows(
        self, collection: str, media_type: str, rows: bytes, options: Body, *, timeout_s: float | None = None
    ) -> list[Body]:
        request = _rows_request(self._http, collection, media_type, rows, options, timeout_s)
        with _translated(self.url), closing(self._http.send(request, stream=True)) as response:
            if not response.is_success:
                response.read()
            return _events(_accepted(response).iter_lines())

    def export(self, collection: str, options: Body, *, timeout_s: float | None = None) -> Generator[bytes, None, None]:
        request = _request(self._http, STREAMS["export"], {"collection": collection}, options, timeout_s)
        with _translated(self.url), closing(self._http.send(request, stream=True)) as response:
            if not response.is_success:
                response.read()
            yield from _accepted(response).iter_bytes(STREAM_BYTES)

    def download(self, collection: str, snapshot_id: str, write: Callable[[bytes], object]) -> None:
        asked = _snapshot_request(self._http, "get_snapshot_content", collection, snapshot_id)
        with _translated(self.url):
            response = self._http.send(asked, stream=True)
            try:
                if not response.is_success:
                    response.read()
                _accepted(response)
                for piece in response.iter_bytes(PIECE_BYTES):
                    write(piece)
            finally:
                response.close()

    def upload(self, collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Body:
        asked = _snapshot_request(self._http, "put_snapshot_content", collection, snapshot_id, pieces)
        with _translated(self.url):
            kept: Body = _accepted(self._http.send(asked)).json()
        return kept

    def close(self) -> None:
        self._http.close()

    def _send(
        self, route: Route, path: Mapping[str, str], body: Body | None, timeout_s: float | None
    ) -> httpx.Response:
        with _translated(self.url):
            return _accepted(self._http.send(_request(self._http, route, path, body, timeout_s)))


class AsyncHttpTransport:
    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        with _translated(self.url):
            self._http = httpx.AsyncClient(base_url=self.url, headers=_headers(api_key), timeout=WAIT_MAX_S)

    async def call(
        self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: float | None = None
    ) -> Body:
        return _body(operation, await self._send(OPERATIONS[operation], path, body, timeout_s))

    async def content(self, collection: str, memory_id: str, *, timeout_s: float | None = None) -> bytes:
        path = {"collection": collection, "id": memory_id}
        return (await self._send(STREAMS["get_content"], path, None, timeout_s)).content

    async def import_rows(
        self, collection: str, media_type: str, rows: bytes, options: Body, *, timeout_s: float | None = None
    ) -> list[Body]:
        request = _rows_request(self._http, collection, media_type, rows, options, timeout_s)
        with _translated(self.url):
            response = await self._http.send(request, stream=True)
            async with aclosing(response):
                if not response.is_success:
                    await response.aread()
                return _events([line async for line in _accepted(response).aiter_lines()])

    async def export(
        self, collection: str, options: Body, *, timeout_s: float | None = None
    ) -> AsyncGenerator[bytes, None]:
        request = _request(self._http, STREAMS["export"], {"collection": collection}, options, timeout_s)
        with _translated(self.url):
            response = await self._http.send(request, stream=True)
            async with aclosing(response):
                if not response.is_success:
                    await response.aread()
                async for chunk in _accepted(response).aiter_bytes(STREAM_BYTES):
                    yield chunk

    async def download(self, collection: str, snapshot_id: str, write: Callable[[bytes], object]) -> None:
        asked = _snapshot_request(self._http, "get_snapshot_content", collection, snapshot_id)
        with _translated(self.url):
            response = await self._http.send(asked, stream=True)
            try:
                if not response.is_success:
                    await response.aread()
                _accepted(response)
                async for piece in response.aiter_bytes(PIECE_BYTES):
                    await asyncio.to_thread(write, piece)
            finally:
                await response.aclose()

    async def upload(self, collection: str, snapshot_id: str, pieces: Iterator[bytes]) -> Body:
        async def read() -> AsyncIterator[bytes]:
            while piece := await asyncio.to_thread(next, pieces, b""):
                yield piece

        asked = _snapshot_request(self._http, "put_snapshot_content", collection, snapshot_id, read())
        with _translated(self.url):
            kept: Body = _accepted(await self._http.send(asked)).json()
        return kept

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(
        self, route: Route, path: Mapping[str, str], body: Body | None, timeout_s: float | None
    ) -> httpx.Response:
        with _translated(self.url):
            return _accepted(await self._http.send(_request(self._http, route, path, body, timeout_s)))


def open_transport(url: str | None, path: str | Path | None, api_key: str | None) -> Transport:
    """Raises `InvalidRequest` where both a server and a folder are named, and `FolderInUse`."""
    if _is_folder(url, path, api_key):
        from engram.local import LocalTransport  # brings torch, which a client of a server does without

        return LocalTransport(Path(path or ""))
    if url is not None and url.startswith(GRPC):
        from engram.rpc import GrpcTransport

        return GrpcTransport(url, api_key)
    return HttpTransport(url or DEFAULT_URL, api_key)


def open_async_transport(url: str | None, path: str | Path | None, api_key: str | None) -> AsyncTransport:
    """As `open_transport`; a folder is opened when it is first asked for anything."""
    if _is_folder(url, path, api_key):
        from engram.local import AsyncLocalTransport

        return AsyncLocalTransport(Path(path or ""))
    if url is not None and url.startswith(GRPC):
        from engram.rpc import AsyncGrpcTransport

        return AsyncGrpcTransport(url, api_key)
    return AsyncHttpTransport(url or DEFAULT_URL, api_key)


def _is_folder(url: str | None, path: str | Path | None, api_key: str | None) -> bool:
    if path is not None and (url is not None or api_key is not None):
        raise InvalidRequest(
            "path opens a folder in this process; url and api_key belong to a server: give one or the other"
        )
    return path is not None


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _request(
    http: httpx.Client | httpx.AsyncClient,
    route: Route,
    path: Mapping[str, str],
    body: Body | None,
    timeout_s: float | None,
) -> httpx.Request:
    sent: dict[str, Any] = {}
    if body is not None and route.method in ("GET", "DELETE"):
        sent = {"params": body}
    elif body is not None:
        fields, files = _parts(body)
        if sum(map(len, files.values())) > MULTIPART_BYTES_MIN:
            sent = {"data": {name: _field(value) for name, value in fields.items()}, "files": files}
        else:
            sent = {"content": _dump(body), "headers": {"Content-Type": "application/json"}}
    if timeout_s is not None:
        sent["timeout"] = timeout_s
    return http.build_request(route.method, _address(route.path, path), **sent)


def _rows_request(
    http: httpx.Client | httpx.AsyncClient,
    collection: str,
    media_type: str,
    rows: bytes,
    options: Body,
    timeout_s: float | None,
) -> httpx.Request:
    route = STREAMS["import_rows"]
    sent: dict[str, Any] = {} if timeout_s is None else {"timeout": timeout_s}
    return http.build_request(
        route.method, _address(route.path, {"collection": collection}), params=options, content=rows,
        headers={"Content-Type": media_type}, **sent,
    )  # fmt: skip


def _events(lines: Iterable[str]) -> list[Body]:
    return imported([orjson.loads(line) for line in lines])


def imported(events: list[Body]) -> list[Body]:
    """The events of an import that came to its end. Raises why one did not."""
    last = events[-1] if events else {"event": "none"}
    if last["event"] == "failed":
        raise error_classes().get(last["code"], EngramError)(last["detail"])
    if last["event"] != "done":
        raise Unreachable("the answer ended before it said what became of the rows")
    return events


def _snapshot_request(
    http: httpx.Client | httpx.AsyncClient,
    operation: str,
    collection: str,
    snapshot_id: str,
    content: Iterator[bytes] | AsyncIterator[bytes] | None = None,
) -> httpx.Request:
    """Without a bound on the whole: a file may be of any size, and a server reads all of it before it answers."""
    route = STREAMS[operation]
    address = _address(route.path, {"collection": collection, "snapshot": snapshot_id})
    return http.build_request(route.method, address, content=content, timeout=httpx.Timeout(WAIT_MAX_S, read=None))


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """httpx's errors as ours."""
    try:
        yield
    except httpx.ConnectError:
        raise Unreachable(f"no server answers at {url}; start one with: engram serve") from None
    except httpx.TimeoutException as error:
        asked = error.request
        waited_s = asked.extensions["timeout"]["read"]
        raise TimedOut(f"{url} did not answer {asked.method} {asked.url.path} in {waited_s:g} s") from None
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise Unreachable(f"the connection to {url} broke: {error}") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise no_server(f"{url!r} is not an address: {error}") from None


def _accepted(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    raise error_of(response)


def _body(operation: str, response: httpx.Response) -> Body:
    if OPERATIONS[operation].reply is None:
        return {}
    try:
        answer: Body = response.json()
    except ValueError:
        raise no_server(f"{response.url} answered {operation} with something other than JSON") from None
    return answer


def no_server(detail: str, status: int = 502) -> Unavailable:
    """Whatever is there does not answer as a server of ours: to ask again would not help."""
    error = Unavailable(detail)
    error.status = status
    return error


def error_of(response: httpx.Response) -> EngramError:
    """The error that a refusal's problem+json names; a code unknown here keeps its words under `EngramError`."""
    retry = response.headers.get("Retry-After", "")
    retry_after_s = int(retry) if retry.isdigit() else None
    error: EngramError
    try:
        problem: Mapping[str, Any] = response.json()
        code, detail = str(problem["code"]), str(problem["detail"])
        items = tuple(ItemError(int(e["item"]), str(e["code"]), str(e["detail"])) for e in problem.get("errors") or ())
    except (ValueError, KeyError, TypeError, AttributeError):
        said = f"{response.url} answered {response.status_code} {response.reason_phrase}"
        # A load balancer's, whose server went away in the middle: as if our own connection to it had broken.
        is_lost = response.status_code == httpx.codes.BAD_GATEWAY
        error = Unreachable(said) if is_lost else no_server(said, response.status_code)
        error.retry_after_s = retry_after_s
        return error
    known = error_classes().get(code)
    if known is not None:
        return known(detail, errors=items, retry_after_s=retry_after_s)
    error = EngramError(detail, errors=items, retry_after_s=retry_after_s)
    error.status, error.code, error.title = response.status_code, code, str(problem.get("title", EngramError.title))
    return error


def _address(template: str, path: Mapping[str, str]) -> str:
    """Each part is escaped whole: an id may hold slashes, or be `..`, and they are its own."""
    return template.format_map({name: quote(part, safe="").replace(".", "%2E") for name, part in path.items()})


def _parts(body: Body) -> tuple[Body, dict[str, bytes]]:
    """A store's or a single recall's body as a form: its fields, and the pictures, which become file parts."""
    files: dict[str, bytes] = {}
    if isinstance(body.get("memories"), list):
        memories = []
        for position, memory in enumerate(body["memories"]):
            if "image" in memory:
                files[f"image{position}"] = memory["image"]["base64"]
                memory = {**memory, "image": {"part": f"image{position}"}}
            memories.append(memory)
        return {**body, "memories": memories}, files
    cue = dict(body.get("cue", {}))
    files = {name: cue.pop(name)["base64"] for name in ("image", "mask") if name in cue}
    return {**{name: value for name, value in body.items() if name != "cue"}, **cue}, files


def _field(value: object) -> str | bytes:
    return value if isinstance(value, str) else _dump(value)


def _dump(value: object) -> bytes:
    return orjson.dumps(value, default=_binary, option=orjson.OPT_SERIALIZE_NUMPY)


def _binary(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
