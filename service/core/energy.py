"""The energy that a step of recall never raises.

    E(x) = ½ K(x, x) - Ψ*(β, K(Ξ, x)),   Ψ*(β, s) = (1/β) [⟨p, βs⟩ - Ω(p)],   p = sep(βs)

(Ramsauer et al., "Hopfield Networks is All You Need", 2021, eq. 2, for dot and softmax; Wu et al., "U-Hop", 2024,
section 2.3, for the other
separations: there the 1/β is missing.)

Rules:
- E is taken over the rows that the step itself uses; energies over different rows, or over different blocks, are not
  comparable.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from service.core.separation import Separation, regulariser
from service.core.similarity import Blocks, self_similarity


def energy(
    blocks: Blocks,
    state: Float[Tensor, "batch d"],
    scores_of_state: Float[Tensor, "batch rows"],
    weights: Float[Tensor, "batch rows"],
    beta: float | Float[Tensor, " batch"],
    separation: Separation,
    observed: Bool[Tensor, "batch spaces"] | None = None,
) -> Float[Tensor, " batch"]:
    """E(x) of each state, from its scores K(Ξ, x) and weights p = sep(β K(Ξ, x)), at least one of which is positive.

    `observed`: the blocks that the scores are over, if not all.
    """
    own = self_similarity(blocks, state, observed)
    return 0.5 * own - _conjugate(scores_of_state, weights, beta, separation)


def _conjugate(
    scores: Float[Tensor, "batch rows"],
    weights: Float[Tensor, "batch rows"],
    beta: float | Float[Tensor, " batch"],
    separation: Separation,
) -> Float[Tensor, " batch"]:
    """Ψ*(β, s)."""
    if separation in ("softmax", "max"):
        # log p_μ = β s_μ - log Σ exp(β s) holds at every row, so the heaviest one (p ≥ 1/rows) gives Ψ* without a
        # second pass over the rows, and Ψ* of max is the limit with log p = 0.
        heaviest, row = weights.max(-1, keepdim=True)
        return scores.gather(-1, row).squeeze(-1) - heaviest.squeeze(-1).log() / beta
    # A row outside the support may have score -∞: it adds 0, not 0 · -∞.
    attained = torch.where(weights > 0, weights * scores, 0.0).sum(-1)
    return attained - regulariser(separation, weights) / beta
