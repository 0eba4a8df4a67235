"""Fashion-MNIST through FAISS alone, the engine in process, and HTTP with one client and with eight.

The full run (60,000 memories) writes results.md beside this file; a smaller one (`--memories 3000`) only prints.
Each stage has a process of its own. FAISS and the server run on one OpenMP thread each, unless OMP_NUM_THREADS says
otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.load import data
from benchmarks.load.measure import LIMIT, SUPPORT, Row, in_own_process
from benchmarks.load.server import COLLECTION, HOST, fill, recalled, requests, serving, wait_until_settled
from engram import Client

MEMORIES = 60_000
CUES = 4_000  # the share of first hits is then known to ± .004
RESULTS = Path(__file__).with_name("results.md")


def over_http(folder: Path, memories: int, cues: int) -> list[Row]:
    images = data.images()[:memories]
    own = data.cue_rows(memories, cues)
    asked = requests(data.masked(images[own]))
    with serving(folder) as (port, pid):
        load_s = fill(port, images)
        say(f"stored in {load_s:.1f} s; waiting for graphs and calibration")
        started = time.perf_counter()
        with Client(f"http://{HOST}:{port}") as client:
            wait_until_settled(client.collection(COLLECTION), memories)
        say(f"at rest after {time.perf_counter() - started:.1f} s more")
        return [
            recalled("Engram over HTTP, 1 client", port, pid, asked, own, 1, load_s),
            recalled("Engram over HTTP, 8 clients", port, pid, asked, own, 8, None),
        ]


def report(rows: list[Row], memories: int, cues: int) -> str:
    hnsw = next(row for row in rows if row.name == "FAISS HNSW alone")
    lines = [
        "# Load: Fashion-MNIST, half of the pixels masked",
        "",
        f"{memories:,} memories of 784 values; {cues:,} cues. FAISS alone returns {SUPPORT} neighbours; Engram settles "
        f"over a support of {SUPPORT}, gates, and returns {LIMIT} matches (defaults throughout).",
        "",
        "| | own image first | median ms | p95 ms | a second | median ÷ HNSW alone | load s | memory MB | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        load = "" if row.load_s is None else f"{row.load_s:.1f}"
        memory = "" if row.rss_mb is None else f"{row.rss_mb:,.0f}"
        lines.append(
            f"| {row.name} | {row.first_share:.4f} | {row.median_ms:.3f} | {row.p95_ms:.3f} | {row.per_s:,.0f} | "
            f"{row.median_ms / hnsw.median_ms:.1f} | {load} | {memory} | {row.note} |"
        )
    by_name = {row.name: row.first_share for row in rows}
    settled, searched = by_name["Engram in process"], by_name["Engram in process, no step"]
    lines += [
        "",
        "Load: FAISS, until the index stood; HTTP, until the last store was acknowledged (on disk); in process, until "
        "the folder the server had filled was open, its graphs built.",
        "",
        f"First hit after the dynamics {settled:.4f}, by the search alone {searched:.4f}: "
        + ("not under it." if settled >= searched else "UNDER IT."),
        "",
        *(f"- {line}" for line in machine()),
    ]
    return "\n".join(lines) + "\n"


def machine() -> list[str]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "faiss-cpu", "fastapi"))
    return [
        f"{cpu}, {os.cpu_count()} cores, {memory_gb:.0f} GiB, {platform.system()}; Python {platform.python_version()}",
        f"{versions}; OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}",
    ]


def say(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--memories", type=int, default=MEMORIES)
    parser.add_argument("--cues", type=int, default=CUES)
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    counts = (str(chosen.memories), str(chosen.cues))
    say("FAISS alone")
    rows = in_own_process("benchmarks.load.faiss_alone", *counts)
    with tempfile.TemporaryDirectory(prefix="engram-load-") as name:
        folder = Path(name) / "memories"
        say("over HTTP")
        http = over_http(folder, chosen.memories, chosen.cues)
        say("in process, on the same folder")
        rows += in_own_process("benchmarks.load.in_process", str(folder), *counts)
    text = report(rows + http, chosen.memories, chosen.cues)
    print(text)
    if chosen.memories == MEMORIES:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
