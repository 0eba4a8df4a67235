"""The invariants of recall, each with the conditions under which it holds.

Here:
 1. A step never raises the energy: dot, neg_l2, and cosine over weighted blocks, zero blocks included; softmax, entmax
    (sparsemax too), normmax, k-subsets, max; a support fixed for the recall (random rows and windows too); clamped
    blocks; 0 < step_size <= 1. From the first whole-state step on. So it is for lsr under neg_l2, and for the
    polynomial, whose energy is the direction's, under dot and cosine without clamped blocks.
 2. Exact top-K re-selected at every step, with the energy over those same rows, never raises it either.
 3. A pattern is an exact fixed point iff beta times its margin is at least m (sparse separations; over m for lsr); for
    the polynomial iff no other pattern has a positive score there.
 4. A support of all rows is dense; padding a support, batching cues and permuting rows change nothing but the order
    (no ties).
 5. Recall from any one block whose own margin is large returns the other blocks; clamped blocks keep the cue exactly.
 6. Finite output on zero, huge, tiny, duplicate and single patterns; arguments are left as they were.
In test_core_separation: sep is a distribution, maximises its definition, agrees with independent implementations.
In test_core_certificate: the one-step softmax bound, the sparse exactness condition.
In test_core_gate: log λ = -∞ is the plain step, the origin attracts, the basin grows with λ, the gate's energy,
mass bounds, conformal coverage. In test_core_beta: the β estimated serves the share of cues that it claims. In
test_core_features: feature models, which have no energy, are the sums they are short for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from service.core.energy import energy
from service.core.names import Entmax, KSubsets, Polynomial, Separation, Similarity, abstains
from service.core.retrieve import Outcome, retrieve
from service.core.separation import exact_recall_margin, separate
from service.core.similarity import Blocks, normalise_rows, overlaps, scores, self_similarity, spread
from service.core.support import random_rows, top_k, window
from service.core.update import update

SEPARATIONS: tuple[Separation, ...] = (
    "softmax", "sparsemax", Entmax(1.5), "max", "normmax", Entmax(1.1), Entmax(2.5), KSubsets(1), KSubsets(3),
)  # fmt: skip
SPARSE = tuple(kind for kind in SEPARATIONS if kind not in ("softmax", KSubsets(3)))
ABSTAINING: tuple[Separation, ...] = ("lsr", Polynomial(2), Polynomial(5))
SIMILARITIES = ("cosine", "dot", "neg_l2")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
CONTENTS = ("plain", "zero rows", "zero blocks", "huge", "tiny", "duplicates", "single", "all zero", "zero cue")


@dataclass(frozen=True)
class Net:
    blocks: Blocks
    stored: Tensor
    cues: Tensor
    observed: Tensor
    beta: float
    generator: torch.Generator


def make_net(
    seed: int,
    similarity: Similarity,
    *,
    rows: int = 6,
    widths: tuple[int, ...] = (5,),
    beta: float = 1.0,
    dtype: torch.dtype = torch.float64,
    content: str = "plain",
) -> Net:
    """Random patterns and four cues: copies of stored patterns with noise, so that recall has something to find."""
    g = torch.Generator().manual_seed(seed)
    if similarity != "cosine":
        widths = widths[:1]
    blocks = Blocks(widths, tuple((0.25 + torch.rand(len(widths), generator=g)).tolist()), similarity)
    raw = torch.randn(1 if content == "single" else rows, blocks.dimension, generator=g, dtype=dtype)
    raw *= torch.rand(raw.shape[0], 1, generator=g, dtype=dtype) * 2 + 0.1
    if content == "zero rows":
        raw[::2] = 0
    if content == "zero blocks":
        for row, part in enumerate(blocks.slices):
            raw[row :: len(widths) + 1, part] = 0
    if content == "duplicates":
        raw[1::2] = raw[0]
    if content == "all zero":
        raw[:] = 0
    raw *= {"huge": 1e30 if similarity == "cosine" else 1e10, "tiny": 1e-30}.get(content, 1.0)
    chosen = torch.randint(raw.shape[0], (4,), generator=g)
    scale = raw.abs().amax() if content in ("huge", "tiny") else 1.0
    cues = raw[chosen] + 0.7 * scale * torch.randn(4, blocks.dimension, generator=g, dtype=dtype)
    if content == "zero cue":
        cues[0] = 0
    observed = torch.rand(4, len(widths), generator=g) < 0.6
    observed[torch.arange(4), torch.randint(len(widths), (4,), generator=g)] = True
    return Net(blocks, normalise_rows(raw, blocks), cues, observed, beta, g)


similarities = st.sampled_from(SIMILARITIES)
separations = st.sampled_from(SEPARATIONS)
seeds = st.integers(0, 2**32 - 1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
betas = st.floats(0.1, 300.0)
widths_of = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def nets(draw: st.DrawFn, contents: tuple[str, ...] = ("plain",), narrowest: int = 1) -> Callable[..., Net]:
    """A net to make inside the test: the run-time shape checks draw from `random`, which a strategy may not do.

    Blocks of one value compare as ±1, which makes ties; a test that excludes ties has blocks of at least two.
    """
    return partial(
        make_net,
        draw(seeds),
        similarity=draw(similarities),
        rows=draw(st.integers(1, 12)),
        widths=draw(st.lists(st.integers(narrowest, 6), min_size=1, max_size=3).map(tuple)),
        beta=draw(betas),
        content=draw(st.sampled_from(contents)),
    )


def assert_never_rises(energies: Tensor, scale: float = 1.0) -> None:
    """`energies` is (cues, times), NaN once a cue is frozen."""
    for before, after in pairwise(energies.unbind(-1)):
        frozen = after.isnan()
        rise = (after - before)[~frozen]
        allowed = TOLERANCE[energies.dtype] * (scale + before[~frozen].abs())
        assert (rise <= allowed).all(), energies


@DTYPES
@given(
    nets(("plain", "zero rows", "zero blocks", "duplicates", "single", "zero cue")),
    separations,
    st.floats(0.05, 1.0),
    st.booleans(),
    st.booleans(),
)
def test_a_step_never_raises_the_energy(
    dtype: torch.dtype, make: Callable[..., Net], separation: Separation, step_size: float, partly: bool, clamp: bool
) -> None:
    net = make(dtype=dtype)
    result = retrieve(
        net.blocks,
        net.stored,
        net.cues,
        beta=net.beta,
        separation=separation,
        observed=net.observed if partly else None,
        step_size=step_size,
        clamp_observed=clamp,
        update_steps_max=12,
        update_steps_eps=0.0,
    )
    whole = result.energy[:, 1:] if partly else result.energy
    raw_scale = 1.0 if net.blocks.similarity == "cosine" else float(net.stored.square().sum(-1).amax()) + 1.0
    assert_never_rises(whole, raw_scale)


@DTYPES
@given(nets(), st.sampled_from((*SEPARATIONS, *ABSTAINING)), st.floats(0.05, 1.0))
def test_a_step_over_a_random_support_or_a_window_never_raises_the_energy(
    dtype: torch.dtype, make: Callable[..., Net], separation: Separation, step_size: float
) -> None:
    """Chosen whatever the scores are, and kept for the recall. lsr takes squared distances, a polynomial none."""
    net = make(dtype=dtype)
    if abstains(separation):
        net = make(dtype=dtype, similarity="neg_l2") if separation == "lsr" else net
        assume(separation == "lsr" or net.blocks.similarity != "neg_l2")
    rows = len(net.stored)
    drawn = random_rows(rows, 1 + rows // 2, 4, net.generator)
    for support in (drawn, window(torch.arange(4) % rows, rows)):
        result = retrieve(
            net.blocks, net.stored[support], net.cues, beta=net.beta, separation=separation, step_size=step_size,
            update_steps_max=10, update_steps_eps=0.0,
        )  # fmt: skip
        assert_never_rises(result.energy, float(net.stored.square().sum(-1).amax()) + 1.0)


@DTYPES
@given(
    nets(("plain", "zero rows", "zero blocks", "duplicates", "single", "zero cue")),
    st.sampled_from(ABSTAINING),
    st.floats(0.05, 1.0),
    st.booleans(),
)
def test_separations_that_abstain_never_raise_their_own_energies(
    dtype: torch.dtype, make: Callable[..., Net], separation: Separation, step_size: float, partly: bool
) -> None:
    """lsr: mean shift. Polynomial: -Σ max(s, 0)^n of the state at unit norm, which is the energy up to a power."""
    net = make(dtype=dtype, similarity="neg_l2") if separation == "lsr" else make(dtype=dtype)
    assume((separation == "lsr") == (net.blocks.similarity == "neg_l2"))
    result = retrieve(
        net.blocks, net.stored, net.cues, beta=net.beta / 30, separation=separation, step_size=step_size,
        observed=net.observed if partly else None, update_steps_max=12, update_steps_eps=0.0, trace=True,
    )  # fmt: skip
    scale = 1.0 if net.blocks.similarity == "cosine" else float(net.stored.square().sum(-1).amax()) + 1.0
    assert_never_rises(result.energy[:, 1:] if partly else result.energy, scale)
    assert result.states is not None
    for t, state in enumerate(result.states[1:], start=1):
        found = overlaps(net.blocks, net.stored, state).double()
        if isinstance(separation, Polynomial):
            size = self_similarity(net.blocks, state.double()).sqrt().unsqueeze(-1)
            want = -(found / size.clamp_min(1e-300)).clamp_min(0).pow(separation.degree).sum(-1)
            want = -((-want) ** (1 / separation.degree))
        else:
            beta = net.beta / 30
            want = -(1 + beta / 2 * found).clamp_min(0).sum(-1) / beta
        moving = ~result.energy[:, t].isnan()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(
            result.energy[moving, t].double(), want[moving], rtol=tolerance, atol=tolerance * scale
        )


@DTYPES
@given(nets(), separations, st.integers(1, 12))
def test_top_k_reselected_each_step_never_raises_its_own_energy(
    dtype: torch.dtype, make: Callable[..., Net], separation: Separation, k: int
) -> None:
    net = make(dtype=dtype)
    state, energies = normalise_rows(net.cues, net.blocks), []
    for _ in range(8):
        best, rows = top_k(overlaps(net.blocks, net.stored, state), k)
        weights = separate(separation, best * net.beta)
        energies.append(energy(net.blocks, state, best, weights, net.beta, separation))
        state = update(net.stored[rows], state, weights)
    assert_never_rises(torch.stack(energies, -1), float(net.stored.square().sum(-1).amax()) + 1.0)


@DTYPES
@given(nets(("plain", "zero blocks")), st.sampled_from((*SPARSE, "lsr")), st.floats(0.9, 1.1))
def test_a_pattern_is_a_fixed_point_iff_beta_times_its_margin_reaches_m(
    dtype: torch.dtype, make: Callable[..., Net], separation: Separation, closeness: float
) -> None:
    net = make(dtype=dtype, similarity="neg_l2") if separation == "lsr" else make(dtype=dtype)
    own = scores(net.blocks, net.stored, net.stored)
    margin = own.diag() - own.masked_fill(torch.eye(len(own), dtype=torch.bool), -torch.inf).amax(-1)
    needed = exact_recall_margin(separation)
    assert needed is not None
    if needed and 0 < margin[0] < torch.inf:  # at the margin, give or take a tenth
        net = replace(net, beta=min(closeness * needed / float(margin[0]), 1e4))
    scale = 1 + needed + net.beta * own.abs().amax()
    near = (net.beta * margin - needed).abs() < (1e-9 if dtype == torch.float64 else 1e-4) * scale
    result = retrieve(net.blocks, net.stored, net.stored, beta=net.beta, separation=separation, update_steps_max=0)
    alone = torch.eye(len(own), dtype=torch.bool)
    exact = torch.where(alone, result.weights == 1.0, result.weights == 0.0).all(-1)
    assert ((net.beta * margin >= needed) == exact)[~near].all()
    step = retrieve(net.blocks, net.stored, net.stored, beta=net.beta, separation=separation, update_steps_max=1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(step.state[exact], net.stored[exact], rtol=tolerance, atol=tolerance)
    assert (step.outcome[exact & (net.stored != 0).any(-1)] == Outcome.CONVERGED).all()


@DTYPES
@given(nets(), st.integers(2, 9))
def test_a_pattern_is_a_fixed_point_of_a_polynomial_iff_no_other_has_a_positive_score(
    dtype: torch.dtype, make: Callable[..., Net], degree: int
) -> None:
    net = make(dtype=dtype, similarity="dot")
    own = scores(net.blocks, net.stored, net.stored)
    alone = torch.eye(len(own), dtype=torch.bool)
    result = retrieve(
        net.blocks, net.stored, net.stored, beta=net.beta, separation=Polynomial(degree), update_steps_max=0
    )
    exact = torch.where(alone, result.weights == 1.0, result.weights == 0.0).all(-1)
    # A positive score may weigh too little for the number format; one so small in float64 is not drawn.
    small = torch.where(alone, 0.0, own / own.diag().unsqueeze(-1)).clamp_min(0).pow(degree - 1).amax(-1) < 1e-30
    lone = torch.where(alone, -1.0, own).amax(-1) <= 0
    assert (exact == lone)[lone | ~small].all()


@given(seeds, st.integers(1, 6), st.integers(1, 20), st.floats(0.1, 10.0))
def test_a_subset_is_recalled_evenly_iff_its_last_score_leads_by_the_margin(
    seed: int, k: int, others: int, beta: float
) -> None:
    z = beta * torch.randn(3, k + others, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = z.sort(-1, descending=True)
    gap = best.values[:, k - 1] - best.values[:, k]
    p = separate(KSubsets(k), z)
    even = torch.zeros_like(p).scatter_(-1, best.indices[:, :k], 1 / k)
    far = (gap - 1).abs() > 1e-9
    assert torch.equal((p == even).all(-1)[far], (gap >= 1)[far])


@given(nets(narrowest=2), separations, st.booleans())
def test_a_support_of_all_rows_is_dense_and_padding_changes_nothing(
    make: Callable[..., Net], separation: Separation, partly: bool
) -> None:
    net = make()
    observed, rows = net.observed if partly else None, len(net.stored)
    settings = {"beta": min(net.beta, 10.0), "separation": separation, "observed": observed, "update_steps_max": 4}
    dense = retrieve(net.blocks, net.stored, net.cues, **settings)
    best, order = top_k(scores(net.blocks, net.stored, net.cues, observed), rows + 5)
    padded = torch.cat([net.stored[order], torch.full((4, 2, net.blocks.dimension), 3.0).double()], dim=1)
    valid = (torch.arange(rows + 2) < rows).expand(4, -1)
    first = torch.cat([best, torch.full((4, 2), -torch.inf).double()], dim=1)
    support = retrieve(net.blocks, padded, net.cues, **settings, valid=valid, first_scores=first)
    assert (support.weights[:, rows:] == 0).all()
    in_row_order = torch.zeros_like(dense.weights).scatter_(-1, order, support.weights[:, :rows])
    torch.testing.assert_close(in_row_order, dense.weights, rtol=0, atol=1e-8)
    torch.testing.assert_close(support.state, dense.state, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(support.energy, dense.energy, rtol=1e-8, atol=1e-8, equal_nan=True)


@given(nets(narrowest=2), separations, seeds)
def test_permuting_rows_permutes_weights(make: Callable[..., Net], separation: Separation, seed: int) -> None:
    net = make()
    order = torch.randperm(len(net.stored), generator=torch.Generator().manual_seed(seed))
    settings = {"beta": min(net.beta, 10.0), "separation": separation, "observed": net.observed}
    before = retrieve(net.blocks, net.stored, net.cues, **settings)
    after = retrieve(net.blocks, net.stored[order], net.cues, **settings)
    torch.testing.assert_close(after.weights, before.weights[:, order], rtol=0, atol=1e-8)
    torch.testing.assert_close(after.state, before.state, rtol=1e-8, atol=1e-8)


@given(nets(narrowest=2), separations, st.booleans())
def test_a_batch_answers_as_its_cues_do_alone(make: Callable[..., Net], separation: Separation, clamp: bool) -> None:
    """Cues settle at different steps, so this also shows that a settled cue is frozen as it was."""
    net = make()
    beta = torch.tensor([0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
    settings = {"separation": separation, "update_steps_max": 30, "clamp_observed": clamp}
    together = retrieve(net.blocks, net.stored, net.cues, beta=beta, observed=net.observed, **settings)
    for i in range(4):
        cue, seen = net.cues[i : i + 1], net.observed[i : i + 1]
        alone = retrieve(net.blocks, net.stored, cue, beta=float(beta[i]), observed=seen, **settings)
        steps = int(alone.steps[0])
        assert (steps, int(alone.outcome[0])) == (int(together.steps[i]), int(together.outcome[i]))
        torch.testing.assert_close(together.state[i], alone.state[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.weights[i], alone.weights[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.energy[i, : steps + 1], alone.energy[0], rtol=1e-9, atol=1e-9)
        assert together.energy[i, steps + 1 :].isnan().all()


@given(seeds, st.integers(2, 12), st.integers(0, 2))
def test_recall_from_one_block_returns_the_others(seed: int, rows: int, block: int) -> None:
    net = make_net(seed, "cosine", rows=rows, widths=(16, 12, 20))
    part, error = net.blocks.slices[block], 1e-3
    observed = torch.zeros(rows, 3, dtype=torch.bool)
    observed[:, block] = True
    own = net.stored[:, part] @ net.stored[:, part].T
    margin = float((own.diag() - own.fill_diagonal_(-torch.inf).amax(-1)).min())
    assume(margin > 0.05)  # the block tells the memories apart
    norm_max = 3**0.5
    beta = torch.log(torch.tensor(2 * norm_max * (rows - 1) / error)).item() / margin
    cues = torch.zeros_like(net.stored)
    cues[:, part] = net.stored[:, part]
    result = retrieve(net.blocks, net.stored, cues, beta=beta, observed=observed, update_steps_max=1)
    assert ((result.state - net.stored).norm(dim=-1) <= error).all()
    assert torch.equal(result.weights.argmax(-1), torch.arange(rows))


@given(nets(("plain", "zero blocks", "duplicates")), st.floats(0.1, 1.0))
def test_clamped_blocks_keep_the_cue_and_the_others_are_the_association(
    make: Callable[..., Net], step_size: float
) -> None:
    net = make()
    result = retrieve(
        net.blocks, net.stored, net.cues, beta=net.beta, observed=net.observed, clamp_observed=True,
        step_size=step_size, update_steps_max=4, trace=True,
    )  # fmt: skip
    assert result.states is not None
    seen = spread(net.observed, net.blocks)
    cue = normalise_rows(net.cues, net.blocks)
    for state in result.states:
        assert torch.equal(state[seen], cue[seen])
    settled = result.outcome == Outcome.CONVERGED
    mean = result.weights @ net.stored
    apart = torch.where(seen, 0.0, result.state - mean)[settled].norm(dim=-1)
    assert (apart <= 2e-4 * mean[settled].norm(dim=-1).clamp_min(1.0)).all()


@DTYPES
@given(
    seeds,
    similarities,
    st.sampled_from((*SEPARATIONS, *ABSTAINING)),
    st.sampled_from(CONTENTS),
    st.sampled_from((1e-9, 1e-3, 1.0, 1e3, 1e6, 1e9)),
    widths_of,
)
def test_output_is_finite_and_arguments_are_kept(
    dtype: torch.dtype,
    seed: int,
    similarity: Similarity,
    separation: Separation,
    content: str,
    beta: float,
    widths: tuple[int, ...],
) -> None:
    if abstains(separation):
        similarity = "neg_l2" if separation == "lsr" else "dot" if similarity == "neg_l2" else similarity
    net = make_net(seed, similarity, widths=widths, dtype=dtype, content=content)
    stored, cues, observed = net.stored.clone(), net.cues.clone(), net.observed.clone()
    result = retrieve(
        net.blocks, stored, cues, beta=beta, separation=separation, observed=observed, update_steps_eps=0.0
    )
    assert result.state.isfinite().all()
    assert (result.weights >= 0).all()
    abstained = result.outcome == Outcome.ABSTAINED
    assert abstains(separation) or not abstained.any()
    assert torch.where(abstained, result.weights.sum(-1) == 0, (result.weights.sum(-1) - 1).abs() < 1e-4).all()
    assert not result.energy.isinf().any()
    assert result.energy[:, 0].isfinite().all()
    assert torch.equal(stored, net.stored)
    assert torch.equal(cues, net.cues)
    assert torch.equal(observed, net.observed)


@given(nets(narrowest=2), separations, st.floats(0.05, 1.0))
def test_each_step_is_the_formula(make: Callable[..., Net], separation: Separation, step_size: float) -> None:
    """x + step_size (Ξᵀp - x), p on the observed blocks at first and on the whole state afterwards."""
    net = make()
    beta = min(net.beta, 10.0)
    result = retrieve(
        net.blocks,
        net.stored,
        net.cues,
        beta=beta,
        separation=separation,
        observed=net.observed,
        step_size=step_size,
        update_steps_eps=0.0,
        trace=True,
    )
    for t, (x, moved) in enumerate(pairwise(result.states.unbind(0))):
        first = scores(net.blocks, net.stored, x, net.observed)
        p = separate(separation, beta * (first if t == 0 else overlaps(net.blocks, net.stored, x)))
        want = x + step_size * (p @ net.stored - x)
        still = (result.steps <= t).unsqueeze(-1)
        torch.testing.assert_close(
            torch.where(still, 0.0, result.step_weights[t]), torch.where(still, 0.0, p), rtol=0, atol=1e-7
        )
        torch.testing.assert_close(moved, torch.where(still, x, want), rtol=1e-7, atol=1e-7)
    last = separate(separation, beta * overlaps(net.blocks, net.stored, result.state))
    torch.testing.assert_close(result.weights, last, rtol=0, atol=1e-7)
    assert torch.equal(result.step_weights[-1], result.weights)


@given(seeds, st.sampled_from(("dot", "neg_l2")), separations, st.sampled_from((1e-4, 1e-2, 1e2, 1e4)))
def test_the_scale_of_the_patterns_does_not_matter(
    seed: int, similarity: Similarity, separation: Separation, scale: float
) -> None:
    """Patterns and cue times c, β over c²: the same steps to the same place."""
    net = make_net(seed, similarity)
    settings = {"separation": separation, "update_steps_max": 20}
    one = retrieve(net.blocks, net.stored, net.cues, beta=2.0, **settings)
    other = retrieve(net.blocks, net.stored * scale, net.cues * scale, beta=2.0 / scale**2, **settings)
    assert torch.equal(one.steps, other.steps)
    assert torch.equal(one.outcome, other.outcome)
    torch.testing.assert_close(other.state / scale, one.state, rtol=1e-7, atol=1e-9)


@given(nets(("plain", "duplicates", "single")), separations)
def test_energy_is_the_formula(make: Callable[..., Net], separation: Separation) -> None:
    """½ K(x, x) - (1/β) [⟨p, βs⟩ - Ω(p)], with Ω written out."""
    net = make()
    states = 0.5 * normalise_rows(net.cues, net.blocks)  # on its way a state is shorter than a cue
    found = overlaps(net.blocks, net.stored, states)
    p = separate(separation, found * net.beta)
    if isinstance(separation, Entmax):
        omega = (p.pow(separation.alpha).sum(-1) - 1) / (separation.alpha * (separation.alpha - 1))
    elif isinstance(separation, KSubsets):
        omega = (separation.k * p.pow(2).sum(-1) - 1) / 2
    else:
        omega = {
            "softmax": torch.special.xlogy(p, p).sum(-1), "sparsemax": (p.pow(2).sum(-1) - 1) / 2,
            "normmax": p.pow(2).sum(-1).sqrt() - 1, "max": torch.zeros(4),
        }[str(separation)]  # fmt: skip
    squares = torch.stack([states[:, part].square().sum(-1) for part in net.blocks.slices], dim=-1)
    shares = torch.tensor(net.blocks.weights, dtype=torch.float64) / sum(net.blocks.weights)
    own = {"cosine": squares @ shares, "dot": squares.sum(-1), "neg_l2": torch.zeros(4)}[net.blocks.similarity]
    want = own / 2 - ((p * net.beta * found).sum(-1) - omega) / net.beta
    got = energy(net.blocks, states, found, p, net.beta, separation)
    torch.testing.assert_close(got, want.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores_are_the_formula(similarity: Similarity) -> None:
    net = make_net(3, similarity, widths=(4, 3, 2), content="zero blocks")
    net = replace(net, observed=torch.ones_like(net.observed)) if similarity != "cosine" else net
    got = scores(net.blocks, net.stored, net.cues, net.observed)
    torch.testing.assert_close(scores(net.blocks, net.stored.expand(4, -1, -1), net.cues, net.observed), got)
    for i, x in enumerate(net.cues):
        for row, pattern in enumerate(net.stored):
            if similarity == "dot":
                want = float(pattern @ x)
            elif similarity == "neg_l2":
                want = -float((pattern - x).square().sum())
            else:
                pairs = [
                    (w, torch.cosine_similarity(pattern[s], x[s], dim=0) if pattern[s].any() else torch.tensor(0.0))
                    for w, s, seen in zip(net.blocks.weights, net.blocks.slices, net.observed[i], strict=True)
                    if seen
                ]
                want = sum(w * float(k) for w, k in pairs) / sum(w for w, _ in pairs)
            assert float(got[i, row]) == pytest.approx(want, abs=1e-12)
