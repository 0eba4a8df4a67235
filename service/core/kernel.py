"""Learned kernels: a linear map W that keeps memories apart, compared by cosine in its image.

    φ(u) = Wu / ‖Wu‖,   K(ξ, x) = ⟨φ(ξ), φ(x)⟩

(Wu et al., "Uniform Memory Retrieval with Larger Capacity for Modern Hopfield Models" (U-Hop), 2024, section 3; φ is
normalised at training and at query time alike: unnormalised, the loss is unbounded in W.)

Three objectives are minimised, each over mini-batches of stored patterns:
- `separation`, U-Hop's: memories are spread over the sphere, whatever cues will look like.
- `separation_plus`, U-Hop+'s: the same with an InfoNCE-like mean.
- `cues`, which the papers lack: a corrupted cue is drawn to its own memory and away from the memories most like it,
  with the separation loss beside it. Separation alone loses to plain cosine on masked cues.

Strategy: W starts as the identity or from whitening; Adam takes steps of constant length; held-out cues or patterns
decide when to stop and which W is returned. Batches for `cues` are made of memories and their nearest neighbours under
the W of the moment, since a random negative is soon too easy to teach anything.

Rules:
- `train` is a generator: whoever runs it sees every evaluation, and stops it by not asking for the next.
- Every draw comes from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.core.names import Objective, Start
from service.core.similarity import Blocks, normalise_rows
from service.errors import InvalidRequest

# W has at most this many rows: more directions than that cost time in every search and held-out cues do not reward
# them; a step of 512 cues over 3,072 values takes .2 s with it on one core.
RANK_MAX = 512

# Up to this dimension W keeps all directions.
FULL_RANK_DIMENSION = 1024

# Rows whose directions a start is made of; more would not change a covariance of at most RANK_MAX directions.
START_ROWS = 8192

# Memories among which a batch looks for neighbours: all of them up to this number, a fresh draw beyond. A search of
# 10,000 among themselves takes .3 s.
NEIGHBOUR_ROWS = 10_000
NEIGHBOURS = 16
NEIGHBOUR_STEPS = 100  # steps between two looks for neighbours: W moves slowly
HELD_OUT = 512  # patterns or cues that judge a W
OVERSAMPLING, SUBSPACE_ITERATIONS = 32, 4  # the customary numbers for spectra that fall slowly
EVALUATE_STEPS = 25


@dataclass(frozen=True)
class Training:
    """How to train. `learning_rate` is Adam's, as a share of W's size; `temperature` is τ (None: .05 for cues, U-Hop+'s
    .1), `separation_t` t, `separation_weight` the part of the separation loss beside the contrastive one in `cues`;
    `patience` the evaluations without a better held-out loss after which training stops.

    Raises InvalidRequest for numbers out of range.
    """

    objective: Objective = "cues"
    start: Start = "whitening"
    steps_max: int = 4_000
    batch: int = 512
    learning_rate: float = 1e-3
    temperature: float | None = None
    separation_t: float = 2.0
    separation_weight: float = 0.01
    patience: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (self.learning_rate, self.tau, self.separation_t)
        if min(positive) <= 0 or not all(map(math.isfinite, positive)) or self.separation_weight < 0:
            raise InvalidRequest("learning_rate, temperature and separation_t are over 0, separation_weight at least 0")
        if self.steps_max < 1 or self.batch < 2 or self.patience < 1:
            raise InvalidRequest("steps_max and patience are at least 1, batch at least 2")

    @property
    def tau(self) -> float:
        if self.temperature is not None:
            return self.temperature
        return 0.1 if self.objective == "separation_plus" else 0.05


@dataclass(frozen=True, eq=False)
class Progress:
    """An evaluation: the training loss since the last one (NaN at step 0), the held-out loss, and the best W so far."""

    step: int
    loss: float
    held_out: float
    weight: Float[Tensor, "r d"]
    best_held_out: float
    best_step: int


Draw = Callable[[Int[Tensor, " n"], torch.Generator], Float[Tensor, "n d"]]
"""Rows of the stored patterns → a freshly corrupted cue of each."""


def features(weight: Float[Tensor, "r d"], x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows r"]:
    """φ(x) = Wx / ‖Wx‖; what W annihilates stays zero."""
    image = x @ weight.T
    length: Tensor = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
    return image / length.clamp_min(torch.finfo(image.dtype).tiny)


def separation_loss(phi: Float[Tensor, "n r"], t: float = 2.0) -> Float[Tensor, ""]:
    """log mean_{μ≠ν} exp(-t ‖φ_μ - φ_ν‖²) of n ≥ 2 features (U-Hop, definition 3.1)."""
    return torch.logsumexp(-t * _pairs((2.0 - 2.0 * (phi @ phi.T)).clamp_min(0.0)), dim=0) - _log_pairs(phi)


def separation_loss_plus(phi: Float[Tensor, "n r"], tau: float = 0.1) -> Float[Tensor, ""]:
    """(1/n) log mean_{i≠j} exp(⟨φ_i, φ_j⟩ / τ) of n ≥ 2 features (U-Hop+)."""
    return (torch.logsumexp(_pairs(phi @ phi.T) / tau, dim=0) - _log_pairs(phi)) / phi.shape[0]


def cue_loss(
    cue: Float[Tensor, "n r"], own: Float[Tensor, "n r"], temperature: float, same: Tensor | None = None
) -> Float[Tensor, ""]:
    """InfoNCE: - mean log softmax(⟨φ(cue_i), φ(ξ_j)⟩ / τ) at j = i, the other memories of the batch being the
    negatives (van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018).

    `same` (n, n) marks pairs i ≠ j that are one memory, so no negatives.
    """
    logits = cue @ own.T / temperature
    if same is not None:
        logits = logits.masked_fill(same, -torch.inf)
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean()


def whitening(patterns: Float[Tensor, "n d"], ridge: float) -> Float[Tensor, "r d"]:
    """Λ = (C + ridge · c̄)^-½ along the patterns' directions, C their second moments, c̄ its mean eigenvalue; scaled so
    that its largest value is 1.

    r = d up to `FULL_RANK_DIMENSION`, else the leading `RANK_MAX` directions at most. Raises InvalidRequest for
    ridge ≤ 0.
    """
    if not ridge > 0:
        raise InvalidRequest(f"a ridge is over 0, not {ridge}")
    values, directions = _directions(patterns)
    scale = (values + ridge * values.mean().clamp_min(torch.finfo(values.dtype).tiny)).rsqrt()
    return directions * (scale / scale.max()).unsqueeze(-1)


def starting(patterns: Float[Tensor, "n d"], start: Start, ridge: float = 0.1) -> Float[Tensor, "r d"]:
    """The W that training starts from: whitening, or the identity (on the patterns' leading directions where d is over
    `FULL_RANK_DIMENSION`).
    """
    if start == "whitening":
        return whitening(patterns, ridge)
    dimension = patterns.shape[1]
    if dimension <= FULL_RANK_DIMENSION:
        return torch.eye(dimension, dtype=patterns.dtype, device=patterns.device)
    return _directions(patterns)[1]


def train(patterns: Float[Tensor, "n d"], training: Training, draw: Draw | None = None) -> Iterator[Progress]:
    """Train W on n ≥ 2 stored patterns, yielding an evaluation at the start, every `EVALUATE_STEPS` steps and at the
    end; the last one holds the W to use.

    draw: makes the cues of the objective `cues`, which alone needs it.
    Raises InvalidRequest where there are too few patterns, or no `draw` for `cues`.
    """
    if patterns.shape[0] < 2:
        raise InvalidRequest(f"a kernel is trained on two patterns at least, not on {patterns.shape[0]}")
    if (draw is None) == (training.objective == "cues"):
        raise InvalidRequest("the objective 'cues' is trained on cues, and no other is")
    return _train(normalise_rows(patterns, Blocks((patterns.shape[1],), (1.0,))), training, draw)


def _train(patterns: Tensor, training: Training, draw: Draw | None) -> Iterator[Progress]:
    generator = torch.Generator().manual_seed(training.seed)
    weight = starting(patterns[_some(patterns, START_ROWS, generator)], training.start).clone().requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=training.learning_rate * _size(weight.detach()))
    batches = _Batches(patterns, training, generator, hard=draw is not None)
    # Judged as it is trained: among memories that are hard to tell apart.
    judged = _some(patterns, HELD_OUT, generator) if draw is None else batches.next(weight.detach())[:HELD_OUT]
    judged_cues = None if draw is None else draw(judged, generator)

    def loss_of(rows: Tensor, cues: Tensor | None) -> Tensor:
        phi = features(weight, patterns[rows])
        if training.objective == "separation_plus":
            return separation_loss_plus(phi, training.tau)
        apart = separation_loss(phi, training.separation_t)
        if cues is None:
            return apart
        pulled = cue_loss(features(weight, cues), phi, training.tau)
        return pulled + training.separation_weight * apart

    best, best_loss, best_step, stale = weight.detach().clone(), math.inf, 0, 0
    losses: list[float] = []
    for step in range(training.steps_max + 1):
        if step % EVALUATE_STEPS == 0 or step == training.steps_max:
            with torch.no_grad():
                held_out = float(loss_of(judged, judged_cues))
            stale = 0 if held_out < best_loss else stale + 1
            if held_out < best_loss:
                best, best_loss, best_step = weight.detach().clone(), held_out, step
            yield Progress(step, _mean(losses), held_out, best, best_loss, best_step)
            losses.clear()
            if stale >= training.patience or step == training.steps_max:
                return
        rows = batches.next(weight.detach())
        optimiser.zero_grad()
        loss = loss_of(rows, None if draw is None else draw(rows, generator))
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))


class _Batches:
    """Which rows the next step sees: drawn at random, or (hard) random ones and their neighbours under W."""

    def __init__(self, patterns: Tensor, training: Training, generator: torch.Generator, hard: bool) -> None:
        self._patterns, self._generator, self._hard = patterns, generator, hard
        self._size = min(training.batch, patterns.shape[0])
        self._step = 0
        self._neighbours: Tensor | None = None

    def next(self, weight: Tensor) -> Int[Tensor, " n"]:
        if not self._hard or self._size == self._patterns.shape[0]:
            return _some(self._patterns, self._size, self._generator)
        if self._step % NEIGHBOUR_STEPS == 0:
            self._neighbours = self._look_for_neighbours(weight)
        self._step += 1
        assert self._neighbours is not None
        groups = 2 * self._size // NEIGHBOURS  # twice as many as fill it, since groups overlap
        chosen = torch.randint(len(self._neighbours), (max(1, groups),), generator=self._generator)
        rows = torch.unique(self._neighbours[chosen])
        shuffled: Tensor = rows[torch.randperm(len(rows), generator=self._generator)[: self._size]]
        return shuffled

    def _look_for_neighbours(self, weight: Tensor) -> Int[Tensor, "rows neighbours"]:
        among = _some(self._patterns, NEIGHBOUR_ROWS, self._generator)
        phi = features(weight, self._patterns[among])
        count = min(NEIGHBOURS, len(among))
        return torch.cat([among[(chunk @ phi.T).topk(count, dim=1).indices] for chunk in torch.split(phi, 1024)])


def _some(patterns: Tensor, count: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    return torch.randperm(patterns.shape[0], generator=generator)[:count]


def _size(weight: Tensor) -> float:
    """‖W‖ over that of the identity, so that a learning rate is the same share of W whatever the start."""
    return float(torch.linalg.matrix_norm(weight)) / math.sqrt(weight.shape[0])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _pairs(square: Float[Tensor, "n n"]) -> Float[Tensor, " pairs"]:
    """The values above the diagonal: every pair μ ≠ ν once, which has the mean of both orders."""
    n = square.shape[0]
    row, column = torch.triu_indices(n, n, 1, device=square.device)
    return square[row, column]


def _log_pairs(phi: Tensor) -> float:
    n = phi.shape[0]
    return math.log(n * (n - 1) / 2)


def _directions(patterns: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "r d"]]:
    """Second moments along their principal directions, largest first, and those directions as rows: all d up to
    `FULL_RANK_DIMENSION`, else the leading ones by subspace iteration (Halko et al., "Finding Structure with
    Randomness", 2011, algorithm 4.4).
    """
    rows, dimension = patterns.shape
    kept_as = torch.promote_types(patterns.dtype, torch.float32)
    if dimension <= FULL_RANK_DIMENSION:
        # In float64: in float32 the eigenvalues of few patterns, most of them 0, often do not converge.
        values, vectors = torch.linalg.eigh(patterns.double().T @ patterns.double() / rows)
        return values.flip(0).clamp_min(0.0).to(kept_as), vectors.T.flip(0).contiguous().to(kept_as)
    wide = patterns.to(kept_as)
    count = min(RANK_MAX, rows)
    drawn = torch.Generator().manual_seed(0)
    basis = torch.randn(dimension, min(count + OVERSAMPLING, dimension), generator=drawn, dtype=wide.dtype)
    basis = basis.to(wide.device)
    for _ in range(SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(wide.T @ (wide @ basis)).Q
    image = (wide @ basis).double()
    values, vectors = torch.linalg.eigh(image.T @ image / rows)
    leading = vectors[:, -count:].flip(1).to(kept_as)
    return values[-count:].flip(0).clamp_min(0.0).to(kept_as), (basis @ leading).T.contiguous()
