"""The loop around the step: outcomes, what is refused, precision, supports."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.core.names import Entmax, KSubsets, Polynomial, Separation
from service.core.retrieve import BETA_MAX, UPDATE_STEPS_MAX, Outcome, retrieve
from service.core.similarity import MAGNITUDE_MAX, Blocks, normalise_rows, scores
from service.errors import InvalidRequest, NothingObserved

COSINE = Blocks((4,), (1.0,))
STORED = torch.eye(4)[:3]
CUE = torch.tensor([[0.9, 0.1, 0.0, 0.0]])
SEPARATIONS: tuple[Separation, ...] = (
    "softmax", "sparsemax", Entmax(1.5), "max", "normmax", Entmax(1.3), Entmax(3.0), KSubsets(1), Polynomial(8),
)  # fmt: skip


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """As in production: the run-time shape checks of the tests would refuse a wrong shape before the code under test
    can.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_cue_that_settles_says_when() -> None:
    result = retrieve(COSINE, STORED, CUE, beta=50.0, separation="sparsemax", trace=True)
    assert result.outcome.tolist() == [Outcome.CONVERGED]
    assert result.steps.tolist() == [1]
    assert torch.equal(result.state, STORED[:1])
    assert result.weights.tolist() == [[1.0, 0.0, 0.0]]
    assert result.energy.shape == (1, 2)
    assert result.energy[0].tolist() == pytest.approx([0.5 - 0.9 / math.hypot(0.9, 0.1), -0.5])
    torch.testing.assert_close(result.states, torch.stack([normalise_rows(CUE, COSINE), STORED[:1]]))


def test_a_cue_that_does_not_settle_says_so() -> None:
    result = retrieve(COSINE, STORED, CUE, beta=2.0, update_steps_max=1)
    assert result.outcome.tolist() == [Outcome.STEPS_EXHAUSTED]
    assert result.steps.tolist() == [1]
    assert result.states is None


def test_a_short_step_is_not_mistaken_for_rest() -> None:
    result = retrieve(COSINE, STORED, CUE, beta=50.0, step_size=1e-5, update_steps_max=1)
    assert result.outcome.tolist() == [Outcome.STEPS_EXHAUSTED]


def test_no_steps_leave_the_cue_and_weigh_the_rows() -> None:
    result = retrieve(COSINE, STORED, CUE, beta=2.0, update_steps_max=0)
    assert result.outcome.tolist() == [Outcome.NO_STEPS]
    assert result.steps.tolist() == [0]
    torch.testing.assert_close(result.state, normalise_rows(CUE, COSINE))
    torch.testing.assert_close(result.weights, torch.softmax(2.0 * scores(COSINE, STORED, CUE), -1))
    assert result.energy.shape == (1, 1)


@pytest.mark.parametrize("steps", [0, 3])
def test_an_empty_memory_is_an_outcome(steps: int) -> None:
    result = retrieve(COSINE, STORED[:0], CUE, beta=2.0, update_steps_max=steps, trace=True)
    assert result.outcome.tolist() == [Outcome.NO_ROWS]
    assert result.weights.shape == (1, 0)
    assert result.energy.isnan().all()
    torch.testing.assert_close(result.state, normalise_rows(CUE, COSINE))
    assert result.states is not None
    assert result.states.shape == (1, 1, 4)


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_a_cue_without_rows_does_not_disturb_the_others(separation: Separation) -> None:
    valid = torch.tensor([[False] * 3, [True] * 3])
    cues = CUE.repeat(2, 1)
    result = retrieve(COSINE, STORED, cues, beta=9.0, separation=separation, valid=valid)
    alone = retrieve(COSINE, STORED, CUE, beta=9.0, separation=separation)
    assert result.outcome.tolist() == [Outcome.NO_ROWS, int(alone.outcome)]
    assert result.steps.tolist() == [0, int(alone.steps)]
    assert (result.weights[0] == 0).all()
    assert result.energy[0].isnan().all()
    torch.testing.assert_close(result.state[:1], normalise_rows(CUE, COSINE))
    torch.testing.assert_close(result.state[1:], alone.state)
    torch.testing.assert_close(result.energy[1:], alone.energy)
    none = retrieve(COSINE, STORED, cues, beta=9.0, separation=separation, valid=torch.zeros(2, 3, dtype=torch.bool))
    assert none.outcome.tolist() == [Outcome.NO_ROWS] * 2
    assert none.weights.shape == (2, 3)


