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

from service.app.operations import OPERATIONS, STREAMS, Route
from service.errors import EngramError, ItemError, Unavailable, error_classes

Body = dict[str, Any]

WAIT_MARGIN_S = 10.0  # a server whose own wait ends answers 202: time for it to say so
WAIT_MAX_S = 600.0  # the server's own bound on a wait
MULTIPART_BYTES_MIN = 2**20  # pictures above this go as file parts: base64 makes them a third larger


class Transport(Protocol):
    def call(self, operation: str, path: Mapping[str, str], body: Body | None = None) -> Body:
        """Ask for an operation of the table; its reply, {} where there is none."""
        ...

    def content(self, collection: str, memory_id: str) -> bytes: ...
    def close(self) -> None: ...


class HttpTransport:
    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s + WAIT_MARGIN_S)
        except (httpx.InvalidURL, ValueError) as error:
            raise Unavailable(f"{url!r} is not an address: {error}") from None

    def call(self, operation: str, path: Mapping[str, str], body: Body | None = None) -> Body:
        asked = OPERATIONS[operation]
        response = self._send(asked, path, body)
        if asked.reply is None:
            return {}
        try:
            answer: Body = response.json()
        except ValueError:
            raise Unavailable(f"{response.url} answered {operation} with something other than JSON") from None
        return answer

    def content(self, collection: str, memory_id: str) -> bytes:
        return self._send(STREAMS["get_content"], {"collection": collection, "id": memory_id}).content

    def close(self) -> None:
        self._http.close()

    def _send(self, route: Route, path: Mapping[str, str], body: Body | None = None) -> httpx.Response:
        method, address = route.method, _address(route.path, path)
        sent: dict[str, Any] = {}
        if body is not None and method in ("GET", "DELETE"):
            sent = {"params": body}
        elif body is not None:
            fields, files = _parts(body)
            if sum(map(len, files.values())) > MULTIPART_BYTES_MIN:
                sent = {"data": {name: _field(value) for name, value in fields.items()}, "files": files}
            else:
                sent = {"content": _dump(body), "headers": {"Content-Type": "application/json"}}
        try:
            response = self._http.request(method, address, **sent)
        except httpx.ConnectError:
            raise Unavailable(f"no server answers at {self.url}; start one with: engram serve") from None
        except httpx.TimeoutException:
            raise Unavailable(
                f"{self.url} did not answer {method} {address} in {self._http.timeout.read:g} s"
            ) from None
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


def _address(template: str, path: Mapping[str, str]) -> str:
    """Each part is escaped whole: an id may hold slashes, or be `..`, and they are its own."""
    return template.format_map({name: quote(part, safe="").replace(".", "%2E") for name, part in path.items()})


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
