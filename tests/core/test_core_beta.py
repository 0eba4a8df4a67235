"""β estimated from margins: it serves the share that it claims, and says when it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from service.core.beta import UNIT_BETA_MAX, auto_beta, lsr_beta, margins
from service.core.names import Entmax, KSubsets, Polynomial, Separation
from service.core.retrieve import BETA_MAX, retrieve
from service.core.separation import exact_recall_margin
from service.core.similarity import Blocks
from service.errors import InvalidRequest

seeds = st.integers(0, 2**32 - 1)
SEPARATIONS: tuple[Separation, ...] = (
    "softmax", "sparsemax", Entmax(1.5), "normmax", Entmax(1.05), Entmax(3.0), KSubsets(1),
)  # fmt: skip


def test_margins_are_own_less_best_other() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert margins(scores, torch.tensor([0, 1, 2])).tolist() == [1.0, -2.0, -1.0]
    assert margins(torch.tensor([[0.5]]), torch.tensor([0])).tolist() == [math.inf]


@given(seeds, st.integers(2, 20), st.sampled_from(SEPARATIONS), st.sampled_from((0.5, 0.8, 0.95, 1.0)))
def test_the_share_claimed_reaches_its_own_memory_in_one_step(
    seed: int, rows: int, separation: Separation, share: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    stored = torch.nn.functional.normalize(torch.randn(rows, 10, generator=g, dtype=torch.float64), dim=-1)
    own = torch.randint(rows, (40,), generator=g)
    cues = stored[own] + 0.25 * torch.randn(40, 10, generator=g, dtype=torch.float64)
    delta = margins(cues @ stored.T, own)
    estimate = auto_beta(delta, separation=separation, norm_max=1.0, support=rows, share=share)
    assume(estimate.beta < UNIT_BETA_MAX)
    reached = retrieve(
        Blocks((10,), (1.0,), "dot"), stored, cues, beta=estimate.beta, separation=separation, update_steps_max=1
    ).state
    exact = exact_recall_margin(separation)
    nearly = exact is None or exact > math.log(2 * (rows - 1) / 0.01)  # an α so near 1 that softmax's β is taken
    # βΔ is m up to rounding, which α-entmax turns into a weight of its (α-1)-th root.
    rounded = 1e-14 ** (1 / (separation.alpha - 1)) if isinstance(separation, Entmax) else 0.0
    error = 0.01 if nearly else max(1e-9, rounded)
    served = (reached - stored[own]).norm(dim=-1) <= error
    assert served[delta >= estimate.margin].all()
    assert float(served.double().mean()) >= estimate.share - 1e-9
    assert estimate.attainable == (estimate.share >= share)
    assert (estimate.note == "") == estimate.attainable


def test_an_unattainable_share_is_said_and_the_largest_one_served() -> None:
    delta = torch.tensor([0.4, 0.3, 0.2, -0.1])
    estimate = auto_beta(delta, separation="sparsemax", norm_max=1.0, support=64, share=0.95)
    assert not estimate.attainable
    assert estimate.share == 0.75
    assert estimate.margin == pytest.approx(0.2)
    assert estimate.beta == pytest.approx(5.0)
    assert "serves 0.75 of the cues, 0.95 were asked for" in estimate.note


def test_no_cue_with_its_own_memory_first_is_said() -> None:
    estimate = auto_beta(torch.tensor([-0.4, 0.0]), separation="softmax", norm_max=1.0, support=64)
    assert (estimate.attainable, estimate.share, estimate.beta) == (False, 0.0, UNIT_BETA_MAX)
    assert "no beta recalls it" in estimate.note


def test_beta_stops_where_rounding_starts() -> None:
    estimate = auto_beta(torch.full((10,), 1e-7), separation="softmax", norm_max=2.0, support=64)
    assert not estimate.attainable
    assert estimate.beta == UNIT_BETA_MAX / 4
    assert "rounding" in estimate.note


def test_a_duplicate_does_not_decide_for_the_others() -> None:
    """Duplicates leave margins of rounding's size: these cues cannot be served, and the others keep their β."""
    margins_of = torch.tensor([0.1] * 18 + [6e-8, -6e-8])
    estimate = auto_beta(margins_of, separation="softmax", norm_max=1.0, support=64)
    assert estimate.margin == pytest.approx(0.1)
    assert estimate.share == 0.9
    assert not estimate.attainable


