"""One way of bringing pictures to a model, in a process of its own: images a second and peak memory, as a line of JSON.

python -m benchmarks.ingest.ways WAY FOLDER ENCODER... where WAY is

- bare: the encoders called in a loop on one thread, over batches that were decoded before the clock runs;
- in_process: files stored by `Client(path=...)`, the engine and its workers in this process;
- over_http: files stored by `Client(url)` on a server of our own.

The clock of the last two runs from the first file read to the last memory acknowledged (on disk and recallable).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH = 64
"""Pictures that the pipeline hands to the encoders at once (service/app/cues.py, ENCODE_BATCH)."""

Call = tuple[float, float]
"""Seconds that passed in a call of a model, and those in which its thread had a core."""


def bare(files: Sequence[Path], encoders: Sequence[str]) -> dict[str, float]:
    import torch

    from service.app.encoding import run_once
    from service.encoders import registry
    from service.encoders.picture import read_picture

    torch.set_num_threads(1)
    models = [registry.make(name, {}) for name in encoders]
    for model in models:
        run_once(model)
    calls: list[Call] = []
    for model in models:
        _clock(model, calls)
    for start in range(0, len(files), BATCH):
        pictures = [read_picture(file.read_bytes()) for file in files[start : start + BATCH]]
        for model in models:
            model.encode_images(pictures)
    seconds, cpu_s = map(sum, zip(*calls, strict=True))
    return {"per_s": len(files) / seconds, "cpu_ms": 1e3 * cpu_s / len(files), "peak_mb": own_peak_mb()}


def in_process(files: Sequence[Path], encoders: Sequence[str]) -> dict[str, float]:
    import torch

    from engram import Client
    from service.encoders import registry

    torch.set_num_threads(1)
    calls: list[Call] = []
    for name in encoders:
        _clock(registry.make(name, {}), calls, "ingest-encode")
    with tempfile.TemporaryDirectory(prefix="engram-ingest-") as folder, Client(path=folder) as client:
        collection = client.create_collection("ingest", {name: {"encoder": name} for name in encoders})
        calls.clear()
        per_s = stored(collection, files)
        seconds, cpu_s = map(sum, zip(*calls, strict=True))
        each = {"cpu_ms": 1e3 * cpu_s / len(files), "busy": seconds * per_s / len(files)}
        return {"per_s": per_s, "peak_mb": own_peak_mb(), **each}


def over_http(files: Sequence[Path], encoders: Sequence[str]) -> dict[str, float]:
    from benchmarks.load.server import HOST, serving
    from engram import Client

    with (
        tempfile.TemporaryDirectory(prefix="engram-ingest-") as folder,
        serving(Path(folder)) as (port, pid),
        Client(f"http://{HOST}:{port}") as client,
    ):
        collection = client.create_collection("ingest", {name: {"encoder": name} for name in encoders})
        per_s = stored(collection, files)
        return {"per_s": per_s, "peak_mb": peak_mb(pid), "client_peak_mb": own_peak_mb()}


def stored(collection: Any, files: Sequence[Path]) -> float:
    """Images a second through a client, into a new collection."""
    began = time.perf_counter()
    reply = collection.store({"id": file.name, "image": file} for file in files)
    seconds = time.perf_counter() - began
    statuses = {item.status for item in reply.results}
    if statuses != {"stored"} or collection.count() != len(files):
        raise SystemExit(f"not all was stored: {statuses}, {collection.count()} of {len(files)}")
    return len(files) / seconds


def _clock(model: Any, calls: list[Call], thread: str | None = None) -> None:
    """Note every call of a model for pictures, or those in a thread of this name."""
    encode = model.encode_images

    def clocked(pictures: Any) -> Any:
        began, worked = time.perf_counter(), time.thread_time()
        try:
            return encode(pictures)
        finally:
            if thread in (None, threading.current_thread().name):
                calls.append((time.perf_counter() - began, time.thread_time() - worked))

    model.encode_images = clocked


def own_peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


WAYS = {"bare": bare, "in_process": in_process, "over_http": over_http}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = sorted(Path(sys.argv[2]).glob("*.jpg"))
    print(json.dumps(WAYS[sys.argv[1]](found, sys.argv[3:])))
