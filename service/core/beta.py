"""The inverse temperature estimated from sampled cues (`beta="auto"`).

A cue's margin Δ is its own memory's score less the best other score in the support. For a share q of cues Δ is at
least Δ_q, the (1-q) quantile, and for these the first step reaches their memory when
    softmax              β = log(2m(K-1)/ε) / Δ_q     then ‖T(x) - ξ_μ‖ ≤ ε
    α-entmax, normmax    β = m_sep / Δ_q              then T(x) = ξ_μ exactly (m_sep: `exact_recall_margin`)
with m = max‖ξ_μ‖, K the support, ε = error · m. (The first is a tighter Theorem 4.1 of Hu et al., "Nonparametric Modern
Hopfield Models", 2024.) At the distance βΔ from the first row the weight under α-entmax is at most
(1 - (α-1)βΔ)_+^(1/(α-1)) of the first's, which is at most exp(-βΔ): so softmax's β serves every α within ε, and where α
is so near 1 that exact recall asks for more, it is taken.

An Epanechnikov recall (`lsr`) asks for two distances instead: its β leaves a cue its own memory within reach,
β/2 d² ≤ 1, and every other beyond.

Rules:
- A β too low averages memories and loses what the search had found; one too high costs nothing until rounding
  decides. So when no β serves the share asked for, β serves the largest share that one can, up to a cap set by
  rounding, and the estimate says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.core.names import KSubsets, Polynomial, Separation, named
from service.core.retrieve import BETA_MAX, BETA_MIN
from service.core.separation import exact_recall_margin
from service.errors import InvalidRequest

# Scores sum about a thousand float32 products, so a score of unit patterns is off by up to about 1e-6. At this β that
# moves a log-odds by 0.1; beyond it rounding would choose the memory.
UNIT_BETA_MAX = 1e5


@dataclass(frozen=True)
class BetaEstimate:
    """beta: the estimate. margin: the Δ it is made for. share: the cues with at least that margin. attainable:
    whether that is the share asked for, at a β that rounding allows. note: why not, or why no margin was needed; else
    empty.
    """

    beta: float
    margin: float
    share: float
    attainable: bool
    note: str


def margins(scores: Float[Tensor, "n rows"], own: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Each cue's own score less the best other one; +∞ where there is no other. `own` is the column of the cue's
    memory.
    """
    column = own.unsqueeze(-1)
    others = scores.scatter(-1, column, -torch.inf)
    return scores.gather(-1, column).squeeze(-1) - others.amax(-1)


def auto_beta(
    margins: Float[Tensor, " n"],
    *,
    separation: Separation,
    norm_max: float,
    support: int,
    error: float = 0.01,
    share: float = 0.95,
) -> BetaEstimate:
    """β from the margins of n sampled cues of a stated corruption, over a support of `support` rows.

    error: ε as a part of norm_max = max‖ξ_μ‖; share: the cues to serve.
    Raises InvalidRequest for no margins or a NaN among them, error, share or norm_max out of range, and a separation
    whose recall no margin decides: lsr (see `lsr_beta`) and subsets of several rows.
    """
    if not 0 < error < 1 or not 0 < share <= 1 or not 0 < norm_max < math.inf:
        raise InvalidRequest(
            "error lies between 0 and 1, share over 0 and at most 1, norm_max over 0; "
            f"they are {error}, {share}, {norm_max}"
        )
    if separation == "max":
        return BetaEstimate(1.0, math.nan, 1.0, True, "max takes the best row at any beta")
    if isinstance(separation, Polynomial):
        return BetaEstimate(1.0, math.nan, 1.0, True, "beta cancels out of a polynomial's weights")
    if separation == "lsr" or (isinstance(separation, KSubsets) and separation.k > 1):
        raise InvalidRequest(f"no margin gives {named(separation)} a beta at which a cue reaches its own memory alone")
    if support <= 1:
        return BetaEstimate(1.0, math.inf, 1.0, True, "a support of one row needs no beta")
    n = margins.shape[0]
    if n == 0 or margins.isnan().any():
        raise InvalidRequest(f"beta is estimated from at least one margin and no NaN; there are {n} margins")

    descending = margins.double().sort(descending=True).values
    wanted = math.ceil(Fraction(repr(share)) * n)
    exact = exact_recall_margin(separation)
    near = math.log(2 * (support - 1) / error)
    log_odds = near if exact is None else min(exact, near)
    cap = min(UNIT_BETA_MAX / norm_max**2, BETA_MAX)
    # A margin that asks for more than the cap is rounding's, as between duplicates: no beta settles such a cue.
    served = min(wanted, int((descending * cap >= log_odds).sum()))
    if served == 0:
        note = "no sampled cue has its own memory first by more than rounding: no beta recalls it"
        return BetaEstimate(cap, float(descending[wanted - 1]), 0.0, False, note)
    margin = float(descending[served - 1])
    beta = log_odds / margin if margin < math.inf else 1.0
    note = ""
    if served < wanted:
        note = (
            f"beta serves {served / n:.3g} of the cues, {share:g} were asked for: the others' own memory is not first"
        )
    return BetaEstimate(min(beta, cap), margin, served / n, not note, note)


def lsr_beta(own: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> BetaEstimate:
    """The β at which the most of n sampled cues have their own memory within reach and no other (`lsr`).

    own, other: ‖x - ξ‖² from each cue to its own memory and to the nearest other one (∞: there is none). A cue is
    served by 2/other < β ≤ 2/own. `margin` is the squared reach 2/β: midway between the farthest own memory that is
    served and the nearest other one to be kept out, so that rounding moves neither across.
    Raises InvalidRequest for no distances, a NaN or a negative one.
    """
    if own.shape[0] == 0 or not (own >= 0).all() or not (other >= 0).all():
        raise InvalidRequest("beta is estimated from at least one pair of squared distances, none of them negative")
    own, other = own.double(), other.double()
    # With a growing reach a cue is won at `own`, and lost again, or never won, once `other` is within it too.
    reaches = own.sort().values
    won = torch.searchsorted(reaches, reaches, right=True)
    lost = torch.searchsorted(torch.maximum(own, other).sort().values, reaches, right=True)
    served, best = (won - lost).max(0)
    farthest = reaches[best]
    kept_out = other[(own <= farthest) & (other > farthest)]
    nearest = float(kept_out.amin()) if len(kept_out) else math.inf
    reach = (float(farthest) + nearest) / 2.0 if nearest < math.inf else 2.0 * float(farthest)
    beta = min(max(2.0 / reach, BETA_MIN), BETA_MAX) if reach > 0 else BETA_MAX
    share = int(served) / own.shape[0]
    note = "" if share == 1.0 else f"beta serves {share:.3g} of the cues: no one reach has every own memory alone in it"
    return BetaEstimate(beta, 2.0 / beta, share, not note, note)
