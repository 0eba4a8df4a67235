"""Certificates: what a top-K support can have cost, against all N rows.

They hold for one step from one state, whose rows an exact search chose at that same state over the blocks that the
step scores. An approximate index, or rows chosen at another state, voids them.

Rules:
- `score_error` is how far a computed score may be from the true one; a row outside the support may then score up to
  s_(K) + 2 score_error.
- Scores -∞ pad a short support and count as no row. If the support is all N rows, nothing is outside and nothing is
  lost.
- Weights of 0 are those of float64: a softmax, a polynomial or an α near 1 may give a row outside up to 1e-308.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.core.names import Separation
from service.core.separation import separate


def softmax_bound(
    scores_topk: Float[Tensor, "batch support"],
    rows_total: int,
    beta: float | Float[Tensor, " batch"],
    norm_max: float,
    score_error: float = 0.0,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """What softmax gives to the rows outside, at most: (r, 2 m r), float64.

    r bounds the mass outside:  r = t / (Σ_{i≤K} exp(β s_i) + t),  t = (N - K) exp(β s_(K)).
    2 m r bounds the step:  ‖T_dense(x) - T_K(x)‖ ≤ 2 m r,  m = max ‖ξ_μ‖ over all N rows.
    (A sharper form of the truncation error of Hu et al. 2024, Theorem 4.1.)
    """
    logits, outside, last = _outside(scores_topk, rows_total, beta, score_error)
    mass = torch.sigmoid(outside.log() + last - logits.logsumexp(-1)).masked_fill(outside == 0, 0.0)
    return mass, 2.0 * norm_max * mass


def polynomial_bound(
    scores_topk: Float[Tensor, "batch support"],
    rows_total: int,
    degree: int,
    norm_max: float,
    score_error: float = 0.0,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """What a polynomial separation gives to the rows outside, at most: (r, 2 m r), float64.

    As for softmax, with max(s, 0)^(n-1) for exp(β s): a row outside weighs no more than one at the K-th score, and one
    inside no less than its own score allows. Both scores move by the error, since ratios are not kept by a shift. Where
    a score outside may be positive and all inside may be 0, the step over the support may be an abstention, which stays
    where it is: the bound on the step is ∞.
    """
    _, outside, last = _outside(scores_topk, rows_total, 1.0, score_error / 2.0)
    inside = (degree - 1) * (scores_topk.double() - score_error).clamp_min(0.0).log()
    beyond = outside.log() + (degree - 1) * last.clamp_min(0.0).log()
    nothing = (outside == 0) | (last <= 0)
    mass = torch.sigmoid(beyond - inside.logsumexp(-1)).masked_fill(nothing, 0.0)
    unbounded = ~nothing & (inside == -torch.inf).all(-1)
    return mass, (2.0 * norm_max * mass).masked_fill(unbounded, torch.inf)


def sparse_exact(
    kind: Separation,
    scores_topk: Float[Tensor, "batch support"],
    beta: float | Float[Tensor, " batch"],
    rows_total: int,
    score_error: float = 0.0,
) -> Bool[Tensor, " batch"]:
    """Whether the step over the support is the dense step: a row at the K-th score (raised by the error) would get
    weight 0.

    Then no row outside changes the others' weights, whatever the separation, and being scored no higher none gets any:
    α-entmax, normmax, k-subsets    the threshold that solves for the K rows lies at or over that row's logit, so it
                                    solves for all rows: for α-entmax (α-1) β s_(K) ≤ τ. Under k-subsets k ≤ K follows.
    polynomial                      s_(K) ≤ 0
    lsr                             β s_(K) < -2, out of reach
    softmax                         never, but by underflow: it has `softmax_bound`
    """
    logits, outside, last = _outside(scores_topk, rows_total, beta, score_error)
    challenger = separate(kind, torch.cat([logits, last.unsqueeze(-1)], dim=-1))[:, -1]
    return (challenger == 0) | (outside == 0)


def _outside(
    scores_topk: Float[Tensor, "batch support"],
    rows_total: int,
    beta: float | Float[Tensor, " batch"],
    score_error: float,
) -> tuple[Float[Tensor, "batch support"], Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """βs in float64, the number of rows outside, and the largest βs that one of these can have."""
    scale = beta.double().unsqueeze(-1) if isinstance(beta, Tensor) else beta
    logits = scores_topk.double() * scale
    inside = scores_topk > -torch.inf
    last = (scores_topk.double() + 2.0 * score_error) * scale
    last = last.masked_fill(~inside, torch.inf).amin(-1)
    return logits, rows_total - inside.sum(-1), last
