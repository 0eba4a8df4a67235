"""The energy that a step of recall never raises.

    E(x) = ½ K(x, x) - Ψ*(β, K(Ξ, x)),   Ψ*(β, s) = (1/β) [⟨p, βs⟩ - Ω(p)],   p = sep(βs)

(Ramsauer et al., "Hopfield Networks is All You Need", 2021, eq. 2, for dot and softmax; Wu et al., "U-Hop", 2024,
section 2.3, for the other separations: there the 1/β is missing. k-subsets: p = ∇_z max_p [⟨p, z⟩ - Ω(p)] is all that
the proof asks for.) Two separations have an energy of another form:

    lsr           E(x) = -(1/β) Σ_μ max(1 - β/2 ‖x - ξ_μ‖², 0)
    polynomial    E(x) = -‖max(K(Ξ, x), 0)‖_n / √K(x, x)

lsr: the kernel is convex in the squared distance, so a step towards the mean of the rows within reach lowers E. (Hoover
et al., "Dense Associative Memory with Epanechnikov Energy", 2025, take -(1/β) log of the sum, which orders states
alike.) polynomial: F(x) = Σ max(K(ξ_μ, x), 0)^n (Krotov, Hopfield, "Dense Associative Memory", 2016) is convex with
∇F(x) a positive multiple of x' in the inner product K. So F(y) ≥ F(x) + ⟨∇F(x), y - x⟩ ≥ F(x) for every y on the way
from x to x' once x and y are scaled to the same norm, and for no other y; E is that F of the direction, and steps that
never scale the state back have the directions of those that do.

Rules:
- The polynomial's energy may rise under clamped blocks, which bend the direction; the others' does not.
- An abstention has energy 0.
- E is taken over the rows that the step itself uses; energies over different rows, or over different blocks, are not
  comparable.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from service.core.names import Polynomial, Regularised, Separation
from service.core.separation import regulariser
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
    """E(x) of each state, from its scores K(Ξ, x) and weights p = sep(β K(Ξ, x)), at least one of which is positive
    unless the separation abstains.

    `observed`: the blocks that the scores are over, if not all.
    """
    if separation == "lsr":
        scale = beta.unsqueeze(-1) if isinstance(beta, Tensor) else beta
        reached = torch.where(weights > 0, 1.0 + scores_of_state * scale / 2.0, 0.0)
        return -reached.clamp_min(0.0).sum(-1) / beta
    if isinstance(separation, Polynomial):
        # In float64, where the norms of states as small as 1e-30 do not vanish; powers are of shares of the largest.
        size = self_similarity(blocks, state.double(), observed).sqrt()
        reached = torch.where(weights > 0, scores_of_state, 0.0).double()
        largest = reached.amax(-1)
        shares = reached / largest.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)
        norm = largest * shares.pow(separation.degree).sum(-1).pow(1.0 / separation.degree)
        return -torch.where(largest > 0, norm / size, 0.0).to(scores_of_state.dtype)
    own = self_similarity(blocks, state, observed)
    return 0.5 * own - _conjugate(scores_of_state, weights, beta, separation)


def _conjugate(
    scores: Float[Tensor, "batch rows"],
    weights: Float[Tensor, "batch rows"],
    beta: float | Float[Tensor, " batch"],
    separation: Regularised,
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
