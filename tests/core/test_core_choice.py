"""The choice among similarities: the fit against an independent one, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from service.core.choice import RIDGE, fit
from service.errors import InvalidRequest


def evidence(seed: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Similarities right by chance; a wrong one's first two are closer together, on the whole."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(0, 50, (n,), generator=generator)
    right = torch.rand(n, k, generator=generator) < 0.6
    nearest = torch.where(right, own[:, None], torch.randint(50, 90, (n, k), generator=generator))
    first = torch.rand(n, k, generator=generator) + 0.1
    gap = torch.rand(n, k, generator=generator) * (0.2 + 0.8 * right)
    return nearest, first, first + gap, own


@given(st.integers(0, 2**31), st.integers(20, 200), st.integers(1, 4))
def test_the_fit_is_that_of_an_independent_logistic_regression(seed: int, n: int, k: int) -> None:
    nearest, first, second, own = evidence(seed, n, k)
    choice = fit(nearest, first, second, own)
    found = choice.probabilities(nearest, first, second)
    for j in range(k):
        label = (nearest[:, j] == own).numpy()
        if len(set(label.tolist())) == 1:
            continue
        agree = np.delete((nearest == nearest[:, j : j + 1]).double().numpy(), j, axis=1)
        distances = torch.cat([first.double().log(), (second - first).double().clamp_min(1e-6).log()], 1).numpy()
        spread = np.maximum(distances.std(0), 1e-6)
        x = np.hstack([(distances - distances.mean(0)) / spread, agree, np.ones((n, 1))])
        model = LogisticRegression(
            C=1 / RIDGE, fit_intercept=False, tol=1e-10, max_iter=10_000, solver="newton-cholesky"
        )
        assert np.allclose(model.fit(x, label).predict_proba(x)[:, 1], found[:, j].numpy(), atol=1e-4)


def test_the_choice_is_better_than_each_similarity_alone() -> None:
    """Of two similarities, each right on the cues that it has a wide gap on."""
    nearest, first, second, own = evidence(1, 600, 2)
    choice = fit(*(t[:300] for t in (nearest, first, second, own)))
    test = [t[300:] for t in (nearest, first, second)]
    picked = choice.probabilities(*test).argmax(1, keepdim=True)
    right = (test[0] == own[300:, None]).double()
    assert right.gather(1, picked).mean() > right.mean(0).max() + 0.05


def test_agreement_is_evidence() -> None:
    nearest, first, _, own = evidence(2, 400, 3)
    flat = torch.ones_like(first)
    found = fit(nearest, flat, 2 * flat, own).probabilities(nearest, flat, 2 * flat)
    agreeing = (nearest == nearest[:, :1]).sum(1) > 1
    assert found[agreeing, 0].min() > found[~agreeing, 0].max()


@pytest.mark.parametrize("right", [True, False])
def test_a_similarity_always_right_or_always_wrong_is_finite(right: bool) -> None:
    nearest = torch.zeros(30, 1, dtype=torch.int64)
    distances = torch.rand(30, 1, generator=torch.Generator().manual_seed(0))
    own = torch.full((30,), 0 if right else 1)
    choice = fit(nearest, distances, distances + 0.1, own)
    found = choice.probabilities(nearest, distances, torch.full_like(distances, torch.inf))
    assert found.isfinite().all()
    assert bool((found > 0.9).all()) if right else bool((found < 0.1).all())


def test_a_fit_needs_numbers() -> None:
    nothing = torch.zeros(0, 2)
    with pytest.raises(InvalidRequest, match="one cue at least"):
        fit(nothing.long(), nothing, nothing, torch.zeros(0, dtype=torch.int64))
