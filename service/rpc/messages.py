"""The messages and the service of engram.proto, made from its descriptor when they are imported.

Not protoc's Python stubs: those refuse every protobuf older than the compiler, and whoever installs Engram has others
to please. The pool is our own, so that a program may hold stubs that it made from engram.proto itself beside these.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

PACKAGE = "engram.v1"
SERVICE_NAME = f"{PACKAGE}.Engram"

POOL = DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("engram.binpb").read_bytes()).file:
    POOL.Add(_file)

SERVICE = POOL.FindServiceByName(SERVICE_NAME)


@cache
def message(name: str) -> Any:
    """The class of a message of engram.proto: `message("RecallRequest")`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


class Stub:
    """Every call of the service over a channel, as protoc's stub has them: `Stub(channel).Recall(request)`."""

    def __init__(self, channel: Any) -> None:
        for method in SERVICE.methods:
            kind = f"{_kind(method.client_streaming)}_{_kind(method.server_streaming)}"
            call = getattr(channel, kind)(
                f"/{SERVICE_NAME}/{method.name}",
                request_serializer=message_factory.GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the service has no call {name}")


def _kind(streams: bool) -> str:
    return "stream" if streams else "unary"
