"""Where networks run, and what is said when that is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram import Client
from service.encoders.device import check_device, check_finite
from service.errors import DeviceMissing, InvalidVector


def test_the_processor_is_always_there() -> None:
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "cpu:x", ""])
def test_another_device_has_to_be_there(name: str) -> None:
    with pytest.raises(DeviceMissing, match=r"there is cpu") as caught:
        check_device(name)
    assert (caught.value.status, caught.value.code) == (503, "device_missing")
    assert "\n" not in caught.value.detail


def test_the_setting_counts_in_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_ENCODER_DEVICE", "cuda:99")
    with pytest.raises(DeviceMissing, match="cuda:99"):
        Client(path=tmp_path)
    monkeypatch.setenv("ENGRAM_ENCODER_DEVICE", "cpu")
    Client(path=tmp_path).close()


def test_a_vector_that_is_not_finite_is_named_with_the_way_out() -> None:
    vectors = np.zeros((3, 4), dtype=np.float32)
    check_finite(vectors, "fp16")
    vectors[1, 2] = np.inf
    with pytest.raises(InvalidVector, match=r"item 1 .* overflows in fp16, use bf16 or fp32"):
        check_finite(vectors, "fp16")
