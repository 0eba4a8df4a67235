"""HEN's cues: stored pictures of which a part is hidden.

Rules:
- `zeroed` is the paper's: the hidden part is black and the encoder knows no better. `masked` is the product's: the
  encoder is told what is hidden, and says nothing of it.
- The regions are fixed, each touching what most pictures show: where the part that is left is blank, no cue is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.encoders.protocol import Picture

Hidden = Literal["a quarter", "half", "three quarters"]
How = Literal["zeroed", "masked"]
HOWS: tuple[How, ...] = ("zeroed", "masked")


def _quarter(side: int) -> NDArray[np.bool_]:
    """The lower right quarter is hidden."""
    seen = np.ones((side, side), np.bool_)
    seen[side // 2 :, side // 2 :] = False
    return seen


def _half(side: int) -> NDArray[np.bool_]:
    """The right half is hidden."""
    seen = np.ones((side, side), np.bool_)
    seen[:, side // 2 :] = False
    return seen


def _three_quarters(side: int) -> NDArray[np.bool_]:
    """All but the middle square, of half the side, is hidden."""
    seen = np.zeros((side, side), np.bool_)
    edge = side // 4
    seen[edge : edge + side // 2, edge : edge + side // 2] = True
    return seen


_SEEN: dict[Hidden, Callable[[int], NDArray[np.bool_]]] = {
    "a quarter": _quarter,
    "half": _half,
    "three quarters": _three_quarters,
}
HIDDEN: tuple[Hidden, ...] = tuple(_SEEN)
HIDDEN_WORDS = "the lower right quarter; the right half; all but the middle square of half the side"


def observed(hidden: Hidden, side: int) -> NDArray[np.bool_]:
    """(side, side): what of a picture the cue shows."""
    return _SEEN[hidden](side)


def whole(pixels: NDArray[np.uint8]) -> list[Picture]:
    """(n, side, side) grey or (n, side, side, 3) → n pictures."""
    colour = pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, axis=-1)
    return [Picture(each) for each in colour]


def cued(pictures: Sequence[Picture], hidden: Hidden, how: How) -> list[Picture]:
    """The pictures, square and of one size, with the part hidden."""
    seen = observed(hidden, pictures[0].pixels.shape[0])
    if how == "masked":
        return [Picture(picture.pixels, seen) for picture in pictures]
    return [Picture(np.where(seen[..., None], picture.pixels, np.uint8(0))) for picture in pictures]


def copies(pixels: NDArray[np.uint8], seen: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """(n,): whether another picture has the same pixels (where `seen`, if given)."""
    rows = pixels.reshape(len(pixels), -1) if seen is None else pixels[:, seen].reshape(len(pixels), -1)
    _, where, counts = np.unique(
        np.ascontiguousarray(rows).view([("", np.void, rows.shape[1])]), return_inverse=True, return_counts=True
    )
    alike: NDArray[np.bool_] = counts[where.reshape(-1)] > 1
    return alike
