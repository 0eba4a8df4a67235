"""The server as a process: keys, bounds, folders, crashes, restarts."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sklearn.datasets import load_digits

from service.api import openapi
from service.encoders.picture import write_png

Serve = Callable[..., AbstractContextManager[Any]]

KILLS = 10 if os.environ.get("TEST_PROFILE") == "full" else 1
DIGITS = 2_000
BATCH = 20


def engram(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
    return subprocess.run(
        [sys.executable, "-m", "engram", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_document_is_not_stale() -> None:
    assert openapi.PATH.read_text() == openapi.text(), "the API has changed: run `make openapi`"


def test_beyond_loopback_a_key_is_needed(serve: Serve, tmp_path: Path) -> None:
    refused = engram("serve", "--data", str(tmp_path / "a"), "--host", "0.0.0.0")
    assert refused.returncode == 1
    assert "ENGRAM_API_KEY" in refused.stderr
    assert "Traceback" not in refused.stderr
    with serve(tmp_path / "b", ENGRAM_HOST="0.0.0.0", ENGRAM_API_KEY="right") as server:
        assert server.http.get("/livez").status_code == 200
        assert server.http.get("/readyz").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
            for path in ("/v1/collections", "/metrics"):
                response = server.http.get(path, headers=headers)
                assert (response.status_code, response.json()["code"]) == (401, "unauthorized")
        assert server.http.get("/v1/collections", headers={"authorization": "Bearer right"}).status_code == 200


def test_settings_that_are_none_are_refused(tmp_path: Path) -> None:
    unknown = engram("serve", "--data", str(tmp_path), ENGRAM_TREADS="2")
    assert unknown.returncode == 1
    assert "ENGRAM_TREADS is not a setting" in unknown.stderr
    assert engram("serve", "--data", str(tmp_path), ENGRAM_THREADS="many").returncode == 1


def test_a_device_that_is_not_there_stops_the_server_at_its_start(tmp_path: Path) -> None:
    refused = engram("serve", "--data", str(tmp_path), ENGRAM_ENCODER_DEVICE="cuda:99")
    assert refused.returncode == 1
    assert "no device 'cuda:99'" in refused.stderr
    assert "there is cpu" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = engram("serve", "--data", str(tmp_path), "--port", port)
    assert refused.returncode == 1
    assert port in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_folder_has_one_owner(serve: Serve, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        second = engram("serve", "--data", str(tmp_path), "--port", "0")
        assert second.returncode == 1
        assert "folder_in_use" in second.stderr
        assert server.url in second.stderr
        assert server.http.get("/livez").status_code == 200


def test_sigterm_closes_everything(serve: Serve, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        server.http.put("/v1/collections/c", json={"spaces": {"v": {"dimension": 2}}}).raise_for_status()
    assert server.process.returncode == 128 + 15
    assert not (tmp_path / "engram.db-wal").exists(), "the write-ahead log is folded into the database"
    assert (tmp_path / "owner.lock").read_text() == ""


def test_without_a_key_only_loopback_names_are_answered(serve: Serve, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        for host in ("evil.example:8000", "10.0.0.1", "localhost.evil.example"):
            refused = server.http.get("/v1/collections", headers={"host": host})
            assert (refused.status_code, refused.json()["code"]) == (403, "cross_site"), host
        for host in ("localhost", "localhost:1234", "127.0.0.1:80", "[::1]:8000"):
            assert server.http.get("/v1/collections", headers={"host": host}).status_code == 200, host


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    refused = engram("serve", "--data", str(file), "--port", "0")
    assert refused.returncode == 1
    assert "storage_unavailable" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_bodies_are_bounded(serve: Serve, tmp_path: Path) -> None:
    with serve(tmp_path, ENGRAM_BODY_BYTES_MAX="20000", ENGRAM_IMAGE_PIXELS_MAX="100") as server:
        server.http.put("/v1/collections/c", json={"spaces": {"image": {"encoder": "pixels"}}}).raise_for_status()
        for body in ({"content": b"x" * 30_000}, {"content": iter([b"x" * 9_000] * 4)}):  # with a length, and chunked
            response = server.http.post("/v1/collections/c/store", **body)
            assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        big = write_png(load_digits().images[0].repeat(2, 0).repeat(2, 1).astype("uint8")[..., None].repeat(3, 2))
        image = {"base64": base64.b64encode(big).decode()}
        reply = server.http.post("/v1/collections/c/store", json={"memories": [{"image": image}]}).json()
        assert reply["results"][0]["error"]["code"] == "image_too_large"


def digit(i: int) -> dict[str, str]:
    images = load_digits().images
    pixels = (images[i % len(images)] * 15).astype("uint8")[..., None].repeat(3, axis=2)
    return {"base64": base64.b64encode(write_png(pixels)).decode()}


def test_a_restart_gives_the_same_answers(serve: Serve, tmp_path: Path) -> None:
    spaces = {"image": {"encoder": "pixels", "options": {"size": 8, "colour": False}}}
    ask = {"cue": {"image": digit(17)}, "reconstruct": True, "limit": 7}
    answers = []
    with serve(tmp_path) as server:
        server.http.put("/v1/collections/d", json={"spaces": spaces}).raise_for_status()
        memories = [{"id": str(i), "image": digit(i), "payload": {"i": i}} for i in range(150)]
        server.http.post("/v1/collections/d/store", json={"memories": memories}).raise_for_status()
        server.http.post("/v1/collections/d/memories/delete", json={"ids": ["3", "4"]}).raise_for_status()
        server.wait_calibrated("d")
        answers.append(server.http.post("/v1/collections/d/recall", json=ask).json())
        before = server.http.get("/v1/collections/d").json()
    with serve(tmp_path) as server:
        answers.append(server.http.post("/v1/collections/d/recall", json=ask).json())
        after = server.http.get("/v1/collections/d").json()
    assert before["version"] == after["version"]
    assert before["calibration"] == after["calibration"]
    assert after["count"] == 148
    first, second = (answer["results"][0] for answer in answers)
    assert first["verdict"] == second["verdict"] == "known"
    assert first["reconstruction"] == second["reconstruction"]
    assert [m["id"] for m in first["matches"]] == [m["id"] for m in second["matches"]]
    assert [m["similarity"] for m in first["matches"]] == pytest.approx([m["similarity"] for m in second["matches"]])


@pytest.mark.full("postgres")  # servers over PostgreSQL are killed in tests/cluster
@pytest.mark.parametrize("kill", range(KILLS))
def test_what_was_acknowledged_survives_kill_9(
    serve: Serve, tmp_path: Path, new_database: Callable[[Path], Path | str], kill: int
) -> None:
    """Killed in the middle of storing 2,000 digits: every acknowledged one is there after the restart, and answers."""
    spaces = {"image": {"encoder": "pixels", "options": {"size": 8, "colour": False}}}
    acknowledged: list[str] = []
    promised: list[str] = []  # accepted without waiting: on disk, encoded later
    where = new_database(tmp_path)
    environment = {} if isinstance(where, Path) else {"ENGRAM_DATABASE_URL": where}
    with serve(tmp_path, **environment) as server:
        server.http.put("/v1/collections/d", json={"spaces": spaces}).raise_for_status()

        def store(worker: int) -> None:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                for start in range(worker * BATCH, DIGITS, 2 * BATCH):
                    ids = [str(i) for i in range(start, start + BATCH)]
                    wait = (start // BATCH) % 3 != 0
                    memories = [{"id": i, "image": digit(int(i))} for i in ids]
                    try:
                        reply = http.post("/v1/collections/d/store", json={"memories": memories, "wait": wait})
                    except httpx.TransportError:
                        return
                    if reply.status_code == 200:
                        acknowledged.extend(ids)
                    elif reply.status_code == 202:
                        promised.extend(ids)

        threads = [threading.Thread(target=store, args=(worker,)) for worker in range(2)]
        for thread in threads:
            thread.start()
        while len(acknowledged) + len(promised) < (kill + 1) * DIGITS // (KILLS + 1):
            time.sleep(0.001)
        server.kill()
        for thread in threads:
            thread.join()
    assert acknowledged
    assert promised
    assert len(acknowledged) + len(promised) < DIGITS, "the server was killed too late to show anything"
    with serve(tmp_path, **environment) as server:
        wanted = set(acknowledged) | set(promised)
        deadline = time.monotonic() + 60
        while server.http.post("/v1/collections/d/memories/count").json()["count"] < len(wanted):
            assert time.monotonic() < deadline, "what was accepted before the crash is not being encoded"
            time.sleep(0.1)
        for i in wanted:
            memory = server.http.get(f"/v1/collections/d/memories/{i}")
            assert memory.status_code == 200, i
            assert memory.json()["spaces"] == ["image"]
        cues = [{"image": digit(int(i))} for i in sorted(wanted)[:200]]
        results = server.http.post("/v1/collections/d/recall", json={"cues": cues, "limit": 3}).json()["results"]
        # Some ids past 1,797 hold the same digit again, so an equal picture may come first.
        assert all(result["matches"][0]["similarity"] > 0.9999 for result in results)
        content = server.http.get(f"/v1/collections/d/memories/{sorted(wanted)[0]}/content").content
        assert content == base64.b64decode(digit(int(sorted(wanted)[0]))["base64"])
