"""How requests reach an engine: the one small protocol, and the one over HTTP.

Rules:
- Requests and replies are dictionaries of the API's shape (`service/app/schemas.py`); binary content in a request is
  `bytes`, in a reply base64 text or bytes.
- A refusal is the `EngramError` whose `code` the server sent; no httpx exception passes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote

import httpx
import orjson

from service.errors import EngramError, ItemError, Unavailable, error_classes

Body = dict[str, Any]

WAIT_MARGIN_S = 10.0  # a server whose own wait ends answers 202: time for it to say so
WAIT_MAX_S = 600.0  # the server's own bound on a wait
MULTIPART_BYTES_MIN = 2**20  # pictures above this go as file parts: base64 makes them a third larger


class Transport(Protocol):
    def create_collection(self, name: str, config: Body) -> Body: ...
    def get_collection(self, name: str) -> Body: ...
    def get_diagnostics(self, name: str) -> Body: ...
    def list_collections(self) -> list[Body]: ...
    def list_encoders(self) -> list[Body]: ...
    def delete_collection(self, name: str) -> None: ...
    def store(self, name: str, request: Body) -> Body: ...
    def recall(self, name: str, request: Body) -> Body: ...
    def train(self, name: str, request: Body) -> Body: ...
    def reencode(self, name: str, space: str, request: Body) -> Body: ...
    def list_kernels(self, name: str) -> Body: ...
    def retire_kernel(self, name: str, kernel_id: str) -> None: ...
    def get_memory(self, name: str, memory_id: str) -> Body: ...
    def get_content(self, name: str, memory_id: str) -> bytes: ...
    def get_memories(self, name: str, request: Body) -> Body: ...
    def scroll(self, name: str, request: Body) -> Body: ...
    def delete_memories(self, name: str, request: Body) -> Body: ...
    def count(self, name: str, request: Body) -> Body: ...
    def get_operation(self, operation_id: str) -> Body: ...
    def cancel_operation(self, operation_id: str) -> Body: ...
    def close(self) -> None: ...


class HttpTransport:
    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s + WAIT_MARGIN_S)
        except (httpx.InvalidURL, ValueError) as error:
            raise Unavailable(f"{url!r} is not an address: {error}") from None

    def create_collection(self, name: str, config: Body) -> Body:
        return self._json("PUT", _path("collections", name), config)

    def get_collection(self, name: str) -> Body:
        return self._json("GET", _path("collections", name))

    def get_diagnostics(self, name: str) -> Body:
        return self._json("GET", _path("collections", name, "diagnostics"))

    def list_collections(self) -> list[Body]:
        collections: list[Body] = self._json("GET", _path("collections"))["collections"]
        return collections

    def list_encoders(self) -> list[Body]:
        encoders: list[Body] = self._json("GET", _path("encoders"))["encoders"]
        return encoders

    def delete_collection(self, name: str) -> None:
        self._send("DELETE", _path("collections", name))

    def store(self, name: str, request: Body) -> Body:
        return self._json("POST", _path("collections", name, "store"), request)

    def recall(self, name: str, request: Body) -> Body:
        return self._json("POST", _path("collections", name, "recall"), request)

    def train(self, name: str, request: Body) -> Body:
        return self._json("POST", _path("collections", name, "train"), request)

    def reencode(self, name: str, space: str, request: Body) -> Body:
        return self._json("POST", _path("collections", name, "spaces", space, "reencode"), request)

    def list_kernels(self, name: str) -> Body:
        return self._json("GET", _path("collections", name, "kernels"))

    def retire_kernel(self, name: str, kernel_id: str) -> None:
        self._send("DELETE", _path("collections", name, "kernels", kernel_id))

    def get_memory(self, name: str, memory_id: str) -> Body:
        return self._json("GET", _path("collections", name, "memories", memory_id))

    def get_content(self, name: str, memory_id: str) -> bytes:
        return self._send("GET", _path("collections", name, "memories", memory_id, "content")).content

    def get_memories(self, name: str, request: Body) -> Body:
        return self._json("POST", _path("collections", name, "memories", "get"), request)

    def scroll(self, name: str, request: Body) -> Body:
        return self._json("POST", _path("collections", name, "memories", "scroll"), request)

    def delete_memories(self, name: str, request: Body) -> Body:
        return self._json("POST", _path("collections", name, "memories", "delete"), request)

    def count(self, name: str, request: Body) -> Body:
        return self._json("POST", _path("collections", name, "memories", "count"), request)

    def cancel_operation(self, operation_id: str) -> Body:
        return self._json("DELETE", _path("operations", operation_id))

    def get_operation(self, operation_id: str) -> Body:
        return self._json("GET", _path("operations", operation_id))

    def close(self) -> None:
        self._http.close()

    def _json(self, method: str, path: str, body: Body | None = None) -> Body:
        response = self._send(method, path, body)
        try:
            answer: Body = response.json()
        except ValueError:
            raise Unavailable(f"{self.url} answered {method} {path} with something other than JSON") from None
        return answer

    def _send(self, method: str, path: str, body: Body | None = None) -> httpx.Response:
        sent: dict[str, Any] = {}
        if body is not None:
            fields, files = _parts(body)
            if sum(map(len, files.values())) > MULTIPART_BYTES_MIN:
                sent = {"data": {name: _field(value) for name, value in fields.items()}, "files": files}
            else:
                sent = {"content": _dump(body), "headers": {"Content-Type": "application/json"}}
        try:
            response = self._http.request(method, path, **sent)
        except httpx.ConnectError:
            raise Unavailable(f"no server answers at {self.url}; start one with: engram serve") from None
        except httpx.TimeoutException:
            raise Unavailable(f"{self.url} did not answer {method} {path} in {self._http.timeout.read:g} s") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"the connection to {self.url} broke: {error}") from None
        if response.is_success:
            return response
        raise error_of(response)


def error_of(response: httpx.Response) -> EngramError:
    """The error that a refusal's problem+json names; a code unknown here keeps its words under `EngramError`."""
    try:
        problem: Mapping[str, Any] = response.json()
        code, detail = str(problem["code"]), str(problem["detail"])
        items = tuple(ItemError(int(e["item"]), str(e["code"]), str(e["detail"])) for e in problem.get("errors") or ())
    except (ValueError, KeyError, TypeError, AttributeError):
        return Unavailable(f"{response.url} answered {response.status_code} {response.reason_phrase}")
    retry = response.headers.get("Retry-After", "")
    retry_after_s = int(retry) if retry.isdigit() else None
    known = error_classes().get(code)
    if known is not None:
        return known(detail, errors=items, retry_after_s=retry_after_s)
    error = EngramError(detail, errors=items, retry_after_s=retry_after_s)
    error.status, error.code, error.title = response.status_code, code, str(problem.get("title", EngramError.title))
    return error


def _path(*parts: str) -> str:
    """`/v1/...`, each part escaped whole: an id may hold slashes, or be `..`, and they are its own."""
    return "/v1/" + "/".join(quote(part, safe="").replace(".", "%2E") for part in parts)


def _parts(body: Body) -> tuple[Body, dict[str, bytes]]:
    """A store's or a single recall's body as a form: its fields, and the pictures, which become file parts."""
    files: dict[str, bytes] = {}
    if "memories" in body:
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
