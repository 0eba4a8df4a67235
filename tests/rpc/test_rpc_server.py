"""gRPC of a real server: the same answers as REST, the same errors, health, reflection, deadlines, draining."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from service import errors, settings
from service.app.serving import POOL_THREADS, Pool
from service.encoders.picture import write_png
from service.rpc.convert import to_dict, to_message
from service.rpc.messages import SERVICE_NAME, message
from service.rpc.problems import BY_STATUS, error_in, status_of
from service.rpc.server import REPLY_MARGIN_S, WAIT_MAX_S, wait_max_s

Served = Any
Serve = Callable[..., AbstractContextManager[Any]]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

VECTORS = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)


def items(count: int = len(VECTORS)) -> list[dict[str, Any]]:
    return [{"id": str(i), "vectors": {"v": VECTORS[i]}, "payload": {"i": i, "even": i % 2 == 0}} for i in range(count)]


@pytest.fixture(scope="module")
def filled(served: Served) -> str:
    served.ask("create_collection", {"collection": "filled", "spaces": {"v": {"dimension": 8}}})
    reply = served.ask("store", {"collection": "filled", "memories": items()})
    assert {item["status"] for item in reply["results"]} == {"stored"}
    while served.ask("get_collection", {"collection": "filled"})["calibration"]["state"] != "current":
        time.sleep(0.1)
    return "filled"


def without_times(reply: Any) -> Any:
    """A reply of either, without what may differ: times, and null beside absent."""
    if isinstance(reply, dict):
        kept = {key: without_times(value) for key, value in reply.items() if key not in ("timings_ms", "seconds")}
        return {key: value for key, value in kept.items() if value is not None}
    return [without_times(item) for item in reply] if isinstance(reply, list) else reply


recall_options = st.fixed_dictionaries(
    {},
    optional={
        "limit": st.integers(1, 7),
        "offset": st.integers(0, 3),
        "filter": st.sampled_from(
            [{"must": [{"key": "even", "match": True}]}, {"must_not": [{"key": "i", "range": {"gte": 30}}]}]
        ),
        "exclude": st.lists(st.sampled_from(["1", "2", "3"]), max_size=3),
        "score_threshold": st.sampled_from([-1.0, 0.5]),
        "spaces": st.just({"v": 2.0}),
        "support": st.sampled_from(["dense", 8]),
        "exact": st.booleans(),
        "separation": st.sampled_from(["softmax", "max", {"entmax": 1.5}]),
        "beta": st.sampled_from(["auto", 2, 0.5]),
        "update_steps_max": st.integers(0, 3),
        "gate": st.booleans(),
        "certify": st.booleans(),
        "with_payload": st.booleans(),
        "with_vectors": st.booleans(),
    },
)


@given(options=recall_options, rows=st.lists(st.integers(0, 59), min_size=1, max_size=3))
@profile(max_examples=25)
def test_recalls_are_those_of_rest(served: Served, filled: str, options: dict[str, Any], rows: list[int]) -> None:
    cues = [{"vectors": {"v": (VECTORS[row] + 0.1).tolist()}} for row in rows]
    body = {**options, "cues": cues} if len(cues) > 1 else {**options, "cue": cues[0]}
    rest = served.http.post(f"/v1/collections/{filled}/recall", json=body).json()
    assert without_times(served.ask("recall", {"collection": filled, **body})) == without_times(rest)


def test_every_reply_that_only_reads_is_that_of_rest(served: Served, filled: str) -> None:
    at = f"/v1/collections/{filled}"
    page = {"limit": 7, "filter": {"must": [{"key": "i", "any": [3, 4, 5]}]}}
    for operation, body, method, path in (
        ("list_encoders", {}, "GET", "/v1/encoders"),
        ("list_collections", {}, "GET", "/v1/collections"),
        ("get_collection", {}, "GET", at),
        ("get_diagnostics", {}, "GET", f"{at}/diagnostics"),
        ("list_kernels", {}, "GET", f"{at}/kernels"),
        ("get_memories", {"ids": ["3", "none", "4"]}, "POST", f"{at}/memories/get"),
        ("scroll", page, "POST", f"{at}/memories/scroll"),
        ("count", {"filter": page["filter"]}, "POST", f"{at}/memories/count"),
        ("get_memory", {"id": "3"}, "GET", f"{at}/memories/3"),
        ("list_operations", {}, "GET", "/v1/operations"),
    ):
        path_fields = {"collection": filled} if at in path else {}
        sent = {"json": body} if method == "POST" else {}
        rest = served.http.request(method, path, **sent).json()
        assert without_times(served.ask(operation, {**path_fields, **body})) == without_times(rest), operation


def test_pictures_travel_as_bytes(served: Served, make: Callable[..., str]) -> None:
    name = make(spaces={"image": {"encoder": "pixels", "options": {"size": 8, "colour": False}}})
    picture = write_png(np.random.default_rng(1).integers(0, 255, (8, 8, 3)).astype(np.uint8))
    reply = served.ask("store", {"collection": name, "memories": [{"id": "a", "image": {"base64": picture}}]})
    assert reply["results"][0]["status"] == "stored"
    content = served.ask("get_content", {"collection": name, "id": "a"})
    assert (content["data"], content["media_type"]) == (picture, "image/png")
    asked = {"cue": {"image": {"base64": picture}}, "reconstruct": True, "trace": True}
    found = served.ask("recall", {"collection": name, **asked})["results"][0]
    encoded = {**asked, "cue": {"image": {"base64": base64.b64encode(picture).decode()}}}
    rest = served.http.post(f"/v1/collections/{name}/recall", json=encoded).json()["results"][0]
    assert found["reconstruction"]["base64"] == base64.b64decode(rest["reconstruction"]["base64"])
    assert [drawn["base64"] for drawn in found["trace"]] == [base64.b64decode(d["base64"]) for d in rest["trace"]]


def test_errors_have_rests_codes(served: Served, filled: str) -> None:
    for operation, body, error, status in (
        ("get_collection", {"collection": "none"}, errors.CollectionNotFound, "NOT_FOUND"),
        ("get_memory", {"collection": filled, "id": "none"}, errors.MemoryNotFound, "NOT_FOUND"),
        (
            "create_collection", {"collection": filled, "spaces": {"v": {"dimension": 9}}},
            errors.CollectionExists, "ALREADY_EXISTS",
        ),
        ("create_collection", {"collection": "/"}, errors.InvalidRequest, "INVALID_ARGUMENT"),
        ("recall", {"collection": filled, "limit": 0, "cue": {"text": "x"}}, errors.InvalidRequest, "INVALID_ARGUMENT"),
        ("recall", {"collection": filled}, errors.InvalidRequest, "INVALID_ARGUMENT"),
        ("recall", {"collection": filled, "cue": {"vectors": {"v": [1.0]}}}, errors.WrongDimension, "INVALID_ARGUMENT"),
        (
            "recall", {"collection": filled, "cue": {"vectors": {"v": [float("nan")] * 8}}},
            errors.InvalidVector, "INVALID_ARGUMENT",
        ),
        ("cancel_operation", {"id": "none"}, errors.OperationNotFound, "NOT_FOUND"),
    ):  # fmt: skip
        with pytest.raises(errors.EngramError) as caught:
            served.ask(operation, body)
        assert type(caught.value) is error, caught.value.detail
        assert status_of(caught.value).name == status
    known = [{"id": "none", "cue": {"vectors": {"v": [1.0]}}}, {"id": "1", "cue": {"vectors": {"v": VECTORS[1]}}}]
    with pytest.raises(errors.InvalidRequest) as caught:
        served.ask("train", {"collection": filled, "what": "gate", "cues": known})
    assert {each.item for each in caught.value.errors} == {0}


def test_every_error_has_a_status() -> None:
    assert {error.status for error in errors.error_classes().values()} <= BY_STATUS.keys()


def test_a_bad_memory_is_reported_and_the_rest_is_stored(served: Served, make: Callable[..., str]) -> None:
    name = make(spaces={"v": {"dimension": 8}})
    short = message("MemoryInput")()
    short.vectors["v"].f4 = b"abc"
    request = to_message("StoreRequest", {"collection": name, "memories": [*items(2), {"vectors": {"v": [1.0]}}]})
    request.memories.append(short)
    reply = served.stub.Store(request)
    assert [item.status for item in reply.results] == ["stored", "stored", "error", "error"]
    assert reply.results[2].error.code == "wrong_dimension"
    assert "4 bytes each" in reply.results[3].error.detail


@pytest.mark.parametrize(
    ("nulls", "says"), [(["text"], "text: both given"), (["collection"], "collection"), (["colour"], "colour")]
)
def test_what_cannot_be_null_is_refused(served: Served, filled: str, nulls: list[str], says: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=says):
        served.ask("patch_memory", {"collection": filled, "id": "1", "text": "t", "nulls": nulls})


def test_what_is_no_message_is_malformed(served: Served) -> None:
    call = served.channel.unary_unary(f"/{SERVICE_NAME}/Count")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "CountRequest" in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        served.channel.unary_unary(f"/{SERVICE_NAME}/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_reflection_lists_the_service(served: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health"),
    ]
    listed, own, health = stub.ServerReflectionInfo(iter(asked))
    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names
    assert b"RecallRequest" in own.file_descriptor_response.file_descriptor_proto[0]
    assert health.file_descriptor_response.file_descriptor_proto


def test_calls_are_counted(served: Served, filled: str) -> None:
    with pytest.raises(errors.MemoryNotFound):
        served.ask("get_memory", {"collection": filled, "id": "none"})
    counted = 'engram_grpc_requests_total{method="GetMemory",status="NOT_FOUND"}'
    deadline = time.monotonic() + 10  # a call is counted when it has ended, which is after its caller has its answer
    while counted not in served.http.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_wait_ends_before_the_calls_deadline() -> None:
    assert wait_max_s(None) == WAIT_MAX_S
    assert wait_max_s(10_000.0) == WAIT_MAX_S
    for left in (0.01, 0.5, 3.0, 60.0):
        assert 0 < left - wait_max_s(left) <= REPLY_MARGIN_S + 1e-9
    assert wait_max_s(-1.0) > 0


def test_keys_bounds_draining_and_loading(serve: Serve, tmp_path: Path) -> None:
    """One server's life, and the beginning of the next one's on the same folder."""
    right = (("authorization", "Bearer right"),)
    with serve(tmp_path, ENGRAM_API_KEY="right", ENGRAM_BODY_BYTES_MAX="200000") as served:
        for wrong in ((), (("authorization", "Bearer wrong"),), (("authorization", "right"),)):
            with pytest.raises(errors.Unauthorized):
                served.ask("list_collections", metadata=wrong)
        assert served.ask("list_collections", metadata=right) == {"collections": []}
        with pytest.raises(grpc.RpcError) as caught:  # refused by grpc before the request is read
            served.ask("count", {"collection": "x" * 300_000}, metadata=right)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        served.ask("create_collection", {"collection": "c"}, metadata=right)
        made = served.ask(
            "create_key", {"name": "reader", "scopes": {"c": "read"}, "rate_limit": "3/minute"}, metadata=right
        )
        reader = (("authorization", f"Bearer {made['key']}"),)
        assert served.ask("count", {"collection": "c"}, metadata=reader)["count"] == 0
        with pytest.raises(errors.Forbidden):
            served.ask("store", {"collection": "c", "memories": [{"text": "a"}]}, metadata=reader)
        stored = to_message("StoreStreamRequest", {"collection": "c", "memories": [{"text": "a"}]})
        with pytest.raises(errors.Forbidden):
            raise_told(served.stub.StoreStream(iter([stored]), metadata=reader))
        with pytest.raises(errors.RateLimited) as limited:
            served.ask("count", {"collection": "c"}, metadata=reader)
        assert limited.value.retry_after_s
        assert status_of(limited.value) is grpc.StatusCode.RESOURCE_EXHAUSTED

        watched = watching(served.channel)
        assert next(watched).status == SERVING
        pictures = np.random.default_rng(3).integers(0, 255, (20, 32, 32, 3)).astype(np.uint8)
        memories = [{"image": {"base64": write_png(picture)}} for picture in pictures]
        request = to_message("StoreRequest", {"collection": "c", "memories": memories})
        under_way = served.stub.Store.future(request, metadata=right)
        time.sleep(0.1)
        served.process.send_signal(signal.SIGTERM)
        assert next(watched).status == NOT_SERVING
        assert {item.status for item in under_way.result(timeout=30).results} == {"stored"}
        assert served.process.wait(30) == 128 + signal.SIGTERM

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "engram", "serve", "--data", str(tmp_path), "--port", "0", "--grpc-port", port]
    process = subprocess.Popen(command, env=environ(), stdout=subprocess.DEVNULL)
    try:
        often = [(f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "min", "max")]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=often) as channel:
            watched = watching(channel)
            assert next(watched).status == NOT_SERVING  # the collection is loaded, and its encoders run once
            assert next(watched).status == SERVING
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def raise_told(call: Any) -> None:
    """Read a stream to its end; the error that it ends with."""
    try:
        list(call)
    except grpc.RpcError as error:
        told = error_in(error.trailing_metadata() or ())
        raise told or error from None


def watching(channel: grpc.Channel) -> Any:
    asked = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    return health_pb2_grpc.HealthStub(channel).Watch(asked, wait_for_ready=True, timeout=120)


def environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}


def test_a_taken_port_is_named(served: Served, tmp_path: Path) -> None:
    assert served.grpc_url is not None
    port = served.grpc_url.rpartition(":")[2]
    command = [sys.executable, "-m", "engram", "serve", "--data", str(tmp_path), "--port", "0", "--grpc-port", port]
    refused = subprocess.run(command, env=environ(), capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
    assert port in refused.stderr
    assert "ENGRAM_GRPC_PORT" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_port_follows_rests() -> None:
    assert settings.load({}).grpc_listens_on == 8001
    assert settings.load({}, port=0).grpc_listens_on == 0
    assert settings.load({"ENGRAM_GRPC_PORT": "off"}).grpc_listens_on is None
    assert settings.load({"ENGRAM_GRPC_PORT": "9000"}).grpc_listens_on == 9000
    with pytest.raises(errors.InvalidSettings, match="ENGRAM_GRPC_PORT"):
        settings.load({}, grpc_port="some")


def test_what_waits_for_a_thread_is_not_done_once_its_call_has_ended() -> None:
    async def run() -> list[str]:
        pool, done, release = Pool(), [], threading.Event()
        busy = [asyncio.ensure_future(pool.run(release.wait)) for _ in range(POOL_THREADS)]
        await asyncio.sleep(0)
        late = asyncio.ensure_future(pool.run(done.append, "late"))
        await asyncio.sleep(0)
        late.cancel()  # as grpc does at a deadline
        await asyncio.wait([late])
        release.set()
        await asyncio.gather(*busy)
        return done

    assert asyncio.run(run()) == []


def test_streams_store_and_answer_as_they_go(served: Served, make: Callable[..., str]) -> None:
    name = make(spaces={"v": {"dimension": 8}})
    vectors = np.random.default_rng(4).normal(size=(4_000, 8)).astype(np.float32)
    bad = {17: [1.0, 2.0], 2_500: [float("nan")] * 8}
    answered = threading.Event()

    def requests() -> Any:
        for start in range(0, len(vectors), 40):
            memories = [{"id": str(i), "vectors": {"v": bad.get(i, vectors[i])}} for i in range(start, start + 40)]
            if start == 2_000:
                assert answered.wait(30), "nothing is answered while the stream is open"
            yield to_message("StoreStreamRequest", {"collection": name if not start else "", "memories": memories})

    statuses: list[str] = []
    for reply in served.stub.StoreStream(requests(), timeout=60):
        assert reply.first == len(statuses)
        statuses += [item.status for item in reply.results]
        answered.set()
    assert len(statuses) == len(vectors)
    assert [i for i, status in enumerate(statuses) if status == "error"] == sorted(bad)
    assert served.ask("count", {"collection": name})["count"] == len(vectors) - len(bad)
    found = served.ask("recall", {"collection": name, "cue": {"vectors": {"v": vectors[3_999]}}, "limit": 1})
    assert found["results"][0]["matches"][0]["id"] == "3999"


def test_what_is_wrong_with_a_stream_ends_it(served: Served) -> None:
    for requests, status in (
        ([], grpc.StatusCode.INVALID_ARGUMENT),
        ([to_message("StoreStreamRequest", {"collection": "none", "memories": items(1)})], grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(served.stub.StoreStream(iter(requests), timeout=30))
        assert caught.value.code() is status


def test_files_of_rows_come_and_go_in_parts(served: Served, make: Callable[..., str]) -> None:
    first, second = make(spaces={"v": {"dimension": 8}}), make(spaces={"v": {"dimension": 8}})
    served.ask("store", {"collection": first, "memories": items()})
    parts = [reply.rows for reply in served.stub.Export(to_message("ExportRequest", {"collection": first}))]
    file = b"".join(parts) + b'{"id": "bad", "vectors": {"v": [1]}}\n'
    requests = [to_message("ImportRowsRequest", {"collection": second, "format": "ndjson"})]
    requests += [to_message("ImportRowsRequest", {"rows": file[at : at + 999]}) for at in range(0, len(file), 999)]
    events = [to_dict(reply, asked=False) for reply in served.stub.ImportRows(iter(requests), timeout=60)]
    assert events[0]["event"] == "started"
    assert [event["row"] for event in events if event["event"] == "refused"] == [len(VECTORS) + 1]
    assert (events[-1]["event"], events[-1]["stored"]) == ("done", len(VECTORS))
    both = [served.ask("get_memories", {"collection": name, "ids": ["7", "8"]})["memories"] for name in (first, second)]
    assert [memory["payload"] for memory in both[0]] == [memory["payload"] for memory in both[1]]
    with pytest.raises(errors.CollectionNotFound):
        raise_told(served.stub.Export(to_message("ExportRequest", {"collection": "none"})))
    malformed = to_message("ImportRowsRequest", {"collection": first, "rows": b"\x00\x01 no rows\n"})
    with pytest.raises(errors.EngramError):
        raise_told(served.stub.ImportRows(iter([malformed])))
