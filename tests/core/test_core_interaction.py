"""The learned interaction matrix: the likelihood it climbs, and what is promised of it on patterns not seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from service.core.gate import log_mass
from service.core.interaction import learn_interaction, learning, log_likelihood
from service.errors import InvalidRequest

seeds = st.integers(0, 2**32 - 1)


def problem(seed: int, rows: int, memories: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(rows, d), draw(memories, d), draw(d).exp()


def clusters(seed: int, rows: int, classes: int = 8, d: int = 12, spread: float = 0.3) -> torch.Tensor:
    """Patterns about `classes` middles; the middles are the same for every seed."""
    middles = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    # Unlike spreads, so that a diagonal Σ has something to learn.
    noise = torch.randn(rows, d, generator=g) * torch.linspace(0.2, 1.8, d) * spread
    return middles[torch.randint(classes, (rows,), generator=g)] + noise


@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.floats(0.05, 8.0))
def test_the_likelihood_is_the_sum_written_out(seed: int, rows: int, memories: int, d: int, beta: float) -> None:
    x, xi, variance = problem(seed, rows, memories, d)
    got = log_likelihood(x, xi, variance, beta)
    for n in range(rows):
        exponents = beta * (xi @ x[n])
        p_mu = torch.exp(exponents - exponents.max())
        p_mu /= p_mu.sum()
        normal = torch.distributions.MultivariateNormal(xi, torch.diag(variance).expand(memories, d, d))
        want = torch.logsumexp(p_mu.log() + normal.log_prob(x[n].expand(memories, d)), 0)
        assert got[n].item() == pytest.approx(want.item(), rel=1e-9, abs=1e-9)
    single = log_likelihood(x.float(), xi.float(), variance.float(), beta)
    np.testing.assert_allclose(single.numpy(), got.numpy(), rtol=2e-4, atol=2e-3)


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.floats(0.05, 3.0))
def test_its_gradient_is_that_of_finite_differences(seed: int, rows: int, memories: int, d: int, beta: float) -> None:
    x, xi, variance = problem(seed, rows, memories, d)
    xi.requires_grad_()
    variance.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, v: log_likelihood(x, m, v, beta).sum(), (xi, variance), eps=1e-6, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("start", ["prototypes", "rows"])
@pytest.mark.parametrize("covariance", ["diagonal", "isotropic"])
def test_new_patterns_become_likelier(start: str, covariance: str) -> None:
    """On patterns that learning never saw, not even to stop by."""
    options = {"norm": 10.0, "start": start, "covariance": covariance, "rounds_max": 15}
    rounds = list(learning(clusters(0, 800), 8, 5.0, **options))  # type: ignore[arg-type]
    new = torch.nn.functional.normalize(clusters(1, 800), dim=-1) * 10.0
    likelihood = [float(log_likelihood(new, r.matrix, r.variance, 5.0).mean()) for r in (rounds[0], rounds[-1])]
    # From drawn rows there is far to go; k-means is all but the answer already, and must not be spoilt.
    assert likelihood[1] > likelihood[0] + (1.0 if start == "rows" else 0.0)
    last = rounds[-1]
    assert last.held_out_curve[last.best_round] == max(last.held_out_curve)
    assert last.curve[-1] > last.curve[0]
    assert len(last.curve) == len(last.held_out_curve) == len(rounds)
    assert last.beta == 5.0


@given(seeds, st.integers(1, 60), st.data())
def test_held_out_patterns_are_never_less_likely_than_at_the_start(seed: int, rows: int, data: st.DataObject) -> None:
    """Few patterns, random scale and β: what is yielded only gets better where it is looked at, and stays finite."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randn(rows, 3, generator=g) * data.draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
    apart = int(0.1 * rows)
    count = data.draw(st.integers(1, rows - apart))
    beta = data.draw(st.floats(0.01, 1.0))
    best = -math.inf
    for learned in learning(patterns, count, beta, rounds_max=2, seed=seed):
        reached = learned.held_out_curve[learned.best_round]
        assert reached >= best
        best = reached
        assert learned.matrix.shape == (count, 3)
        assert learned.matrix.isfinite().all()
        assert learned.variance.isfinite().all()
        assert (learned.variance > 0).all()


