"""Separations: how scaled scores become association weights, with the regulariser Ω each one is the maximiser of.

    sep(z) = argmax_p ⟨p, z⟩ - Ω(p) over the probability simplex

    softmax       Ω = Σ p log p
    α-entmax      Ω = (Σ p^α - 1) / (α(α-1)): softmax at α = 1, sparsemax at α = 2, towards `max` as α grows
    normmax       Ω = ‖p‖₂ - 1
    k-subsets     Ω = (k ‖p‖² - 1) / 2 with every p ≤ 1/k: the mean of k rows, sparsemax at k = 1
    max           Ω = 0

(Martins, Astudillo, "From Softmax to Sparsemax", 2016; Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models",
2019; Blondel, Martins, Niculae, "Learning with Fenchel-Young Losses", 2020; Santos et al., "Sparse and Structured
Hopfield Networks", 2024.) Two are no such maximisers, since a constant added to all scores changes them, and abstain
where no row is near enough:

    polynomial    p ∝ max(z, 0)^(n-1)                     (Krotov, Hopfield, "Dense Associative Memory", 2016)
    lsr           equal weights where -z/2 = β/2 ‖x - ξ‖² ≤ 1, under neg_l2: the Epanechnikov kernel's mean shift
                  (Hoover et al., "Dense Associative Memory with Epanechnikov Energy", 2025)

Rules:
- z is already multiplied by β. A row that takes no part has logit -∞, never 0, and weight exactly 0.
- A cue with no valid row has no distribution: its weights are all 0. So are those of an abstention.
- All but max and lsr, which are piecewise constant, carry gradients to z.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from service.core.names import Entmax, KSubsets, Polynomial, Regularised, Separation

# Logits are shifted so that the largest is 0. The threshold τ then lies in [-1, 0] (a single winner has weight 1), so
# a row under this floor has weight 0 wherever it lies: lifting it to the floor changes no weight and keeps -∞ and
# large squares out of sums and slopes.
_FLOOR = -2.0

# From so many rows on, counting those that can have weight and sorting them alone is faster than sorting all.
_HEAD_ROWS = 4_096

# Logits whose weights are worked out at once: 4 MB of float32, which caches hold and malloc keeps.
_CACHED_VALUES = 2**20

# Every step of Newton's that does not halve the error is followed by a bisection, so 40 halvings of an error of at most
# log(rows) and 60 of the interval are more than enough; 5 to 15 steps are usual. The last step squares the error.
_ROOT_STEPS_MAX = 128
_ROOT_ERROR = 1e-12

# Halvings of an interval of length 1 until float64 has no number between its ends.
_HALVINGS = 60


def separate(
    kind: Separation, z: Float[Tensor, "*batch rows"], valid: Bool[Tensor, "*batch rows"] | None = None
) -> Float[Tensor, "*batch rows"]:
    """Weights p = sep(z) over the last axis, which has at least one row; float32 or wider."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if valid is not None:
        z = z.masked_fill(~valid, -torch.inf)
    weights: Tensor
    match kind:
        case "softmax":
            weights = _softmax(z)
        case "sparsemax":
            weights = _sparsemax(z)
        case "max":
            # argmax gives the first of equal maxima: ties go to the lowest index.
            weights = torch.zeros_like(z).scatter_(-1, z.argmax(-1, keepdim=True), 1.0)
        case "normmax":
            weights = _normmax(z)
        case "lsr":
            inside = z >= -2.0
            weights = inside / inside.sum(-1, keepdim=True).clamp_min(1).to(z.dtype)
        case Entmax(alpha):
            weights = _entmax15(z) if alpha == 1.5 else _entmax(z, alpha - 1.0)
        case Polynomial(degree):
            weights = _polynomial(z, degree)
        case KSubsets(k):
            weights = _k_subsets(z, k)
    return weights if valid is None else weights.masked_fill(~valid, 0.0)


