"""A masked picture with its hidden pixels in the colours around them, for a network that looks at few pixels at once.

Such a network sees hidden pixels only beside observed ones, at the border of a mask or between the specks of a
scattered one. There the colour of what lies near is nearer to the picture than one mean colour is: cells next to the
mask come out nearly as in the whole picture.

Strategy (normalised convolution: Knutsson and Westin 1993): on a grid of `GRID` cells, the observed colour averaged
with a Gaussian window, the narrowest of `WINDOWS` of which enough is observed, the wider ones blended in where it is
not; the mean of all that is observed stands behind. The grid's colours are then stretched over the picture.

Rules:
- Hidden pixels have no influence. Observed ones stay as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.encoders.cells import observed_means, observed_share
from service.encoders.protocol import Picture
from service.errors import NothingObserved

GRID = 64
WINDOWS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Standard deviations, in cells."""

ENOUGH = 0.25
"""The observed share of a window from which on it decides alone."""


def surrounded(picture: Picture) -> NDArray[np.uint8]:
    """(height, width, 3) uint8. Raises `NothingObserved`."""
    if picture.observed is None:
        return picture.pixels
    if not picture.observed.any():
        raise NothingObserved("the mask marks the whole picture as missing")
    height, width = picture.observed.shape
    colours = _colours(picture.pixels, picture.observed)
    stretched = Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR)
    return np.where(picture.observed[..., None], picture.pixels, np.asarray(stretched))


def _colours(pixels: NDArray[np.uint8], observed: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(GRID, GRID, 3): what to fill with, at each place of the picture."""
    share = observed_share(observed, GRID)[..., None]
    weighted = observed_means(pixels, observed, GRID) * share
    found = np.zeros_like(weighted)
    left = np.ones_like(share)
    places = np.arange(GRID, dtype=np.float32)
    for deviation in WINDOWS:
        window = np.exp(-((places[:, None] - places) ** 2) / (2 * deviation**2))
        window /= window.sum(axis=1).max()
        seen = _windowed(share, window)
        certain = left * (seen / ENOUGH).clip(max=1.0)
        found += certain * _windowed(weighted, window) / np.maximum(seen, np.finfo(np.float32).tiny)
        left -= certain
    found += left * weighted.sum(axis=(0, 1)) / share.sum()
    colours: NDArray[np.uint8] = np.rint(found.clip(0.0, 1.0) * 255).astype(np.uint8)
    return colours


def _windowed(values: NDArray[np.float32], window: NDArray[np.float32]) -> NDArray[np.float32]:
    """(GRID, GRID, c) values, weighed along both sides by `window` (GRID, GRID)."""
    down = (window @ values.reshape(GRID, -1)).reshape(values.shape)
    return window @ down
