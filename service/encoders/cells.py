"""Means over the cells of a grid laid across a picture: the picture stretched to a small square, exactly by area.

A cell's mean weighs each pixel by the share of the cell that it covers, so the grid need not divide the picture.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PIXELS_AT_ONCE = 1 << 20
"""Pixels averaged in one piece: bounds the float32 copy of a large picture, or of a stack of small ones, to 12 MB."""

LENGTH_CACHED_MAX = 4096
"""Longer sides are rare and their matrices large: so the cache's 64 entries stay under 128 MB."""


def cell_means(pixels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """(n, height, width, channels) uint8 → (n, size, size, channels) cell means in [0, 1], by bands of rows to bound
    the copy.
    """
    height, width = pixels.shape[1:3]
    rows = _averaging(height, size)
    band = max(1, PIXELS_AT_ONCE // (width * len(pixels)))
    total = np.zeros((len(pixels), size, size, pixels.shape[3]), dtype=np.float32)
    for start in range(0, height, band):
        part = pixels[:, start : start + band].astype(np.float32)
        total += _averaged(part, rows[:, start : start + band], size)
    return total / np.float32(255.0)


def observed_share(observed: NDArray[np.bool_], size: int) -> NDArray[np.float32]:
    """(height, width) bool → (size, size): the share of each cell that is observed."""
    share: NDArray[np.float32] = cell_means(np.where(observed, np.uint8(255), np.uint8(0))[None, ..., None], size)
    return share[0, ..., 0]


def observed_means(pixels: NDArray[np.uint8], observed: NDArray[np.bool_], size: int) -> NDArray[np.float32]:
    """(height, width, 3), (height, width) → (size, size, 3) means over each cell's observed pixels; 0 where there are
    none.
    """
    shown = cell_means(np.where(observed[..., None], pixels, np.uint8(0))[None], size)[0]
    share = observed_share(observed, size)[..., None]
    means: NDArray[np.float32] = np.divide(shown, share, out=np.zeros_like(shown), where=share > 0)
    return means


def _averaging(length: int, size: int) -> NDArray[np.float32]:
    return _averaging_cached(length, size) if length <= LENGTH_CACHED_MAX else _averaging_matrix(length, size)


@lru_cache(maxsize=64)  # a collection's pictures share few side lengths
def _averaging_cached(length: int, size: int) -> NDArray[np.float32]:
    return _averaging_matrix(length, size)


def _averaging_matrix(length: int, size: int) -> NDArray[np.float32]:
    """(size, length): row i holds the share of cell i's extent that each of `length` pixels covers; rows sum to 1."""
    edges = np.arange(size + 1, dtype=np.float64) * (length / size)
    starts = np.arange(length, dtype=np.float64)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return (overlap.clip(min=0.0) * (size / length)).astype(np.float32)


def _averaged(values: NDArray[np.float32], rows: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """(n, height, width, channels) → (n, size, size, channels), by `rows` (size, height) and the averaging of the
    width.
    """
    count, height, width, channels = values.shape
    down = (rows @ values.reshape(count, height, width * channels)).reshape(count, size, width, channels)
    averaged: NDArray[np.float32] = _averaging(width, size) @ down
    return averaged
