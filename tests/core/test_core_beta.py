"""β estimated from margins: it serves the share that it claims, and says when it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from service.core.beta import UNIT_BETA_MAX, auto_beta, margins
from service.core.retrieve import retrieve
from service.core.similarity import Blocks
from service.errors import InvalidRequest

seeds = st.integers(0, 2**32 - 1)
SEPARATIONS = ("softmax", "sparsemax", "entmax15")


def test_margins_are_own_less_best_other() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert margins(scores, torch.tensor([0, 1, 2])).tolist() == [1.0, -2.0, -1.0]
    assert margins(torch.tensor([[0.5]]), torch.tensor([0])).tolist() == [math.inf]


@given(seeds, st.integers(2, 20), st.sampled_from(SEPARATIONS), st.sampled_from((0.5, 0.8, 0.95, 1.0)))
def test_the_share_claimed_reaches_its_own_memory_in_one_step(
    seed: int, rows: int, separation: str, share: float
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
    error = 0.01 if separation == "softmax" else 1e-9
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
def test_beta_follows_the_scale_of_the_patterns(separation: str, scale: float, support: int) -> None:
    """Patterns times c: margins times c², β over c²."""
    delta = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)
    unit = auto_beta(delta, separation=separation, norm_max=1.0, support=support)
    scaled = auto_beta(delta * scale**2, separation=separation, norm_max=scale, support=support)
    assert scaled.beta == pytest.approx(unit.beta / scale**2)


def test_what_needs_no_margin_gets_none() -> None:
    delta = torch.tensor([0.5])
    assert auto_beta(delta, separation="max", norm_max=1.0, support=64).beta == 1.0
    assert auto_beta(delta, separation="softmax", norm_max=1.0, support=1).beta == 1.0
    assert auto_beta(torch.tensor([math.inf]), separation="softmax", norm_max=1.0, support=2).beta == 1.0


def test_bad_arguments_are_refused() -> None:
    delta = torch.tensor([0.5])
    for bad in (torch.empty(0), torch.tensor([math.nan])):
        with pytest.raises(InvalidRequest, match="margin"):
            auto_beta(bad, separation="softmax", norm_max=1.0, support=64)
    for settings in ({"norm_max": 0.0}, {"error": 0.0}, {"error": 1.0}, {"share": 0.0}, {"share": 1.1}):
        with pytest.raises(InvalidRequest, match="error lies"):
            auto_beta(delta, **({"separation": "softmax", "norm_max": 1.0, "support": 64} | settings))
