"""The inverse temperature estimated from sampled cues (`beta="auto"`).

A cue's margin Δ is its own memory's score less the best other score in the support. For a share q of cues Δ is at
least Δ_q, the (1-q) quantile, and for these the first step reaches their memory when
    softmax     β = log(2m(K-1)/ε) / Δ_q     (then ‖T(x) - ξ_μ‖ ≤ ε; a tighter Theorem 4.1 of Hu et al.,
    "Nonparametric Modern Hopfield Models", 2024) α-entmax    β = 1/(α-1) / Δ_q            (then T(x) = ξ_μ exactly)
with m = max‖ξ_μ‖, K the support, ε = error · m.

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

from service.core.retrieve import BETA_MAX
from service.core.separation import Separation, exact_recall_margin
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
    Raises InvalidRequest for no margins or a NaN among them, or error, share or norm_max out of range.
    """
    if not 0 < error < 1 or not 0 < share <= 1 or not 0 < norm_max < math.inf:
        raise InvalidRequest(
            "error lies between 0 and 1, share over 0 and at most 1, norm_max over 0; "
            f"they are {error}, {share}, {norm_max}"
        )
    if separation == "max":
        return BetaEstimate(1.0, math.nan, 1.0, True, "max takes the best row at any beta")
    if support <= 1:
        return BetaEstimate(1.0, math.inf, 1.0, True, "a support of one row needs no beta")
    n = margins.shape[0]
    if n == 0 or margins.isnan().any():
        raise InvalidRequest(f"beta is estimated from at least one margin and no NaN; there are {n} margins")

    descending = margins.double().sort(descending=True).values
    wanted = math.ceil(Fraction(repr(share)) * n)
    exact = exact_recall_margin(separation)
    log_odds = math.log(2 * (support - 1) / error) if exact is None else exact
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
