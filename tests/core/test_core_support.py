"""Supports: which rows take part."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.core.support import random_rows, top_k, window
from service.errors import InvalidRequest

seeds = st.integers(0, 2**32 - 1)


def test_top_k_orders_ties_by_row_and_pads() -> None:
    values = torch.tensor([[1.0, 5.0, 5.0, 0.0, 5.0]])
    best, rows = top_k(values, 4)
    assert best.tolist() == [[5.0, 5.0, 5.0, 1.0]]
    assert rows.tolist() == [[1, 2, 4, 0]]
    best, rows = top_k(values, 9, torch.tensor([[True, False, True, False, False]]))
    assert rows.tolist() == [[2, 0, -1, -1, -1]]
    assert best.tolist() == [[5.0, 1.0] + [-math.inf] * 3]
    with pytest.raises(InvalidRequest, match="at least one row"):
        top_k(values, 0)


@given(seeds, st.integers(1, 30), st.integers(1, 40), st.integers(0, 4))
def test_random_rows_are_a_set_of_rows_drawn_from_the_generator(seed: int, rows: int, k: int, batch: int) -> None:
    drawn = random_rows(rows, k, batch, torch.Generator().manual_seed(seed))
    assert drawn.shape == (batch, min(k, rows))
    assert ((drawn >= 0) & (drawn < rows)).all()
    assert (drawn.diff(dim=-1) > 0).all()  # ascending, and so none twice
    assert torch.equal(drawn, random_rows(rows, k, batch, torch.Generator().manual_seed(seed)))
    with pytest.raises(InvalidRequest, match="at least one row"):
        random_rows(rows, 0, batch, torch.Generator())


def test_every_row_is_drawn_as_often() -> None:
    drawn = random_rows(20, 5, 8_000, torch.Generator().manual_seed(1))
    times = torch.bincount(drawn.flatten(), minlength=20)
    # Binomial(8000, 1/4): five standard deviations about 2000.
    assert (times - 2_000).abs().max() < 5 * (8_000 * 0.25 * 0.75) ** 0.5


@given(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 70)), st.data())
def test_a_window_is_consecutive_and_holds_its_position(rows: int, width: int | None, data: st.DataObject) -> None:
    positions = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
    seen = window(positions, rows, width)
    size = math.ceil(math.sqrt(rows)) if width is None else min(width, rows)
    assert seen.shape == (len(positions), size)
    assert ((seen >= 0) & (seen < rows)).all()
    assert (seen.diff(dim=-1) == 1).all()
    assert (seen == positions.unsqueeze(-1)).any(-1).all()
    inner = (positions >= size) & (positions < rows - size)
    assert torch.equal(seen[inner][:, size // 2], positions[inner])


def test_a_window_of_no_rows_or_around_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one row"):
        window(torch.tensor([0]), 4, 0)
    for position in (-1, 4):
        with pytest.raises(InvalidRequest, match="positions are rows from 0 to 3"):
            window(torch.tensor([position]), 4)
