"""Feature models against the sums that they are short for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.core import features
from service.core.features import LogFeatures, PositiveRandom, draw, feature_weights, linear, memorise
from service.core.similarity import MAGNITUDE_MAX
from service.errors import InvalidRequest

seeds = st.integers(0, 2**32 - 1)
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
CONTENTS = ("plain", "zero rows", "huge", "tiny", "duplicates", "single", "all zero")


def patterns(seed: int, rows: int, dtype: torch.dtype, content: str = "plain") -> tuple[Tensor, Tensor]:
    """Unit rows, and three cues near some of them."""
    g = torch.Generator().manual_seed(seed)
    stored = torch.nn.functional.normalize(torch.randn(rows, 6, generator=g, dtype=torch.float64), dim=-1)
    cues = stored[torch.randint(rows, (3,), generator=g)] + 0.2 * torch.randn(3, 6, generator=g, dtype=torch.float64)
    if content == "zero rows":
        stored[::2] = 0
    if content == "all zero":
        stored[:] = 0
    if content == "duplicates":
        stored[1::2] = stored[0]
    if content == "single":
        stored = stored[:1]
    scale = {"huge": MAGNITUDE_MAX / 10, "tiny": 1e-30}.get(content, 1.0)
    return (stored * scale).to(dtype), (cues * scale).to(dtype)


def models(seed: int, beta: float, dtype: torch.dtype) -> tuple[LogFeatures, LogFeatures]:
    g = torch.Generator().manual_seed(seed)
    return linear, PositiveRandom(draw(16, 6, g, dtype=dtype), beta)


@DTYPES
@given(seeds, st.integers(1, 40), st.floats(0.01, 4.0))
def test_a_step_is_the_sum_over_all_rows(
    dtype: torch.dtype, tolerance: float, seed: int, rows: int, beta: float
) -> None:
    """Σ ⟨φ(x), φ(ξ_μ)⟩ ξ_μ / Σ ⟨φ(x), φ(ξ_μ)⟩, with φ written out."""
    stored, cues = patterns(seed, rows, dtype)
    for model in models(seed, beta, dtype):

        def phi(x: Tensor, model: LogFeatures = model) -> Tensor:
            if isinstance(model, PositiveRandom):
                u, omega = x.double() * beta**0.5, model.projection.double()
                return torch.exp(u @ omega.T - u.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(omega))
            return torch.nn.functional.elu(x.double()) + 1

        products = phi(cues) @ phi(stored).T
        want = products / products.sum(-1, keepdim=True)
        got = feature_weights(stored, cues, model)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
        step = memorise(stored, model).step(cues)
        assert step.dtype == dtype
        torch.testing.assert_close(step.double(), want @ stored.double(), rtol=0, atol=tolerance)


@DTYPES
@given(seeds, st.sampled_from((1, 3, 7)))
def test_rows_summed_in_parts_are_summed_as_a_whole(
    dtype: torch.dtype, tolerance: float, seed: int, chunk: int
) -> None:
    stored, cues = patterns(seed, 20, dtype)
    for model in models(seed, 1.0, dtype):
        whole = memorise(stored, model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "_CHUNK_ROWS", chunk)
            parts = memorise(stored, model)
        torch.testing.assert_close(parts.log_scale, whole.log_scale)
        torch.testing.assert_close(parts.mass, whole.mass, rtol=tolerance, atol=0)
        torch.testing.assert_close(parts.step(cues), whole.step(cues), rtol=0, atol=tolerance)


@DTYPES
@given(seeds, st.sampled_from(CONTENTS), st.sampled_from((1e-6, 1.0, 1e3, 1e9)))
def test_steps_are_finite_means_of_the_rows(
    dtype: torch.dtype, tolerance: float, seed: int, content: str, beta: float
) -> None:
    stored, cues = patterns(seed, 9, dtype, content)
    kept = stored.clone()
    for model in models(seed, beta, dtype):
        weights = feature_weights(stored, cues, model)
        assert (weights >= 0).all()
        assert ((weights.sum(-1) - 1).abs() < 1e-5).all()
        step = memorise(stored, model).step(cues)
        size = float(stored.abs().amax())
        assert (step.abs() <= size * (1 + 1e-5)).all()
    assert torch.equal(stored, kept)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_random_features_estimate_the_exponential_kernel(orthogonal: bool) -> None:
    """The mean over draws is exp(β⟨x, ξ⟩); plain draws have relative variance (exp(β‖x + ξ‖²) - 1)/m, orthogonal ones
    less.
    """
    g = torch.Generator().manual_seed(5)
    x, y = torch.nn.functional.normalize(torch.randn(2, 8, generator=g, dtype=torch.float64), dim=-1)
    beta, m, draws = 0.4, 8, 16_384
    # Blocks of as many directions as there are values are drawn independently, so one large draw is many small ones.
    omega = torch.cat([draw(m * draws // 2, 8, g, orthogonal=orthogonal, dtype=torch.float64) for _ in range(2)])
    model = PositiveRandom(omega, beta)
    products = torch.exp(model(x[None]) + model(y[None])) * len(omega)
    estimates = products.reshape(draws, m).mean(-1)
    true = math.exp(beta * float(x @ y))
    variance = (math.exp(beta * float((x + y).square().sum())) - 1) / m
    assert float(estimates.mean()) == pytest.approx(true, rel=5 * (variance / draws) ** 0.5)
    spread = float(estimates.var()) / true**2
    if orthogonal:
        assert spread < 0.95 * variance
    else:
        assert spread == pytest.approx(variance, rel=0.15)


def test_many_random_features_are_nearly_the_dense_recall_at_a_small_beta_and_not_at_a_large_one() -> None:
    stored, cues = patterns(3, 30, torch.float64)
    g = torch.Generator().manual_seed(1)
    off = {}
    for beta in (0.5, 30.0):
        memory = memorise(stored, PositiveRandom(draw(8_192, 6, g, dtype=torch.float64), beta))
        dense = torch.softmax(beta * cues @ stored.T, -1) @ stored
        off[beta] = float((memory.step(cues) - dense).norm(dim=-1).amax())
    assert off[0.5] < 0.02 < 0.2 < off[30.0]


@given(seeds, st.integers(1, 20), st.integers(1, 7))
def test_orthogonal_directions_are_at_right_angles_within_each_block(seed: int, count: int, dimension: int) -> None:
    directions = draw(count, dimension, torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert directions.shape == (count, dimension)
    for block in torch.split(directions, dimension):
        products = block @ block.T
        norms = products.diag().sqrt()
        off = products - torch.diag(products.diag())
        assert (off.abs() <= 1e-9 * norms.outer(norms) + 1e-300).all()
    assert torch.equal(directions, draw(count, dimension, torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_what_makes_no_sense_is_refused() -> None:
    g = torch.Generator().manual_seed(0)
    for count, dimension in ((0, 4), (4, 0), (features.FEATURES_MAX + 1, 4)):
        with pytest.raises(InvalidRequest, match="features number from 1"):
            draw(count, dimension, g)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidRequest, match="beta is positive"):
            PositiveRandom(draw(2, 3, g), beta)
    with pytest.raises(InvalidRequest, match="at least one pattern"):
        memorise(torch.empty(0, 3), linear)
    for bad in (torch.full((1, 3), math.nan), torch.full((1, 3), 2 * MAGNITUDE_MAX)):
        with pytest.raises(InvalidRequest, match="values are at most"):
            memorise(bad, linear)
        with pytest.raises(InvalidRequest, match="values are at most"):
            memorise(torch.ones(1, 3), linear).step(bad)
