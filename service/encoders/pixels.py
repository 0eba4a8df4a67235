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

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from service.encoders.cells import PIXELS_AT_ONCE, cell_means, observed_means
from service.encoders.fit import fit_warnings
from service.encoders.protocol import Encoded, Picture, Source
from service.encoders.visible import observed_cells
from service.errors import InvalidRequest, WrongDimension

MEAN_WEIGHT = 1 / 32
"""What is left of the mean: so little that cosine hardly sees it, enough for fp16 to return it to within 1/255."""

MEAN_OFFSET = 1 / 8
"""Keeps a uniform picture, a black one too, from becoming the zero vector."""

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
            thumbnails = cell_means(np.stack([pictures[i].pixels for i in positions]), self._size)
            vectors[positions] = self._latents(thumbnails, None)
        for i, picture in enumerate(pictures):
            if picture.observed is not None:
                seen = observed_cells(picture, self._size)
                thumbnail = observed_means(picture.pixels, picture.observed, self._size)
                vectors[i] = self._latents(thumbnail[None], seen[None])[0]
        sizes = [picture.pixels.shape[:2] for picture in pictures]
        return Encoded(vectors, tuple(fit_warnings(height, width, "stretched") for height, width in sizes))

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
