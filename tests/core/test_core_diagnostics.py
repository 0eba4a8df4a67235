"""Diagnostics against their definitions on every pair, and capacity against memories of the size it speaks of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from service.core import diagnostics
from service.core.diagnostics import Gather, capacity, fixed_points, nearest, needed_margin, relative_rank
from service.core.names import Entmax, KSubsets, Polynomial, Separation
from service.core.retrieve import retrieve
from service.core.similarity import Blocks, Kernel, normalise_rows, overlaps
from service.errors import InvalidRequest

seeds = st.integers(0, 2**32 - 1)
D = 6
KINDS = ("cosine", "dot", "neg_l2", "kernel", "blocks")


def drawn(seed: int, rows: int, width: int = D, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layout(kind: str, seed: int = 0) -> Blocks:
    match kind:
        case "kernel":
            return Blocks((D,), (1.0,), "cosine", (Kernel(drawn(seed + 1, D)),))
        case "blocks":
            return Blocks((D - 2, 2), (1.0, 3.0))
        case "cosine" | "dot" | "neg_l2":
            return Blocks((D,), (1.0,), kind)
    raise ValueError(kind)


def gathered(stored: Tensor) -> Gather:
    return lambda rows: stored[rows]


def every_pair(blocks: Blocks, stored: Tensor) -> tuple[Tensor, Tensor]:
    """K of every pair (row: as the state), and the distances of the similarity, from the differences."""
    distances = torch.empty(len(stored), len(stored), dtype=stored.dtype)
    for i, row in enumerate(stored):
        apart = stored - row
        if blocks.similarity != "cosine":
            distances[i] = apart.norm(dim=-1)
            continue
        shares = torch.tensor(blocks.weights, dtype=stored.dtype) / sum(blocks.weights)
        squares = []
        for b, part in enumerate(blocks.slices):
            kernel = blocks.kernels[b] if blocks.kernels else None
            block = apart[:, part] if kernel is None else apart[:, part] @ kernel.weight.T
            squares.append(block.square().sum(-1))
        distances[i] = (torch.stack(squares, -1) @ shares).sqrt()
    return overlaps(blocks, stored, stored), distances


@given(seeds, st.integers(2, 40), st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_neighbours_are_those_of_every_pair(
    seed: int, rows: int, kind: str, sampled: int, kept: int, in_chunks: bool
) -> None:
    blocks = layout(kind, seed)
    stored = normalise_rows(drawn(seed, rows), blocks)
    sample = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:sampled].sort().values
    with pytest.MonkeyPatch.context() as patch:
        if in_chunks:
            patch.setattr(diagnostics, "CHUNK_VALUES", 3 * max(len(sample), D))
        found = nearest(blocks, gathered(stored), torch.arange(rows), sample, kept)
    scores, distances = every_pair(blocks, stored)
    own = scores.diagonal().clone()
    others = scores.fill_diagonal_(-torch.inf)[sample]
    expected = others.topk(min(kept, rows)).values
    torch.testing.assert_close(found.scores, expected, rtol=1e-9, atol=1e-9)
    held = torch.where(found.others >= 0, others.gather(1, found.others.clamp_min(0)), -torch.inf)
    torch.testing.assert_close(held, found.scores, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.margins, own[sample] - others.amax(-1), rtol=1e-9, atol=1e-9)
    least = distances.fill_diagonal_(torch.inf)[sample].amin(-1)
    torch.testing.assert_close(found.distance, least, rtol=1e-9, atol=1e-9)
    assert found.radius == pytest.approx(float(least.min()) / 2)


@given(seeds, st.sampled_from(("softmax", "sparsemax", "max")), st.floats(0.5, 200.0), st.sampled_from(KINDS))
def test_fixed_points_are_those_of_a_step(seed: int, separation: str, beta: float, kind: str) -> None:
    blocks = layout(kind, seed)
    stored = normalise_rows(drawn(seed, 30), blocks)
    norm_max = float(stored.norm(dim=-1).max())
    rows = torch.arange(30)
    found = nearest(blocks, gathered(stored), rows, rows)
    fixed = fixed_points(
        blocks, gathered(stored), found, beta=beta, separation=separation, support=30, norm_max=norm_max
    )
    scores = overlaps(blocks, stored, stored)
    step = retrieve(blocks, stored, stored, beta=beta, separation=separation, first_scores=scores, update_steps_max=1)
    reached = step.weights @ stored if separation == "max" else _one_step(blocks, stored, beta, separation)
    moved = (reached - stored).norm(dim=-1)
    allowed = 0.01 * norm_max if separation == "softmax" else 1e-9
    clear = (moved - allowed).abs() > 1e-9  # on the edge rounding decides
    assert torch.equal(fixed[clear], (moved <= allowed)[clear])


def _one_step(blocks: Blocks, stored: Tensor, beta: float, separation: str) -> Tensor:
    from service.core.separation import separate

    return separate(separation, overlaps(blocks, stored, stored) * beta) @ stored


@given(seeds, st.floats(1.0, 100.0), st.integers(2, 60))
def test_rows_beyond_the_neighbours_count_at_their_bound(seed: int, beta: float, support: int) -> None:
    """With few neighbours kept, whatever is called fixed is fixed."""
    blocks = layout("cosine")
    stored = normalise_rows(drawn(seed, 60), blocks)
    rows = torch.arange(60)
    few = nearest(blocks, gathered(stored), rows, rows, kept=3)
    every = nearest(blocks, gathered(stored), rows, rows, kept=59)
    claims = {"beta": beta, "separation": "softmax", "support": support, "norm_max": 1.0}
    claimed = fixed_points(blocks, gathered(stored), few, **claims)
    truly = fixed_points(blocks, gathered(stored), every, **claims)
    assert not (claimed & ~truly).any()


@given(seeds, st.sampled_from(("softmax", "sparsemax", Entmax(1.5))), st.floats(5.0, 500.0), st.integers(2, 30))
def test_the_needed_margin_makes_fixed_points(seed: int, separation: Separation, beta: float, support: int) -> None:
    blocks = layout("cosine")
    stored = normalise_rows(drawn(seed, 30), blocks)
    rows = torch.arange(30)
    found = nearest(blocks, gathered(stored), rows, rows)
    fixed = fixed_points(
        blocks, gathered(stored), found, beta=beta, separation=separation, support=support, norm_max=1.0
    )
    wide = found.margins >= needed_margin(separation, beta, support) + 1e-12
    assert fixed[wide].all()
    if separation != "softmax":  # there the margin is necessary too
        assert not fixed[found.margins < needed_margin(separation, beta, support) - 1e-12].any()


@pytest.mark.parametrize("separation", ["lsr", KSubsets(2), Polynomial(3)])
def test_fixed_points_that_margins_do_not_tell_are_refused(separation: Separation) -> None:
    stored, rows, blocks = torch.eye(3), torch.arange(3), Blocks((3,), (1.0,))
    found = nearest(blocks, gathered(stored), rows, rows)
    with pytest.raises(InvalidRequest, match="fixed points under"):
        fixed_points(blocks, gathered(stored), found, beta=1.0, separation=separation, support=3, norm_max=1.0)


def test_an_empty_sample_is_refused() -> None:
    stored = torch.eye(3)
    with pytest.raises(InvalidRequest, match="sampled"):
        nearest(Blocks((3,), (1.0,)), gathered(stored), torch.arange(3), torch.arange(0))


def test_a_single_pattern_has_no_rival() -> None:
    found = nearest(Blocks((3,), (1.0,)), gathered(torch.eye(3)[:1]), torch.arange(1), torch.arange(1))
    assert found.margins.tolist() == [math.inf]
    assert (found.radius, found.near_duplicate.tolist()) == (math.inf, [False])
    assert capacity(found, 0.1, 0.95).memories is None


@pytest.mark.parametrize("kind", ["cosine", "dot", "neg_l2"])
def test_equal_and_nearly_equal_patterns_are_near_duplicates(kind: str) -> None:
    blocks = layout(kind)
    stored = drawn(0, 50, dtype=torch.float32)
    stored[7] = stored[3]
    stored[9] = stored[5] + 0.02 * stored[5].norm() * torch.nn.functional.normalize(drawn(1, 1).float(), dim=1)[0]
    stored = normalise_rows(stored, blocks)
    rows = torch.arange(50)
    found = nearest(blocks, gathered(stored), rows, rows)
    assert torch.nonzero(found.near_duplicate).flatten().tolist() == [3, 5, 7, 9]
    assert found.nearest[[3, 5, 7, 9]].tolist() == [7, 9, 3, 5]
    assert found.radius == 0


@given(seeds, st.integers(1, 8), st.integers(1, 30), st.integers(1, 30))
def test_relative_rank_counts_directions(seed: int, rank: int, rows: int, width: int) -> None:
    assume(rank <= min(rows, width))
    patterns = drawn(seed, rows, rank) @ drawn(seed + 1, rank, width)
    wide = torch.linalg.svdvals(patterns)
    assume(wide[rank - 1] > 1e-2 * wide[0])
    measured = relative_rank(patterns.float())
    assert (measured.rank, measured.most) == (rank, min(rows, width))
    assert measured.relative == pytest.approx(rank / min(rows, width))


def uniform_margins(seed: int, rows: int, width: int, sampled: int = 1500) -> diagnostics.Neighbours:
    blocks = Blocks((width,), (1.0,))
    stored = normalise_rows(drawn(seed, rows, width, torch.float32), blocks)
    sample = torch.arange(min(rows, sampled))  # any rows will do: they are drawn independently
    return nearest(blocks, gathered(stored), torch.arange(rows), sample)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_an_extrapolated_capacity_is_right_where_patterns_can_be_drawn(width: int) -> None:
    """Uniform patterns on a sphere: the capacity foreseen from 2,000 is drawn, and keeps about the share."""
    seen = uniform_margins(0, 2_000, width)
    # Under which 8 times as many should keep the share: nearest neighbours come closer like N^(-2/dimension).
    needed = 8 ** (-2 / (width - 1)) * float(seen.margins.quantile(0.05))
    foreseen = capacity(seen, needed, 0.95)
    assert foreseen.extrapolated
    assert not foreseen.at_least
    assert foreseen.growth == pytest.approx(2 / (width - 1), rel=0.3)
    assert foreseen.memories is not None
    assert 8_000 < foreseen.memories < 40_000
    kept = (uniform_margins(1, foreseen.memories, width).margins >= needed).double().mean()
    assert 0.92 <= float(kept) <= 0.98


@pytest.mark.parametrize("width", [4, 16])
def test_a_capacity_within_the_memory_is_counted(width: int) -> None:
    seen = uniform_margins(0, 4_000, width, 4_000)
    needed = 1.5 * float(seen.margins.quantile(0.05))
    counted = capacity(seen, needed, 0.95)
    assert not counted.extrapolated
    assert counted.memories is not None
    assert counted.memories < 4_000
    kept = [
        float((uniform_margins(seed, counted.memories, width, 4_000).margins >= needed).double().mean())
        for seed in range(2, 8)
    ]
    assert sum(kept) / len(kept) == pytest.approx(0.95, abs=0.012)


def test_duplicates_bound_the_capacity_and_orthogonal_patterns_do_not() -> None:
    twice = torch.eye(40).repeat(2, 1)
    rows = torch.arange(80)
    found = nearest(Blocks((40,), (1.0,)), gathered(twice), rows, rows)
    # Of n random rows of 80, each one's twin is missing with probability 1 - (n - 1)/79: .95 up to n = 4.95.
    assert capacity(found, 0.1, 0.95).memories == 4
    orthogonal = nearest(Blocks((40,), (1.0,)), gathered(torch.eye(40)), rows[:40], rows[:40])
    said = capacity(orthogonal, 0.1, 0.95)
    assert (said.memories, said.at_least) == (4_000, True)
    assert capacity(orthogonal, 0.0, 0.95).memories is None
