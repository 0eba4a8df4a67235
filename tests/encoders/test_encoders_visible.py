"""What a network that knows no mask is shown of a masked picture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from service.encoders.protocol import Picture
from service.encoders.visible import filled, observed_cells, visible_part
from service.errors import NothingObserved

GRID = 4
sides = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(masks=sides.flatmap(lambda shape: arrays.arrays(np.bool_, shape)), seed=st.integers(0, 99))
def test_hidden_pixels_have_no_influence_and_seen_ones_stay(masks: NDArray[np.bool_], seed: int) -> None:
    masks[0, 0] = True
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 256, (2, *masks.shape, 3), dtype=np.uint8)
    changed = np.where(masks[..., None], one, other)
    shown = filled(Picture(one, masks))
    np.testing.assert_array_equal(shown, filled(Picture(changed, masks)))
    np.testing.assert_array_equal(shown[masks], one[masks])
    assert shown.shape == one.shape
    mean = one[masks].mean(axis=0)
    assert np.abs(shown[~masks] - mean).max(initial=0) <= 0.5
    part = visible_part(Picture(one, masks))
    np.testing.assert_array_equal(part, visible_part(Picture(changed, masks)))


@given(mask=sides.flatmap(lambda shape: arrays.arrays(np.bool_, shape)))
def test_a_cell_counts_from_half_of_its_area_on(mask: NDArray[np.bool_]) -> None:
    height, width = mask.shape
    # Each pixel becomes GRID x GRID equal parts, each cell height x width of them: exact, by definition.
    parts = np.kron(mask, np.ones((GRID, GRID))).reshape(GRID, height, GRID, width)
    expected = parts.sum(axis=(1, 3)) * 2 >= height * width
    picture = Picture(np.zeros((height, width, 3), dtype=np.uint8), mask)
    if expected.any():
        np.testing.assert_array_equal(observed_cells(picture, GRID), expected)
    else:
        with pytest.raises(NothingObserved, match="half observed"):
            observed_cells(picture, GRID)


def test_without_a_mask_all_is_shown() -> None:
    picture = Picture(np.arange(27, dtype=np.uint8).reshape(3, 3, 3))
    assert filled(picture) is picture.pixels
    assert observed_cells(picture, GRID).all()


@pytest.mark.parametrize("show", [filled, visible_part])
def test_a_mask_over_everything_is_nothing_observed(show: object) -> None:
    assert callable(show)
    with pytest.raises(NothingObserved, match="whole picture"):
        show(Picture(np.zeros((3, 3, 3), dtype=np.uint8), np.zeros((3, 3), dtype=np.bool_)))
