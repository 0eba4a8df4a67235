"""What every request passes first: its origin, its key and what that may ask, the size of its body, whether anything is
there to answer it; and what counts the answers. What a key may do is asked at the route (`app.py`), which knows what
the request is.

One plain ASGI layer rather than several dependencies: it costs a request microseconds, not tenths of a millisecond.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import as_response
from service.app.access import CALLER
from service.app.engine import Engine
from service.errors import BodyTooLarge, CrossSite, EngramError

GUARDED = ("/v1/", "/metrics")  # what needs a key, where there is any; the rest tells nothing about what is stored
# Bodies that are never held; they have bounds of their own.
STREAMED = re.compile(r"/v1/collections/[^/]+/(import|snapshots/[^/]+/content)")


class Edge:
    def __init__(self, app: ASGIApp, engine: Engine | None, body_bytes_max: int | None) -> None:
        self.app = app
        self.engine = engine
        self.metrics = None if engine is None else engine.resources.metrics
        self.body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        bytes_max = None if STREAMED.fullmatch(scope["path"]) else self.body_bytes_max
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if bytes_max is not None and size > bytes_max:
                raise BodyTooLarge(f"the body has more than {bytes_max} bytes; send less at once")
            return message

        async def counted(message: Message) -> None:
            if self.metrics is not None and message["type"] == "http.response.start":
                self.metrics.answered(scope["method"], message["status"])
            await send(message)

        try:
            admitted = self._admit(scope, headers, bytes_max)
        except EngramError as error:
            await as_response(error)(scope, receive, counted)
            return
        with admitted:
            try:
                await self._answer(scope, bounded, counted)
            except Exception:
                # The layer outside this one answers it with a 500.
                if self.metrics is not None:
                    self.metrics.answered(scope["method"], 500)
                raise
            finally:
                if self.metrics is not None and size:
                    self.metrics.used(CALLER.get().name, bytes_in=size)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.engine is not None and scope["path"].startswith("/v1/"):
            try:
                self.engine.check_loaded()
            except EngramError as error:
                await as_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _admit(
        self, scope: Scope, headers: Mapping[bytes, bytes], bytes_max: int | None
    ) -> AbstractContextManager[object]:
        """Raises `CrossSite`, `Unauthorized`, `RateLimited`, `BodyTooLarge`."""
        if self.engine is None:
            return nullcontext()
        # Without keys the server answers on loopback alone; another name for that address is a rebound one.
        if not self.engine.keys.required and not _is_loopback(headers.get(b"host", b"").decode("latin-1")):
            raise CrossSite("without an API key the server answers to localhost and loopback addresses only")
        # A page of another site can make a visitor's browser post to a server on loopback, where no key is asked for.
        origin = headers.get(b"origin")
        foreign = origin is not None and origin.partition(b"://")[2] != headers.get(b"host")
        if foreign and scope["method"] not in ("GET", "HEAD"):
            raise CrossSite("this request comes from another site's page; send it without the header Origin")
        declared = headers.get(b"content-length", b"")
        if bytes_max is not None and declared.isdigit() and int(declared) > bytes_max:
            raise BodyTooLarge(f"the body has {int(declared)} bytes; send at most {bytes_max} at once")
        if not scope["path"].startswith(GUARDED):
            return nullcontext()
        client = scope.get("client")
        return self.engine.admission.admit(headers.get(b"authorization", b""), client[0] if client else "")


def _is_loopback(host: str) -> bool:
    """Whether a Host header (`name[:port]`) names this machine's loopback. None at all is no browser's."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
