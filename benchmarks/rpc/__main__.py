"""Recall over vectors of 784 values, one cue and 32 at once, over REST and over gRPC, of one server in one run.

`client`: `engram.Client`, as a program has it. `bare`: requests that are serialised already, over one connection each,
answers as bytes: what the server and the wire take. The ways take turns, so that what else the machine does meets all.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import grpc
import numpy as np
import orjson

from benchmarks.load.__main__ import machine
from benchmarks.load.server import COLLECTION, wait_until_settled
from engram import Client
from service.rpc.convert import to_message
from service.rpc.messages import SERVICE_NAME
from service.storage.folder import read_owner

DIMENSION = 784
BATCH = 32
RESULTS = Path(__file__).with_name("results.md")

Ask = Callable[[int], object]


def ways(url: str, grpc_url: str, cues: np.ndarray) -> dict[tuple[str, str, int], Ask]:
    """By protocol, way and number of cues: ask with the cues from a number on."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = HTTPConnection(host, int(port))
    channel = grpc.insecure_channel(grpc_url.removeprefix("grpc://"))
    call = channel.unary_unary(f"/{SERVICE_NAME}/Recall")
    clients = {"REST": Client(url), "gRPC": Client(grpc_url)}
    found: dict[tuple[str, str, int], Ask] = {}

    def post(body: bytes) -> bytes:
        head = {"Content-Type": "application/json"}
        connection.request("POST", f"/v1/collections/{COLLECTION}/recall", body, head)
        return connection.getresponse().read()

    for count in (1, BATCH):
        bodies = [
            {"cue": {"vectors": {"v": some[0]}}} if count == 1 else {"cues": [{"vectors": {"v": v}} for v in some]}
            for some in (cues[start : start + count] for start in range(0, len(cues) - count, count))
        ]
        json = [orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY) for body in bodies]
        packed = [to_message("RecallRequest", {"collection": COLLECTION, **b}).SerializeToString() for b in bodies]
        found["REST", "bare", count] = lambda i, json=json: post(json[i % len(json)])
        found["gRPC", "bare", count] = lambda i, packed=packed: call(packed[i % len(packed)])
        for name, client in clients.items():
            collection = client.collection(COLLECTION)
            if count == 1:
                found[name, "client", 1] = lambda i, c=collection: c.recall(vectors={"v": cues[i % len(cues)]})
            else:
                found[name, "client", count] = lambda i, c=collection, bodies=bodies: c.recall_batch(
                    bodies[i % len(bodies)]["cues"]
                )
    return found


def measured(asks: dict[tuple[str, str, int], Ask], rounds: int) -> dict[tuple[str, str, int], float]:
    """Median milliseconds of each."""
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in asks}
    for i in range(rounds + 10):
        for key, ask in asks.items():
            started = time.perf_counter()
            ask(i)
            if i >= 10:
                seconds[key].append(time.perf_counter() - started)
    return {key: 1000 * statistics.median(taken) for key, taken in seconds.items()}


def report(found: dict[tuple[str, str, int], float], memories: int, stored: dict[str, float]) -> str:
    lines = [
        "# Recall over gRPC and over REST",
        "",
        f"{memories:,} random memories of {DIMENSION} values; median milliseconds of a request.",
        "",
        "| | REST | gRPC | gRPC ÷ REST |",
        "|---|--:|--:|--:|",
    ]
    for way in ("bare", "client"):
        for count in (1, BATCH):
            rest, rpc = found["REST", way, count], found["gRPC", way, count]
            lines.append(
                f"| {way}, {count} cue{'s' if count > 1 else ''} | {rest:.2f} | {rpc:.2f} | {rpc / rest:.2f} |"
            )
    lines.append(f"| store, s | {stored['REST']:.2f} | {stored['gRPC']:.2f} | {stored['gRPC'] / stored['REST']:.2f} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in machine()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rpc", description=__doc__)
    parser.add_argument("--memories", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=300)
    chosen = parser.parse_args()
    vectors = np.random.default_rng(0).normal(size=(chosen.memories, DIMENSION)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="engram-rpc-") as folder:
        command = [sys.executable, "-m", "engram", "serve", "--data", folder, "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while (owner := read_owner(folder)) is None or owner.url is None or owner.grpc_url is None:
                time.sleep(0.1)
            stored: dict[str, float] = {}
            for name, url in (("REST", owner.url), ("gRPC", owner.grpc_url)):
                with Client(url) as client:
                    spaces = {"v": {"dimension": DIMENSION}}
                    collection = client.create_collection(COLLECTION if name == "gRPC" else "rest", spaces)
                    started = time.perf_counter()
                    collection.store(
                        ({"id": str(i), "vectors": {"v": vector}} for i, vector in enumerate(vectors)), batch=500
                    )
                    stored[name] = time.perf_counter() - started
                    wait_until_settled(collection, chosen.memories)
            cues = vectors[:2_000] + 0.1
            found = measured(ways(owner.url, owner.grpc_url, cues), chosen.rounds)
        finally:
            process.terminate()
            process.wait()
    text = report(found, chosen.memories, stored)
    print(text)
    if chosen.memories == parser.get_default("memories"):
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
