"""Learned kernels: the losses against their definitions, training against what it is for, and the dynamics under W."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.core import kernel as kernels
from service.core.kernel import Training, cue_loss, features, separation_loss, separation_loss_plus, starting, train
from service.core.retrieve import retrieve
from service.core.similarity import Blocks, Kernel, normalise_rows, overlaps, scores, self_similarity
from service.errors import InvalidRequest

DTYPES = (torch.float32, torch.float64)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the losses -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 6))
def test_the_separation_loss_is_the_mean_over_pairs(seed: int, n: int, r: int) -> None:
    phi = features(torch.eye(r, dtype=torch.float64), drawn(seed, n, r, dtype=torch.float64))
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    squared = torch.stack([(phi[i] - phi[j]).square().sum() for i, j in pairs])
    assert torch.allclose(separation_loss(phi, 2.0), (-2.0 * squared).exp().mean().log())
    inner = torch.stack([phi[i] @ phi[j] for i, j in pairs])
    assert torch.allclose(separation_loss_plus(phi, 0.1), (inner / 0.1).exp().mean().log() / n)


def test_the_cue_loss_is_zero_only_where_every_cue_tells_its_memory_apart() -> None:
    phi = torch.eye(4)
    assert float(cue_loss(phi, phi, 0.05)) < 1e-7
    assert math.isclose(float(cue_loss(phi.roll(1, 0), phi, 0.05)), 20.0, rel_tol=1e-6)
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert math.isclose(float(cue_loss(twins, twins, 0.05)), math.log(2), rel_tol=1e-6)
    same = torch.tensor([[False, True], [True, False]])
    assert float(cue_loss(twins, twins, 0.05, same)) == 0.0


@given(st.integers(0, 2**31), st.integers(20, 60), st.integers(2, 10))
def test_whitening_makes_the_second_moments_even(seed: int, n: int, d: int) -> None:
    x = drawn(seed, n, d, dtype=torch.float64) * torch.logspace(0, 1, d, dtype=torch.float64)
    w = kernels.whitening(x, ridge=1e-9)
    white = x @ w.T
    moments = white.T @ white / n
    assert torch.allclose(moments, torch.eye(d, dtype=torch.float64) * moments[0, 0], atol=1e-5 * float(moments[0, 0]))


@pytest.mark.parametrize("seed", range(3))
def test_few_patterns_of_many_zeros_are_whitened(seed: int) -> None:
    """As ten digits with an empty frame: in float32 the eigenvalues of their empty directions do not converge."""
    x = drawn(seed, 10, 784).abs() * (drawn(seed + 1, 1, 784) > 0.8)
    assert starting(x / x.norm(dim=1, keepdim=True), "whitening").isfinite().all()


def test_a_wide_space_starts_from_its_leading_directions() -> None:
    d = kernels.FULL_RANK_DIMENSION + 50
    x = drawn(1, 40, 7) @ drawn(2, 7, d)
    w = starting(x, "identity")
    assert w.shape == (40, d)
    # On the span of the patterns it is an isometry, so that cosine is as it was.
    assert torch.allclose((x @ w.T).norm(dim=1), x.norm(dim=1), rtol=1e-4)
    assert starting(x, "whitening").isfinite().all()


# --- training ---------------------------------------------------------------------------------------------------------


def crowded(n: int = 60, d: int = 16) -> torch.Tensor:
    """Patterns that share a large direction, as pictures do."""
    return drawn(3, n, d) + 4.0 * drawn(4, 1, d)


@pytest.mark.parametrize("objective", ["separation", "separation_plus"])
@pytest.mark.parametrize("start", ["identity", "whitening"])
def test_separation_training_spreads_the_memories(objective: str, start: str) -> None:
    x = normalise_rows(crowded(), Blocks((16,), (1.0,)))
    evaluations = list(train(x, Training(objective=objective, start=start, steps_max=300, learning_rate=1e-2)))
    first, last = evaluations[0], evaluations[-1]
    assert last.best_held_out < first.held_out
    assert last.best_held_out == min(e.held_out for e in evaluations)
    before, after = separation_loss(features(torch.eye(16), x)), separation_loss(features(last.weight, x))
    assert after < before


def test_a_kernel_trained_for_cues_finds_memories_that_cosine_does_not() -> None:
    x = crowded(200)

    def half(rows: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        cue = x[rows].clone()
        cue[:, 8:] = 0.0
        return cue

    everything = torch.arange(len(x))
    cue = half(everything, torch.Generator())
    *_, last = train(x, Training(steps_max=400, batch=64, learning_rate=1e-2), half)
    first_by = {
        name: float(((features(w, cue) @ features(w, x).T).argmax(1) == everything).float().mean())
        for name, w in {"cosine": torch.eye(16), "kernel": last.weight}.items()
    }
    assert first_by["kernel"] > first_by["cosine"] + 0.1


def test_training_repeats_exactly_and_stops_when_nothing_improves() -> None:
    x = crowded()
    training = Training(
        objective="separation", start="identity", learning_rate=10.0, patience=3, steps_max=10_000, seed=5
    )
    once, twice = list(train(x, training)), list(train(x, training))
    assert [e.held_out for e in once] == [e.held_out for e in twice]
    assert torch.equal(once[-1].weight, twice[-1].weight)
    assert once[-1].step < 10_000
    assert once[-1].step - once[-1].best_step == 3 * kernels.EVALUATE_STEPS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.0}, "over 0"),
        ({"temperature": math.nan}, "over 0"),
        ({"batch": 1}, "batch at least 2"),
    ],
)
def test_training_refuses_what_it_cannot_do(change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Training(**change)  # type: ignore[arg-type]


def test_training_needs_patterns_and_cues() -> None:
    with pytest.raises(InvalidRequest, match="two patterns"):
        train(torch.ones(1, 4), Training(objective="separation"))
    with pytest.raises(InvalidRequest, match="cues"):
        train(torch.ones(3, 4), Training(objective="cues"))


# --- the dynamics under a kernel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), d=st.integers(1, 8), r=st.integers(1, 8))
def test_a_score_under_a_kernel_is_the_cosine_of_the_images(
    dtype: torch.dtype, seed: int, n: int, d: int, r: int
) -> None:
    w, x, cue = drawn(seed, r, d, dtype=dtype), drawn(seed + 1, n, d, dtype=dtype), drawn(seed + 2, 3, d, dtype=dtype)
    blocks = Blocks((d,), (1.0,), kernels=(Kernel(w),))
    found = scores(blocks, normalise_rows(x, blocks), cue)
    wanted = features(w.double(), cue.double()) @ features(w.double(), x.double()).T
    # Where Wu all but vanishes its direction is rounding's.
    clear = (cue.double() @ w.double().T).norm(dim=1)[:, None] * (x.double() @ w.double().T).norm(dim=1) > 0.05
    assert torch.allclose(found.double()[clear], wanted[clear], atol=1e-3 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 10))
def test_the_identity_is_cosine(dtype: torch.dtype, seed: int, d: int) -> None:
    x, cue = drawn(seed, 6, d, dtype=dtype), drawn(seed + 1, 4, d, dtype=dtype)
    plain, under = Blocks((d,), (1.0,)), Blocks((d,), (1.0,), kernels=(Kernel(torch.eye(d, dtype=dtype)),))
    left = retrieve(plain, normalise_rows(x, plain), cue, beta=5.0)
    right = retrieve(under, normalise_rows(x, under), cue, beta=5.0)
    assert torch.allclose(left.weights, right.weights, atol=1e-5)
    assert torch.allclose(left.energy, right.energy, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 12), beta=st.floats(0.1, 60), step_size=st.floats(0.1, 1.0),
    separation=st.sampled_from(["softmax", "sparsemax", "max"]),
)  # fmt: skip
def test_the_energy_never_rises_under_a_kernel(
    dtype: torch.dtype, seed: int, n: int, beta: float, step_size: float, separation: str
) -> None:
    """Two blocks, one of them under a kernel of low rank."""
    blocks = Blocks((6, 3), (1.0, 0.5), kernels=(Kernel(drawn(seed, 4, 6, dtype=dtype)), None))
    stored, cue = normalise_rows(drawn(seed + 1, n, 9, dtype=dtype), blocks), drawn(seed + 2, 3, 9, dtype=dtype)
    out = retrieve(blocks, stored, cue, beta=beta, separation=separation, step_size=step_size, update_steps_max=10)
    rises = out.energy[:, 1:] - out.energy[:, :-1]
    assert float(rises.nan_to_num(0.0).max()) <= (1e-4 if dtype == torch.float32 else 1e-10) if rises.numel() else True


def test_what_the_kernel_annihilates_has_no_direction() -> None:
    blocks = Blocks((3,), (1.0,), kernels=(Kernel(torch.tensor([[1.0, 0.0, 0.0]])),))
    stored = normalise_rows(torch.tensor([[2.0, 5.0, 0.0], [0.0, 1.0, 3.0]]), blocks)
    assert torch.equal(stored[1], torch.zeros(3))
    assert scores(blocks, stored, torch.tensor([[7.0, 0.0, 0.0]])).tolist() == [[1.0, 0.0]]
    assert torch.allclose(overlaps(blocks, stored, stored[:1]), torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(self_similarity(blocks, stored), torch.tensor([1.0, 0.0]))


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="does not fit"):
        Blocks((3,), (1.0,), kernels=(Kernel(torch.eye(4)),))
    with pytest.raises(InvalidRequest, match="one for each block"):
        Blocks((3, 4), (1.0, 1.0), kernels=(Kernel(torch.eye(3)),))
    with pytest.raises(InvalidRequest, match="cosine alone"):
        Blocks((3,), (1.0,), "dot", kernels=(Kernel(torch.eye(3)),))
