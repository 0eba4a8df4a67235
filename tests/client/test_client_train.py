"""Training the gate with one's own cues, over HTTP and in process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engram import Client
from engram.replies import Operation
from service.errors import InvalidRequest

NewName = Callable[[], str]
COUNT = 40


def picture(seed: int, noise_seed: int | None = None) -> NDArray[np.uint8]:
    blocks = np.random.default_rng(seed).integers(40, 216, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(blocks).resize((16, 16), Image.Resampling.BICUBIC)).astype(np.float64)
    if noise_seed is not None:
        pixels = pixels + np.random.default_rng(noise_seed).normal(0, 60, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def ended(client: Client, operation: Operation) -> Operation:
    deadline = time.monotonic() + 120
    while (found := client.operation(operation.id)).status in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_known_cues_and_negatives(client: Client, new_name: NewName) -> None:
    photos = client.create_collection(
        new_name(), {"image": {"encoder": "pixels", "options": {"size": 16}}}, gate={"when": "path"}
    )
    photos.store({"id": f"p{seed}", "image": picture(seed)} for seed in range(COUNT))
    cues: list[dict[str, Any]] = [{"id": f"p{i % COUNT}", "image": picture(i % COUNT, 1_000 + i)} for i in range(60)]
    negatives = [{"image": picture(10_000 + i)} for i in range(20)]
    operation = ended(client, photos.train(cues=iter(cues), negatives=negatives, target_tpr=0.9))
    assert operation.status == "done"
    assert operation.result is not None
    assert operation.result["skipped"] == []
    calibration = photos.wait_until_calibrated().calibration
    assert (calibration.rows_then, calibration.rows_now, calibration.redone_over) == (COUNT, COUNT, COUNT // 10)
    assert "0 of 40 memories have changed" in calibration.why
    (whole,) = (record for record in calibration.modalities if record.modality == "image")
    assert (whole.cues, whole.cues_from, whole.target_tpr, whole.when) == (60, "caller", 0.9, "path")
    assert whole.negatives is not None
    assert (whole.negatives.boosting, whole.negatives.held_out) == (10, 10)
    (masked,) = (record for record in calibration.modalities if record.modality == "image:masked")
    assert (masked.cues_from, masked.negatives) == ("memories", None)

    known = photos.recall(image=picture(7))
    assert known.verdict == "known"
    assert known.gate is not None
    assert known.gate.rejected_at is None
    stranger = photos.recall(image=picture(77_777))
    assert stranger.verdict == "unknown"
    assert stranger.gate is not None
    assert stranger.gate.rejected_at == 0

    assert ended(client, photos.train(cues=[], negatives=[])).status == "done"
    (whole,) = (record for record in photos.info().calibration.modalities if record.modality == "image")
    assert (whole.cues_from, whole.negatives) == ("memories", None)


def test_a_learned_matrix_says_how_it_was_learned(client: Client, new_name: NewName) -> None:
    vectors = client.create_collection(new_name(), {"v": {"dimension": 8}}, gate={"interaction": {"learned": 6}})
    rows = np.random.default_rng(3).standard_normal((80, 8)).astype(np.float32)
    vectors.store({"id": str(i), "vectors": {"v": row}} for i, row in enumerate(rows))
    (record,) = vectors.wait_until_calibrated().calibration.modalities
    assert record.learning is not None
    assert record.learning.patterns == 80
    assert len(record.learning.log_likelihood) == record.learning.rounds + 1


def test_what_is_wrong_is_told(client: Client, new_name: NewName) -> None:
    vectors = client.create_collection(new_name(), {"v": {"dimension": 4}})
    vectors.store([{"id": "a", "vectors": {"v": [1.0, 0, 0, 0]}}])
    with pytest.raises(InvalidRequest, match="no memory b"):
        vectors.train(cues=[{"id": "b", "vectors": {"v": [1.0, 0, 0, 0]}}])
    with pytest.raises(InvalidRequest, match="give it an id"):
        vectors.train(cues=[{"vectors": {"v": [1.0, 0, 0, 0]}}])
    with pytest.raises(InvalidRequest, match="target_tpr"):
        vectors.train(target_tpr=1.5)
