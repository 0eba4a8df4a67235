"""The wheel carries all that a server needs: built, unpacked elsewhere, served from there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA_FILES = (
    "service/encoders/imagenet_classes.txt", "service/encoders/bert_uncased_vocab.txt", "service/rpc/engram.proto",
    "service/rpc/engram.binpb", "migrations/env.py",
)  # fmt: skip


def test_the_wheel_serves_elsewhere(serve: Callable[..., AbstractContextManager[Any]], tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("engram_memory-*.whl")
    elsewhere = tmp_path / "elsewhere"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(elsewhere), str(wheel)], check=True)
    for name in DATA_FILES:
        assert (elsewhere / name).is_file(), f"the wheel lacks {name}"
    where = subprocess.run(
        [sys.executable, "-c", "import engram, service, workers; print(engram.__file__, service.__file__)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(elsewhere)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.count(str(elsewhere)) == 2
    with serve(tmp_path / "data", cwd=tmp_path, PYTHONPATH=str(elsewhere)) as server:
        http = server.http
        http.put("/v1/collections/c", json={"spaces": {"text": {"encoder": "bridge", "source": "text"}}})
        stored = http.post("/v1/collections/c/store", json={"memories": [{"id": "a", "text": "a cat on a mat"}]})
        assert stored.json()["results"][0]["status"] == "stored", stored.text
        found = http.post("/v1/collections/c/recall", json={"cue": {"text": "cat"}}).json()
        assert found["results"][0]["matches"][0]["id"] == "a"
