"""Servers and workers killed one after the other, while others store and recall: nothing acknowledged is lost, nothing
wrong is answered, and each returns to work.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import pytest

from engram import Client, Collection

SPACES = {"t": {"encoder": "sentence", "source": "text"}}
WORDS = ["red", "round", "old", "warm", "loud", "sweet", "tall", "thin", "wet", "kind"]


def sentence(number: int) -> str:
    """No two are alike."""
    return " ".join(WORDS[int(digit)] for digit in f"{number:06}")


class Load:
    """Threads that store and recall through one server each, and note when they are answered."""

    def __init__(self, urls: list[str]) -> None:
        self.stored: dict[int, int] = {}  # number → version
        self.wrong: list[str] = []
        self.answered_s: dict[str, list[float]] = {"store": [], "recall": []}
        self._stopping = threading.Event()
        self._numbers = count()
        self._failed: list[BaseException] = []
        self._clients = [Client(url, timeout_s=60) for url in urls]
        self._threads = [
            threading.Thread(target=self._run, args=(work, Client(url, timeout_s=60)))
            for url in urls
            for work in (self._store, self._recall)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self._failed:
            raise self._failed[0]

    def longest_gap_s(self, kind: str, since_s: float) -> float:
        """Between two answers of a kind, from a moment on."""
        times = [since_s, *sorted(at for at in self.answered_s[kind] if at > since_s), time.monotonic()]
        return max(after - before for before, after in pairwise(times))

    def _run(self, work: Callable[[Collection], None], client: Client) -> None:
        try:
            with client:
                while not self._stopping.is_set():
                    work(client.collection("c"))
        except BaseException as error:
            self._failed.append(error)

    def _store(self, collection: Collection) -> None:
        numbers = [next(self._numbers) for _ in range(4)]
        reply = collection.store({"id": str(number), "text": sentence(number)} for number in numbers)
        for number, result in zip(numbers, reply.results, strict=True):
            if result.status in ("stored", "updated"):
                assert reply.version is not None
                self.stored[number] = reply.version
            elif result.status == "error":
                self.wrong.append(f"store {number}: {result.error}")
        self.answered_s["store"].append(time.monotonic())
        time.sleep(0.05)

    def _recall(self, collection: Collection) -> None:
        known = list(self.stored.items())
        if known:
            number, version = known[len(self.answered_s["recall"]) * 7 % len(known)]
            recalled = collection.recall(text=sentence(number), gate=False, limit=2, min_version=version)
            if not recalled.matches or recalled.matches[0].id != str(number):
                self.wrong.append(f"recall of {number}: {[match.id for match in recalled.matches]}")
            self.answered_s["recall"].append(time.monotonic())
        time.sleep(0.02)


def test_killed_servers_and_workers_lose_nothing(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    servers, workers = ["api1", "api2"], ["worker1"]
    for name in servers + workers:
        cluster.start(name)
    with Client(cluster.url("api1")) as client:
        client.create_collection("c", SPACES)
    # Behind a load balancer, over HTTP and gRPC, where there is one to be had; else of each server its own clients.
    balanced = cluster.start_balancer()
    load = Load([cluster.url("balancer"), cluster.grpc_url] if balanced else [cluster.url(name) for name in servers])
    gaps = {}
    try:
        while len(load.stored) < 20:
            time.sleep(0.1)
        full = os.environ.get("TEST_PROFILE") == "full"
        for name in [*servers, *workers] if full else ["api1", "worker1"]:
            killed_s, before = time.monotonic(), len(load.stored)
            cluster.kill(name)
            time.sleep(0.5)
            cluster.start(name)
            while len(load.stored) < before + 20:
                time.sleep(0.1)
            gaps[name] = {kind: load.longest_gap_s(kind, killed_s) for kind in ("store", "recall")}
    finally:
        load.stop()
    with capsys.disabled():
        print(f"\n{'behind nginx' if balanced else 'without nginx, which is not installed'}: longest gap after kill -9")
        for name, gap in gaps.items():
            print(f"  {name:8} stores {gap['store']:.1f} s, recalls {gap['recall']:.1f} s")
    assert load.wrong == []
    for name in servers:
        with Client(cluster.url(name)) as client:
            kept = {memory.id for memory in client.collection("c").scroll()}
            lost = {str(number) for number in load.stored} - kept
            assert lost == set(), f"{len(lost)} of {len(load.stored)} acknowledged memories are lost"
