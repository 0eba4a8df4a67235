"""What every request passes first: its origin, its key, the size of its body, whether anything is there to answer it;
and what counts the answers.

One plain ASGI layer rather than several dependencies: it costs a request microseconds, not tenths of a millisecond.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import as_response
from service.app.engine import Engine
from service.errors import BodyTooLarge, CrossSite, EngramError, Unauthorized

GUARDED = ("/v1/", "/metrics")  # what needs the key, where one is set; the rest tells nothing about what is stored


class Edge:
    def __init__(self, app: ASGIApp, engine: Engine | None, api_key: str | None, body_bytes_max: int | None) -> None:
        self.app = app
        self.engine = engine
        self.metrics = None if engine is None else engine.resources.metrics
        self.bearer = None if api_key is None else b"Bearer " + api_key.encode()
        self.body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if self.body_bytes_max is not None and size > self.body_bytes_max:
                raise BodyTooLarge(f"the body has more than {self.body_bytes_max} bytes; send less at once")
            return message

        async def counted(message: Message) -> None:
            if self.metrics is not None and message["type"] == "http.response.start":
                self.metrics.answered(scope["method"], message["status"])
            await send(message)

        try:
            self._check(scope, headers)
        except EngramError as error:
            await as_response(error)(scope, receive, counted)
            return
        try:
            await self.app(scope, bounded, counted)
        except Exception:
            # The layer outside this one answers it with a 500.
            if self.metrics is not None:
                self.metrics.answered(scope["method"], 500)
            raise

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Raises `Unauthorized`, `CrossSite`, `BodyTooLarge`, and `Unavailable` while collections are loaded."""
        given = headers.get(b"authorization", b"")
        guarded = self.bearer is not None and scope["path"].startswith(GUARDED)
        if guarded and not hmac.compare_digest(given, self.bearer or b""):
            raise Unauthorized("send the header Authorization: Bearer <key>")
        # Without a key the server answers on loopback alone; another name for that address is a rebound one.
        if self.bearer is None and not _is_loopback(headers.get(b"host", b"").decode("latin-1")):
            raise CrossSite("without an API key the server answers to localhost and loopback addresses only")
        # A page of another site can make a visitor's browser post to a server on loopback, where no key is asked for.
        origin = headers.get(b"origin")
        foreign = origin is not None and origin.partition(b"://")[2] != headers.get(b"host")
        if foreign and scope["method"] not in ("GET", "HEAD"):
            raise CrossSite("this request comes from another site's page; send it without the header Origin")
        declared = headers.get(b"content-length", b"")
        if self.body_bytes_max is not None and declared.isdigit() and int(declared) > self.body_bytes_max:
            raise BodyTooLarge(f"the body has {int(declared)} bytes; send at most {self.body_bytes_max} at once")
        if self.engine is not None and scope["path"].startswith("/v1/"):
            self.engine.check_loaded()


def _is_loopback(host: str) -> bool:
    """Whether a Host header (`name[:port]`) names this machine's loopback. None at all is no browser's."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
