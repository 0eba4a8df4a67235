"""Certificates against the dense step that they speak about."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.core.certificate import polynomial_bound, softmax_bound, sparse_exact
from service.core.names import Entmax, KSubsets, Polynomial, Separation
from service.core.separation import separate
from service.core.support import top_k

SPARSE: tuple[Separation, ...] = ("sparsemax", Entmax(1.5), "normmax", Entmax(1.3), Entmax(2.5), KSubsets(2))
CERTIFIED = (*SPARSE, "max", "lsr", Polynomial(3))
seeds = st.integers(0, 2**32 - 1)
betas = st.floats(0.01, 50.0)


def memory(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    stored = torch.randn(rows, 7, generator=g, dtype=torch.float64)
    return stored, torch.randn(3, 7, generator=g, dtype=torch.float64) @ stored.T, g


@given(seeds, st.integers(1, 40), st.integers(1, 40), betas, st.sampled_from((0.0, 1e-6, 0.1)))
def test_the_softmax_bound_holds_for_one_step(seed: int, rows: int, k: int, beta: float, error: float) -> None:
    """With the scores off by up to `error`: the mass outside, and, for exact scores, the distance to the dense step."""
    stored, exact, g = memory(seed, rows)
    computed = exact + error * (2 * torch.rand(exact.shape, generator=g, dtype=torch.float64) - 1)
    best, kept = top_k(computed, k)
    norm_max = float(stored.norm(dim=-1).amax())
    mass, bound = softmax_bound(best, rows, beta, norm_max, score_error=error)
    dense = torch.softmax(beta * exact, -1)
    outside = 1 - dense.gather(-1, kept).sum(-1)
    assert (outside <= mass + 1e-12).all()
    assert torch.equal(bound, 2 * norm_max * mass)
    over_support = torch.softmax(beta * exact.gather(-1, kept), -1)
    step = torch.einsum("bk,bkd->bd", over_support, stored[kept])
    assert ((dense @ stored - step).norm(dim=-1) <= bound + 1e-12).all()
    if k >= rows:
        assert (mass == 0).all()


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(2, 12), st.sampled_from((0.0, 1e-6, 0.1)))
def test_the_polynomial_bound_holds_for_one_step(seed: int, rows: int, k: int, degree: int, error: float) -> None:
    stored, exact, g = memory(seed, rows)
    computed = exact + error * (2 * torch.rand(exact.shape, generator=g, dtype=torch.float64) - 1)
    best, kept = top_k(computed, k)
    norm_max = float(stored.norm(dim=-1).amax())
    mass, bound = polynomial_bound(best, rows, degree, norm_max, score_error=error)
    dense = separate(Polynomial(degree), exact)
    outside = dense.scatter(-1, kept, 0.0).sum(-1)
    assert (outside <= mass + 1e-12).all()
    over_support = separate(Polynomial(degree), exact.gather(-1, kept))
    step = torch.einsum("bk,bkd->bd", over_support, stored[kept])
    stays = (over_support == 0).all(-1)  # an abstention: the step leads to the state, not to 0
    assert torch.where(stays, bound == torch.inf, True)[dense.any(-1)].all()
    off = (dense @ stored - step).norm(dim=-1)
    assert (off <= bound + 1e-12).all()
    if k >= rows:
        assert (mass == 0).all()


def test_a_polynomial_support_that_ends_at_zero_loses_nothing() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, -2.0], [3.0, 2.0, 1.0], [-1.0, -2.0, -3.0]]).double()
    mass, bound = polynomial_bound(scores, 13, 3, 1.0)
    assert mass.tolist() == pytest.approx([0.0, 0.0, 10 / 24, 0.0])
    assert bound.tolist() == pytest.approx([0.0, 0.0, 20 / 24, 0.0])
    assert sparse_exact(Polynomial(3), scores, 1.0, 13).tolist() == [True, True, False, True]
    mass, bound = polynomial_bound(scores[3:] + 0.95, 13, 3, 1.0, score_error=0.1)
    assert (mass.item(), bound.item()) == (0.0, 0.0)
    mass, bound = polynomial_bound(scores[3:, :1] + 0.95, 13, 3, 1.0, score_error=0.1)
    assert (mass.item(), bound.item()) == (1.0, torch.inf)


@given(seeds, st.integers(1, 40), st.integers(1, 40), betas, st.sampled_from(CERTIFIED), st.sampled_from((0.0, 0.1)))
def test_a_sparse_certificate_means_that_the_dense_step_has_no_other_row(
    seed: int, rows: int, k: int, beta: float, kind: Separation, error: float
) -> None:
    _, exact, g = memory(seed, rows)
    computed = exact + error * (2 * torch.rand(exact.shape, generator=g, dtype=torch.float64) - 1)
    best, kept = top_k(computed, k)
    certified = sparse_exact(kind, best, beta, rows, score_error=error)
    dense = separate(kind, beta * exact)
    outside = dense.scatter(-1, kept, 0.0).sum(-1)
    assert (outside[certified] <= 1e-12).all()
    if k >= rows:
        assert certified.all()


@given(seeds, st.integers(2, 30), betas, st.sampled_from(SPARSE))
def test_without_a_sparse_certificate_a_row_tied_with_the_last_takes_part(
    seed: int, k: int, beta: float, kind: Separation
) -> None:
    """The condition is exact in the next score s_(K+1): a copy of the K-th row is outside the weights iff it is
    certified.
    """
    _, exact, _ = memory(seed, k)
    best = exact.sort(-1, descending=True).values
    tied = torch.cat([best, best[:, -1:]], dim=-1)
    certified = sparse_exact(kind, best, beta, k + 1)
    assert torch.equal(certified, separate(kind, beta * tied)[:, -1] == 0)


def test_score_errors_count_against_both_sides() -> None:
    """The worst case is attained: rows inside truly score less than computed, rows outside more."""
    beta, error, inside, total = 3.0, 0.1, 4, 10
    true = torch.tensor([[1.0 - error] * inside + [1.0 + error] * (total - inside)], dtype=torch.float64)
    mass, _ = softmax_bound(torch.ones(1, inside, dtype=torch.float64), total, beta, 1.0, score_error=error)
    assert mass.item() == pytest.approx(torch.softmax(beta * true, -1)[0, inside:].sum().item())

    computed = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    true = torch.tensor([[0.9, 0.0, 0.1]], dtype=torch.float64)
    for beta, reaches_outside in ((1.2, True), (1.3, False)):
        assert bool(separate("sparsemax", beta * true)[0, 2] > 0) == reaches_outside
        assert sparse_exact("sparsemax", computed, beta, 3, score_error=error).item() != reaches_outside
        assert sparse_exact("sparsemax", computed, beta, 3).item()


def test_padding_counts_as_no_row() -> None:
    padded = torch.tensor([[3.0, 1.0, -torch.inf]])
    mass, _ = softmax_bound(padded, 2, 1.0, 1.0)
    assert mass.tolist() == [0.0]
    assert softmax_bound(padded, 10, 1.0, 1.0)[0].item() == pytest.approx(
        softmax_bound(padded[:, :2], 10, 1.0, 1.0)[0].item()
    )
    assert (
        sparse_exact("sparsemax", padded, 1.0, 10).tolist()
        == sparse_exact("sparsemax", padded[:, :2], 1.0, 10).tolist()
    )
    assert softmax_bound(torch.tensor([[-torch.inf]]), 4, 1.0, 1.0)[0].tolist() == [1.0]


def test_beta_may_differ_per_cue() -> None:
    best = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    both, _ = softmax_bound(best, 100, torch.tensor([1.0, 20.0]), 1.0)
    assert both.tolist() == [softmax_bound(best[:1], 100, beta, 1.0)[0].item() for beta in (1.0, 20.0)]
    assert sparse_exact("sparsemax", best, torch.tensor([0.5, 2.0]), 100).tolist() == [False, True]
