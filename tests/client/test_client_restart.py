"""A server that is killed and started again while clients are at work: they go on."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engram import AsyncClient, Client
from service.errors import Unreachable

AT_WORK_S = 2.0  # before the server is killed


def test_loops_go_on_over_a_server_that_is_killed_and_started_again(
    start_engram: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = start_engram("serve", "--data", tmp_path / "m", "--port", port)
    wait_for(url)
    with Client(url) as client:
        client.create_collection("c", {"v": {"dimension": 2}})
    stop = threading.Event()
    stored: dict[str, int] = {"called": 0, "awaited": 0}

    def called() -> None:
        with Client(url) as client:
            collection = client.collection("c")
            while not stop.is_set():
                number = stored["called"]
                collection.store([{"id": f"called {number}", "vectors": {"v": [1, number]}}])
                stored["called"] += 1
                assert collection.recall(vectors={"v": [1, number]}, limit=1).matches

    async def awaited() -> None:
        async with AsyncClient(url) as client:
            collection = client.collection("c")
            while not stop.is_set():
                number = stored["awaited"]
                await collection.store([{"id": f"awaited {number}", "vectors": {"v": [1, -number]}}])
                stored["awaited"] += 1
                assert (await collection.recall(vectors={"v": [1, -number]}, limit=1)).matches

    failed: list[BaseException] = []

    def at_work(loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=at_work, args=(loop,)) for loop in (called, lambda: asyncio.run(awaited()))]
    for thread in threads:
        thread.start()
    try:
        time.sleep(AT_WORK_S)
        server.kill()
        server.communicate()
        before = dict(stored)
        server = start_engram("serve", "--data", tmp_path / "m", "--port", port)
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


def wait_for(url: str) -> None:
    with Client(url) as client:
        while True:
            try:
                client.collections()
            except Unreachable:
                time.sleep(0.05)
            else:
                return
