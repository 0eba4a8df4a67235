"""The floor: the same rows into a flat index of FAISS's and, in one transaction, into SQLite; nothing is checked, and
nothing can be recalled by anything but distance."""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch  # noqa: F401 (before faiss: each brings its own OpenMP)

import faiss  # isort: skip


def main(file: str) -> None:
    started = time.perf_counter()
    table = pa.ipc.open_stream(file).read_all()
    vectors = table["vectors.v"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder:
        database = sqlite3.connect(Path(folder) / "floor.db", isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE memories (id TEXT PRIMARY KEY, payload BLOB, vector BLOB)")
        database.execute("BEGIN IMMEDIATE")
        rows = zip(table["id"].to_pylist(), table["payload"].to_pylist(), map(bytes, vectors), strict=True)
        database.executemany("INSERT INTO memories VALUES (?, ?, ?)", rows)
        database.execute("COMMIT")
        _, found = index.search(vectors[-1:], 1)
        seconds = time.perf_counter() - started
        database.close()
    print(json.dumps({"seconds": seconds, "found": int(found[0, 0])}))


if __name__ == "__main__":
    main(sys.argv[1])
