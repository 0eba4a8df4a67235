"""`engram import` and `engram export` as a user types them, and an import that is killed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engram import Client

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]
NewName = Callable[[], str]


def test_rows_go_in_and_out(run_engram: Run, server_url: str, new_name: NewName, tmp_path: Path) -> None:
    rows, reasons, name = tmp_path / "rows.ndjson", tmp_path / "refused.ndjson", new_name()
    lines = [{"id": str(i), "vectors": {"v": [1, 2, i]}, "text": f"row {i}"} for i in range(5)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "bad", "vectors": {"v": [1]}}]))
    done = run_engram("import", rows, "-c", name, "--refused", reasons, "--url", server_url)
    assert done.returncode == 1
    assert f"Made the collection {name} with v (3 values by the rows)" in done.stdout
    assert "5 stored, 1 refused" in done.stdout
    assert [json.loads(line)["row"] for line in reasons.read_text().splitlines()] == [6]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["refused.ndjson", "rows.ndjson"]

    keep = json.dumps({"must": [{"key": "n", "exists": False}]})
    printed = run_engram("export", "-c", name, "-", "--no-vectors", "--filter", keep, "--url", server_url)
    assert [json.loads(line)["text"] for line in printed.stdout.splitlines()[1:]] == [line["text"] for line in lines]
    done = run_engram("export", "-c", name, tmp_path / "out.parquet", "--url", server_url)
    assert (done.returncode, pq.read_table(tmp_path / "out.parquet").num_rows) == (0, 5)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 3)])
def test_a_collection_is_made_by_the_columns_of_vectors(
    kind: pa.DataType, run_engram: Run, server_url: str, new_name: NewName, tmp_path: Path
) -> None:
    rows, name = tmp_path / "rows.parquet", new_name()
    vectors, raw = pa.array([None, [1, 2, 3]], kind), pa.array([b"\0\0\x80?" * 2] * 2)
    pq.write_table(pa.table({"id": ["a", "b"], "v": vectors, "vectors.w": raw}), rows)
    done = run_engram("import", rows, "-c", name, "--url", server_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with v (3 values by the rows), w (2 values by the rows)" in " ".join(done.stdout.split())


def test_an_import_that_is_killed_goes_on_where_it_was(
    run_engram: Run, start_engram: Start, http_client: Client, server_url: str, new_name: NewName, tmp_path: Path
) -> None:
    count, name, file = 15_000, new_name(), tmp_path / "rows.arrow"
    values = np.random.default_rng(0).random(512 * count, dtype=np.float32) + 1
    table = pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(values), 512)})
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=count)  # one batch, which is sent in parts all the same
    importing = start_engram("import", file, "-c", name, "--url", server_url)
    note = tmp_path / ".rows.arrow.engram-import"
    while not note.exists():
        assert importing.poll() is None, importing.communicate()[0]
        time.sleep(0.01)
    importing.kill()
    importing.communicate()
    done = run_engram("import", file, "-c", name, "--resume", "--url", server_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Going on at row" in done.stdout
    assert not note.exists()
    collection = http_client.collection(name)
    assert collection.count() == count
    last = collection.recall(vectors={"v": values[-512:]}, limit=1).matches[0]
    assert last.id.endswith(f"-{count}")
    http_client.delete_collection(name)
