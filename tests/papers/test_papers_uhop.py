"""U-Hop's tables: the exactness of the descent in the patterns' span, the cues, β's tuning, and a whole small run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.papers import uhop
from benchmarks.papers.data import Images
from benchmarks.papers.uhop_cues import masked, masked_doubled, noisy, noisy_folded, right_half_missing
from benchmarks.papers.uhop_findings import rank_correlation
from benchmarks.papers.uhop_kernels import descend, trained_for_cues
from benchmarks.papers.uhop_methods import (
    BETAS,
    MAGNITUDE,
    METHODS,
    Memory,
    as_printed,
    compared,
    distance,
    recall,
    similarities,
    tuned,
    under_kernel,
)
from service.core.kernel import features, separation_loss, separation_loss_plus


def _patterns(count: int, dimension: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(count, dimension, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _asked(memory: Memory, cues: torch.Tensor, beta: float, steps_max: int = 0) -> uhop.Recalled:
    return recall(memory, cues, memory.score(cues), beta=beta, separation="softmax", steps_max=steps_max)


# ---- kernels ----


@given(count=st.integers(2, 9), dimension=st.integers(2, 12), seed=st.integers(0, 99), steps=st.integers(0, 10))
def test_descent_in_the_span_is_descent(count: int, dimension: int, seed: int, steps: int) -> None:
    patterns = _patterns(count, dimension, seed, torch.float64)
    for loss in (separation_loss, separation_loss_plus):
        weight = torch.eye(dimension, dtype=torch.float64)
        for _ in range(steps):
            weight.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(features(weight, patterns)), weight)
            weight = weight.detach() - 0.05 * gradient
        (fitted,) = descend(patterns, loss, marks=(steps,), step=0.05).values()
        torch.testing.assert_close(fitted.weight, weight.detach(), atol=1e-6, rtol=1e-6)
        assert fitted.loss == pytest.approx(float(loss(features(weight.detach(), patterns))), rel=1e-6, abs=1e-6)


def test_descent_lowers_the_loss_and_keeps_every_mark() -> None:
    fits = descend(_patterns(20, 30), marks=(0, 5, 50), step=0.01)
    assert list(fits) == [0, 5, 50]
    torch.testing.assert_close(fits[0].weight, torch.eye(30))
    assert fits[0].loss > fits[5].loss > fits[50].loss


def test_the_published_schedule_stands_still() -> None:
    fits = descend(_patterns(20, 30), marks=(10, 100), start="normal", schedule="published")
    moved = (fits[100].weight - fits[10].weight).norm() / fits[10].weight.norm()
    constant = descend(_patterns(20, 30), marks=(10, 100), start="normal")
    assert moved < 1e-4 < 1e-2 < (constant[100].weight - constant[10].weight).norm() / constant[10].weight.norm()


def test_a_kernel_trained_for_missing_halves_finds_them_better_than_cosine() -> None:
    # Blurred noise: halves are much alike, as those of pictures are.
    coarse = _patterns(60, 9).reshape(60, 1, 3, 3)
    patterns = torch.nn.functional.interpolate(coarse, size=8, mode="bilinear").reshape(60, 64)
    corrupt = right_half_missing(8)
    cues = corrupt(patterns, torch.Generator())
    weight = trained_for_cues(patterns, (corrupt,), steps_max=150, batch=60, seed=0)
    shares = [
        _asked(memory, cues, 100.0).own for memory in (compared(patterns, "cosine"), under_kernel(patterns, weight))
    ]
    assert shares[0] + 0.1 < shares[1]


# ---- cues ----


def test_masks_hide_half_of_each_image_on_its_own() -> None:
    patterns = _patterns(50, 400) + 0.1
    cues = masked(patterns, torch.Generator().manual_seed(0))
    hidden = cues == 0
    assert torch.equal(cues[~hidden], patterns[~hidden])
    assert hidden.double().mean() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(hidden[0], hidden[1])
    assert torch.equal(masked_doubled(patterns, torch.Generator().manual_seed(0)), 2 * cues)


def test_the_right_half_is_the_right_one_in_colour_too() -> None:
    picture = torch.arange(4 * 4 * 3.0).reshape(1, 4, 4, 3) + 1
    cue = right_half_missing(4)(picture.reshape(1, 48), torch.Generator()).reshape(1, 4, 4, 3)
    assert torch.equal(cue[:, :, :2], picture[:, :, :2])
    assert not cue[:, :, 2:].any()


def test_folded_noise_is_noise_folded_and_cut() -> None:
    patterns = _patterns(5, 100)
    plain = noisy(0.7)(patterns, torch.Generator().manual_seed(1))
    assert (plain - patterns).std() == pytest.approx(0.7, abs=0.1)
    folded = noisy_folded(0.7)(patterns, torch.Generator().manual_seed(1))
    torch.testing.assert_close(folded, plain.abs().clamp_max(1.0))


# ---- recall ----


def test_signs_decide_which_memory_comes_back() -> None:
    patterns = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]])
    for power in (1, 2):
        assert _asked(distance(patterns, power, -1), patterns, 50.0).own == 1.0
        assert _asked(distance(patterns, power, +1), patterns, 50.0).own == 0.0


def test_cosine_is_the_kernel_of_the_identity() -> None:
    patterns = _patterns(30, 20)
    cues = masked(patterns, torch.Generator().manual_seed(0))
    cosine, identity = compared(patterns, "cosine"), under_kernel(patterns, torch.eye(20))
    torch.testing.assert_close(cosine.score(cues), identity.score(cues))
    assert cosine.magnitude == identity.magnitude == pytest.approx(float(patterns.square().sum(-1).mean()))


def test_the_error_is_read_out_over_raw_patterns_once() -> None:
    patterns = _patterns(3, 5)
    cues = patterns.repeat(2, 1)  # twice over: cue 3 is pattern 0's again
    weight = _patterns(5, 5, seed=1)
    memory = under_kernel(patterns, weight)
    phi = features(weight, patterns)
    p = torch.softmax(7.0 * phi @ phi.T, dim=-1)
    expected = (p @ patterns - patterns).square().sum(-1).mean()
    found = _asked(memory, cues, 7.0)
    assert found.error == pytest.approx(float(expected), rel=1e-4)
    assert found.own == float((p.argmax(-1) == torch.arange(3)).double().mean())


def test_printed_features_are_not_normalised() -> None:
    patterns = _patterns(4, 6)
    weight = _patterns(6, 6, seed=2)
    rows = weight / weight.norm(dim=1, keepdim=True)
    printed = as_printed(patterns, weight)
    torch.testing.assert_close(printed.score(patterns), (patterns @ rows.T) @ (patterns @ rows.T).T)
    with pytest.raises(ValueError, match="one step alone"):
        _asked(printed, patterns, 1.0, steps_max=1)


def test_the_tuned_beta_is_the_best_of_the_grid() -> None:
    patterns = _patterns(30, 20)
    memory = compared(patterns, "neg_l2")
    cues = noisy(0.4)(patterns, torch.Generator().manual_seed(0))
    errors = {beta: _asked(memory, cues, beta).error for beta in BETAS}
    assert errors[tuned(memory, cues, "softmax")] == pytest.approx(min(errors.values()), rel=1e-5)


def test_every_method_has_its_similarity() -> None:
    patterns = _patterns(4, 6)
    trained = ("whitening 0.1", "whitening 1", "U-Hop", "U-Hop+", "cue-trained", "U-Hop as printed")
    held = similarities(patterns, dict.fromkeys(trained, torch.eye(6)))
    assert {method.similarity for method in METHODS} <= set(held)
    assert len(set(METHODS)) == len(METHODS)


def test_rank_correlation_knows_ties() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 1, 2½, 2½, 4 against 1, 2, 3, 4.
    assert rank_correlation([0, 5, 5, 7], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


# ---- the whole ----


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> uhop.Plan:
    draw = torch.Generator().manual_seed(5)
    pixels = (torch.rand(80, 8, 8, generator=draw) * 255).byte().numpy()
    monkeypatch.setattr(uhop, "_images", lambda: [Images("squares", pixels, None, "drawn")])
    monkeypatch.setattr(uhop, "MIDDLE", 10)
    monkeypatch.setattr(uhop, "CUES_MIN", 10)
    plan = uhop.Plan(
        seeds=(0, 1), sizes=(4, 10), noise_levels=(0.5,), iterations=(0, 10), scatter_runs=10, cue_steps=5, cue_batch=16
    )
    monkeypatch.setitem(uhop.PLANS, "quick", plan)
    return plan


def test_a_small_run_writes_the_report(small: uhop.Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pools: dict[int, set[int]] = {}
    real = uhop._drawn_patterns

    def spied(rows: torch.Tensor, pool: torch.Tensor, count: int, seed: int) -> torch.Tensor:
        pools.setdefault(seed, set()).update(pool.tolist())
        return real(rows, pool, count, seed)

    monkeypatch.setattr(uhop, "_drawn_patterns", spied)
    uhop.run("quick", tmp_path)
    written = (tmp_path / "uhop.md").read_text()
    for words in ("squares", "at least 30% under", "β tuned", "σ·N(0, 1)", "Spearman", "Cosine at a tuned β is under"):
        assert words in written
    assert "nan" not in written
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"uhop-{name}.png" for name in ("iterations", "loss", "noise", "size", "tuned")
    ]
    # No image that β was tuned on is in a table.
    tables = set().union(*(pool for seed, pool in pools.items() if seed != uhop.TUNING_SEED))
    assert len(tables) == len(pools[uhop.TUNING_SEED]) == 40
    assert pools[uhop.TUNING_SEED].isdisjoint(tables)


def test_the_same_seeds_give_the_same_figures(small: uhop.Plan, tmp_path: Path) -> None:
    report = uhop.Report("small", tmp_path, "uhop", "quick", small.seeds)
    (images,) = uhop._images()
    one_size = dataclasses.replace(small, sizes=(4,), scatter_runs=2)
    first, second = (uhop.measured(images, one_size, report) for _ in range(2))
    assert first.by_size == second.by_size
    assert first.runs == second.runs
    assert all(len(answers[MAGNITUDE[0]]) == len(small.seeds) for answers in first.by_size["masked"].values())