def test_the_floor_holds_where_a_coordinate_never_changes() -> None:
    """Without it the likelihood of a constant coordinate grows without end."""
    patterns = clusters(0, 300)
    patterns[:, 0] = 1.0
    learned = learn_interaction(patterns, 300 - 30, 1.0, rounds_max=10)  # a memory for every pattern, too
    spread = (patterns - patterns.mean(0)).square().mean()
    assert float(learned.variance.amin()) >= 0.5e-2 * float(spread)
    assert math.isfinite(learned.held_out_curve[-1])


def test_an_isotropic_covariance_is_one_number() -> None:
    learned = learn_interaction(clusters(0, 200), 4, 5.0, covariance="isotropic", rounds_max=2)
    assert learned.variance.unique().numel() == 1
    diagonal = learn_interaction(clusters(0, 200), 4, 5.0, rounds_max=2)
    assert diagonal.variance.unique().numel() > 1


def test_the_same_arguments_give_the_same_matrix() -> None:
    first, again, other = (learn_interaction(clusters(0, 200), 4, 5.0, rounds_max=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.matrix, again.matrix)
    assert first.curve == again.curve
    assert not torch.equal(first.matrix, other.matrix)


def test_it_stops_early_and_can_be_left_at_any_round() -> None:
    ended = list(learning(clusters(0, 200, classes=2), 2, 5.0, learning_rate=5.0, patience=3))
    assert len(ended) <= 1 + ended[-1].best_round + 3
    rounds = learning(clusters(0, 200), 4, 5.0)
    assert len(next(rounds).curve) == 1
    assert len(next(rounds).curve) == 2
    assert torch.is_grad_enabled()
    with torch.no_grad():  # the caller's mode is its own, between rounds too
        third = next(rounds)
        assert not torch.is_grad_enabled()
    assert len(third.curve) == 3
    assert not third.matrix.requires_grad


def test_norm_is_the_length_that_beta_belongs_to() -> None:
    """Rows of length 10 at β = 5 are rows of length 1 at β = 500, with a matrix ten times shorter."""
    options = {"start": "rows", "rounds_max": 0}
    long = learn_interaction(clusters(0, 100), 4, 5.0, norm=10.0, **options)  # type: ignore[arg-type]
    short = learn_interaction(clusters(0, 100), 4, 500.0, norm=1.0, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(long.matrix, 10 * short.matrix)
    torch.testing.assert_close(long.matrix.norm(dim=-1), torch.full((4,), 10.0))


def test_a_learned_matrix_tells_what_it_saw_from_what_lies_far() -> None:
    learned = learn_interaction(clusters(0, 800), 8, 5.0, norm=10.0)
    new = torch.nn.functional.normalize(clusters(1, 300), dim=-1) * 10.0
    far = torch.nn.functional.normalize(torch.randn(300, 12, generator=torch.Generator().manual_seed(3)), dim=-1) * 10.0
    known, strange = (log_mass(v @ learned.matrix.T, 5.0) for v in (new, far))
    assert float((known.unsqueeze(1) > strange).double().mean()) > 0.9  # the area under the curve


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": 0.0}, {"beta": math.inf}, {"norm": -1.0}, {"covariance": "full"}, {"start": "zeros"}, {"batch": 0},
        {"held_out_share": 1.0}, {"rounds_max": 1_000}, {"count": 0}, {"count": 91}, {"variance_floor": 0.0},
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    arguments = {"count": 4, "beta": 1.0, **wrong}
    with pytest.raises((InvalidRequest, TypeCheckError)):  # the latter where tests check annotations, as conftest says
        next(learning(clusters(0, 100), **arguments))  # type: ignore[arg-type]
