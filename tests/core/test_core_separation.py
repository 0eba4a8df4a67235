"""Separations: distributions, maximisers of their definition, equal to independent implementations."""

from __future__ import annotations

import math

import entmax
import numpy as np
import pytest
import torch
from entmax.root_finding import budget_bisect
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from service.core import separation
from service.core.names import (
    ALPHA_MAX,
    DEGREE_MAX,
    Entmax,
    KSubsets,
    Polynomial,
    Separation,
    abstains,
    is_separation,
    named,
)
from service.core.names import entmax as entmax_of
from service.core.separation import exact_recall_margin, regulariser, separate
from service.errors import InvalidRequest

FIXED: tuple[Separation, ...] = (
    "softmax", "sparsemax", Entmax(1.5), "max", "normmax", Entmax(1.01), Entmax(1.3), Entmax(3.0), Entmax(ALPHA_MAX),
    KSubsets(1), KSubsets(3), "lsr", Polynomial(2), Polynomial(7),
)  # fmt: skip
REGULARISED = tuple(kind for kind in FIXED if not abstains(kind))
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(FIXED)
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])


def logits(seed: int, rows: int, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, rows, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def resolution(alpha: float) -> float:
    """What one rounding of a logit does to the weight of a row at the threshold."""
    return float(torch.finfo(torch.float64).eps) ** (1 / (alpha - 1))


@DTYPES
@given(seeds, st.integers(1, 200), st.sampled_from((1e-6, 0.1, 1.0, 10.0, 1e4, 1e9)), kinds)
def test_weights_are_a_distribution_unless_the_separation_abstains(
    dtype: torch.dtype, tolerance: float, seed: int, rows: int, scale: float, kind: Separation
) -> None:
    z = logits(seed, rows, scale, dtype)
    p = separate(kind, z)
    assert p.dtype == dtype
    assert (p >= 0).all()
    total = p.sum(-1)
    if abstains(kind):
        reached = (z > 0 if kind != "lsr" else z >= -2).any(-1)
        assert torch.equal(total > 0, reached)
        total = total[reached]
    assert ((total - 1).abs() <= tolerance / 10).all()


@DTYPES
@given(seeds, st.integers(1, 40), st.sampled_from((0.1, 1.0, 10.0)), st.sampled_from(REGULARISED))
def test_weights_maximise_the_definition(
    dtype: torch.dtype, tolerance: float, seed: int, rows: int, scale: float, kind: Separation
) -> None:
    """No other point of the polytope has a larger ⟨q, z⟩ - Ω(q)."""
    assert not abstains(kind)
    z = logits(seed, rows, scale, dtype).double()
    p = separate(kind, z.to(dtype)).double()
    attained = (p * z).sum(-1) - regulariser(kind, p)
    g = torch.Generator().manual_seed(seed + 1)
    if isinstance(kind, KSubsets):
        size = min(kind.k, rows)
        chosen = torch.rand(3, rows, generator=g).topk(size).indices
        corner = torch.zeros(3, rows, dtype=torch.float64).scatter_(-1, chosen, 1.0 / size)
        inside = (corner + 1.0 / rows) / 2
        assert (p <= 1.0 / size + 1e-6).all()
    else:
        corner = torch.nn.functional.one_hot(torch.randint(rows, (3,), generator=g), rows).double()
        inside = torch.softmax(torch.randn(3, rows, generator=g, dtype=torch.float64) * 3, -1)
    for other in (corner, inside):
        for share in (1e-3, 0.3, 1.0):
            q = (1 - share) * p + share * other
            assert (attained - (q * z).sum(-1) + regulariser(kind, q) >= -tolerance * 1e-3 * scale).all()


@DTYPES
@given(seed=seeds, rows=st.integers(1, 300), scale=st.sampled_from((0.01, 1.0, 5.0, 50.0)))
def test_agrees_with_the_entmax_package(
    dtype: torch.dtype, tolerance: float, seed: int, rows: int, scale: float
) -> None:
    z = logits(seed, rows, scale, dtype)
    torch.testing.assert_close(separate("sparsemax", z), entmax.sparsemax(z, dim=-1), rtol=0, atol=tolerance)
    torch.testing.assert_close(separate(Entmax(1.5), z), entmax.entmax15(z, dim=-1), rtol=0, atol=tolerance)
    normmax = entmax.normmax_bisect(z.double(), alpha=2, dim=-1, n_iter=100).to(dtype)
    torch.testing.assert_close(separate("normmax", z), normmax, rtol=0, atol=tolerance)
    for k in (1, 2, 5):
        if k < rows:  # the package's interval does not hold the threshold of all rows
            subsets = budget_bisect(z.double(), budget=float(k), dim=-1, n_iter=100).to(dtype) / k
            torch.testing.assert_close(separate(KSubsets(k), z), subsets, rtol=0, atol=tolerance)


@DTYPES
@given(
    seed=seeds, rows=st.integers(1, 300), scale=st.sampled_from((0.01, 1.0, 5.0, 50.0)),
    alpha=st.one_of(st.floats(1.001, 3.0), st.floats(3.0, ALPHA_MAX)),
)  # fmt: skip
def test_entmax_of_any_alpha_agrees_with_bisection(
    dtype: torch.dtype, tolerance: float, seed: int, rows: int, scale: float, alpha: float
) -> None:
    z = logits(seed, rows, scale, dtype)
    wide = z.double() - z.double().amax(-1, keepdim=True)  # the package loses precision far from 0
    want = entmax.entmax_bisect(wide, alpha=alpha, dim=-1, n_iter=120).to(dtype)
    # 1e-6 and 1e-4 up to α = 3.5; beyond, as near as rounding lets any implementation come.
    torch.testing.assert_close(separate(Entmax(alpha), z), want, rtol=0, atol=max(tolerance, 4 * resolution(alpha)))


@pytest.mark.parametrize("kind", [kind for kind in REGULARISED if kind not in ("max", Entmax(ALPHA_MAX))], ids=named)
@DTYPES
def test_agrees_with_a_general_optimiser(kind: Separation, dtype: torch.dtype, tolerance: float) -> None:
    """scipy's SLSQP on the definition itself. It stops at a corner at times, where the slope of an entmax is infinite:
    of several starts the best counts.
    """
    assert not abstains(kind)
    for seed in range(6):
        z = logits(seed, 5, 1.0, dtype)[0]
        cap = 1.0 / min(kind.k, 5) if isinstance(kind, KSubsets) else 1.0

        def negative(p: np.ndarray, z: Tensor = z) -> tuple[float, np.ndarray]:
            q = torch.tensor(p, dtype=torch.float64, requires_grad=True)
            value = regulariser(kind, q.clamp_min(1e-300)) - (q * z.double()).sum()
            value.backward()
            assert q.grad is not None
            return float(value.detach()), np.nan_to_num(q.grad.numpy(), neginf=-1e3)

        found = [
            minimize(
                negative, 0.2 * (1 - share) + share * torch.softmax(z.double(), -1).numpy(), jac=True, method="SLSQP",
                bounds=[(0.0, cap)] * 5, tol=1e-15, options={"maxiter": 2000},
                constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
            )
            for share in (0.0, 0.5, 0.9)
        ]  # fmt: skip
        best = min(found, key=lambda result: result.fun)
        got = separate(kind, z).double()
        assert np.abs(best.x - got.numpy()).max() <= tolerance, (named(kind), best.x, got)
        assert negative(got.numpy())[0] <= best.fun + tolerance * 1e-3


@DTYPES
@given(seed=seeds, rows=st.integers(1, 60), scale=st.sampled_from((0.01, 1.0, 5.0)), degree=st.integers(2, 30))
def test_polynomial_and_epanechnikov_are_their_formulas(
    dtype: torch.dtype, tolerance: float, seed: int, rows: int, scale: float, degree: int
) -> None:
    z = logits(seed, rows, scale, dtype)
    for p, row in zip(separate(Polynomial(degree), z).tolist(), z.tolist(), strict=True):
        powers = [max(value, 0.0) ** (degree - 1) for value in row]
        want = [power / sum(powers) if sum(powers) else 0.0 for power in powers]
        assert p == pytest.approx(want, abs=tolerance)
    for p, row in zip(separate("lsr", z).tolist(), z.tolist(), strict=True):
        inside = [value >= -2 for value in row]
        assert p == pytest.approx([x / max(sum(inside), 1) for x in inside], abs=tolerance)


@given(seeds, st.integers(2, 60), st.sampled_from((0.1, 1.0, 30.0)), kinds)
def test_an_invalid_row_weighs_nothing_and_the_rest_is_solved_without_it(
    seed: int, rows: int, scale: float, kind: Separation
) -> None:
    z = logits(seed, rows, scale)
    valid = torch.rand(3, rows, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    valid[2] = False
    p = separate(kind, z, valid)
    assert (p[~valid] == 0).all()
    tolerance = 4 * resolution(kind.alpha) + 1e-12 if isinstance(kind, Entmax) else 1e-12
    for i in range(2):
        if valid[i].any():
            torch.testing.assert_close(p[i][valid[i]], separate(kind, z[i][valid[i]]), rtol=0, atol=tolerance)
    alone = separate(kind, z.masked_fill(~valid, -torch.inf)[:1], valid[:1])
    torch.testing.assert_close(alone, p[:1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["sparsemax", Entmax(1.5), Entmax(1.8), "normmax", KSubsets(2)], ids=named)
@pytest.mark.parametrize("spread", [0.3, 30.0, None])
def test_many_rows_are_solved_as_few_are(kind: Separation, spread: float | None) -> None:
    """Beyond some thousands of rows only those that can have weight are sorted: few, many, and none too many."""
    z = logits(7, 6_000, spread or 1e-3)
    if spread is None:
        z[:, 60:] -= 50.0
    p = separate(kind, z)
    some = p > 0
    for weights, row, kept in zip(p, z, some, strict=True):
        assert int(kept.sum()) < 6_000
        torch.testing.assert_close(weights[kept], separate(kind, row[kept]), rtol=0, atol=1e-12)
    assert ((p.sum(-1) - 1).abs() < 1e-12).all()


def test_alpha_one_is_softmax_two_is_sparsemax_and_many_tend_to_max() -> None:
    assert (entmax_of(1.0), entmax_of(2.0), entmax_of(1.5)) == ("softmax", "sparsemax", Entmax(1.5))
    z = logits(3, 30, 1.0)
    torch.testing.assert_close(separate(Entmax(1 + 1e-12), z), torch.softmax(z, -1), rtol=0, atol=1e-9)
    torch.testing.assert_close(separate(Entmax(2.0), z), separate("sparsemax", z), rtol=0, atol=1e-12)
    torch.testing.assert_close(separate(Entmax(1.5), z), separate(Entmax(1.5 + 1e-12), z), rtol=0, atol=1e-9)
    to_max = [
        float((separate(Entmax(alpha), z) - separate("max", z)).abs().amax()) for alpha in (1.2, 1.6, 2.5, 4.0, 8.0)
    ]
    assert to_max == sorted(to_max, reverse=True)


def test_max_gives_a_tie_to_the_lowest_row() -> None:
    assert separate("max", torch.tensor([[1.0, 3.0, 3.0, 3.0]])).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_ties_share_alike() -> None:
    tied = torch.tensor([[2.0, 2.0, 2.0, -40.0]], dtype=torch.float64)
    for kind in (*REGULARISED, "lsr", Polynomial(5)):
        if kind == "max":
            continue
        p = separate(kind, tied)[0]
        assert p[:3].tolist() == pytest.approx([1 / 3] * 3, rel=1e-9), named(kind)


def test_fewer_rows_than_a_subset_weigh_alike() -> None:
    assert separate(KSubsets(5), torch.tensor([[3.0, 1.0]])).tolist() == [[0.5, 0.5]]
    valid = torch.tensor([[True, False, True], [False] * 3])
    got = separate(KSubsets(2), torch.tensor([[3.0, 9.0, 1.0]] * 2), valid)
    assert got.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", FIXED, ids=named)
def test_half_precision_logits_are_separated_in_float32(kind: Separation) -> None:
    z = torch.tensor([[0.5, 1.0, 4.0]], dtype=torch.float16)
    assert torch.equal(separate(kind, z), separate(kind, z.float()))


@given(seeds, st.integers(2, 12))
def test_gradients_are_those_of_differences(seed: int, rows: int) -> None:
    """By finite differences, where no row is at the threshold."""
    z = logits(seed, rows, 1.0)
    step = torch.randn(3, rows, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    out = torch.randn(3, rows, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    for kind in FIXED:
        if kind in ("max", "lsr") or (isinstance(kind, Entmax) and kind.alpha > 2):
            continue
        at = z.clone().requires_grad_()
        p = separate(kind, at)
        (p * out).sum().backward()
        assert at.grad is not None
        assert at.grad.isfinite().all(), named(kind)
        h = 1e-6
        with torch.no_grad():
            up, down = separate(kind, z + h * step), separate(kind, z - h * step)
        same = ((up > 0) == (down > 0)).all(-1)
        if isinstance(kind, KSubsets):
            same &= ((up < 1 / kind.k) == (down < 1 / kind.k)).all(-1)
        slope = ((up - down) * out).sum(-1) / (2 * h)
        torch.testing.assert_close((at.grad * step).sum(-1)[same], slope[same], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", FIXED, ids=named)
def test_gradients_stay_finite_at_ties_padding_and_single_winners(kind: Separation) -> None:
    z = torch.tensor([[0.0, 0.0, 0.0, -torch.inf], [9.0, 0.0, 0.0, -torch.inf], [-9.0, -8.0, -9.0, -torch.inf]])
    z = z.double().requires_grad_()
    valid = torch.tensor([[True, True, True, False]]).expand(3, -1)
    p = separate(kind, z, valid)
    assert p.isfinite().all()
    if p.requires_grad:
        p.square().sum().backward()
        assert z.grad is not None
        assert z.grad[:, :3].isfinite().all()


@pytest.mark.parametrize("kind", REGULARISED, ids=named)
def test_the_regulariser_is_zero_at_a_single_winner_and_least_at_equal_weights(kind: Separation) -> None:
    assert not abstains(kind)
    k = kind.k if isinstance(kind, KSubsets) else 1
    rows = 3 * k
    corner, even = torch.zeros(rows).double(), torch.full((rows,), 1 / rows).double()
    corner[:k] = 1 / k
    assert float(regulariser(kind, corner)) == pytest.approx(0.0, abs=1e-12)
    least = float(regulariser(kind, even))
    alpha = {"softmax": 1.0, "sparsemax": 2.0}.get(str(kind), kind.alpha if isinstance(kind, Entmax) else None)
    if kind == "max":
        assert least == 0.0
    elif kind == "normmax":
        assert least == pytest.approx(3**-0.5 - 1)
    elif isinstance(kind, KSubsets):
        assert least == pytest.approx(-1 / 3)
    else:
        assert alpha is not None
        assert least == pytest.approx(-math.log(3) if alpha == 1 else (3 ** (1 - alpha) - 1) / (alpha * (alpha - 1)))


def test_separations_have_names_values_and_bounds() -> None:
    assert [named(kind) for kind in FIXED[:8:2]] == ["softmax", "entmax 1.5", "normmax", "entmax 1.3"]
    assert (named(KSubsets(2)), named(Polynomial(3)), named("lsr")) == ("2-subsets", "polynomial 3", "lsr")
    assert len({*FIXED, Entmax(1.5), KSubsets(3)}) == len(FIXED)
    assert all(is_separation(kind) for kind in FIXED)
    assert not any(is_separation(kind) for kind in ("entmax15", None, 1.5, ["softmax"]))
    assert [exact_recall_margin(k) for k in ("softmax", Polynomial(3), "max", "sparsemax", Entmax(1.5), "normmax")] == [
        None, None, 0.0, 1.0, 2.0, 1.0,
    ]  # fmt: skip
    assert (exact_recall_margin(KSubsets(4)), exact_recall_margin("lsr")) == (1.0, 2.0)
    for alpha in (0.5, 1.0, ALPHA_MAX + 0.1, math.nan, math.inf):
        with pytest.raises(InvalidRequest, match="α of entmax lies over 1 and is at most 8"):
            Entmax(alpha)
    for degree in (1, 0, -3, DEGREE_MAX + 1):
        with pytest.raises(InvalidRequest, match="degree of a polynomial is from 2"):
            Polynomial(degree)
    with pytest.raises(InvalidRequest, match="at least one row"):
        KSubsets(0)
    with pytest.raises(InvalidRequest, match="α of entmax"):
        entmax_of(0.9)


@DTYPES
@given(seeds, st.integers(1, 300), st.sampled_from((1.0, 30.0, 100.0, 1e3)))
def test_softmax_has_no_subnormal_weight_and_loses_nothing_to_that(
    dtype: torch.dtype, tolerance: float, seed: int, rows: int, scale: float
) -> None:
    z = logits(seed, rows, scale, dtype)
    p = separate("softmax", z)
    assert not ((p > 0) & (p < torch.finfo(dtype).tiny)).any()
    torch.testing.assert_close(p, torch.softmax(z, -1), rtol=tolerance, atol=1e-30)


@given(seeds, st.integers(1, 9), st.integers(1, 30), st.integers(1, 100), st.booleans())
def test_softmax_in_parts_is_softmax(seed: int, outer: int, batch: int, rows: int, transposed: bool) -> None:
    z = torch.randn(outer, batch, rows, generator=torch.Generator().manual_seed(seed)) * 5
    z = z.transpose(0, 1) if transposed else z
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separation, "_CACHED_VALUES", 64)
        torch.testing.assert_close(separate("softmax", z), torch.softmax(z, -1))
