"""The gate: whether any stored memory is the origin of a cue (RecLag: the rectified Lagrangian for modern Hopfield
networks).

    S(v) = Σ_μ exp(β ξ_μ·v),   v' = 1[S(v) > λ] · Ξᵀ softmax(β Ξ v),   E(v) = ½‖v‖² - (1/β) max(log S(v) - log λ, 0)

λ is the inverse memory strength, held as log λ. A cue with S ≤ λ falls to the origin: it is unknown. S(v) is
proportional to the density that the memory gives to v, so this is a level set of that density. Under a top-K search
log S is known between bounds. A cue over λ may still come to a state under it and fall later: `follow` walks the path,
and the least log S along it is the score of the whole path.

With known negatives O the score is log S_Ξ(v) - log(S_O(v) + b). At b = 0 it is Hopfield Boosting's lse(β, Ξv) -
lse(β, Ov) (Hofmann et al., "Energy-based Hopfield Boosting for Out-of-Distribution Detection", 2024), in units of
log S. That alone accepts what is far from both and a little less far from Ξ; the background b, a negative that is
everywhere, keeps it out: far from O the score is log S_Ξ - log b again.

Rules:
- log S is float64, so that calibration and use compare the same numbers.
- λ comes from calibration alone, by split conformal prediction in exact rationals: of new known cues, drawn like the
  calibration's, at least the target share is accepted, on average over draws of the calibration set.
- The score (β, interaction matrix, negatives, steps) is fixed before a calibration cue is looked at: else nothing is
  guaranteed.
- Too few cues, or a threshold at which nothing falls to the origin, is a refusal that says what is missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.core.separation import separate
from service.errors import CalibrationRefused, InvalidRequest

# Lloyd's iterations nearly always stop changing well before this; the bound keeps a calibration job's time
# proportional to the rows.
LLOYD_ITERATIONS_MAX = 25

# Rows assigned at once: with 1,000 prototypes a block of distances is 16 MB in float32.
_LLOYD_CHUNK_ROWS = 4096


def log_mass(scores: Float[Tensor, "batch rows"], beta: float) -> Float[Tensor, " batch"]:
    """log S = log Σ_μ exp(β s_μ), float64. Scores -∞ count as no row; without any the mass is -∞."""
    return (scores.double() * beta).logsumexp(-1)


def mass_bounds(
    scores_topk: Float[Tensor, "batch support"], rows_total: int, beta: float
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """log S over all N rows from its K best scores: LSE_K ≤ log S ≤ log(exp(LSE_K) + (N-K) exp(β s_(K))), float64."""
    low = log_mass(scores_topk, beta)
    inside = scores_topk > -torch.inf
    outside = (rows_total - inside.sum(-1)).double()
    last = scores_topk.double().masked_fill(~inside, torch.inf).amin(-1) * beta
    high = torch.logaddexp(low, outside.log() + last)
    return low, torch.where(outside > 0, high, low)


def gated_step(
    patterns: Float[Tensor, "rows d"], state: Float[Tensor, "batch d"], beta: float, log_lambda: float
) -> Float[Tensor, "batch d"]:
    """v' = 1[S(v) > λ] · Ξᵀ softmax(β Ξ v) (RecLag, eq. 12 with a full step); log λ = -∞ is the plain step (Theorem
    2).
    """
    scores = state @ patterns.T
    target = separate("softmax", scores * beta) @ patterns
    accepted = log_mass(scores, beta) > log_lambda
    return target.masked_fill(~accepted.unsqueeze(-1), 0.0)


def gate_energy(
    patterns: Float[Tensor, "rows d"], state: Float[Tensor, "batch d"], beta: float, log_lambda: float
) -> Float[Tensor, " batch"]:
    """E(v) = ½‖v‖² - (1/β) max(log S(v) - log λ, 0), float64; at log λ = -∞ that of the plain network, ½‖v‖² - (1/β)
    log S(v).
    """
    mass = log_mass(state @ patterns.T, beta)
    memory = mass if log_lambda == -math.inf else (mass - log_lambda).clamp_min(0.0)
    return 0.5 * state.double().square().sum(-1) - memory / beta


def origin_radius(log_lambda: float, rows: int, beta: float, norm_max: float) -> float:
    """The radius of a ball that falls to the origin, (log λ - log N_h) / (β max‖ξ_μ‖) (RecLag, Theorem 1); 0 unless
    log λ > log N_h.
    """
    return max(log_lambda - math.log(rows), 0.0) / (beta * norm_max)


@dataclass(frozen=True, eq=False)
class Path:
    """The states that the plain dynamics visits from each cue, as the gate sees them.

    log_masses: [t] log S at v_t (less log S_O, with negatives), float64; a cue at rest keeps its last value.
    state: the last one. settled: whether the path had come to rest by then.

    Until it falls the gated dynamics visits the same states, so one path answers for every λ.
    """

    log_masses: Float[Tensor, "batch times"]
    state: Float[Tensor, "batch d"]
    settled: Bool[Tensor, " batch"]

    @property
    def score(self) -> Float[Tensor, " batch"]:
        """min_t log S(v_t): over log λ iff the gated dynamics never falls on this path."""
        return self.log_masses.amin(-1)

    def rejected_at(self, log_lambda: float) -> Int[Tensor, " batch"]:
        """When S(v_t) ≤ λ first: 0 is a cue rejected before any step, t one that fell to the origin after t steps; -1
        where it never is.
        """
        under = self.log_masses <= log_lambda
        return torch.where(under.any(-1), under.int().argmax(-1), -1)


def follow(
    patterns: Float[Tensor, "rows d"] | Float[Tensor, "batch rows d"],
    state: Float[Tensor, "batch d"],
    beta: float,
    *,
    steps_max: int,
    valid: Bool[Tensor, "batch rows"] | None = None,
    negatives: Float[Tensor, "negatives d"] | None = None,
    log_background: float = -math.inf,
    eps: float = 1e-4,
) -> Path:
    """log S at every state from the cue on, v ← Ξᵀ softmax(β Ξ v), for at most `steps_max` steps (RecLag, eq. 12).

    patterns: shared by the batch, or each cue's nearest rows (a fixed support); valid: the rows that take part (None:
    all). A cue is at rest when a step moves it by at most `eps` of its length; it stays there, whatever its batch does.
    """
    resting = torch.zeros(state.shape[0], dtype=torch.bool, device=state.device)
    log_masses: list[Tensor] = []
    for t in range(steps_max + 1):
        products = state @ patterns.T if patterns.ndim == 2 else torch.bmm(state.unsqueeze(1), patterns.mT).squeeze(1)
        if valid is not None:
            products = products.masked_fill(~valid, -torch.inf)
        score = log_mass(products, beta)
        if negatives is not None:
            score = boosted(score, state @ negatives.T, beta, log_background)
        log_masses.append(score if t == 0 else torch.where(resting, log_masses[-1], score))
        weights = torch.softmax(products * beta, dim=-1).nan_to_num(0.0)  # a cue without rows goes to the origin
        target = weights @ patterns if patterns.ndim == 2 else torch.bmm(weights.unsqueeze(1), patterns).squeeze(1)
        moved: Tensor = torch.linalg.vector_norm(target - state, dim=-1)
        length: Tensor = torch.linalg.vector_norm(target, dim=-1)
        resting = resting | (moved <= eps * length)
        if t == steps_max or bool(resting.all()):
            break
        state = torch.where(resting.unsqueeze(-1), state, target)
    return Path(torch.stack(log_masses, dim=-1), state, resting)


def boosted(
    known: Float[Tensor, " batch"],
    negative_scores: Float[Tensor, "batch negatives"],
    beta: float,
    log_background: float = -math.inf,
) -> Float[Tensor, " batch"]:
    """log S_Ξ - log(S_O + b) from log S_Ξ and the scores of the negatives, float64; without a background β times
    Hopfield Boosting's score.
    """
    against = log_mass(negative_scores, beta)
    return known - torch.logaddexp(against, torch.full_like(against, log_background))


def prototypes(stored: Float[Tensor, "rows d"], count: int, seed: int) -> Float[Tensor, "count d"]:
    """`count` k-means centres of the stored patterns, an interaction matrix whose size does not grow with the memory.

    Lloyd's iterations from `count` distinct rows drawn by `seed`; the same arguments give the same centres. A centre
    that loses all its rows stays. Raises InvalidRequest unless 1 ≤ count ≤ rows.
    """
    rows = stored.shape[0]
    if not 1 <= count <= rows:
        raise InvalidRequest(f"prototypes number from 1 to the {rows} stored patterns, not {count}")
    stored = stored.to(torch.promote_types(stored.dtype, torch.float32))
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]
    centres = stored[drawn.to(stored.device)]
    for _ in range(LLOYD_ITERATIONS_MAX):
        total, size = torch.zeros_like(centres), centres.new_zeros(count, 1)
        for chunk in torch.split(stored, _LLOYD_CHUNK_ROWS):
            nearest = torch.cdist(chunk, centres).argmin(-1)
            # Sums by matrix product: unlike scattered additions they come out the same every time on every device.
            member = torch.nn.functional.one_hot(nearest, count).to(chunk.dtype)
            total += member.T @ chunk
            size += member.sum(0).unsqueeze(-1)
        moved = torch.where(size > 0, total / size.clamp_min(1.0), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


@dataclass(frozen=True)
class Threshold:
    """A calibrated λ: known cues are accepted with a share of at least `target_tpr`, from `n` held-out known cues."""

    log_lambda: float
    target_tpr: Fraction
    n: int

    def accepts(self, score: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Whether each log S is strictly over log λ; compared in float64, as the threshold was set."""
        return score.double() > self.log_lambda


