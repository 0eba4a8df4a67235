"""The engine in this process, behind the client's protocol: no server, no JSON, the same requests and replies.

The only module of the client that imports the engine, and torch with it.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path

import structlog
from pydantic import BaseModel, TypeAdapter, ValidationError

from engram.transport import Body
from service import settings
from service.api.bodies import validate
from service.app.engine import Engine
from service.app.fields import Name, faults
from service.app.memory_schemas import CountRequest, DeleteRequest, GetRequest, ScrollRequest
from service.app.reencode_schemas import ReencodeRequest
from service.app.schemas import CollectionConfig, RecallRequest, StoreRequest, TrainRequest
from service.errors import InvalidRequest
from service.observability import configure_logging
from workers.loop import running

HERE = "ENGRAM_ENCODER_DEVICE"  # of the server's settings the one that means something where nobody listens

_name: TypeAdapter[str] = TypeAdapter(Name)


class LocalTransport:
    def __init__(self, path: Path) -> None:
        if not structlog.is_configured():  # else the program around the engine has its own way
            configure_logging(logging.WARNING)
        with ExitStack() as opened:  # whatever was opened is closed again if the next thing fails
            self._engine = opened.enter_context(Engine(settings.load(_environment(), data=path)))
            opened.enter_context(running(self._engine))
            self._opened = opened.pop_all()

    def create_collection(self, name: str, config: Body) -> Body:
        try:
            _name.validate_python(name)
        except ValidationError as error:
            raise InvalidRequest(f"{name}: {faults(error)}") from None
        return _body(self._engine.create_collection(name, validate(CollectionConfig, config)))

    def get_collection(self, name: str) -> Body:
        return _body(self._engine.collection(name))

    def get_diagnostics(self, name: str) -> Body:
        return _body(self._engine.diagnostics(name))

    def list_collections(self) -> list[Body]:
        return [_body(info) for info in self._engine.collections().collections]

    def list_encoders(self) -> list[Body]:
        return [_body(card) for card in self._engine.encoders().encoders]

    def delete_collection(self, name: str) -> None:
        self._engine.delete_collection(name)

    def store(self, name: str, request: Body) -> Body:
        return _body(self._engine.store(name, validate(StoreRequest, request)))

    def recall(self, name: str, request: Body) -> Body:
        return dict(self._engine.recall(name, validate(RecallRequest, request)))

    def train(self, name: str, request: Body) -> Body:
        return _body(self._engine.train(name, validate(TrainRequest, request)))

    def reencode(self, name: str, space: str, request: Body) -> Body:
        return _body(self._engine.reencode(name, space, validate(ReencodeRequest, request)))

    def list_kernels(self, name: str) -> Body:
        return _body(self._engine.kernels(name))

    def retire_kernel(self, name: str, kernel_id: str) -> None:
        self._engine.retire_kernel(name, kernel_id)

    def get_memory(self, name: str, memory_id: str) -> Body:
        return _body(self._engine.memory(name, memory_id))

    def get_content(self, name: str, memory_id: str) -> bytes:
        return self._engine.content(name, memory_id)[0]

    def get_memories(self, name: str, request: Body) -> Body:
        return _body(self._engine.memories(name, validate(GetRequest, request)))

    def scroll(self, name: str, request: Body) -> Body:
        return _body(self._engine.scroll(name, validate(ScrollRequest, request)))

    def delete_memories(self, name: str, request: Body) -> Body:
        return _body(self._engine.delete(name, validate(DeleteRequest, request)))

    def count(self, name: str, request: Body) -> Body:
        return _body(self._engine.count(name, validate(CountRequest, request)))

    def cancel_operation(self, operation_id: str) -> Body:
        return _body(self._engine.cancel(operation_id))

    def get_operation(self, operation_id: str) -> Body:
        return _body(self._engine.operation(operation_id))

    def close(self) -> None:
        self._opened.close()


def _body(reply: BaseModel) -> Body:
    return reply.model_dump()


def _environment() -> dict[str, str]:
    return {HERE: os.environ[HERE]} if HERE in os.environ else {}
