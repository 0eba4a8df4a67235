"""Rows of 784 values through a running server over HTTP, as Arrow, Parquet and NDJSON: how long until all are durable
and recalled, what the server holds meanwhile, how recall fares until its graph is built, and how fast they come out.

The full run (60,000 rows, three times; 15,000 beside it for the memory) writes results.md beside this file; a smaller
one (`--rows 3000`) only prints. Fashion-MNIST where `benchmarks.load.data` finds it, else random pixels, half of them
0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.load import data
from benchmarks.load.__main__ import machine, say
from benchmarks.load.server import HOST, serving
from engram import Client

ROWS, REPEATS = 60_000, 3
GOAL_S = 11.8  # what Milvus standalone took for these rows on this project's machines
RESULTS = Path(__file__).with_name("results.md")
FORMS = ("arrow", "parquet", "ndjson")
SEALED_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Run:
    """Seconds; bytes. `beyond`: the peak, less what the server held at its start and what its bank holds."""

    form: str
    rows: int
    durable: float
    answerable: float
    cpu: float
    peak: int
    beyond: int
    recall: float  # median, from the last row on until the graph is built
    sealed: float
    exported: float
    load: float


def images() -> tuple[NDArray[np.float32], str]:
    try:
        return data.images(), "Fashion-MNIST"
    except SystemExit:
        random = np.random.default_rng(0)
        drawn = random.integers(0, 256, (ROWS, 784)).astype(np.float32)
        drawn[random.random(drawn.shape) < 0.5] = 0
        return drawn, "random pixels, half of them 0 (Fashion-MNIST was not found)"


def write(vectors: NDArray[np.float32], folder: Path) -> dict[str, Path]:
    files = {form: folder / f"{len(vectors)}.{form}" for form in FORMS}
    columns = {
        "id": pa.array([str(row) for row in range(len(vectors))]),
        "payload": pa.array([json.dumps({"n": row}) for row in range(len(vectors))]),
        "vectors.v": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
    }
    table = pa.table(columns)
    with pa.ipc.new_stream(str(files["arrow"]), table.schema) as writer:
        writer.write_table(table, max_chunksize=4_096)
    pq.write_table(table, files["parquet"])
    with files["ndjson"].open("wb") as lines:
        for row, vector in enumerate(vectors):
            line = {"id": str(row), "payload": {"n": row}, "vectors": {"v": vector}}
            lines.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    return files


def imported(form: str, file: Path, vectors: NDArray[np.float32], folder: Path) -> Run:
    with serving(folder) as (port, pid), Client(f"http://{HOST}:{port}", timeout_s=300) as client:
        collection = client.create_collection("rows", {"v": {"dimension": vectors.shape[1]}})
        held, spent = status(pid)["VmRSS"], cpu_s(pid)
        started = time.perf_counter()
        done = collection.import_rows(file)
        durable = time.perf_counter() - started
        assert done.stored == len(vectors), done
        last = collection.recall(vectors={"v": vectors[-1]}, limit=1, exact=True).matches[0]
        answerable = time.perf_counter() - started
        assert last.id == str(len(vectors) - 1), last
        cpu, load = cpu_s(pid) - spent, os.getloadavg()[0]
        peak, bank = status(pid)["VmHWM"], sum(collection.info().bytes.values())
        seconds = []
        while collection.info().indexing and time.perf_counter() - started < SEALED_TIMEOUT_S:
            began = time.perf_counter()
            collection.recall(vectors={"v": vectors[len(seconds)]}, limit=1)
            seconds.append(time.perf_counter() - began)
            time.sleep(0.05)
        sealed = time.perf_counter() - started
        began = time.perf_counter()
        assert collection.export(folder.parent / f"out.{form}") > 0
        exported = time.perf_counter() - began
    recall = median(seconds) if seconds else 0.0
    return Run(
        form, len(vectors), durable, answerable, cpu, peak - held, peak - held - bank, recall, sealed, exported, load
    )


def status(pid: int) -> dict[str, int]:
    """Memory of a process by the kernel's names, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def floor(file: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.transfer.floor", str(file)]
    return float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["seconds"])


def report(runs: list[Run], floors: list[float], what: str) -> str:
    base = median(floors)
    most = max(run.rows for run in runs)
    lines = [
        "# Import and export", "",
        f"{most:,} rows of 784 float32 with a payload, through a running server over HTTP; {what}. Medians of "
        f"{len(floors)} runs. The floor, a flat index of FAISS's and SQLite in one transaction: {base:.1f} s.", "",
        "| rows | as | durable s | answerable s | ÷ floor | rows/s | server CPU s | peak MB | beyond the bank MB | "
        "recall until sealed, ms | sealed s | export rows/s |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for rows, form in dict.fromkeys((run.rows, run.form) for run in runs):
        some = [run for run in runs if (run.rows, run.form) == (rows, form)]

        def mid(name: str, some: list[Run] = some) -> float:
            return float(median(getattr(run, name) for run in some))

        ratio = f"{mid('answerable') / base:.1f}" if rows == most else ""
        lines.append(
            f"| {rows:,} | {form} | {mid('durable'):.1f} | {mid('answerable'):.1f} | {ratio} | "
            f"{rows / mid('answerable'):,.0f} | {mid('cpu'):.1f} | {mid('peak') / 1e6:,.0f} | "
            f"{mid('beyond') / 1e6:,.0f} | {1e3 * mid('recall'):.1f} | {mid('sealed'):.1f} | "
            f"{rows / mid('exported'):,.0f} |"
        )
    loads = [run.load for run in runs]
    lines += [
        "",
        "Durable: the last row's commit is on disk. Answerable: a recall has found the last row by a scan. Sealed: its "
        "graph is built. Peak: the server's memory beyond that at its start; the bank holds the rows themselves.",
        "",
        f"The goal was under {GOAL_S} s. Load average during the runs: {min(loads):.1f} to {max(loads):.1f}.",
        "",
        *(f"- {line}" for line in machine()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    vectors, what = images()
    runs: list[Run] = []
    floors: list[float] = []
    with tempfile.TemporaryDirectory(prefix="engram-transfer-") as name:
        folder = Path(name)
        for rows in (chosen.rows // 4, chosen.rows):
            files = write(vectors[:rows], folder)
            for repeat in range(chosen.repeats if rows == chosen.rows else 1):
                if rows == chosen.rows:
                    floors.append(floor(files["arrow"]))
                for form in chosen.forms:
                    runs.append(imported(form, files[form], vectors[:rows], folder / f"{rows}-{repeat}-{form}"))
                    say(str(runs[-1]))
    text = report(runs, floors, what)
    print(text)
    if chosen.rows == ROWS and tuple(chosen.forms) == FORMS:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
