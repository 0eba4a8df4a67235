"""What of a masked picture a network that knows no mask is shown: hidden pixels have no influence.

What is hidden gets the observed mean colour, the constant that is nearest to the picture. A network that makes one
vector of the whole picture is shown `visible_part`: cropping to what is observed shows the least that is made up. One
that keeps the picture's grid in its latent is shown `filled`, and the latent's cells that are not `observed_cells` are
then set to 0, which says nothing under an inner product.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.encoders.cells import observed_share
from service.encoders.protocol import Picture
from service.errors import NothingObserved

OBSERVED_SHARE_MIN = 0.5
"""A cell counts from this observed share on: under it, what is hidden would decide more than what is seen."""


def filled(picture: Picture) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: all of the picture, its hidden pixels in the observed mean colour. Raises
    `NothingObserved`.
    """
    if picture.observed is None:
        return picture.pixels
    return _fill(picture.pixels, picture.observed)


def visible_part(picture: Picture) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: the bounding box of the observed pixels, the hidden ones in it filled. Raises
    `NothingObserved`.
    """
    if picture.observed is None:
        return picture.pixels
    rows, columns = np.flatnonzero(picture.observed.any(axis=1)), np.flatnonzero(picture.observed.any(axis=0))
    if not len(rows):
        raise NothingObserved("the mask marks the whole picture as missing")
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _fill(picture.pixels[box], picture.observed[box])


def observed_cells(picture: Picture, grid: int) -> NDArray[np.bool_]:
    """(grid, grid) bool: which cells of a grid laid across the whole picture count. Raises `NothingObserved` where
    none does.
    """
    if picture.observed is None:
        return np.ones((grid, grid), dtype=np.bool_)
    # float32 sums of exact halves land a rounding below
    seen: NDArray[np.bool_] = observed_share(picture.observed, grid) >= OBSERVED_SHARE_MIN - 1e-6
    if not seen.any():
        raise NothingObserved(f"no cell of the {grid}x{grid} grid that the encoder sees is at least half observed")
    return seen


def _fill(pixels: NDArray[np.uint8], observed: NDArray[np.bool_]) -> NDArray[np.uint8]:
    if not observed.any():
        raise NothingObserved("the mask marks the whole picture as missing")
    colour = np.rint(pixels[observed].mean(axis=0)).astype(np.uint8)
    return np.where(observed[..., None], pixels, colour)
