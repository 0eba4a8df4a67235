"""Kernels over HTTP and in process alike, and from the command line."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engram import Client
from service.errors import InvalidRequest, TrainingRefused, UnknownKernel

D, N = 24, 200
RNG = np.random.default_rng(7)
ROWS = (RNG.standard_normal((N, D)) + 6.0 * RNG.standard_normal((1, D))).astype(np.float32)
HIDDEN = np.random.default_rng(8).random((N, D)).argsort(axis=1) < D // 2
CUES = [{"vectors": {"v": row}} for row in np.where(HIDDEN, 0, ROWS).astype(np.float32)]


def test_a_kernel_is_trained_used_and_retired(client: Client, new_name: Callable[[], str]) -> None:
    crowd = client.create_collection(new_name(), {"v": {"dimension": D}}, corruptions=[{"kind": "mask", "share": 0.5}])
    crowd.store({"id": f"m{i}", "vectors": {"v": row}} for i, row in enumerate(ROWS))
    assert crowd.kernels() == []
    operation = crowd.train("kernel", space="v", steps_max=200, learning_rate=0.01)
    deadline = time.monotonic() + 120
    while operation.status in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        operation = client.operation(operation.id)
    assert operation.status == "done", operation.error
    assert operation.result is not None
    (kernel,) = crowd.kernels()
    assert kernel["record"] == operation.result
    assert (kernel["id"], kernel["status"], kernel["rank"], kernel["dimension"]) == ("v-1", "active", D, D)
    assert crowd.info().kernels == ({"id": "v-1", "space": "v"},)

    def found(**options: str) -> float:
        answers = crowd.recall_batch(CUES, limit=1, **options)
        return sum(answer.matches[0].id == f"m{i}" for i, answer in enumerate(answers)) / N

    assert found() > found(kernel="none") + 0.2
    with pytest.raises(UnknownKernel, match="in use \\(v-1\\), not v-2"):
        found(kernel="v-2")
    crowd.retire_kernel("v-1")
    assert found() == found(kernel="none")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"what": "kernels"}, "what: is one of 'gate', 'kernel', not 'kernels'"),
        ({"what": "kernel", "objective": "separate"}, "'cues', 'separation' or 'separation_plus'"),
        ({"what": "kernel", "time_limit_s": 0}, "time_limit_s"),
        ({"what": "gate", "space": "v"}, "space"),
    ],
)
def test_a_misspelt_training_is_refused_in_words(
    client: Client, new_name: Callable[[], str], request_: dict[str, object], words: str
) -> None:
    crowd = client.create_collection(new_name(), {"v": {"dimension": D}})
    with pytest.raises(InvalidRequest, match=words):
        crowd.train(**request_)  # type: ignore[arg-type]


def test_what_cannot_be_trained_says_why(client: Client, new_name: Callable[[], str]) -> None:
    near = client.create_collection(new_name(), {"v": {"dimension": D, "similarity": "neg_l2"}})
    with pytest.raises(TrainingRefused, match="a kernel compares directions"):
        near.train("kernel")


def test_the_command_shows_what_came_of_it(
    run_engram: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        blocks = np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((24, 24), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    data = tmp_path / "memories"
    assert run_engram("store", folder, "--data", data).returncode == 0
    trained = run_engram("train", "kernel", "--space", "image", "--time-limit", "5", "--data", data)
    assert trained.returncode == 0, trained.stderr
    assert "Own memory first" in trained.stdout
    assert "The kernel is in use" in trained.stdout or "The kernel is dropped" in trained.stdout
    missing = run_engram("train", "kernel", "--space", "sound", "--data", data)
    assert missing.returncode == 1
    assert "no space sound" in missing.stderr
    again = run_engram("train", "gate", "--data", data)
    assert "strangers let in" in again.stdout
    misused = run_engram("train", "gate", "--objective", "cues", "--data", data)
    assert misused.returncode == 1
    assert "objective" in misused.stderr
    listed = run_engram("kernels", "--data", data)
    assert "image-1" in listed.stdout
    recalled = run_engram("recall", folder / "3.png", "--kernel", "none", "--data", data)
    assert "similarity (cosine)" in recalled.stdout
