"""`pixel_text`: a text as the picture of its hash, through any image encoder (HEN, appendix D).

The sha256 of the text in hexadecimal, 64 digits, is drawn as an image of 8 x 8 digits, and what the image encoder makes
of that is the text's vector. So texts and pictures share one encoder, and two texts are never alike because they mean
alike: a key, not a meaning.

Rules:
- The digits are drawn from the bitmaps below, not by a font: fonts differ between versions and machines, and a text
  must have the same vector everywhere.
- The text is hashed as it is, in UTF-8: a capital or a space more is another key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from service.encoders.protocol import Encoded, Encoder, Picture, Source
from service.errors import EmptyText, InvalidRequest

CELL = 8
"""Pixels along the side of a digit's cell, of which a digit fills 5 x 7."""

DIGITS_ALONG = 8

_BITMAPS = """
.###. ..#.. .###. ####. ...#. ##### .###. ##### .###. .###. ..... #.... ..... ....# ..... ..##.
#...# .##.. #...# ....# ..##. #.... #.... ....# #...# #...# ..... #.... ..... ....# ..... .#..#
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...# .###. ####. .###. .#### .###. .#...
#.#.# ..#.. ..##. .###. #..#. ....# ####. ..#.. .###. .#### ....# #...# #...# #...# #...# ###..
##..# ..#.. .#... ....# ##### ....# #...# .#... #...# ....# .#### #...# #.... #...# ##### .#...
#...# ..#.. #.... ....# ...#. #...# #...# .#... #...# ....# #...# #...# #...# #...# #.... .#...
.###. .###. ##### ####. ...#. .###. .###. .#... .###. .###. .#### ####. .###. .#### .###. .#...
"""


def _digits() -> NDArray[np.uint8]:
    """(16, 8, 8): 0 where a digit is, 255 around it."""
    rows = [line.split() for line in _BITMAPS.split("\n") if line]
    drawn = np.full((16, CELL, CELL), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for digit, marks in enumerate(row):
            for x, mark in enumerate(marks):
                if mark == "#":
                    drawn[digit, y, x + 1] = 0
    return drawn


_DIGITS = _digits()


class PixelTextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = Field(min_length=1, description="the image encoder, by name")
    options: dict[str, Any] = Field(default_factory=dict, description="that encoder's options")


def draw_hash(text: str) -> NDArray[np.uint8]:
    """(64, 64, 3) uint8: the text's sha256, eight digits a row, black on white."""
    digits = [int(digit, 16) for digit in hashlib.sha256(text.encode()).hexdigest()]
    side = DIGITS_ALONG * CELL
    grid = _DIGITS[digits].reshape(DIGITS_ALONG, DIGITS_ALONG, CELL, CELL).transpose(0, 2, 1, 3).reshape(side, side)
    return np.repeat(grid[..., None], 3, axis=2)


class PixelText:
    """An `Encoder` (protocol.py) of texts."""

    name = "pixel_text"
    takes: frozenset[Source] = frozenset({"text"})

    def __init__(self, images: Encoder) -> None:
        """Raises `InvalidRequest` for an encoder that takes no images."""
        if "image" not in images.takes:
            raise InvalidRequest(f"pixel_text draws its texts, and the encoder {images.name!r} takes no images")
        self._images = images
        self.dimension = images.dimension
        self.fingerprint = f"pixel_text/1:{images.fingerprint}"

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """(batch) texts → (batch, dimension). Raises `EmptyText`, and what the image encoder raises."""
        for text in texts:
            if not text.strip():
                raise EmptyText("the text has no words")
        return self._images.encode_images([Picture(draw_hash(text)) for text in texts])

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """Raises `InvalidRequest`: texts only (`takes`)."""
        raise InvalidRequest("the encoder 'pixel_text' takes texts only")
