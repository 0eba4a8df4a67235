"""fsck: each kind of thing that a data folder keeps is damaged for real, found, named, and mended where it can be."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import psycopg
import pytest
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import make_url

from engram import Client
from engram.cli import main
from service.app.engine import Engine
from service.app.findings import NAMED_MAX, Report, pattern_fault
from service.app.fsck import fsck
from service.app.reencode_schemas import ReencodeRequest
from service.app.schemas import CollectionConfig, StoreRequest
from service.errors import FolderInUse, InvalidRequest, NotFound, OriginalsElsewhere, StorageUnavailable
from service.settings import Settings
from service.storage.database import Database
from service.storage.folder import database_path
from service.storage.jobs import NewItem
from service.storage.repository import Repository
from service.storage.writer import Writer
from workers.loop import running

COUNT = 6
D = 4
SPACES = {"v": {"dimension": D}, "image": {"encoder": "pixels", "options": {"size": 4}}}


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled") / "memories"
    fill(Settings(data=folder))
    return folder


@pytest.fixture
def settings(tmp_path: Path, new_database: Callable[[Path], Path | str], request: pytest.FixtureRequest) -> Settings:
    where = new_database(tmp_path / "memories")
    if isinstance(where, Path):
        return cast(Settings, request.getfixturevalue("on_sqlite"))
    made = Settings(data=tmp_path / "memories", database_url=SecretStr(where))
    fill(made)
    return made


@pytest.fixture
def on_sqlite(tmp_path: Path, filled: Path) -> Settings:
    shutil.copytree(filled, tmp_path / "memories")
    return Settings(data=tmp_path / "memories")


def fill(settings: Settings) -> None:
    """Six memories with a picture and a vector, a kernel, and a snapshot."""
    with Engine(settings) as engine:
        engine.create_collection("c", CollectionConfig.model_validate({"spaces": SPACES}))
        with running(engine):
            memories = [
                {"id": f"m{i}", "image": {"base64": png(i)}, "vectors": {"v": [i + 1.0, 2, 3, 4]}, "payload": {"n": i}}
                for i in range(COUNT)
            ]
            reply = engine.store("c", StoreRequest.model_validate({"memories": memories}))
            assert [item.error for item in reply.results] == [None] * COUNT
            operation = engine.create_snapshot("c")
            while engine.operation(operation.id).status != "done":
                time.sleep(0.01)
        live = engine.resources.live("c")
        engine.repository.put_kernel(live.id, "v", "cues", np.eye(D, dtype=np.float32), {}, activate=True)


def run(settings: Settings, *statements: tuple[str, Any]) -> None:
    """Statements on the database itself, by another program, with its constraints off."""
    if settings.database_url is None:
        connection = sqlite3.connect(database_path(settings.data))
        connection.execute("PRAGMA ignore_check_constraints=ON")
        for statement, value in statements:
            connection.execute(statement, () if value is None else (value,))
        connection.commit()
        connection.close()
        return
    url = make_url(settings.database_url.get_secret_value()).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False)) as there:
        for table, name in (("patterns", "ck_patterns_vector"), ("kernels", "ck_kernels_weight")):
            there.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}")
        for statement, value in statements:
            there.execute(statement.replace("?", "%s"), None if value is None else (value,))


def originals(settings: Settings) -> dict[str, Path]:
    return {path.name: path for path in sorted(settings.data.glob("blobs/??/*"))}


def found(report: Report) -> dict[tuple[str, str], list[str]]:
    """By kind and state: the names."""
    by: dict[tuple[str, str], list[str]] = {}
    for each in report.found:
        by.setdefault((each.kind, each.state), []).extend(named.name for named in each.first)
    return by


def vector(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_a_whole_folder_has_nothing_wrong(settings: Settings, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    before = {path: path.stat().st_mtime_ns for path in settings.data.rglob("*.tar")} | {
        path: path.stat().st_mtime_ns for path in originals(settings).values()
    }
    report = fsck(settings, tell=lambda what, share: told.append((what, share)))
    assert report.found == []
    assert report.exit_code == 0
    assert report.checked == {
        "collections": 1, "patterns": 2 * COUNT, "memories": COUNT, "kernels": 1, "originals": COUNT, "snapshots": 1,
        "banks": 1,
    }  # fmt: skip
    assert {what for what, _ in told} == {"the database", "originals", "snapshots", "banks"}
    assert all(0 <= share <= 1 for _, share in told)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    if settings.database_url is not None:  # else all originals would be missing
        with pytest.raises(OriginalsElsewhere):
            fsck(settings.model_copy(update={"data": tmp_path / "another"}))


def test_damaged_patterns_are_removed_and_made_again(settings: Settings) -> None:
    of = "space = '{}' AND memory_key = (SELECT key FROM memories WHERE id = '{}')"
    run(
        settings,
        (f"UPDATE patterns SET vector = ? WHERE {of.format('v', 'm0')}", b"abc"),
        (f"UPDATE patterns SET vector = ? WHERE {of.format('v', 'm1')}", vector(1, 2, np.nan, 4)),
        (f"UPDATE patterns SET dimension = 3, vector = ? WHERE {of.format('v', 'm2')}", vector(1, 2, 3)),
        (f"UPDATE patterns SET vector = ? WHERE {of.format('image', 'm3')}", vector(1, 2)),
        (f"UPDATE patterns SET space = 'former' WHERE {of.format('v', 'm4')}", None),
    )
    with Engine(settings) as engine, pytest.raises(StorageUnavailable, match="engram fsck"):
        engine.resources.live("c")  # the server starts all the same
    wanted = {
        ("pattern_damaged", "lost"): ["c/m0 v", "c/m1 v", "c/m2 v"],
        ("pattern_damaged", "repairable"): ["c/m3 image", "c/m4 former"],
    }
    report = fsck(settings)
    assert found(report) == wanted
    assert report.exit_code == 2
    assert fsck(settings).found == report.found  # nothing was changed
    repaired = fsck(settings, repair=True)
    assert repaired.checked["banks"] == 1
    assert [each.state for each in repaired.found] == [each.state.replace("able", "ed") for each in report.found]
    left = fsck(settings)
    assert found(left) == {("pattern_missing", "repairable"): ["c/m3"]}
    assert left.found[0].remedy == "engram reencode c image"
    assert left.exit_code == 1
    with Engine(settings) as engine, running(engine):
        assert engine.collection("c").count == COUNT
        operation = engine.reencode("c", "image", ReencodeRequest())
        while operation.status in ("queued", "running"):
            time.sleep(0.01)
            operation = engine.operation(operation.id)
        assert operation.status == "done"
        assert engine.repository.get_memory(engine.resources.live("c").id, "m3").spaces == ("image", "v")
    assert fsck(settings).found == []


def test_damaged_and_missing_originals_are_named_and_healed_by_storing_again(settings: Settings) -> None:
    flipped, gone = list(originals(settings).values())[:2]
    content = bytearray(flipped.read_bytes())
    content[20] ^= 1
    flipped.write_bytes(content)
    gone.unlink()
    stray = settings.data / "blobs" / "00" / ("00" * 32)
    stray.write_bytes(b"not what its name says")
    unnamed = settings.data / "blobs" / "2c" / "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
    unnamed.write_bytes(b"foo")
    of = dict(zip(hashes_of(settings), (f"c/m{i}" for i in range(COUNT)), strict=True))
    report = fsck(settings)
    assert found(report) == {
        ("original_damaged", "repairable"): [stray.name],
        ("original_damaged", "lost"): [of[flipped.name]],
        ("original_missing", "lost"): [of[gone.name]],
        ("original_unnamed", "note"): [unnamed.name],
    }
    assert flipped.exists()
    repaired = fsck(settings, repair=True)
    assert ("original_damaged", "repaired") in found(repaired)
    assert not flipped.exists()
    assert (settings.data / "blobs" / "quarantine" / flipped.name).read_bytes() == content
    assert unnamed.exists()  # housekeeping's
    left = fsck(settings)
    assert found(left)["original_missing", "lost"] == sorted([of[flipped.name], of[gone.name]], key=reverse(of).get)
    with Engine(settings) as engine, running(engine):
        again = [{"id": f"m{i}", "image": {"base64": png(i)}, "vectors": {"v": [1, 2, 3, 4]}} for i in range(COUNT)]
        engine.store("c", StoreRequest.model_validate({"memories": again}))
    assert fsck(settings).exit_code == 0


def reverse(of: dict[str, str]) -> dict[str, str]:
    return {name: hash_ for hash_, name in of.items()}


def hashes_of(settings: Settings) -> list[str]:
    """Of the memories, in their order."""
    where = settings.database_url
    database = Database.open(database_path(settings.data) if where is None else where.get_secret_value())
    writer = Writer(database)
    repository = Repository(database, writer)
    row = repository.get_collection("c")
    kept = [repository.get_memory(row.id, f"m{i}").blob_hash for i in range(row.count)]
    writer.close()
    database.close()
    return [str(hash_) for hash_ in kept]


def test_an_original_that_waits_to_be_encoded_is_missed(settings: Settings) -> None:
    with Engine(settings) as engine:
        hash_ = engine.blobs.put(png(99))
        live = engine.resources.live("c")
        job = engine.repository.enqueue("store", live.id, {}, [NewItem({}, hash_)])
    originals(settings)[hash_].unlink()
    assert found(fsck(settings)) == {("original_missing", "lost"): [f"item 0 of operation {job}"]}


def test_a_snapshot_cut_short_is_moved_aside(on_sqlite: Settings) -> None:
    (kept,) = on_sqlite.data.glob("snapshots/c/*.tar")
    os.truncate(kept, 3000)
    report = fsck(on_sqlite)
    assert found(report) == {("snapshot_damaged", "repairable"): [f"c/{kept.stem}"]}
    assert report.exit_code == 1
    assert fsck(on_sqlite, repair=True).exit_code == 1
    assert (on_sqlite.data / "snapshots" / ".quarantine" / "c" / kept.name).stat().st_size == 3000
    assert fsck(on_sqlite).found == []


def test_damaged_kernels_and_payloads(settings: Settings) -> None:
    run(
        settings,
        ("UPDATE kernels SET weight = ?", vector(*[np.inf] * D * D)),
        ("UPDATE memories SET payload = ? WHERE id = 'm5'", b'{"n"'),
    )
    report = fsck(settings, repair=True)
    assert found(report) == {("payload_damaged", "lost"): ["c/m5"], ("kernel_damaged", "repaired"): ["c v-1"]}
    assert found(fsck(settings)) == {("payload_damaged", "lost"): ["c/m5"]}
    with Engine(settings) as engine:
        assert engine.collection("c").kernels == []


def test_files_left_half_written_go_with_repair(on_sqlite: Settings) -> None:
    (on_sqlite.data / "snapshots" / ".tmp").mkdir(exist_ok=True)
    stale = [on_sqlite.data / "blobs" / "tmp" / "old", on_sqlite.data / "snapshots" / ".tmp" / "old"]
    young = on_sqlite.data / "blobs" / "tmp" / "young"  # of another server, that may be writing it
    for path in (*stale, young):
        path.write_bytes(b"half")
    os.utime(stale[0], (1, 1))
    report = fsck(on_sqlite)
    assert found(report) == {("temporary_stale", "note"): [str(path) for path in stale]}
    assert report.exit_code == 0
    assert all(path.exists() for path in stale)
    fsck(on_sqlite, repair=True)
    assert not any(path.exists() for path in stale)
    assert young.exists()


def test_rows_that_belong_to_nothing_and_indexes(on_sqlite: Settings) -> None:
    run(
        on_sqlite,
        ("INSERT INTO patterns VALUES (99, 'v', 'f4', 1, ?)", vector(1)),
        ("PRAGMA writable_schema=ON", None),
        ("UPDATE sqlite_master SET sql = sql || ' WHERE blob_hash IS NULL' WHERE name = 'ix_memories_blob'", None),
    )
    report = fsck(on_sqlite)
    assert found(report)["orphan_rows", "repairable"] == ["patterns"]
    assert ("index_damaged", "repairable") in found(report)
    assert report.exit_code == 1
    assert fsck(on_sqlite, repair=True).exit_code == 1
    assert fsck(on_sqlite).found == []


def test_a_damaged_database_is_said_and_not_written_to(on_sqlite: Settings) -> None:
    path = database_path(on_sqlite.data)
    content = bytearray(path.read_bytes())
    connection = sqlite3.connect(path)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'patterns'").fetchone()
    connection.close()
    content[(page - 1) * 4096 : (page - 1) * 4096 + 200] = b"\xff" * 200
    path.write_bytes(content)
    (kept,) = on_sqlite.data.glob("snapshots/c/*.tar")
    os.truncate(kept, 3000)
    report = fsck(on_sqlite, repair=True)
    assert report.exit_code == 2
    assert {"database_damaged", "snapshot_damaged"} <= {each.kind for each in report.found}
    assert path.read_bytes() == content
    path.write_bytes(b"no database at all" * 1000)
    report = fsck(on_sqlite)
    assert found(report)["database_damaged", "lost"] == ["engram.db"]
    assert report.checked == {"originals": COUNT}  # what can be told without it
    path.unlink()
    with pytest.raises(NotFound, match=r"engram\.db"):
        fsck(on_sqlite)


def test_compacting_leaves_nothing_of_what_was_deleted(on_sqlite: Settings) -> None:
    secret = b"a secret of before" * 10
    run(on_sqlite, ("PRAGMA secure_delete=OFF", None), ("UPDATE memories SET payload = ?", b'"' + secret + b'"'))
    run(on_sqlite, ("PRAGMA secure_delete=OFF", None), ("UPDATE memories SET payload = ?", b"{}"))
    assert secret in database_path(on_sqlite.data).read_bytes()
    report = fsck(on_sqlite, compact=True)
    assert list(found(report)) == [("database_compacted", "note")]
    assert report.exit_code == 0
    assert secret not in database_path(on_sqlite.data).read_bytes()
    elsewhere = on_sqlite.model_copy(update={"database_url": SecretStr("postgresql://nowhere/none")})
    with pytest.raises(InvalidRequest, match="VACUUM FULL"):
        fsck(elsewhere, compact=True)


def test_the_owner_of_the_folder_is_named(on_sqlite: Settings) -> None:
    with Engine(on_sqlite) as engine:
        engine.folder.announce("http://127.0.0.1:1234")
        with pytest.raises(FolderInUse, match=r"serves at http://127\.0\.0\.1:1234"):
            fsck(on_sqlite)


def test_the_first_names_are_kept_and_all_are_counted() -> None:
    report = Report()
    for i in range(100):
        report.add("original_missing", "lost", f"m{i}")
    assert (report.found[0].count, len(report.found[0].first)) == (100, NAMED_MAX)
    assert pattern_fault("f4", D, vector(0, 0, 0, 0), D) is not None
    assert pattern_fault("f2", D, vector(1, 2, 3, 4), D) is not None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "memories"
    with Client(path=folder) as client:
        client.create_collection("c", spaces=SPACES)
        client.collection("c").store([{"id": "m", "image": png(0), "vectors": {"v": [1, 2, 3, 4]}}])

    def ran(*arguments: str) -> tuple[int | None, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["fsck", "--data", str(folder), *arguments])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err  # type: ignore[return-value]

    code, out, _ = ran()
    assert (code or 0, out.splitlines()[-1]) == (0, "Nothing is wrong.")
    next(iter(folder.glob("blobs/??/*"))).unlink()
    code, out, _ = ran()
    assert code == 2
    assert "lost: 1 missing originals\n  c/m: original" in out
    code, out, _ = ran("--json")
    said = json.loads(out)
    assert (code, said["exit_code"], said["found"][0]["kind"]) == (2, 2, "original_missing")
    server = subprocess.Popen(
        [sys.executable, "-c", "import sys; from service.storage.folder import DataFolder\n"
         f"DataFolder.open({str(folder)!r}, 'http://here:1'); print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    server.stdout.readline()
    code, out, err = ran()
    server.communicate()
    assert (code, out) == (3, "")
    assert "serves at http://here:1" in err.replace("\n", " ")
