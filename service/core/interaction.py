"""An interaction matrix learned for the gate (RecLag, section 5: training by probabilistic interaction).

A memory is drawn for a pattern, and a pattern for that memory; ξ and Σ make the stored patterns likely to come back:

    max  Σ_n log Σ_μ p(μ|x_n) p(x_n|μ),   p(μ|x) = softmax(β ξ x),   p(x|μ) = N(x; ξ_μ, Σ)        (RecLag, eqs. 15, 16)

Strategy: the sum over μ is taken exactly (the paper samples five of them), and its gradient is followed by Adam in
mini-batches: ξ sits inside the softmax too, so that expectation and maximisation have no closed step. `learning` is a
generator, so that whoever runs it can report progress, stop when its time is over, or drop it.

Rules:
- Σ is diagonal or isotropic, with a floor: a coordinate that never changes would make the likelihood unbounded.
- What is yielded is the best so far on patterns that are held out, the start among them: learning never returns a
  matrix under which these are less likely than at the start.
- The same arguments give the same matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from service.core.gate import prototypes
from service.errors import InvalidRequest

Covariance = Literal["diagonal", "isotropic"]
Start = Literal["prototypes", "rows"]

# Mini-batches between two looks at the held-out patterns: often enough to stop early and to be stopped, seldom enough
# that looking costs little beside learning.
ROUND_STEPS = 20

# Rounds at most: 2,000 steps, a hundred passes over 5,000 patterns (the paper: 100 epochs).
ROUNDS_MAX = 100

# Held-out patterns looked at in a round: their mean is known to a hundredth of its spread.
_HELD_OUT_MAX = 1_000


@dataclass(frozen=True, eq=False)
class Interaction:
    """A learned interaction matrix and how it came about.

    matrix: ξ; variance: the diagonal of Σ; beta: what both were learned at, to be used with them.
    curve, held_out_curve: mean log-likelihood of a pattern in nats, before the first and after each round, of all
    patterns learned from and of those held out (the same patterns where there are too few to hold any out).
    best_round: the round that matrix and variance are of; 0 is the start.
    """

    matrix: Float[Tensor, "memories d"]
    variance: Float[Tensor, " d"]
    beta: float
    curve: tuple[float, ...]
    held_out_curve: tuple[float, ...]
    best_round: int


def log_likelihood(
    patterns: Float[Tensor, "rows d"],
    matrix: Float[Tensor, "memories d"],
    variance: Float[Tensor, " d"],
    beta: float,
) -> Float[Tensor, " rows"]:
    """log Σ_μ p(μ|x) p(x|μ) of each pattern, in nats (RecLag, eqs. 15 and 16), summed over all memories."""
    choice = torch.log_softmax(patterns @ matrix.T * beta, dim=-1)
    # About a middle and in units of Σ the squares are small, so that expanding the distance cancels little.
    middle, scale = matrix.mean(0), variance.rsqrt()
    x, m = (patterns - middle) * scale, (matrix - middle) * scale
    distance = x.square().sum(-1, keepdim=True) - 2.0 * (x @ m.T) + m.square().sum(-1)
    volume = (2.0 * math.pi * variance).log().sum()
    return (choice - 0.5 * (distance + volume)).logsumexp(-1)


def learning(
    patterns: Float[Tensor, "rows d"],
    count: int,
    beta: float,
    *,
    norm: float | None = None,
    covariance: Covariance = "diagonal",
    start: Start = "prototypes",
    batch: int = 256,
    learning_rate: float = 0.02,
    variance_floor: float = 1e-2,
    held_out_share: float = 0.1,
    rounds_max: int = ROUNDS_MAX,
    patience: int = 10,
    seed: int = 0,
) -> Iterator[Interaction]:
    """Learn a matrix of `count` memories; yields the start, then the best so far after each round of `ROUND_STEPS`.

    norm: every pattern is scaled to this length first (the paper: 10, with β = 5); None takes them as they are. β and
    the matrix belong to that scale.
    start: k-means prototypes of the patterns, or `count` of them drawn at random.
    learning_rate: of Adam, in units of the patterns' root mean square for ξ and of log Σ.
    variance_floor: the least variance, as a part of the patterns' mean variance.
    Ends after `rounds_max` rounds, or once `patience` rounds have not made the held-out patterns likelier.

    Raises InvalidRequest unless 1 ≤ count ≤ the patterns learned from and the numbers are in range.
    """
    _check(beta, norm, covariance, start, batch, learning_rate, variance_floor, held_out_share, rounds_max, patience)
    patterns = patterns.to(torch.promote_types(patterns.dtype, torch.float32))
    if norm is not None:
        patterns = torch.nn.functional.normalize(patterns, dim=-1) * norm
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(patterns.shape[0], generator=generator).to(patterns.device)
    apart = min(int(held_out_share * patterns.shape[0]), _HELD_OUT_MAX)
    learned_from = patterns[order[apart:]]
    held_out = patterns[order[:apart]] if apart else learned_from[:_HELD_OUT_MAX]
    rows = learned_from.shape[0]
    if not 1 <= count <= rows:
        raise InvalidRequest(
            f"a matrix of {count} memories is learned from at least as many patterns; there are {rows} "
            f"beside the {apart} held out"
        )

    matrix = prototypes(learned_from, count, seed) if start == "prototypes" else learned_from[:count].clone()
    nearest = torch.cdist(learned_from, matrix).argmin(-1)
    squared = (learned_from - matrix[nearest]).square().mean(0)
    spread = (learned_from - learned_from.mean(0)).square().mean()
    # Patterns that are all equal have no spread at all; their scale then sets the floor.
    floor = (variance_floor * (spread if spread > 0 else learned_from.square().mean())).clamp_min(1e-12)
    free = (squared if covariance == "diagonal" else squared.mean(0, keepdim=True)).clamp_min(float(floor) * 1e-2)
    log_free = free.log().requires_grad_()  # the variance over the floor
    matrix.requires_grad_()
    scale = float(learned_from.square().mean().sqrt()) or 1.0
    adam = torch.optim.Adam(
        [{"params": [matrix], "lr": learning_rate * scale}, {"params": [log_free], "lr": learning_rate}]
    )

    def variance() -> Tensor:
        return (floor + log_free.exp()).expand(patterns.shape[1])

    def snapshot(round_: int) -> Interaction:
        return Interaction(
            matrix.detach().clone(), variance().detach().clone(), beta, tuple(curve), tuple(held_out_curve), round_
        )

    with torch.no_grad():
        sample = learned_from[:_HELD_OUT_MAX]
        curve = [float(log_likelihood(sample, matrix, variance(), beta).mean())]
        held_out_curve = [float(log_likelihood(held_out, matrix, variance(), beta).mean())]
    best = snapshot(0)
    yield best
    waiting = torch.empty(0, dtype=torch.int64)
    for round_ in range(1, rounds_max + 1):
        total = 0.0
        for _ in range(ROUND_STEPS):
            if waiting.numel() == 0:
                waiting = torch.randperm(rows, generator=generator)
            taken, waiting = waiting[:batch], waiting[batch:]
            # Not around the loop: a mode set inside a generator would stay set for its caller.
            with torch.enable_grad():
                mean = log_likelihood(learned_from[taken.to(patterns.device)], matrix, variance(), beta).mean()
                adam.zero_grad()
                (-mean).backward()  # type: ignore[no-untyped-call]
            adam.step()
            total += float(mean.detach())
        curve.append(total / ROUND_STEPS)
        with torch.no_grad():
            held_out_curve.append(float(log_likelihood(held_out, matrix, variance(), beta).mean()))
        if held_out_curve[-1] > held_out_curve[best.best_round]:
            best = snapshot(round_)
        else:
            best = Interaction(best.matrix, best.variance, beta, tuple(curve), tuple(held_out_curve), best.best_round)
        yield best
        if round_ - best.best_round >= patience:
            return


def learn_interaction(
    patterns: Float[Tensor, "rows d"],
    count: int,
    beta: float,
    *,
    norm: float | None = None,
    covariance: Covariance = "diagonal",
    start: Start = "prototypes",
    rounds_max: int = ROUNDS_MAX,
    seed: int = 0,
) -> Interaction:
    """`learning`, to its end."""
    rounds = learning(
        patterns, count, beta, norm=norm, covariance=covariance, start=start, rounds_max=rounds_max, seed=seed
    )
    for last in rounds:
        reached = last
    return reached


def _check(
    beta: float, norm: float | None, covariance: Covariance, start: Start, batch: int, learning_rate: float,
    variance_floor: float, held_out_share: float, rounds_max: int, patience: int,
) -> None:  # fmt: skip
    if covariance not in get_args(Covariance) or start not in get_args(Start):
        raise InvalidRequest(
            f"covariance is one of {', '.join(get_args(Covariance))} and start one of {', '.join(get_args(Start))}, "
            f"not {covariance!r} and {start!r}"
        )
    positive = {
        "beta": beta, "norm": 1.0 if norm is None else norm, "batch": batch, "learning_rate": learning_rate,
        "variance_floor": variance_floor, "patience": patience,
    }  # fmt: skip
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise InvalidRequest(f"{name} is over 0 and finite, not {value}")
    if not 0 <= held_out_share < 1:
        raise InvalidRequest(f"held_out_share is at least 0 and under 1, not {held_out_share}")
    if not 0 <= rounds_max <= ROUNDS_MAX:
        raise InvalidRequest(f"rounds_max is from 0 to {ROUNDS_MAX}, not {rounds_max}")
