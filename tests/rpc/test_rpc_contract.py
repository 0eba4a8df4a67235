"""gRPC and REST have the same operations, and what is committed is what the models say."""

from __future__ import annotations

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from service.api import openapi
from service.rpc import generate
from service.rpc.contract import Contract, Message, MessageField, contract
from service.rpc.messages import SERVICE
from service.rpc.methods import METHODS, rpc_name

ONLY_REST: dict[str, str] = {}
"""Operations of REST that gRPC has not, and why."""

ONLY_RPC = {
    "StoreStream": "REST has no stream of requests and answers at once; its bulk way is many requests",
}


def test_rest_and_grpc_have_the_same_operations() -> None:
    paths = openapi.document()["paths"]
    rest = {
        operation["operationId"]
        for path, methods in paths.items()
        if path.startswith("/v1/")
        for operation in methods.values()
    }
    rpc = {method.name for method in SERVICE.methods}
    assert {rpc_name(name) for name in rest} - rpc == {rpc_name(name) for name in ONLY_REST}
    assert rpc - {rpc_name(name) for name in rest} == ONLY_RPC.keys()
    assert rpc == {method.rpc for method in METHODS.values()}


def test_what_is_committed_is_what_the_models_say() -> None:
    committed = generate.PROTO.read_text()
    assert generate.text(contract(), committed) == committed, "run `python -m service.rpc.generate`"
    compiled = FileDescriptorSet.FromString(generate.descriptor(committed))
    assert FileDescriptorSet.FromString(generate.DESCRIPTOR.read_bytes()) == compiled


def test_fields_keep_their_numbers() -> None:
    def proto(former: str, *fields: tuple[str, str]) -> str:
        made = tuple(MessageField("", kind, name) for kind, name in fields)
        return generate.text(Contract([], {"M": Message("M", "", made)}), former).partition("message M")[2]

    def whole(text: str) -> str:
        return "message M" + text

    first = proto("", ("string", "a"), ("int64", "b"), ("bool", "c"))
    assert "string a = 1;" in first
    assert "bool c = 3;" in first
    moved = proto(whole(first), ("bool", "c"), ("bytes", "d"), ("string", "a"))
    for line in ("bool c = 3;", "bytes d = 4;", "string a = 1;", "reserved 2;"):
        assert line in moved
    changed = proto(whole(moved), ("double", "c"), ("bytes", "d"), ("string", "a"), ("int64", "b"))
    for line in ("double c = 5;", "bytes d = 4;", "string a = 1;", "int64 b = 6;", "reserved 2, 3;"):
        assert line in changed
