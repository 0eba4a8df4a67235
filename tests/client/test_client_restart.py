"""A server that is killed and started again while clients are at work: they go on."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from engram import AsyncClient, Client
from service.errors import Unreachable

AT_WORK_S = 2.0  # before the server is killed


@pytest.mark.full  # as do the loops of tests/cluster, over HTTP and gRPC
def test_loops_go_on_over_a_server_that_is_killed_and_started_again(
    start_engram: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    port, grpc_port = free_ports(2)
    url, grpc_url = f"http://127.0.0.1:{port}", f"grpc://127.0.0.1:{grpc_port}"
    serve = ("serve", "--data", tmp_path / "m", "--port", port, "--grpc-port", grpc_port)
    server = start_engram(*serve)
    wait_for(url)
    with Client(url) as client:
        client.create_collection("c", {"v": {"dimension": 2}})
    stop = threading.Event()
    stored = {"called": 0, "called over gRPC": 0, "awaited": 0}

    def called(way: str, where: str) -> None:
        with Client(where) as client:
            collection = client.collection("c")
            while not stop.is_set():
                cue = {"v": [1.0, float(stored[way])]}
                collection.store([{"id": f"{way} {stored[way]}", "vectors": cue}])
                stored[way] += 1
                assert collection.recall(vectors=cue, limit=1).matches

    async def awaited(way: str, where: str) -> None:
        async with AsyncClient(where) as client:
            collection = client.collection("c")
            while not stop.is_set():
                cue = {"v": [1.0, float(-stored[way])]}
                await collection.store([{"id": f"{way} {stored[way]}", "vectors": cue}])
                stored[way] += 1
                assert (await collection.recall(vectors=cue, limit=1)).matches

    failed: list[BaseException] = []

    def at_work(loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            failed.append(error)

    loops: list[Callable[[], None]] = [
        lambda: called("called", url),
        lambda: called("called over gRPC", grpc_url),
        lambda: asyncio.run(awaited("awaited", url)),
    ]
    threads = [threading.Thread(target=at_work, args=(loop,)) for loop in loops]
    for thread in threads:
        thread.start()
    try:
        time.sleep(AT_WORK_S)
        server.kill()
        server.communicate()
        before = dict(stored)
        server = start_engram(*serve)
        wait_for(url)
        while not failed and any(stored[way] <= before[way] + 1 for way in stored):
            time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    try:
        assert not failed
        assert all(count > 1 for count in before.values()), before
        with Client(url) as client:
            assert client.collection("c").count() == sum(stored.values())
    finally:
        server.terminate()
        server.communicate()


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(url: str) -> None:
    with Client(url) as client:
        while True:
            try:
                client.collections()
            except Unreachable:
                time.sleep(0.05)
            else:
                return
