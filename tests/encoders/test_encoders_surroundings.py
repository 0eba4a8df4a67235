"""Hidden pixels in the colours around them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from service.encoders.protocol import Picture
from service.encoders.surroundings import surrounded
from service.errors import NothingObserved


@st.composite
def masked(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    observed = rng.random((height, width)) < draw(st.floats(0, 1))
    observed[rng.integers(height), rng.integers(width)] = True
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), observed


@given(given=masked())
def test_what_is_hidden_has_no_influence_and_what_is_observed_stays(
    given: tuple[NDArray[np.uint8], NDArray[np.bool_]],
) -> None:
    pixels, observed = given
    found = surrounded(Picture(pixels, observed))
    np.testing.assert_array_equal(found[observed], pixels[observed])
    other = np.where(observed[..., None], pixels, 255 - pixels)
    np.testing.assert_array_equal(surrounded(Picture(other, observed)), found)
    # A mean of what is observed lies between its extremes.
    low, high = pixels[observed].min(axis=0), pixels[observed].max(axis=0)
    assert (found >= np.maximum(low, 1) - 1).all()
    assert (found <= np.minimum(high, 254) + 1).all()


@given(arrays.arrays(np.uint8, (1, 1, 3)))
def test_one_colour_fills_with_itself(colour: NDArray[np.uint8]) -> None:
    observed = np.zeros((50, 20), np.bool_)
    observed[40:, 3] = True
    pixels = np.where(observed[..., None], colour, np.uint8(7))
    assert np.abs(surrounded(Picture(pixels, observed)).astype(int) - colour).max() <= 1


def test_near_colours_count_more_than_far_ones() -> None:
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[:, 64:] = 250
    observed = np.ones((128, 128), np.bool_)
    observed[:, 48:80] = False
    row = surrounded(Picture(pixels, observed))[64, :, 0].astype(int)
    assert row[49] < 40 < 200 < row[78]
    assert (np.diff(row[48:80]) >= -1).all()


def test_a_scattered_mask_is_nearly_the_picture() -> None:
    down, across = np.mgrid[:64, :64]
    pixels = np.stack([4 * down, 4 * across, 2 * (down + across)], axis=-1).astype(np.uint8)
    observed = np.random.default_rng(0).random((64, 64)) < 0.5
    assert np.abs(surrounded(Picture(pixels, observed)).astype(int) - pixels).mean() < 4


def test_a_whole_picture_is_itself_and_a_hidden_one_is_refused() -> None:
    pixels = np.zeros((4, 5, 3), np.uint8)
    assert surrounded(Picture(pixels)) is pixels
    with pytest.raises(NothingObserved):
        surrounded(Picture(pixels, np.zeros((4, 5), np.bool_)))