def test_the_first_step_sees_the_observed_blocks_and_later_ones_all() -> None:
    blocks = Blocks((2, 2), (1.0, 3.0))
    stored = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    observed = torch.tensor([[True, False]])
    cue = torch.tensor([[1.0, 0.2, 7.0, 0.0]])  # the second block would point at the other memory
    result = retrieve(blocks, stored, cue, beta=9.0, separation="sparsemax", observed=observed, trace=True)
    assert torch.equal(result.state, stored[:1])
    assert result.states is not None
    assert (result.states[0, :, 2:] == 0).all()
    heavier = scores(blocks, stored, stored[:1])
    assert heavier.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("beta", [20.0, 50.0, 200.0])
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_a_memory_that_lacks_a_block_is_recalled_by_the_others(beta: float, separation: Separation) -> None:
    """The trace of a neighbour's last block must not grow to the size of a block once the winner has none there."""
    blocks = Blocks((8, 8, 8), (1.0, 1.0, 1.0))
    g = torch.Generator().manual_seed(5)
    raw = torch.randn(6, 24, generator=g)
    raw[0, 16:] = 0
    stored = normalise_rows(raw, blocks)
    observed = torch.tensor([[True, True, False]])
    cue = raw[:1] + 0.5 * torch.randn(1, 24, generator=g)
    settled = retrieve(blocks, stored, cue, beta=beta, separation=separation, observed=observed, update_steps_max=20)
    assert int(settled.weights.argmax()) == 0
    assert float(settled.weights[0, 0]) > 0.9
    whole = settled.energy[0, 1:]
    assert (whole.diff() <= 1e-6).all()


def test_a_step_on_some_blocks_does_not_settle_a_cue() -> None:
    """The cue is at rest for its own block, which both memories share; the others are only filled in afterwards."""
    blocks = Blocks((1, 1), (1.0, 1.0))
    stored = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    observed = torch.tensor([[True, False]])
    result = retrieve(blocks, stored, torch.tensor([[1.0, 0.0]]), beta=1.0, observed=observed)
    assert result.steps.tolist() == [1]
    assert result.outcome.tolist() == [Outcome.CONVERGED]
    alone = retrieve(blocks, stored, torch.tensor([[1.0, 0.0]]), beta=1.0)
    assert alone.steps.tolist() == [0]


def test_a_cue_that_is_a_memory_is_at_rest_before_any_step() -> None:
    result = retrieve(COSINE, STORED, STORED[1:2] * 3.0, beta=200.0)
    assert result.steps.tolist() == [0]
    assert result.outcome.tolist() == [Outcome.CONVERGED]
    assert int(result.weights.argmax()) == 1


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1.0), st.sampled_from(SEPARATIONS[:-1]))
def test_clamped_blocks_keep_the_cue(seed: int, step_size: float, separation: Separation) -> None:
    g = torch.Generator().manual_seed(seed)
    blocks = Blocks((3, 4), (1.0, 0.5))
    stored, cues = normalise_rows(torch.randn(5, 7, generator=g), blocks), torch.randn(2, 7, generator=g)
    observed = torch.tensor([[True, False], [False, True]])
    result = retrieve(
        blocks, stored, cues, beta=5.0, observed=observed, clamp_observed=True, step_size=step_size,
        separation=separation,
    )  # fmt: skip
    unit = normalise_rows(cues, blocks)
    assert torch.equal(result.state[0, :3], unit[0, :3])
    assert torch.equal(result.state[1, 3:], unit[1, 3:])
    assert (result.state[0, 3:] != 0).any()
    assert (result.state[1, :3] != 0).any()
    still = retrieve(blocks, stored, cues, beta=5.0, clamp_observed=True)
    assert torch.equal(still.state, unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "neg_l2"])
