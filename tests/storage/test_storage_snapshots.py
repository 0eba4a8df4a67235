"""The file of a snapshot and where it is kept: any program opens it, no bit changes unseen, and a folder and a bucket
do the same.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.app.snapshot_content import Item, _npy, read
from service.app.snapshot_schemas import GateLine, KernelLine, MemoryLine
from service.errors import InvalidSettings, InvalidSnapshot, SnapshotDamaged, SnapshotExists, SnapshotNotFound
from service.errors import StorageUnavailable as Unreached
from service.storage import snapshot_store
from service.storage.copies import GateRow, KernelRow, MemoryRow
from service.storage.snapshot_file import END, SnapshotWriter, _header, read_entries
from service.storage.snapshot_store import BucketStore, FolderStore, KeptFile, SnapshotStore, Workspace, open_store
from service.storage.tables import gates, kernels, memories

SIZES = {"": 10_000, "originals": 10_000, "memories": 10_000}
HEAD = (
    b'{"format":"engram-snapshot","format_version":1,"engram":"1","collection":"c","version":3,'
    b'"made_at":"2026-01-01T00:00:00Z","created_at":"2026-01-01T00:00:00Z","generation":0,"memories":1,"kernels":0,'
    b'"gates":0,"spaces":{"v":2},"config":{"config":{"spaces":{"v":{"dimension":2}}},"fingerprints":{"v":null}}}'
)
MEMORY = (
    b'{"id":"a","version":3,"text":"t","payload":{"n":1},"original":null,"media_type":null,'
    b'"created_at":"2026-01-01T00:00:00Z","updated_at":"2026-01-01T00:00:00Z","spaces":["v"]}\n'
)
VECTOR = np.array([0.5, -2.0], dtype="<f4").tobytes()
LINES, ARRAY = "memories/00000000.ndjson", "patterns/v/00000000.npy"
WHOLE = [("snapshot.json", HEAD), (LINES, MEMORY), (ARRAY, _npy(1, 2) + VECTOR)]


def file_of(entries: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    writer = SnapshotWriter(file)
    for name, content in entries:
        writer.add(name, content)
    writer.finish(originals=0, missing=0)
    return file.getvalue()


def items(file: bytes) -> list[Item]:
    return list(read(io.BytesIO(file), 1_000))


def changed(entries: list[tuple[str, bytes]], name: str, content: bytes) -> bytes:
    return file_of([(each, content if each == name else before) for each, before in entries])


@given(contents=st.lists(st.binary(max_size=2_000), max_size=5))
def test_what_was_written_comes_back(contents: list[bytes]) -> None:
    entries = [(f"originals/{i}", content) for i, content in enumerate(contents)]
    read_back = read_entries(io.BytesIO(file_of(entries)), SIZES)
    assert [(entry.name, entry.content) for entry in read_back] == entries


@given(at=st.integers(0, 8 * len(file_of(WHOLE)) - 1))
def test_a_flipped_bit_anywhere_is_refused_and_named(at: int) -> None:
    damaged = bytearray(file_of(WHOLE))
    damaged[at // 8] ^= 1 << at % 8
    with pytest.raises(InvalidSnapshot) as refused:
        items(bytes(damaged))
    named = [*(name for name, _ in WHOLE), "header", "beginning", "SHA256SUMS", "summary.json", "snapshot"]
    assert any(name in refused.value.detail for name in named)


@given(size=st.integers(0, len(file_of(WHOLE)) - 1))
def test_a_file_that_is_cut_short_is_refused(size: int) -> None:
    with pytest.raises(SnapshotDamaged):
        items(file_of(WHOLE)[:size])


def test_other_programs_open_it(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(file_of(WHOLE))
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getnames() == [*(name for name, _ in WHOLE), "SHA256SUMS", "summary.json"]
    script = "tar xf s.tar && sha256sum -c SHA256SUMS && head -c -2048 s.tar | sha256sum && cat summary.json"
    done = subprocess.run(script, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == len(WHOLE)
    assert done.stdout.splitlines()[-2].split()[0] in done.stdout.splitlines()[-1]
    assert np.array_equal(np.load(tmp_path / "patterns/v/00000000.npy", allow_pickle=False), [[0.5, -2.0]])


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (b"", "cut short|ends in"),
        (b"not a tar at all" * 100, "no snapshot of Engram"),
        (file_of([("../../etc/passwd", b"x")]), "no entry"),
        (file_of([*WHOLE, ("/etc/passwd", b"x")]), "no entry"),
        (file_of([*WHOLE, ("originals/../../x", b"x")]), "sha-256"),
        (file_of([*WHOLE, ("patterns/../v/00000000.npy", b"x")]), "not behind|does not name"),
        (file_of([*WHOLE, ("snapshot.json", HEAD)]), "no entry"),
        (file_of([*WHOLE, WHOLE[1]]), "belongs"),
        (file_of(WHOLE[1:]), "begin with"),
        (file_of(WHOLE[:1]), "0 memories"),
        (file_of([]), "empty"),
        (file_of(WHOLE[:2]), "no patterns"),
        (_header("snapshot.json", 8 * 2**30 - 1), "are read at most"),
        (_header("originals/a", 7 * 2**30) + END, "are read at most"),
        (changed(WHOLE, "snapshot.json", HEAD.replace(b'_version":1', b'_version":2')), "format 2"),
        (changed(WHOLE, "snapshot.json", HEAD.replace(b'"collection":"c"', b'"collection":"../c"')), "collection"),
        (changed(WHOLE, "snapshot.json", HEAD.replace(b'"version":3', b'"version":"3"')), "version"),
        (changed(WHOLE, "snapshot.json", HEAD[:-1] + b',"more":1}'), "more"),
        (changed(WHOLE, LINES, MEMORY.replace(b'"t"', b"7")), "text"),
        (changed(WHOLE, LINES, MEMORY.replace(b'"n":1', b'"n":NaN')), "not JSON"),
        (changed(WHOLE, LINES, MEMORY.replace(b'["v"]', b'["w"]')), "not an array|no patterns"),
        (
            changed(
                WHOLE, LINES,
                MEMORY.replace(b'l":null,"media_type":null', b'l":"' + b"a" * 64 + b'","media_type":"text/html"'),
            ),
            "media_type",
        ),
        (changed(WHOLE, LINES, MEMORY.replace(b'{"n":1}', b'{"n":"' + b"x" * 70_000 + b'"}')), "payload"),
        (changed(WHOLE, ARRAY, _npy(2, 2) + VECTOR), "not an array"),
        (changed(WHOLE, ARRAY, _npy(1, 2) + np.array([1, np.nan], "<f4").tobytes()), "NaN"),
        (
            changed(WHOLE, ARRAY, _npy(1, 2).replace(b"<f4", b"|O ") + VECTOR),
            "not an array",
        ),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused(file: bytes, says: str) -> None:
    with pytest.raises(InvalidSnapshot, match=says):
        items(file)


# --- where they are kept ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket in a real S3 server on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in keys.items():
                patch.setenv(name, value)
            while True:
                assert process.poll() is None
                with socket.socket() as asked:
                    if asked.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            boto3.client("s3", endpoint_url=url).create_bucket(Bucket="kept")
            yield f"s3://kept/some/prefix?endpoint={url}&region=us-east-1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SnapshotStore:
    if request.param == "folder":
        return open_store(None, tmp_path / "snapshots")
    return open_store(request.getfixturevalue("bucket_url"), tmp_path)


@pytest.fixture
def put(tmp_path: Path) -> Callable[[SnapshotStore, str, str, bytes], None]:
    workspace = Workspace(tmp_path / "work")

    def keep(store: SnapshotStore, collection: str, id_: str, content: bytes) -> None:
        with workspace.file() as (path, file):
            file.write(content)
            file.flush()
            store.put(collection, id_, path)
        assert not os.listdir(tmp_path / "work")

    return keep


def test_a_store_keeps_what_it_is_given(
    store: SnapshotStore, put: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"c{os.urandom(4).hex()}"
    assert store.list(name) == []
    content = os.urandom(100_000)
    put(store, name, "one", content)
    put(store, name, "two.more", b"2")
    assert [(kept.collection, kept.id, kept.size_bytes) for kept in store.list(name)] == [
        (name, "one", 100_000), (name, "two.more", 1),
    ]  # fmt: skip
    assert {kept.id for kept in store.list() if kept.collection == name} == {"one", "two.more"}
    kept = store.find(name, "one")
    assert store.read(kept, 0, 10) == content[:10]
    assert store.read(kept, 99_990, 100) == content[-10:]
    assert store.read(kept, 100_000, 10) == b""
    monkeypatch.setattr(snapshot_store, "RANGE_BYTES", 1_000)
    assert KeptFile(store, kept).read(100_001) == content
    with pytest.raises(SnapshotExists):
        put(store, name, "one", b"other")
    assert store.read(kept, 0, 10) == content[:10]
    where = store.quarantine(name, "two.more")
    assert ".quarantine" in where
    assert [kept.id for kept in store.list(name)] == ["one"]
    store.delete(name, "one")
    for missing in ("one", "two.more", "../one", ".tmp", ""):
        with pytest.raises(SnapshotNotFound):
            store.find(name, missing)
        with pytest.raises(SnapshotNotFound):
            store.delete(name, missing)
    with pytest.raises(SnapshotNotFound):
        store.list("..")


def test_a_large_file_reaches_a_bucket_in_parts(bucket_url: str, put: Callable[..., None]) -> None:
    store = BucketStore(bucket_url)
    content = os.urandom(snapshot_store.RANGE_BYTES * 2 + 17)
    put(store, "large", "one", content)
    assert KeptFile(store, store.find("large", "one")).read(len(content)) == content


def test_a_bucket_that_is_not_there_is_told(bucket_url: str, put: Callable[..., None]) -> None:
    store = BucketStore(bucket_url.replace("s3://kept", "s3://other"))
    with pytest.raises(Unreached, match="bucket"):
        store.list("c")
    with pytest.raises((Unreached, SnapshotNotFound)):
        store.find("c", "one")
    for url in ("s3://", "gs://bucket", "s3://bucket?endpint=http://x", "file:///tmp"):
        with pytest.raises(InvalidSettings, match="s3://bucket/prefix"):
            open_store(url, Path())


def test_what_was_being_written_is_gone_at_the_next_open(tmp_path: Path) -> None:
    (tmp_path / "left").write_bytes(b"half")
    Workspace(tmp_path)
    assert not os.listdir(tmp_path)
    store = FolderStore(tmp_path / "none")
    assert store.list() == store.list("c") == []


def test_a_copy_has_every_column() -> None:
    """A column that a table gets belongs in snapshots too: in the row here, and in its line of the file."""
    lines = {MemoryRow: (memories, MemoryLine), KernelRow: (kernels, KernelLine), GateRow: (gates, GateLine)}
    for row, (table, line) in lines.items():
        columns = {column.name for column in table.c} - {"key", "collection_id"}
        assert columns == set(row.__dataclass_fields__)
        assert set(line.model_fields) - {"spaces"} == {
            {"blob_hash": "original"}.get(c, c) for c in columns - {"weight"}
        }