@given(st.sampled_from(SEPARATIONS), st.floats(1e-2, 1e2), st.integers(2, 1000))
def test_beta_follows_the_scale_of_the_patterns(separation: Separation, scale: float, support: int) -> None:
    """Patterns times c: margins times c², β over c²."""
    delta = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)
    unit = auto_beta(delta, separation=separation, norm_max=1.0, support=support)
    scaled = auto_beta(delta * scale**2, separation=separation, norm_max=scale, support=support)
    assert scaled.beta == pytest.approx(unit.beta / scale**2)


def test_what_needs_no_margin_gets_none() -> None:
    delta = torch.tensor([0.5])
    assert auto_beta(delta, separation="max", norm_max=1.0, support=64).beta == 1.0
    assert auto_beta(delta, separation=Polynomial(4), norm_max=1.0, support=64).beta == 1.0
    assert auto_beta(delta, separation="softmax", norm_max=1.0, support=1).beta == 1.0
    assert auto_beta(torch.tensor([math.inf]), separation="softmax", norm_max=1.0, support=2).beta == 1.0


@given(seeds, st.integers(1, 20), st.integers(1, 30))
def test_the_reach_of_lsr_serves_the_share_it_claims_and_no_other_serves_more(seed: int, rows: int, cues: int) -> None:
    g = torch.Generator().manual_seed(seed)
    stored = torch.randn(rows, 4, generator=g, dtype=torch.float64)
    own = torch.randint(rows, (cues,), generator=g)
    state = stored[own] + 0.7 * torch.randn(cues, 4, generator=g, dtype=torch.float64)
    distances = torch.cdist(state, stored).square()
    to_own = distances.gather(-1, own.unsqueeze(-1)).squeeze(-1)
    to_other = distances.scatter(-1, own.unsqueeze(-1), math.inf).amin(-1)
    estimate = lsr_beta(to_own, to_other)

    def share(beta: float) -> float:
        settled = retrieve(
            Blocks((4,), (1.0,), "neg_l2"), stored, state, beta=beta, separation="lsr", update_steps_max=0
        )
        return float((settled.weights.gather(-1, own.unsqueeze(-1)) == 1).double().mean())

    assert share(estimate.beta) == pytest.approx(estimate.share)
    assert estimate.attainable == (estimate.share == 1)
    assert (estimate.note == "") == estimate.attainable
    assert estimate.margin == pytest.approx(2 / estimate.beta)
    for beta in (2 / to_own[:10] * (1 - 1e-9)).tolist():
        assert share(min(max(beta, 1e-30), BETA_MAX)) <= estimate.share + 1e-12


def test_the_reach_of_lsr_at_its_ends() -> None:
    clean = lsr_beta(torch.zeros(3), torch.tensor([4.0, 5.0, 9.0]))
    assert (clean.beta, clean.share) == (1.0, 1.0)
    alone = lsr_beta(torch.tensor([2.0]), torch.tensor([math.inf]))
    assert (alone.beta, alone.margin) == (0.5, 4.0)
    assert lsr_beta(torch.tensor([0.0]), torch.tensor([math.inf])).beta == BETA_MAX
    assert lsr_beta(torch.tensor([2.0]), torch.tensor([1.0])).share == 0.0
    for bad in ((torch.empty(0), torch.empty(0)), (torch.tensor([math.nan]), torch.tensor([1.0]))):
        with pytest.raises(InvalidRequest, match="squared distances"):
            lsr_beta(*bad)


def test_bad_arguments_are_refused() -> None:
    delta = torch.tensor([0.5])
    for kind in ("lsr", KSubsets(2)):
        with pytest.raises(InvalidRequest, match="no margin gives"):
            auto_beta(delta, separation=kind, norm_max=1.0, support=64)
    for bad in (torch.empty(0), torch.tensor([math.nan])):
        with pytest.raises(InvalidRequest, match="margin"):
            auto_beta(bad, separation="softmax", norm_max=1.0, support=64)
    for settings in ({"norm_max": 0.0}, {"error": 0.0}, {"error": 1.0}, {"share": 0.0}, {"share": 1.1}):
        with pytest.raises(InvalidRequest, match="error lies"):
            auto_beta(delta, **({"separation": "softmax", "norm_max": 1.0, "support": 64} | settings))