def test_half_precision_patterns_are_recalled_in_float32(dtype: torch.dtype, similarity: str) -> None:
    blocks = Blocks((4,), (1.0,), similarity)
    for stored in (STORED, STORED.expand(1, 3, 4)):
        result = retrieve(blocks, stored.to(dtype), CUE, beta=20.0)
        assert {result.state.dtype, result.weights.dtype, result.energy.dtype} == {torch.float32}
        torch.testing.assert_close(result.state, retrieve(blocks, stored, CUE, beta=20.0).state, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beta": 0.0}, "beta is positive"),
        ({"beta": -1.0}, "beta is positive"),
        ({"beta": math.nan}, "beta is positive"),
        ({"beta": math.inf}, "beta is positive"),
        ({"beta": 2 * BETA_MAX}, "beta is positive"),
        ({"beta": torch.tensor([math.nan])}, "beta is positive"),
        ({"beta": torch.tensor([-2.0])}, "beta is positive"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": 1.1}, "step_size"),
        ({"update_steps_max": -1}, "update_steps_max"),
        ({"update_steps_max": UPDATE_STEPS_MAX + 1}, "update_steps_max"),
        ({"update_steps_eps": -1e-9}, "update_steps_eps"),
        ({"update_steps_eps": math.nan}, "update_steps_eps"),
        (
            {"separation": "hardmax"},
            r"separation is one of softmax, sparsemax, max, normmax, lsr, Entmax\(alpha\), Polynomial\(degree\), "
            r"KSubsets\(k\), not 'hardmax'",
        ),
        ({"separation": "lsr"}, "lsr separates squared distances, neg_l2, not cosine"),
        ({"state": torch.ones(1, 5)}, r"state \(1, 5\) and stored \(3, 4\)"),
        ({"state": torch.ones(4)}, r"state \(4,\) and stored \(3, 4\)"),
        ({"stored": torch.ones(2, 3, 4)}, r"state \(1, 4\) and stored \(2, 3, 4\)"),
        ({"stored": torch.ones(3, 5), "state": torch.ones(1, 5)}, r"do not fit blocks of 4"),
        ({"beta": torch.ones(3)}, r"beta \(3,\) should be \(1,\)"),
        ({"observed": torch.ones(1, 2, dtype=torch.bool)}, r"observed \(1, 2\) should be \(1, 1\)"),
        ({"valid": torch.ones(1, 2, dtype=torch.bool)}, r"valid \(1, 2\) should be \(1, 3\)"),
        ({"first_scores": torch.ones(2, 3)}, r"first_scores \(2, 3\) should be \(1, 3\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_refused(settings: dict[str, object], says: str) -> None:
    arguments = {"stored": STORED, "state": CUE, "beta": 1.0} | settings
    with pytest.raises(InvalidRequest, match=says):
        retrieve(COSINE, **arguments)


def test_a_cue_with_nothing_observed_is_refused() -> None:
    with pytest.raises(NothingObserved):
        retrieve(COSINE, STORED, CUE, beta=1.0, observed=torch.zeros(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("similarity", ["dot", "neg_l2"])
def test_values_whose_scores_would_overflow_are_refused(similarity: str) -> None:
    blocks = Blocks((4,), (1.0,), similarity)
    edge = torch.full((1, 4), MAGNITUDE_MAX)
    assert retrieve(blocks, edge, -edge, beta=BETA_MAX).energy.isfinite().all()
    for bad in (2 * edge, torch.full((1, 4), math.nan)):
        with pytest.raises(InvalidRequest, match="at most 1e\\+12"):
            retrieve(blocks, STORED, bad, beta=1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"widths": (), "weights": ()},
        {"widths": (2,), "weights": (1.0, 1.0)},
        {"widths": (2, 0), "weights": (1.0, 1.0)},
        {"widths": (2,), "weights": (0.0,)},
        {"widths": (2,), "weights": (math.inf,)},
        {"widths": (2, 2), "weights": (1.0, 1.0), "similarity": "dot"},
        {"widths": (2, 2), "weights": (1.0, 1.0), "similarity": "neg_l2"},
        {"widths": (2,), "weights": (1.0,), "similarity": "l1"},
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_blocks_that_make_no_sense_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        Blocks(**arguments)


@pytest.mark.parametrize("steps", [0, 3])
def test_an_abstention_leaves_the_state_where_it_is(steps: int) -> None:
    """The second cue is out of every pattern's reach; the others are as without it."""
    cues = torch.cat([CUE, -CUE, STORED[1:2]])
    for blocks, separation in ((COSINE, Polynomial(8)), (Blocks((4,), (1.0,), "neg_l2"), "lsr")):
        result = retrieve(blocks, STORED, cues, beta=1.5, separation=separation, update_steps_max=steps, trace=True)
        others = retrieve(blocks, STORED, cues[::2], beta=1.5, separation=separation, update_steps_max=steps)
        assert int(result.outcome[1]) == Outcome.ABSTAINED
        assert torch.equal(result.state[1], normalise_rows(-CUE, blocks)[0])
        assert (result.weights[1] == 0).all()
        assert result.energy[1, 0] == 0.0
        assert result.energy[1, 1:].isnan().all()  # as of any cue that has settled
        assert int(result.steps[1]) == 0
        assert result.states is not None
        assert result.states.isfinite().all()
        assert torch.equal(result.outcome[::2], others.outcome)
        assert Outcome.ABSTAINED not in others.outcome.tolist()
        assert torch.equal(result.steps[::2], others.steps)
        torch.testing.assert_close(result.state[::2], others.state)
        torch.testing.assert_close(result.energy[::2], others.energy, equal_nan=True)


def test_an_abstention_on_some_blocks_is_final() -> None:
    blocks = Blocks((2, 2), (1.0, 3.0))
    stored = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    observed, valid = torch.tensor([[True, False]] * 2), torch.tensor([[True, True], [False, False]])
    cue = torch.tensor([[-1.0, -0.2, 7.0, 0.0]] * 2)
    result = retrieve(blocks, stored, cue, beta=9.0, separation=Polynomial(3), observed=observed, valid=valid)
    assert result.outcome.tolist() == [Outcome.ABSTAINED, Outcome.NO_ROWS]
    assert result.steps.tolist() == [0, 0]
    assert (result.state[:, 2:] == 0).all()


def test_a_separation_that_could_only_abstain_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="abstain from every cue"):
        retrieve(Blocks((4,), (1.0,), "neg_l2"), STORED, CUE, beta=1.0, separation=Polynomial(2))


def test_k_subsets_recall_the_mean_of_k() -> None:
    twins = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    cue = torch.tensor([[1.0, 0.9, -1.0, 0.0]])
    result = retrieve(COSINE, twins, cue, beta=20.0, separation=KSubsets(2), update_steps_max=5)
    assert result.weights.tolist() == [[0.5, 0.5, 0.0]]
    assert torch.equal(result.state, twins[:2].mean(0, keepdim=True))
    assert result.outcome.tolist() == [Outcome.CONVERGED]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([200.0, 5e3, 1e5]),
    st.sampled_from(["softmax", "sparsemax", Entmax(1.5)]),
)
def test_equal_keys_give_the_mixture_whatever_beta(seed: int, beta: float, separation: Separation) -> None:
    """HEN, figure 6: recalled by a key that two memories share, they come back as their mean. Without `ties` rounding
    lets one of them win from some β on.
    """
    g = torch.Generator().manual_seed(seed)
    blocks = Blocks((16, 32), (1.0, 0.5))
    raw = torch.randn(12, blocks.dimension, generator=g)
    raw[7, :16] = raw[3, :16] * (1 + 1e-7)
    stored = normalise_rows(raw, blocks)
    cue = torch.zeros(1, blocks.dimension)
    cue[0, :16] = raw[3, :16]
    observed = torch.tensor([[True, False]])
    result = retrieve(
        blocks, stored, cue, beta=beta, separation=separation, observed=observed, ties=True, update_steps_max=30
    )
    assert result.weights[0, [3, 7]].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    torch.testing.assert_close(result.state[0], (stored[3] + stored[7]) / 2, atol=2e-3, rtol=0)


def test_ties_change_nothing_where_nothing_ties() -> None:
    g = torch.Generator().manual_seed(5)
    stored = normalise_rows(torch.randn(40, 16, generator=g), Blocks((16,), (1.0,)))
    cues = torch.randn(8, 16, generator=g)
    plain, with_ties = (retrieve(Blocks((16,), (1.0,)), stored, cues, beta=9.0, ties=ties) for ties in (False, True))
    assert torch.equal(plain.weights, with_ties.weights)
