"""What a square input does to a picture that is not square, in words: the warnings of an encoder about its pictures."""

from __future__ import annotations

from typing import Literal

Fit = Literal["stretched", "cropped"]
"""How an encoder makes its square input: all of the picture, its proportions lost, or the middle alone."""

RATIO_MAX = 2.0
"""Longer side over shorter: up to here (a panorama is wider) half of the picture or more is still in its middle square,
and a stretched one is still itself to the eye."""

_FITTED: dict[Fit, str] = {
    "stretched": "was stretched to the encoder's square",
    "cropped": "was cropped to its middle square, the rest is lost",
}


def fit_warnings(height: int, width: int, how: Fit) -> tuple[str, ...]:
    """What to tell of a picture of `height` x `width` pixels that is fitted to a square, or nothing."""
    if height == width == 1:
        return ("the picture is one pixel: all that is encoded is its colour",)
    if max(height, width) > RATIO_MAX * min(height, width):
        return (f"the picture is {width}x{height}: it {_FITTED[how]}",)
    return ()
