"""The papers' images: published formats read back exactly, generators that repeat, and messages that help."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from benchmarks.papers import data


@pytest.fixture
def drawn() -> np.random.Generator:
    return np.random.default_rng(0)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape) + values.tobytes()


def test_idx_files_are_read_gzipped_or_not(tmp_path: Path, drawn: np.random.Generator) -> None:
    pixels, labels = drawn.integers(0, 256, (7, 5, 4), np.uint8), drawn.integers(0, 10, 7).astype(np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(pixels))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    read = data.mnist(tmp_path)
    assert np.array_equal(read.pixels, pixels)
    assert read.labels is not None
    assert np.array_equal(read.labels, labels)
    assert read.rows().shape == (7, 20)
    assert read.rows().max() <= 1
    with pytest.raises(data.MissingData, match="holds no idx files"):
        data.mnist(tmp_path, "test")


@pytest.mark.parametrize("damage", [b"", b"\0\0\x08\x03" + b"\0" * 3, idx(np.zeros((2, 3, 3), np.uint8))[:-1]])
def test_a_damaged_idx_file_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(data.MissingData, match="train-images-idx3-ubyte is not an idx file of 3 dimensions"):
        data.mnist(tmp_path)


@pytest.mark.parametrize("binary", [True, False])
def test_cifar10_in_both_published_formats(tmp_path: Path, drawn: np.random.Generator, binary: bool) -> None:
    pixels, labels = drawn.integers(0, 256, (3, 32, 32, 3), np.uint8), np.array([3, 1, 4], np.uint8)
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(3, -1)
    if binary:
        (tmp_path / "test_batch.bin").write_bytes(np.concatenate([labels[:, None], planes], 1).tobytes())
    else:
        batch = {b"data": planes, b"labels": labels.tolist()}
        (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    read = data.cifar10(tmp_path, "test")
    assert np.array_equal(read.pixels, pixels)
    assert read.labels is not None
    assert read.labels.tolist() == [3, 1, 4]


class _Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run",))


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(pickle.UnpicklingError, match="no part of an array"):
        data.cifar10(tmp_path, "test")
    assert capsys.readouterr().out == ""


def test_what_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    monkeypatch.delenv("CIFAR10", raising=False)
    for missing, advice in (
        (data.mnist_small, "make papers-data"),
        (data.silhouettes, "make papers-data"),
        (data.cifar10, "CIFAR10"),
    ):
        with pytest.raises(data.MissingData, match=advice):
            missing()
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    with pytest.raises(data.MissingData, match="FASHION_MNIST"):
        data.fashion()


@pytest.mark.parametrize("fetched", [data.mnist_small, data.silhouettes])
def test_fetched_sets_are_ten_thousand_images_of_ten_classes(fetched: object) -> None:
    try:
        images = fetched()  # type: ignore[operator]
    except data.MissingData as missing:
        pytest.skip(str(missing))
    assert images.pixels.shape == (10_000, 28, 28)
    assert set(images.labels.tolist()) == set(range(10))
    assert images.pixels.max() == 255


@pytest.mark.parametrize("kind", sorted(data.GENERATED))
def test_generated_images_repeat_and_differ(kind: str) -> None:
    first, again, other = (data.generated(kind, 6, seed).pixels for seed in (1, 1, 2))
    assert first.shape == (6, 28, 28)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({each.tobytes() for each in first}) == 6


def test_pieces_of_photographs_are_drawn_by_seed() -> None:
    for drawn_from in (data.photograph_patches, data.texture_patches, data.page_patches):
        first, again, other = (drawn_from(5, seed).pixels for seed in (1, 1, 2))
        assert first.shape == (5, 28, 28)
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


def test_carried_sets_have_one_size_each() -> None:
    assert data.photographs(32).pixels.shape[1:] == (32, 32, 3)
    digits = data.digits()
    assert digits.pixels.shape == (1797, 8, 8)
    assert data.resized(digits.take(slice(4))).pixels.shape == (4, 28, 28)
