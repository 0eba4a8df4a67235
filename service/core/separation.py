"""Separations: how scaled scores become association weights, with the regulariser Ω each one is the maximiser of.

    sep(z) = argmax_p ⟨p, z⟩ - Ω(p) over the probability simplex

α-entmax (Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", 2019) is softmax at α = 1, sparsemax
(Martins, Astudillo, "From Softmax to Sparsemax", 2016) at α = 2, and tends to `max` as α grows. α = 2 and 1.5 are
solved exactly by sorting.

Rules:
- z is already multiplied by β. A row that takes no part has logit -∞, never 0, and weight exactly 0.
- A cue with no valid row has no distribution: its weights are all 0.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SparseSeparation = Literal["sparsemax", "entmax15", "max"]
Separation = Literal["softmax"] | SparseSeparation

# Logits are shifted so that the largest is 0. The threshold τ then lies in [-1, 0] (a single winner has weight 1), so
# a row under this floor has weight 0 wherever it lies: lifting it to the floor changes no weight and keeps -∞ and
# large squares out of the running sums.
_FLOOR = -2.0


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
            weights = torch.softmax(z, dim=-1)
        case "sparsemax":
            weights = _sparsemax(z)
        case "entmax15":
            weights = _entmax15(z)
        case "max":
            # argmax gives the first of equal maxima: ties go to the lowest index.
            weights = torch.zeros_like(z).scatter_(-1, z.argmax(-1, keepdim=True), 1.0)
        case _:
            assert_never(kind)
    return weights if valid is None else weights.masked_fill(~valid, 0.0)


def regulariser(kind: Separation, p: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch"]:
    """Ω(p): Σ p log p for softmax, (Σ p^α - 1) / (α(α-1)) for α-entmax, 0 for max."""
    match kind:
        case "softmax":
            entropy: Tensor = torch.special.entr(p)
            return -entropy.sum(-1)
        case "sparsemax":
            return (p.square().sum(-1) - 1.0) / 2.0
        case "entmax15":
            return (p.pow(1.5).sum(-1) - 1.0) / 0.75
        case "max":
            return torch.zeros_like(p[..., 0])
        case _:
            assert_never(kind)


def exact_recall_margin(kind: Separation) -> float | None:
    """The m in: ξ_μ is a fixed point iff β · min_{ν≠μ} [K(ξ_μ, ξ_μ) - K(ξ_ν, ξ_μ)] ≥ m.

    m = 1/(α-1) for α-entmax and its limit 0 for max (up to ties). None for softmax, which has no exact fixed points.
    """
    margins: dict[Separation, float | None] = {"softmax": None, "sparsemax": 1.0, "entmax15": 2.0, "max": 0.0}
    return margins[kind]


def _shifted(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    # Bounded from below, so that a cue with no valid row stays at -∞ and not at -∞ + ∞.
    return z - z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)


def _sparsemax(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    """max(z - τ, 0), τ from the largest k with 1 + k z_(k) > Σ_{i≤k} z_(i) (Martins, Astudillo 2016, Algorithm 1)."""
    z = _shifted(z)
    descending = z.sort(dim=-1, descending=True).values.clamp_min(_FLOOR)
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    total = descending.cumsum(-1)
    size = (1.0 + rank * descending > total).sum(-1, keepdim=True)
    threshold = (total.gather(-1, size - 1) - 1.0) / size
    return (z - threshold).clamp_min(0.0)


def _entmax15(z: Float[Tensor, "*batch rows"]) -> Float[Tensor, "*batch rows"]:
    """max(z/2 - τ, 0)², τ = M_k - √((1 - S_k)/k) from the k largest, M_k their mean, S_k their sum of squares about
    it (Peters et al. 2019, Algorithm 2).
    """
    z = _shifted(z) / 2.0
    descending = z.sort(dim=-1, descending=True).values.clamp_min(_FLOOR)
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = descending.cumsum(-1) / rank
    spread = descending.square().cumsum(-1) - rank * mean.square()
    threshold = mean - ((1.0 - spread) / rank).clamp_min(0.0).sqrt()
    size = (threshold <= descending).sum(-1, keepdim=True)
    return (z - threshold.gather(-1, size - 1)).clamp_min(0.0).square()
