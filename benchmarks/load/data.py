"""Fashion-MNIST as vectors, and cues: the same images with half of their pixels masked.

Read from, in this order: the folder FASHION_MNIST names (the published idx files, gzipped or not), Debian's package
dataset-fashion-mnist, torchvision's download.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE = "train-images-idx3-ubyte"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CACHE = Path.home() / ".cache" / "engram" / "fashion-mnist"
MASKED_SHARE = 0.5
SEED = 0


def images() -> NDArray[np.float32]:
    """(60,000, 784), values 0 to 255. Exits with a sentence where the data set cannot be had."""
    if named := os.environ.get("FASHION_MNIST"):
        found = _find(Path(named))
        if found is None:
            raise SystemExit(f"FASHION_MNIST={named} has neither {FILE} nor {FILE}.gz")
    else:
        found = _find(DEBIAN) or _downloaded()
    data = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    magic, count, height, width = np.frombuffer(data, ">i4", count=4)
    if magic != 0x803 or len(data) != 16 + count * height * width:
        raise SystemExit(f"{found} is not an idx file of images")
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, height * width).astype(np.float32)


def masked(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row with half of its values, drawn for it alone, set to zero; the same for the same shape."""
    return np.where(np.random.default_rng(SEED).random(rows.shape) < MASKED_SHARE, 0, rows).astype(np.float32)


def cue_rows(count: int, cues: int) -> NDArray[np.int64]:
    """Which memories the cues are made of: drawn without replacement, the same for the same numbers."""
    return np.random.default_rng(SEED).permutation(count)[:cues]


def _find(folder: Path) -> Path | None:
    return next((path for path in (folder / FILE, folder / f"{FILE}.gz") if path.exists()), None)


def _downloaded() -> Path:
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(CACHE, train=True, download=True)
    except Exception as error:
        raise SystemExit(
            f"Fashion-MNIST was not found and could not be downloaded ({error}): install Debian's "
            "dataset-fashion-mnist, or let FASHION_MNIST name a folder with its idx files"
        ) from error
    found = _find(CACHE / "FashionMNIST" / "raw")
    if found is None:
        raise SystemExit(f"torchvision left no {FILE} under {CACHE}")
    return found
