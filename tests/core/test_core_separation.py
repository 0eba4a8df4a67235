"""Separations: distributions, maximisers of their definition, equal to an independent implementation."""

from __future__ import annotations

import entmax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.core.separation import regulariser, separate

SEPARATIONS = ("softmax", "sparsemax", "entmax15", "max")
ALPHA = {"softmax": 1.0, "sparsemax": 2.0, "entmax15": 1.5}
seeds = st.integers(0, 2**32 - 1)


def logits(seed: int, rows: int, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, rows, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


@given(seeds, st.integers(1, 200), st.sampled_from((1e-6, 0.1, 1.0, 10.0, 1e4, 1e9)), st.sampled_from(SEPARATIONS))
def test_weights_are_a_distribution(seed: int, rows: int, scale: float, kind: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        p = separate(kind, logits(seed, rows, scale, dtype))
        assert p.dtype == dtype
        assert (p >= 0).all()
        assert (p.sum(-1) - 1).abs().amax() <= tolerance


@given(seeds, st.integers(1, 40), st.sampled_from((0.1, 1.0, 10.0)), st.sampled_from(SEPARATIONS))
def test_weights_maximise_the_definition(seed: int, rows: int, scale: float, kind: str) -> None:
    """No other point of the simplex has a larger ⟨q, z⟩ - Ω(q)."""
    z = logits(seed, rows, scale)
    p = separate(kind, z)
    attained = (p * z).sum(-1) - regulariser(kind, p)
    g = torch.Generator().manual_seed(seed + 1)
    corner = torch.nn.functional.one_hot(torch.randint(rows, (3,), generator=g), rows).double()
    inside = torch.softmax(torch.randn(3, rows, generator=g, dtype=torch.float64) * 3, -1)
    for other in (corner, inside):
        for share in (1e-3, 0.3, 1.0):
            q = (1 - share) * p + share * other
            assert (attained - (q * z).sum(-1) + regulariser(kind, q) >= -1e-10 * scale).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
@given(seed=seeds, rows=st.integers(1, 300), scale=st.sampled_from((0.01, 1.0, 5.0, 50.0)))
def test_agrees_with_the_entmax_package(
    dtype: torch.dtype, tolerance: float, seed: int, rows: int, scale: float
) -> None:
    z = logits(seed, rows, scale, dtype)
    torch.testing.assert_close(separate("sparsemax", z), entmax.sparsemax(z, dim=-1), rtol=0, atol=tolerance)
    torch.testing.assert_close(separate("entmax15", z), entmax.entmax15(z, dim=-1), rtol=0, atol=tolerance)
    bisected = entmax.entmax_bisect(z.double(), alpha=1.5, dim=-1, n_iter=80).to(dtype)
    torch.testing.assert_close(separate("entmax15", z), bisected, rtol=0, atol=tolerance)


@given(seeds, st.integers(2, 60), st.sampled_from((0.1, 1.0, 30.0)), st.sampled_from(SEPARATIONS))
def test_an_invalid_row_weighs_nothing_and_the_rest_is_solved_without_it(
    seed: int, rows: int, scale: float, kind: str
) -> None:
    z = logits(seed, rows, scale)
    valid = torch.rand(3, rows, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    valid[2] = False
    p = separate(kind, z, valid)
    assert (p[~valid] == 0).all()
    for i in range(2):
        if valid[i].any():
            torch.testing.assert_close(p[i][valid[i]], separate(kind, z[i][valid[i]]), rtol=0, atol=1e-12)
    assert torch.equal(separate(kind, z.masked_fill(~valid, -torch.inf)[:1], valid[:1]), p[:1])


def test_max_gives_a_tie_to_the_lowest_row() -> None:
    assert separate("max", torch.tensor([[1.0, 3.0, 3.0, 3.0]])).tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", SEPARATIONS)
def test_half_precision_logits_are_separated_in_float32(kind: str) -> None:
    z = torch.tensor([[0.5, 1.0, 4.0]], dtype=torch.float16)
    assert torch.equal(separate(kind, z), separate(kind, z.float()))


@pytest.mark.parametrize("kind", SEPARATIONS)
def test_the_regulariser_is_zero_at_a_single_row_and_least_at_equal_weights(kind: str) -> None:
    corner, even = torch.tensor([0.0, 1.0, 0.0]), torch.full((3,), 1 / 3)
    assert float(regulariser(kind, corner)) == 0.0
    if kind == "max":
        assert float(regulariser(kind, even)) == 0.0
        return
    alpha = ALPHA[kind]
    want = -torch.log(torch.tensor(3.0)) if alpha == 1 else (3 ** (1 - alpha) - 1) / (alpha * (alpha - 1))
    assert float(regulariser(kind, even)) == pytest.approx(float(want), rel=1e-6)
