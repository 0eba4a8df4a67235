"""A server of our own on a folder, and clients that only keep it busy.

The clients are sockets with bodies encoded beforehand, driven by one thread of this process; answers are read here and
parsed after the clock has stopped. Their own share of a core is reported: well under 1, it is the server that is
measured.
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load.measure import LIMIT, Row, row, rss_mb
from engram import Collection

COLLECTION = "fashion"
STORED_AT_ONCE = 500
HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 900.0  # graphs over 60,000 rows take half a minute on one core, and are built more than once
SETTLED_S = 5.0  # nothing changed for this long, which covers the engine's own pauses


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, int]]:
    """`engram serve` on the folder: its port and pid. Stopped, and its folder free again, at the end."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "engram",
        "serve",
        "--data",
        str(folder),
        "--port",
        str(port),
        "--grpc-port",
        "off",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, port)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server stopped with code {process.returncode}")
        try:
            if ask(port, "GET", "/readyz")[0] == 200:
                return
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {START_TIMEOUT_S:.0f} s")


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = HTTPConnection(HOST, port, timeout=SETTLE_TIMEOUT_S)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def fill(port: int, images: np.ndarray) -> float:
    """Create the collection and store every image as a vector; seconds until the last was acknowledged."""
    config = {
        "spaces": {"v": {"dimension": images.shape[1]}},
        "corruptions": [{"kind": "mask", "share": 0.5}],
    }
    status, reply = ask(port, "PUT", f"/v1/collections/{COLLECTION}", config)
    if status != 201:
        raise SystemExit(f"creating the collection: {status} {reply}")
    started = time.perf_counter()
    for start in range(0, len(images), STORED_AT_ONCE):
        batch = images[start : start + STORED_AT_ONCE].astype(int).tolist()
        memories = [{"id": str(start + i), "vectors": {"v": vector}} for i, vector in enumerate(batch)]
        status, reply = ask(
            port, "POST", f"/v1/collections/{COLLECTION}/store", {"memories": memories, "timeout_s": 300}
        )
        if status != 200 or any(item["status"] != "stored" for item in reply["results"]):
            raise SystemExit(f"storing: {status} {str(reply)[:500]}")
    return time.perf_counter() - started


def wait_until_settled(collection: Collection, memories: int) -> None:
    """Wait until all memories are there, the calibration is current and sealing has come to rest."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    last, since = None, time.monotonic()
    while time.monotonic() < deadline:
        info = collection.info()
        state = (info.count, info.calibration.state, info.bytes)
        if state != last:
            last, since = state, time.monotonic()
        settled = info.count == memories and info.calibration.state == "current" and not info.indexing
        if settled and time.monotonic() - since > SETTLED_S:
            return
        time.sleep(0.25)
    raise SystemExit(f"the collection did not come to rest in {SETTLE_TIMEOUT_S:.0f} s: {last}")


def requests(cues: np.ndarray) -> list[bytes]:
    """Whole HTTP requests, one a cue: default options, the pixels as integers."""
    head = f"POST /v1/collections/{COLLECTION}/recall HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    bodies = [
        json.dumps({"cue": {"vectors": {"v": cue}}, "limit": LIMIT}).encode() for cue in cues.astype(int).tolist()
    ]
    return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


@dataclass
class _Connection:
    sock: socket.socket
    number: int = -1  # of the request under way
    sent_at: float = 0.0
    received: bytes = b""


def drive(port: int, asked: Sequence[bytes], clients: int) -> tuple[list[float], list[bytes], float, float]:
    """Send every request once over `clients` connections kept alive, each with one request under way.

    Returns seconds and the reply's body by request, seconds in all, and this thread's share of a core.
    """
    seconds, bodies = [0.0] * len(asked), [b""] * len(asked)
    waiting = iter(range(len(asked)))
    left = len(asked)
    with selectors.DefaultSelector() as selector:
        began, worked = time.perf_counter(), time.thread_time()

        def send_next(connection: _Connection) -> None:
            connection.number = next(waiting, -1)
            if connection.number < 0:
                selector.unregister(connection.sock)
                connection.sock.close()
                return
            connection.received = b""
            connection.sent_at = time.perf_counter()
            connection.sock.sendall(asked[connection.number])

        for _ in range(clients):
            sock = socket.create_connection((HOST, port), timeout=START_TIMEOUT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(sock)
            selector.register(sock, selectors.EVENT_READ, connection)
            send_next(connection)
        while left:
            for key, _ in selector.select():
                connection = key.data
                chunk = connection.sock.recv(1 << 16)
                if not chunk:
                    raise SystemExit("the server closed a connection")
                connection.received += chunk
                body = _body(connection.received)
                if body is None:
                    continue
                seconds[connection.number] = time.perf_counter() - connection.sent_at
                bodies[connection.number] = body
                left -= 1
                send_next(connection)
        elapsed_s = time.perf_counter() - began
        return seconds, bodies, elapsed_s, (time.thread_time() - worked) / elapsed_s


def _body(received: bytes) -> bytes | None:
    """The reply's body once all of it is there."""
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return None
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"a recall was refused: {received[:500]!r}")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
    )
    return body if len(body) == length else None


def recalled(
    name: str, port: int, pid: int, asked: list[bytes], own: np.ndarray, clients: int, load_s: float | None
) -> Row:
    drive(port, asked[:50], clients)  # warm-up
    seconds, bodies, elapsed_s, share = drive(port, asked, clients)
    firsts = [json.loads(body)["results"][0]["matches"][0]["id"] for body in bodies]
    first_share = sum(first == str(memory) for first, memory in zip(firsts, own, strict=True)) / len(own)
    note = f"client {share:.2f} of a core"
    return row(name, first_share, seconds, elapsed_s=elapsed_s, load_s=load_s, rss_mb=rss_mb(pid), note=note)
