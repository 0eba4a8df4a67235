"""What is said of pictures that a square does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from service.encoders.fit import fit_warnings
from service.encoders.pixels import Pixels, PixelsOptions
from service.encoders.protocol import Picture


def test_sides_of_more_than_two_to_one_are_told_with_how_they_were_fitted() -> None:
    assert fit_warnings(100, 201, "stretched") == ("the picture is 201x100: it was stretched to the encoder's square",)
    assert "cropped to its middle square" in fit_warnings(201, 100, "cropped")[0]
    assert "201x100" not in fit_warnings(201, 100, "cropped")[0]


@pytest.mark.parametrize(("height", "width"), [(100, 200), (200, 100), (2, 2), (1, 2)])
def test_what_is_not_odd_has_no_warning(height: int, width: int) -> None:
    assert fit_warnings(height, width, "stretched") == fit_warnings(height, width, "cropped") == ()


def test_one_pixel_is_told() -> None:
    assert fit_warnings(1, 1, "cropped") == ("the picture is one pixel: all that is encoded is its colour",)
    assert "3x1" in fit_warnings(1, 3, "stretched")[0]


def test_pixels_tells_it_of_each_picture() -> None:
    pictures = [Picture(np.full((height, 8, 3), 9, dtype=np.uint8)) for height in (8, 20, 8)]
    warnings = Pixels(PixelsOptions(size=4)).encode_images(pictures).warnings
    assert warnings == ((), fit_warnings(20, 8, "stretched"), ())
