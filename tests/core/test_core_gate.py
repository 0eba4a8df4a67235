"""The gate: its dynamics, the bounds on log S, and what calibration guarantees."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.core.energy import energy
from service.core.gate import (
    Threshold,
    calibrate,
    gate_energy,
    gated_step,
    log_mass,
    mass_bounds,
    origin_radius,
    prototypes,
)
from service.core.separation import separate
from service.core.similarity import Blocks
from service.core.support import top_k
from service.core.update import update
from service.errors import CalibrationRefused, InvalidRequest

seeds = st.integers(0, 2**32 - 1)
rows_of = st.integers(1, 15)
betas = st.floats(0.05, 20.0)


def net(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randn(rows, 5, generator=g, dtype=torch.float64) * (torch.rand(1, generator=g) * 3 + 0.1)
    return patterns, torch.randn(8, 5, generator=g, dtype=torch.float64) * 2, g


@given(seeds, rows_of, betas)
def test_without_lambda_it_is_the_plain_step(seed: int, rows: int, beta: float) -> None:
    patterns, state, _ = net(seed, rows)
    scores = state @ patterns.T
    weights = separate("softmax", beta * scores)
    plain = update(patterns, state, weights)
    torch.testing.assert_close(gated_step(patterns, state, beta, -math.inf), plain, rtol=1e-12, atol=1e-12)
    blocks = Blocks((5,), (1.0,), "dot")
    want = energy(blocks, state, scores, weights, beta, "softmax")
    torch.testing.assert_close(gate_energy(patterns, state, beta, -math.inf), want, rtol=1e-12, atol=1e-12)


@given(seeds, rows_of, betas, st.floats(1e-6, 10.0))
def test_the_origin_attracts_its_ball(seed: int, rows: int, beta: float, excess: float) -> None:
    """Theorem 1: with log λ > log N_h, every state within the radius falls to the origin, and stays."""
    patterns, direction, _ = net(seed, rows)
    log_lambda = math.log(rows) + excess
    radius = origin_radius(log_lambda, rows, beta, float(patterns.norm(dim=-1).amax()))
    assert radius > 0
    state = torch.nn.functional.normalize(direction, dim=-1) * radius * (1 - 1e-9)
    worst = torch.nn.functional.normalize(patterns, dim=-1) * radius * (1 - 1e-9)
    for start in (state, worst):
        fallen = gated_step(patterns, start, beta, log_lambda)
        assert (fallen == 0).all()
        assert (gated_step(patterns, fallen, beta, log_lambda) == 0).all()


def test_no_ball_unless_lambda_is_over_the_number_of_rows() -> None:
    assert origin_radius(math.log(7), 7, 1.0, 1.0) == 0.0
    assert origin_radius(0.0, 7, 1.0, 1.0) == 0.0


@given(seeds, rows_of, betas, st.floats(0.0, 8.0), st.floats(0.0, 8.0))
def test_the_basin_grows_with_lambda(seed: int, rows: int, beta: float, low: float, more: float) -> None:
    patterns, state, _ = net(seed, rows)
    fell = []
    for log_lambda in (math.log(rows) + 1e-6 + low, math.log(rows) + 1e-6 + low + more):
        v = state
        for _ in range(10):
            v = gated_step(patterns, v, beta, log_lambda)
        fell.append((v == 0).all(-1))
    assert (fell[1] | ~fell[0]).all()


@given(seeds, rows_of, betas, st.one_of(st.just(-math.inf), st.floats(-5.0, 30.0)))
def test_a_gated_step_never_raises_the_gates_energy(seed: int, rows: int, beta: float, log_lambda: float) -> None:
    patterns, v, _ = net(seed, rows)
    before = gate_energy(patterns, v, beta, log_lambda)
    for _ in range(6):
        v = gated_step(patterns, v, beta, log_lambda)
        after = gate_energy(patterns, v, beta, log_lambda)
        assert (after <= before + 1e-10 * (1 + before.abs())).all()
        before = after


@given(seeds, st.integers(1, 40), st.integers(1, 40), betas)
def test_mass_bounds_hold_the_mass(seed: int, rows: int, k: int, beta: float) -> None:
    patterns, state, _ = net(seed, rows)
    scores = state @ patterns.T
    mass = log_mass(scores, beta)
    torch.testing.assert_close(mass.numpy(), np.logaddexp.reduce(beta * scores.numpy(), -1), rtol=1e-12, atol=1e-12)
    low, high = mass_bounds(top_k(scores, k)[0], rows, beta)
    slack = 1e-12 * (1 + mass.abs())
    assert (low <= mass + slack).all()
    assert (mass <= high + slack).all()
    if k >= rows:
        assert torch.equal(low, high)


def test_the_upper_mass_bound_is_attained_when_the_rows_outside_tie_with_the_last() -> None:
    low, high = mass_bounds(torch.tensor([[2.0, 2.0]]), 10, 3.0)
    assert low.item() == pytest.approx(6.0 + math.log(2))
    assert high.item() == pytest.approx(6.0 + math.log(10))


def test_mass_bounds_ignore_padding() -> None:
    full = torch.tensor([[2.0, 1.0]])
    padded = torch.tensor([[2.0, 1.0, -torch.inf]])
    for rows in (2, 9):
        for a, b in zip(mass_bounds(full, rows, 3.0), mass_bounds(padded, rows, 3.0), strict=True):
            assert a.item() == pytest.approx(b.item())


@pytest.mark.parametrize(("n", "target"), [(19, 0.95), (39, 0.9), (100, 0.95), (37, 0.8)])
@pytest.mark.parametrize("tied", [False, True])
def test_coverage_is_within_its_binomial_interval(n: int, target: float, tied: bool) -> None:
    """Over draws of calibration set and new cue. Continuous scores are accepted with probability 1 - k/(n+1) exactly;
    with ties, at least that.
    """
    draws = 3000
    g = torch.Generator().manual_seed(20240607)
    scores = 50 + 5 * torch.randn(draws, n + 1, generator=g, dtype=torch.float64)
    if tied:
        scores = scores.round(decimals=-1)
    accepted = sum(int(calibrate(row[:n], target, 10).accepts(row[n:]).sum()) for row in scores)
    exact = 1 - math.floor((1 - Fraction(repr(target))) * (n + 1)) / (n + 1)
    assert exact >= target
    deviation = 4 * math.sqrt(draws * exact * (1 - exact))
    assert accepted >= draws * exact - deviation
    if not tied:
        assert accepted <= draws * exact + deviation


@pytest.mark.parametrize(("target", "needed"), [(0.95, 19), (0.9, 9), (0.99, 99), (0.7, 3), (Fraction(2, 3), 2)])
def test_it_refuses_too_few_cues_and_takes_just_enough(target: float | Fraction, needed: int) -> None:
    scores = torch.linspace(10, 20, needed, dtype=torch.float64)
    threshold = calibrate(scores, target, 5)
    assert threshold.n == needed
    assert threshold.log_lambda == math.nextafter(10.0, -math.inf)
    assert threshold.accepts(scores).all()
    with pytest.raises(CalibrationRefused, match=f"needs n >= {needed} held-out cues .* has {needed - 1}"):
        calibrate(scores[1:], target, 5)


def test_a_score_equal_to_the_threshold_is_refused_and_float32_ties_are_accepted() -> None:
    scores = torch.full((30,), 7.3)  # float32: not the float64 that prints so
    threshold = calibrate(scores, 0.95, 5)
    assert threshold.accepts(scores).all()
    at = torch.tensor([threshold.log_lambda], dtype=torch.float64)
    assert not threshold.accepts(at).any()


def test_it_refuses_a_threshold_at_which_nothing_falls() -> None:
    scores = torch.full((30,), math.log(1000), dtype=torch.float64)
    with pytest.raises(CalibrationRefused, match=r"log N = 6\.908"):
        calibrate(scores, 0.95, 1000)
    with pytest.raises(CalibrationRefused, match="is not over log N"):
        calibrate(torch.full((30,), -torch.inf), 0.95, 0)
    assert isinstance(calibrate(scores + 0.01, 0.95, 1000), Threshold)


@pytest.mark.parametrize("target", [0.0, 1.0, 1.5, -0.1])
def test_a_target_is_a_share(target: float) -> None:
    with pytest.raises(InvalidRequest):
        calibrate(torch.ones(100), target, 5)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not a number"):
        calibrate(torch.tensor([math.nan] * 30), 0.95, 5)


@given(seeds, st.integers(1, 60), st.data())
def test_prototypes_are_the_same_each_time_and_spread_over_the_patterns(
    seed: int, rows: int, data: st.DataObject
) -> None:
    stored = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    count = data.draw(st.integers(1, rows))
    centres = prototypes(stored, count, seed)
    assert torch.equal(centres, prototypes(stored, count, seed))

    def inertia(points: torch.Tensor) -> float:
        return float(torch.cdist(stored, points).amin(-1).square().sum())

    first = stored[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]]
    assert inertia(centres) <= inertia(first) * (1 + 1e-5) + 1e-5
    if count == 1:
        torch.testing.assert_close(centres[0], stored.mean(0), rtol=1e-4, atol=1e-5)
    if count == rows:
        assert inertia(centres) <= 1e-5


def test_prototypes_find_clusters_over_several_chunks() -> None:
    g = torch.Generator().manual_seed(1)
    middles = torch.tensor([[10.0, 0.0], [-10.0, 0.0]])
    stored = middles[torch.arange(9000) % 2] + torch.randn(9000, 2, generator=g)
    centres = prototypes(stored, 2, 0)
    assert torch.cdist(middles, centres).amin(-1).amax() < 0.1


def test_a_prototype_that_loses_its_rows_stays() -> None:
    """Equal patterns all go to the first of equal centres."""
    assert torch.equal(prototypes(torch.ones(5, 2), 3, 0), torch.ones(3, 2))


@pytest.mark.parametrize("count", [0, 4])
def test_prototypes_are_not_more_than_the_patterns(count: int) -> None:
    with pytest.raises(InvalidRequest, match=f"3 stored patterns, not {count}"):
        prototypes(torch.ones(3, 2), count, 0)
