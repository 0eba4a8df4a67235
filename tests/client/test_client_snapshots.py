"""Snapshots by every client, from the command line, and from one to the other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engram import Client
from engram.cli import main
from engram.snapshots import collection_of
from service.errors import (
    CollectionNotEmpty,
    CollectionNotFound,
    InvalidRequest,
    InvalidSnapshot,
    NotFound,
    ScheduleNotFound,
    SnapshotExists,
    SnapshotNotFound,
)

D = 8
SPACES = {"v": {"dimension": D}}
ROWS = np.random.default_rng(0).standard_normal((40, D)).astype(np.float32)
MEMORIES: list[dict[str, Any]] = [
    {"id": f"m{i}", "vectors": {"v": row}, "payload": {"n": i}} for i, row in enumerate(ROWS)
]


@pytest.fixture
def client(client_of_any_way: Client) -> Client:
    return client_of_any_way


def test_a_collection_comes_back(client: Client, new_name: Callable[[], str], tmp_path: Path) -> None:
    name = new_name()
    target = client.create_collection(name, SPACES)
    target.store(MEMORIES)
    made = target.snapshot()
    assert (made.made_of, made.memories, made.spaces) == (name, 40, {"v": None})
    assert target.snapshots() == [made] == [target.snapshot_info(made.id)]
    target.delete(["m1", "m2"])
    with pytest.raises(CollectionNotEmpty):
        target.restore(made.id)
    done = target.restore(made.id, replace=True)
    assert (done.collection, done.memories, target.count()) == (name, 40, 40)
    assert target.recall(vectors={"v": ROWS[1]}, gate=False).matches[0].id == "m1"

    file = target.download_snapshot(made.id, tmp_path)
    assert (file.name, file.stat().st_size, collection_of(file)) == (f"{name}-{made.id}.tar", made.size_bytes, name)
    other = new_name()
    assert client.restore(file, other).collection == other
    assert client.collection(other).count() == 40
    assert [kept.id for kept in client.collection(other).snapshots()] == [f"{name}-{made.id}"]
    client.delete_collection(name)
    assert client.restore(file).collection == name  # where it came from
    target.delete_snapshot(made.id)
    for call in (target.snapshot_info, target.delete_snapshot, target.restore):
        with pytest.raises(SnapshotNotFound):
            call(made.id)
    with pytest.raises(SnapshotNotFound):
        target.download_snapshot(made.id, tmp_path / "none.tar")
    with pytest.raises(CollectionNotFound):
        client.collection("never").snapshot()


def test_what_is_wrong_is_refused(client: Client, new_name: Callable[[], str], tmp_path: Path) -> None:
    target = client.create_collection(new_name(), SPACES)
    target.store(MEMORIES[:3])
    made = target.snapshot()
    file = target.download_snapshot(made.id, tmp_path / "s.tar")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.tar").write_bytes(damaged)
    with pytest.raises(InvalidSnapshot, match="its "):
        target.upload_snapshot(tmp_path / "damaged.tar")
    with pytest.raises(InvalidRequest):
        target.upload_snapshot(file, "a name")
    target.store(MEMORIES[3:4])
    again = target.download_snapshot(target.snapshot().id, tmp_path / "again.tar")
    with pytest.raises(SnapshotExists):
        target.upload_snapshot(again, made.id)
    assert target.upload_snapshot(file, made.id).id == made.id
    with pytest.raises(NotFound):
        target.upload_snapshot(tmp_path / "none.tar")
    assert {kept.id for kept in target.snapshots()} >= {made.id}


@pytest.fixture(params=["http_client", "grpc_client", "local_client", "awaited_local_client"])
def any_client(request: pytest.FixtureRequest) -> Client:
    found: Client = request.getfixturevalue(request.param)
    return found


def test_snapshots_at_set_times(any_client: Client, new_name: Callable[[], str]) -> None:
    target = any_client.create_collection(new_name(), SPACES)
    target.store(MEMORIES)
    with pytest.raises(ScheduleNotFound):
        target.snapshot_schedule()
    for every_s, keep in ((59, 7), (10**9, 7), (60, 0), (60, 1_001)):
        with pytest.raises(InvalidRequest):
            target.schedule_snapshots(every_s, keep)
    asked = target.schedule_snapshots(3_600, keep=2)
    assert (asked.every_s, asked.keep, asked.error) == (3_600, 2, None)
    deadline = time.monotonic() + 60
    while (told := target.snapshot_schedule()).snapshot is None or told.operation is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [kept.id for kept in target.snapshots()] == [told.snapshot]
    assert (told.next_at > (told.made_at or ""), told.failed_at) == (True, None)
    target.unschedule_snapshots()
    with pytest.raises(ScheduleNotFound):
        target.snapshot_schedule()
    assert len(target.snapshots()) == 1
    with pytest.raises(CollectionNotFound):
        any_client.collection("never").schedule_snapshots(60)


def test_the_api_is_plain_http(server_url: str, new_name: Callable[[], str]) -> None:
    with httpx.Client(base_url=f"{server_url}/v1/collections") as http:
        name = new_name()
        http.put(f"/{name}", json={"spaces": SPACES})
        started = http.post(f"/{name}/snapshots")
        assert started.status_code == 202
        while (operation := http.get(f"{server_url}/v1/operations/{started.json()['id']}").json())["status"] != "done":
            time.sleep(0.05)
        address = f"/{name}/snapshots/{operation['result']['id']}"
        file = http.get(f"{address}/content")
        assert file.headers["content-type"] == "application/x-tar"
        assert len(file.content) == operation["result"]["size_bytes"]
        for content, status, code in (
            (file.content[:-1], 422, "snapshot_damaged"), (b"", 422, "snapshot_damaged"),
            (file.content, 201, None),
        ):  # fmt: skip
            answer = http.put(f"/{name}/snapshots/mine/content", content=content)
            assert (answer.status_code, answer.json().get("code")) == (status, code)
        assert http.put(f"/{name}/snapshots/.x/content", content=file.content).status_code == 422
        assert http.post(f"{address}/restore", json={"into": "../x"}).status_code == 422
        assert http.post(f"{address}/restore", json={"inot": "x"}).status_code == 422
        assert http.post(f"{address}/restore", content=b"{").status_code == 400
        assert http.get(f"/{name}/snapshots/none").status_code == 404
        assert http.delete(address).status_code == 204


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The `engram` command in this process, which has the engine's libraries loaded already."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    told = capsys.readouterr()
    return code, told.out + told.err


def test_the_command_and_the_move_to_a_server(
    server_url: str, new_name: Callable[[], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "laptop"
    mine, yours = new_name(), new_name()
    with Client(path=data) as client:
        for name in (mine, yours):
            client.create_collection(name, SPACES).store(MEMORIES)
    at = ("--collection", mine, "--data", data)
    assert "40" in run(capsys, "snapshot", "create", *at)[1]
    id_ = json.loads(run(capsys, "snapshot", "list", "--json", *at)[1])["id"]
    assert id_ in run(capsys, "snapshot", "list", *at)[1]
    assert json.loads(run(capsys, "snapshot", "info", id_, "--json", *at)[1])["memories"] == 40
    file = tmp_path / "s.tar"
    assert run(capsys, "snapshot", "download", id_, file, *at)[0] == 0
    copy = new_name()
    assert "40 memories" in run(capsys, "snapshot", "restore", file, "--into", copy, "--data", data)[1]
    code, told = run(capsys, "snapshot", "restore", id_, *at)
    assert (code, "collection_not_empty" in told) == (1, True)
    assert "deleted" in run(capsys, "snapshot", "delete", id_, *at)[1]
    code, told = run(capsys, "push", server_url, "--data", data)
    assert code == 0, told
    with Client(server_url) as there:
        assert {mine, yours, copy} <= {info.name for info in there.collections()}
        assert there.collection(mine).count() == 40
        assert there.collection(mine).snapshots() == []
    assert run(capsys, "push", server_url, "--collection", mine, "--data", data)[0] == 1
    assert run(capsys, "push", server_url, "--collection", mine, "--replace", "--data", data)[0] == 0
    assert not list((data / "snapshots" / mine).iterdir())
    assert "No snapshots of" in run(capsys, "snapshot", "schedule", *at)[1]
    assert run(capsys, "snapshot", "schedule", "--keep", 3, *at)[0] == 1
    for wrong in (("--every", "six hours"), ("--every", "59s"), ("--every", "1h", "--off")):
        assert run(capsys, "snapshot", "schedule", *wrong, *at)[0] == 1
    assert "every 6h, the newest 7 are kept" in run(capsys, "snapshot", "schedule", "--every", "6h", *at)[1]
    assert json.loads(run(capsys, "snapshot", "schedule", "--keep", 3, "--json", *at)[1])["every_s"] == 21_600
    assert "No snapshots of" in run(capsys, "snapshot", "schedule", "--off", *at)[1]
