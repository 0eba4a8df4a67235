"""Batches that do not fit are halved, and what fitted is kept."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.encoders.halving import is_out_of_memory, run_batches
from service.errors import OutOfMemory


@given(count=st.integers(0, 70), at_once=st.integers(1, 40), fits=st.integers(1, 40))
def test_every_item_is_run_once_whatever_fits(count: int, at_once: int, fits: int) -> None:
    done = np.zeros(count, dtype=int)
    failed = 0

    def run(part: slice) -> None:
        nonlocal failed
        if part.stop - part.start > fits:
            failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        done[part] += 1

    run_batches(count, at_once, run)
    assert (done == 1).all()
    assert failed <= 6  # what fitted is kept: at most the halvings from 40 to 1, once


def test_one_item_that_does_not_fit_is_out_of_memory() -> None:
    sizes = []

    def run(part: slice) -> None:
        sizes.append(part.stop - part.start)
        raise MemoryError

    with pytest.raises(OutOfMemory) as caught:
        run_batches(9, 8, run)
    assert (caught.value.status, caught.value.code) == (507, "out_of_memory")
    assert sizes == [8, 4, 2, 1]


def test_other_errors_are_not_retried() -> None:
    sizes = []

    def run(part: slice) -> None:
        sizes.append(part)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        run_batches(9, 8, run)
    assert len(sizes) == 1


def test_the_allocators_own_errors_are_known() -> None:
    for allocate in (lambda: torch.empty(10**15), lambda: np.empty(10**15)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


def test_what_the_failed_attempt_held_is_let_go_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def run(part: slice) -> None:
        assert all(reference() is None for reference in held)
        activations = torch.zeros(4)
        held.append(weakref.ref(activations))
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run_batches(4, 4, run)
    assert len(held) == 6  # 4, 2, and four times 1