def regulariser(kind: Regularised, p: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch"]:
    """Ω(p), as in the table above."""
    match kind:
        case "softmax":
            entropy: Tensor = torch.special.entr(p)
            return -entropy.sum(-1)
        case "sparsemax":
            return (p.square().sum(-1) - 1.0) / 2.0
        case "max":
            return torch.zeros_like(p[..., 0])
        case "normmax":
            norm: Tensor = torch.linalg.vector_norm(p, dim=-1)
            return norm - 1.0
        case Entmax(alpha):
            # Σ p = 1, so Σ p^α - 1 = Σ p (p^(α-1) - 1): terms of one sign, exact also where α is nearly 1.
            return (p * torch.expm1((alpha - 1.0) * p.log())).sum(-1) / (alpha * (alpha - 1.0))
        case KSubsets(k):
            return (k * p.square().sum(-1) - 1.0) / 2.0


def exact_recall_margin(kind: Separation) -> float | None:
    """The m in: ξ_μ is a fixed point with all weight iff β · min_{ν≠μ} [K(ξ_μ, ξ_μ) - K(ξ_ν, ξ_μ)] ≥ m.

    m = 1/(α-1) for α-entmax, 1 for normmax, and the limit 0 for max (up to ties). For k-subsets, m = 1 is the margin
    between the k-th and the next score at which the k best rows have 1/k each. For lsr, m = 2 is a squared distance
    times β, and must be exceeded. None for softmax, which has no exact fixed points, and for the polynomial, where no
    margin decides: ξ_μ is fixed iff every other K(ξ_ν, ξ_μ) ≤ 0 < K(ξ_μ, ξ_μ).
    """
    match kind:
        case "softmax" | Polynomial():
            return None
        case "max":
            return 0.0
        case "lsr":
            return 2.0
        case Entmax(alpha):
            return 1.0 / (alpha - 1.0)
        case "sparsemax" | "normmax" | KSubsets():
            return 1.0


def _shifted(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    # Bounded from below, so that a cue with no valid row stays at -∞ and not at -∞ + ∞.
    return z - z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)


def _head(z: Float[Tensor, "*batch rows"], reach: float) -> Float[Tensor, "*batch head"]:
    """The shifted logits from the largest down, at least all those over -reach, in float64: their running sums over
    a million rows would lose the threshold in float32.
    """
    rows = z.shape[-1]
    if rows > _HEAD_ROWS:
        count = int((z > -reach).sum(-1).amax()) if z.numel() else 0
        if count < rows // 4:
            return z.topk(max(count, 1), dim=-1).values.double()
    return z.sort(dim=-1, descending=True).values.double()


def _softmax(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    """exp z / Σ exp z, with weight 0 for rows so far down that theirs would be subnormal numbers.

    A processor takes a hundred times as long over each of those: with half of the weights subnormal, Ξᵀp took 4.1 s
    instead of 0.05 (64 cues, 100,000 patterns). What is left out adds up to less than 1e-23 even over a million rows.
    """
    # e^17 rows may share the sum before a weight that is kept falls under the smallest normal number.
    lowest = math.log(torch.finfo(z.dtype).tiny) + 17.0
    if z.requires_grad or z.numel() <= _CACHED_VALUES:
        return torch.softmax(functional.threshold(_shifted(z), lowest, -torch.inf), dim=-1)
    weights = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    flat, into = z.reshape(-1, z.shape[-1]), weights.view(-1, z.shape[-1])
    step = max(1, _CACHED_VALUES // z.shape[-1])
    for some, given in zip(torch.split(flat, step), torch.split(into, step), strict=True):
        torch.softmax(functional.threshold(_shifted(some), lowest, -torch.inf, inplace=True), dim=-1, out=given)
    return weights


def _sparsemax(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    """max(z - τ, 0), τ from the largest k with 1 + k z_(k) > Σ_{i≤k} z_(i) (Martins, Astudillo 2016, Algorithm 1)."""
    z = _shifted(z)
    descending = _head(z, 1.0).clamp_min(_FLOOR)
    rank = torch.arange(1, descending.shape[-1] + 1, dtype=torch.float64, device=z.device)
    total = descending.cumsum(-1)
    size = (1.0 + rank * descending > total).sum(-1, keepdim=True)
    threshold = (total.gather(-1, size - 1) - 1.0) / size
    return (z - threshold.to(z.dtype)).clamp_min(0.0)


def _entmax15(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    """max(z/2 - τ, 0)², whose sum is 1 (Peters et al. 2019, Algorithm 2)."""
    return _over_unit_norm_threshold(_shifted(z) / 2.0).square()


def _normmax(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    """max(z - τ, 0) of norm 1, divided by its sum: z - p/‖p‖₂ is τ where p > 0 (Blondel et al. 2020, section 4.3)."""
    over = _over_unit_norm_threshold(_shifted(z))
    return over / over.sum(-1, keepdim=True).clamp_min(torch.finfo(over.dtype).tiny)


def _over_unit_norm_threshold(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    """max(z - τ, 0) with Σ max(z - τ, 0)² = 1: τ = M_k - √((1 - S_k)/k) from the k largest, M_k their mean, S_k their
    sum of squares about it; k is the largest with τ_k ≤ z_(k). 0 for a cue with no valid row.
    """
    descending = _head(z, 1.0).clamp_min(_FLOOR)
    rank = torch.arange(1, descending.shape[-1] + 1, dtype=torch.float64, device=z.device)
    mean = descending.cumsum(-1) / rank
    room = (1.0 - descending.square().cumsum(-1)) / rank + mean.square()
    with torch.no_grad():
        size = (mean - room.clamp_min(0.0).sqrt() <= descending).sum(-1, keepdim=True)
    # The root is taken of the chosen k alone, where it is positive: its slope at 0 would spoil the gradient.
    room = room.gather(-1, size - 1).clamp_min(torch.finfo(torch.float64).tiny)
    threshold = mean.gather(-1, size - 1) - room.sqrt()
    return (z - threshold.to(z.dtype)).clamp_min(0.0)


def _entmax(z: Float[Tensor, "*batch rows"], a: float) -> Float[Tensor, "*batch rows"]:
    """p_i = (q^a + a z_i)_+^(1/a), a = α - 1, with q the largest weight, at which z = 0: the q whose weights sum to 1.

    Solved for q and not for the threshold -q^a, and in float64, so that nothing cancels at any α; log q by Newton's
    method on log Σ p, kept inside the interval known to hold it.
    """
    wide = _shifted(z.double()).clamp_min(_FLOOR / a)
    head = _head(wide, 1.0 / a)
    log_q = _log_largest_weight(head.detach(), a)
    # One step more, through which gradients flow: dq/dz by the implicit function theorem. Where no q brings the sum
    # near 1, because a row enters within one rounding, there is no step to take.
    total, slope = _total_and_slope(head, log_q, a)
    excess = log_q + total.log()
    excess = excess - torch.where(excess.abs() > _ROOT_ERROR, excess, 0.0).detach()
    log_q = log_q - excess / slope.detach()
    weights = _relative_weights(wide, log_q, a)
    return (weights / weights.sum(-1, keepdim=True)).to(z.dtype)


def _relative_weights(
    z: Float[Tensor, "*batch rows"], log_q: Float[Tensor, "*batch 1"], a: float
) -> Float[Tensor, "*batch rows"]:
    """p_i / q = (1 + a z_i q^-a)_+^(1/a)."""
    lowered = a * z * torch.exp(-a * log_q)
    inside = lowered > -1.0
    return torch.where(inside, torch.exp(torch.log1p(torch.where(inside, lowered, 0.0)) / a), 0.0)


def _total_and_slope(
    z: Float[Tensor, "*batch rows"], log_q: Float[Tensor, "*batch 1"], a: float
) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
    """Σ p / q, and d log Σ p / d log q = Σ p (q/p)^a / Σ p, which is at least 1."""
    relative = _relative_weights(z, log_q, a)
    total = relative.sum(-1, keepdim=True)
    steep = torch.where(relative > 0, relative.clamp_min(torch.finfo(z.dtype).tiny).pow(1.0 - a), 0.0)
    return total, steep.sum(-1, keepdim=True) / total


def _log_largest_weight(z: Float[Tensor, "*batch rows"], a: float) -> Float[Tensor, "*batch 1"]:
    """log q, between -log rows (all alike) and 0 (one row has all)."""
    point = torch.zeros_like(z[..., :1])
    low, high = point - math.log(z.shape[-1]), point
    before = torch.full_like(point, torch.inf)
    for _ in range(_ROOT_STEPS_MAX):
        total, slope = _total_and_slope(z, point, a)
        excess = point + total.log()
        off = excess.abs()
        low, high = torch.where(excess <= 0, point, low), torch.where(excess >= 0, point, high)
        newton, middle = point - excess / slope, (low + high) / 2.0
        if not ((off > _ROOT_ERROR) & (low < middle) & (middle < high)).any():
            break
        useful = (newton > low) & (newton < high) & (off <= before / 2.0)
        point = torch.where(off <= _ROOT_ERROR, point, torch.where(useful, newton, middle))
        before = off
    return point


def _polynomial(z: Float[Tensor, "*batch rows"], degree: int) -> Float[Tensor, "*batch rows"]:
    """max(z, 0)^(n-1) over its sum, by logarithms, so that no power overflows; 0 where no z is positive."""
    positive = z > 0
    powers = (degree - 1) * torch.where(positive, z, 1.0).log()
    weights = torch.softmax(powers.masked_fill(~positive & positive.any(-1, keepdim=True), -torch.inf), dim=-1)
    return torch.where(positive, weights, 0.0)


def _k_subsets(z: Float[Tensor, "*batch rows"], k: int) -> Float[Tensor, "*batch rows"]:
    """clip(z - τ, 0, 1) / k with Σ clip(z - τ, 0, 1) = k; a cue with fewer rows than k weighs all of them alike.

    With the k-th largest logit shifted to 0, τ lies in [-1, 0]: at 0 fewer than k rows lie above it, at -1 k have
    clip 1. So what lies outside [-1, 1] may be drawn in.
    """
    wide = z.double()
    size = (z > -torch.inf).sum(-1, keepdim=True).clamp_max(k)
    kth = wide.topk(min(k, z.shape[-1]), dim=-1).values[..., -1:]
    wide = (wide - kth.clamp_min(torch.finfo(z.dtype).min)).clamp(-1.0, 1.0)
    with torch.no_grad():
        low = torch.full_like(kth, -1.0)
        high = torch.zeros_like(low)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            reached = (wide - middle).clamp(0.0, 1.0).sum(-1, keepdim=True) >= size
            low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
        whole = wide >= low + 1.0
        between = (wide > low) & ~whole
    # With the rows between known the sum is linear in τ, which is then exact and carries the gradient.
    count = between.sum(-1, keepdim=True)
    over = torch.where(between, wide, 0.0).sum(-1, keepdim=True) + whole.sum(-1, keepdim=True) - size
    threshold = torch.where(count > 0, over / count.clamp_min(1), low)
    weights = (wide - threshold).clamp(0.0, 1.0)
    return (weights / size.clamp_min(1)).to(z.dtype)