def calibrate(
    known_scores: Float[Tensor, " n"], target_tpr: float | Fraction, rows: int | None, log_against: float = 0.0
) -> Threshold:
    """The threshold that accepts new known cues with probability at least `target_tpr` (split conformal prediction).

    known_scores: log S of n held-out cues whose memories are stored; rows: N_h, the rows of the interaction matrix,
    or None where the scores are of distances, which know no origin;
    log_against: log(N_o + b) where the scores are boosted, so that the origin's own score is log N_h less that.
    With α = 1 - target_tpr and k = ⌊α(n+1)⌋, log λ lies just under the k-th smallest score: just under, so that ties
    with it are accepted. A float target is read as the decimal it prints as (0.9 is 9/10).

    Raises CalibrationRefused when n < 1/α - 1 or log λ is not over the origin's score (then the origin attracts
    nothing), InvalidRequest for a target outside (0, 1) or a NaN.
    """
    target = target_tpr if isinstance(target_tpr, Fraction) else Fraction(repr(target_tpr))
    if not 0 < target < 1:
        raise InvalidRequest(f"a target share lies between 0 and 1, not at {target_tpr}")
    if known_scores.isnan().any():
        raise InvalidRequest("a calibration score is not a number")
    miss = 1 - target
    n, needed = known_scores.shape[0], math.ceil(1 / miss - 1)
    if n < needed:
        raise CalibrationRefused(
            f"needs n >= {needed} held-out cues for a target of {float(target):g}, has {n}: {needed - n} more"
        )
    k = math.floor(miss * (n + 1))
    log_lambda = math.nextafter(known_scores.double().sort().values[k - 1].item(), -math.inf)
    at_origin = math.log(rows) - log_against if rows else -math.inf
    if rows is not None and (rows < 1 or log_lambda <= at_origin):
        less = " less that of the negatives" if log_against else ""
        raise CalibrationRefused(
            f"log λ = {log_lambda:.4g} is not over log N = {at_origin:.4g} of the interaction matrix{less}: "
            "the known cues are no nearer to the memories than the origin is; a larger beta or clearer cues are needed"
        )
    return Threshold(log_lambda=log_lambda, target_tpr=target, n=n)
