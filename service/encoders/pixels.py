"""`pixels`: the thumbnail itself as the latent. Nothing is learned, any picture will do, and it can be drawn again.

The latent of a picture is its thumbnail x of `size` x `size` cells, each the mean of the picture over the cell's area
(the picture is stretched to the square), values in [0, 1], with most of the picture's brightness taken out:

    v = (x - m) + MEAN_WEIGHT (m + MEAN_OFFSET),   m = mean(x), one number for all cells and channels

so that cosine similarity compares what is drawn rather than how bright it is (uncentred, every pair of photographs is
alike). The map is affine and, since mean(v) = MEAN_WEIGHT (m + MEAN_OFFSET), invertible: `decode` finds m again from v
alone, also from a convex combination of latents, which is what a recall returns.

Rules:
- `centre: false` is the raw-image baseline of HEN (Hopfield Encoding Networks): v = x. There alone a black picture is
  the zero vector, which callers refuse as they refuse any zero vector.
- Of a masked picture only observed pixels count. A cell of which less than half is observed is hidden: it is 0, the
  value of "says nothing" under an inner product, and m is taken over the cells that remain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from service.encoders.protocol import Encoded, Picture, Source
from service.errors import InvalidRequest, NothingObserved, WrongDimension

MEAN_WEIGHT = 1 / 32
"""What is left of the mean: so little that cosine hardly sees it, enough for fp16 to return it to within 1/255."""

MEAN_OFFSET = 1 / 8
"""Keeps a uniform picture, a black one too, from becoming the zero vector."""

OBSERVED_SHARE_MIN = 0.5
"""A cell counts from this observed share on: under it, what is hidden would decide more than what is seen."""

PIXELS_AT_ONCE = 1 << 20
"""Pixels averaged in one piece: bounds the float32 copy of a large picture, or of a stack of small ones, to 12 MB."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Grey from RGB, ITU-R BT.601."""


class PixelsOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(32, ge=4, le=128, description="cells along each side of the thumbnail")
    colour: bool = Field(True, description="three channels; false keeps the luma alone")
    centre: bool = Field(True, description="take most of the mean out; false is HEN's raw-image baseline")


class Pixels:
    """An `Encoder` and a `Decoder` (protocol.py)."""

    name = "pixels"
    takes: frozenset[Source] = frozenset({"image"})

    def __init__(self, options: PixelsOptions) -> None:
        self._size = options.size
        self._channels = 3 if options.colour else 1
        self._centre = options.centre
        self.dimension = options.size**2 * self._channels
        colour, centre = str(options.colour).lower(), str(options.centre).lower()
        self.fingerprint = f"pixels/1:size={options.size},colour={colour},centre={centre}"

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """(batch) pictures → (batch, size·size·channels), the thumbnail in (row, column, channel) order.

        Raises `NothingObserved` when a mask leaves no cell half observed.
        """
        vectors = np.empty((len(pictures), self.dimension), dtype=np.float32)
        for positions in _stacks(pictures):
            thumbnails = _thumbnails(np.stack([pictures[i].pixels for i in positions]), self._size)
            vectors[positions] = self._latents(thumbnails, None)
        for i, picture in enumerate(pictures):
            if picture.observed is not None:
                thumbnail, seen = _masked_thumbnail(picture.pixels, picture.observed, self._size)
                if not seen.any():
                    detail = f"no cell of the {self._size}x{self._size} thumbnail is at least half observed"
                    raise NothingObserved(detail)
                vectors[i] = self._latents(thumbnail[None], seen[None])[0]
        return Encoded(vectors, ((),) * len(pictures))

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """Raises `InvalidRequest`: pixels takes images only (`takes`)."""
        raise InvalidRequest("the encoder 'pixels' takes images only")

    def decode(self, latents: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """(batch, dimension) → batch pictures (size, size, 3) uint8: the latent map inverted, grey in all channels."""
        if latents.ndim != 2 or latents.shape[1] != self.dimension:
            raise WrongDimension(f"latents have shape {latents.shape}; (batch, {self.dimension}) is needed")
        values = latents.astype(np.float32)
        if self._centre:
            level = values.mean(axis=1, keepdims=True)
            values = values - level + (level / MEAN_WEIGHT - MEAN_OFFSET)
        drawn = np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)
        shaped = drawn.reshape(-1, self._size, self._size, self._channels)
        return list(np.broadcast_to(shaped, (*shaped.shape[:3], 3)))

    def _latents(self, thumbnails: NDArray[np.float32], seen: NDArray[np.bool_] | None) -> NDArray[np.float32]:
        """(n, size, size, 3) cells and (n, size, size) whether each is observed → (n, dimension)."""
        values = thumbnails if self._channels == 3 else thumbnails @ LUMA[:, None]
        weights = np.ones((*values.shape[:3], 1), np.float32) if seen is None else seen[..., None].astype(np.float32)
        if self._centre:
            total = (values * weights).sum(axis=(1, 2, 3), keepdims=True)
            mean = total / (weights.sum(axis=(1, 2, 3), keepdims=True) * self._channels)
            values = values - mean + MEAN_WEIGHT * (mean + MEAN_OFFSET)
        latents: NDArray[np.float32] = (values * weights).reshape(len(values), self.dimension)
        return latents


def _stacks(pictures: Sequence[Picture]) -> list[list[int]]:
    """Positions of the unmasked pictures in stacks of one shape, of at most `PIXELS_AT_ONCE` pixels or of one."""
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, picture in enumerate(pictures):
        if picture.observed is None:
            by_shape[picture.pixels.shape].append(i)
    stacks = []
    for (height, width, _), positions in by_shape.items():
        count = max(1, PIXELS_AT_ONCE // (height * width))
        stacks += [positions[start : start + count] for start in range(0, len(positions), count)]
    return stacks


LENGTH_CACHED_MAX = 4096
"""Longer sides are rare and their matrices large: so the cache's 64 entries stay under 128 MB."""


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


def _thumbnails(pixels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """(n, height, width, 3) uint8 → (n, size, size, 3) cell means in [0, 1], by bands of rows to bound the copy."""
    height, width = pixels.shape[1:3]
    rows = _averaging(height, size)
    band = max(1, PIXELS_AT_ONCE // (width * len(pixels)))
    total = np.zeros((len(pixels), size, size, pixels.shape[3]), dtype=np.float32)
    for start in range(0, height, band):
        part = pixels[:, start : start + band].astype(np.float32)
        total += _averaged(part, rows[:, start : start + band], size)
    return total / np.float32(255.0)


def _masked_thumbnail(
    pixels: NDArray[np.uint8], observed: NDArray[np.bool_], size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Cell means over the observed pixels (size, size, 3), and whether each cell (size, size) counts."""
    shown = np.where(observed[..., None], pixels, np.uint8(0))
    share = _thumbnails(np.where(observed, np.uint8(255), np.uint8(0))[None, ..., None], size)[0]
    seen = share[..., 0] >= OBSERVED_SHARE_MIN - 1e-6  # float32 sums of exact halves land a rounding below
    means = _thumbnails(shown[None], size)[0] / np.where(seen[..., None], share, np.float32(1.0))
    return means.astype(np.float32), seen
