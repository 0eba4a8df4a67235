"""The engine in this process, behind the client's protocol: no server, no JSON, the same requests and replies.

The only module of the client that imports the engine, and torch with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import structlog
from pydantic import BaseModel

from engram.transport import Body
from service import settings
from service.api.bodies import validate
from service.app.engine import Engine
from service.app.operations import OPERATIONS
from service.observability import configure_logging
from workers.loop import running

HERE = "ENGRAM_ENCODER_DEVICE"  # of the server's settings the one that means something where nobody listens


class LocalTransport:
    def __init__(self, path: Path) -> None:
        if not structlog.is_configured():  # else the program around the engine has its own way
            configure_logging(logging.WARNING)
        with ExitStack() as opened:  # whatever was opened is closed again if the next thing fails
            self._engine = opened.enter_context(Engine(settings.load(_environment(), data=path)))
            opened.enter_context(running(self._engine))
            self._opened = opened.pop_all()

    def call(self, operation: str, path: Mapping[str, str], body: Body | None = None) -> Body:
        asked = OPERATIONS[operation]
        request = None if asked.request is None else validate(asked.request, body or {})
        reply = asked.call(self._engine, path, request)
        if isinstance(reply, BaseModel):
            return reply.model_dump()
        return {} if reply is None else dict(reply)

    def content(self, collection: str, memory_id: str) -> bytes:
        return self._engine.content(collection, memory_id)[0]

    def close(self) -> None:
        self._opened.close()


def _environment() -> dict[str, str]:
    return {HERE: os.environ[HERE]} if HERE in os.environ else {}
