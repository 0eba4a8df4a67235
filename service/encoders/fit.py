"""What is lost when a picture or a text is fitted to a model's input, in words: the warnings of the encoders."""

from __future__ import annotations

from typing import Literal

Fit = Literal["stretched", "cropped", "padded"]
"""How an encoder makes its square input: all of the picture, its proportions lost; the middle alone; or all of it,
smaller, between bars."""

RATIO_MAX = 2.0
"""Longer side over shorter: up to here (a panorama is wider) half of the picture or more is still in its middle square,
and a stretched one is still itself to the eye."""

_FITTED: dict[Fit, str] = {
    "stretched": "was stretched to the encoder's square",
    "cropped": "was cropped to its middle square, the rest is lost",
    "padded": "was shrunk to fit between bars",
}


def fit_warnings(height: int, width: int, how: Fit) -> tuple[str, ...]:
    """What to tell of a picture of `height` x `width` pixels that is fitted to a square, or nothing."""
    if height == width == 1:
        return ("the picture is one pixel: all that is encoded is its colour",)
    if max(height, width) > RATIO_MAX * min(height, width):
        return (f"the picture is {width}x{height}: it {_FITTED[how]}",)
    return ()


def text_warnings(count: int, length: int, unknown: int = 0) -> tuple[str, ...]:
    """What to tell of a text of `count` tokens, of which the model takes `length` and does not know `unknown`."""
    lost = []
    if count > length:
        lost.append(f"text cut to the model's length: {length} of {count} tokens kept")
    if unknown:
        lost.append(f"{unknown} of {count} tokens are unknown to the model: it was not trained on such text")
    return tuple(lost)
