"""Which memories a cue does not tell apart, and how sure a recall is: what `ambiguous` and `candidates` say.

Rules (../shared/math.md, section 3: recall needs unique associations):
- It is decided before any step, by the odds of the scores on the cue's own blocks. Equal keys give the mixture of their
  memories in one step, and then rounding lets one of them win, so settled weights alone say nothing.
- A settled weight that leaves a quarter to others is a doubt of its own.
- A text also fills the spaces of pictures. Where two memories have one caption, and the text names that caption more
  strongly than it tells their pictures apart, the pictures do not decide between them: likeness across sources is the
  weaker evidence, and β, made for cues that name a caption of their own, would call any trace of it certain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.app.cues import CueBlocks
from service.app.live import LiveCollection
from service.bank import View
from service.core.diagnostics import NEAR_DUPLICATE

AMBIGUOUS_LOG_ODDS = math.log(3.0)  # step-0 odds of the first two under 3:1 (design: verdicts)
AMBIGUOUS_WEIGHT = 0.75  # settled weight of the first under this
CANDIDATES_MAX = 16  # ids named: a person looks at no more, and a β near 0 makes candidates of all


def rivals(nearest: Float[Tensor, "batch k"], beta: float) -> Bool[Tensor, "batch k"]:
    """Which rows have odds under 3:1 against the first, by their falling scores before any step; the first is none."""
    close = beta * (nearest[:, :1] - nearest) < AMBIGUOUS_LOG_ODDS
    close[:, :1] = False
    return close


def twins(
    live: LiveCollection, view: View, cues: Sequence[CueBlocks], rows: Int[Tensor, "batch k"]
) -> Bool[Tensor, "batch k"]:
    """Which rows have the key of the first in the spaces that the cue fills as memories do, where the cue crosses into
    others (`CueBlocks.crossed`) and those others decide less than the key says; the first is none.
    """
    found = torch.zeros(rows.shape, dtype=torch.bool)
    if live.similarity != "cosine" or rows.shape[1] < 2:
        return found
    for i, cue in enumerate(cues):
        same = [name for name in cue.vectors if name not in cue.crossed]
        if not cue.crossed or not same or int(rows[i, 1]) < 0:
            continue
        patterns = view.gather(rows[i : i + 1])[0]
        parts = dict(zip(live.spaces, live.blocks.slices, strict=True))
        keys = torch.cat([patterns[:, parts[name]] for name in same], dim=1)
        alike = (keys @ keys[0]) >= (1 - NEAR_DUPLICATE) * keys[0].square().sum()
        alike[0] = False
        if not bool(keys[0].any()) or not bool(alike.any()):
            continue
        own, across = (_score(live, patterns, cue, names, parts) for names in (same, list(cue.crossed)))
        others = own[~alike & (rows[i] >= 0)][1:]
        named = own[0] - others.max() if len(others) else own.new_zeros(())
        exact = own[0] >= (1 - NEAR_DUPLICATE) * sum(live.spaces[name].weight for name in same)
        found[i] = alike & (exact | (named > across[0] - across))
    return found


def _score(
    live: LiveCollection, patterns: Float[Tensor, "k d"], cue: CueBlocks, spaces: Sequence[str], parts: dict[str, slice]
) -> Float[Tensor, " k"]:
    """Σ w cos of some of the cue's spaces, not divided by the weights."""
    total = patterns.new_zeros(len(patterns))
    for name in spaces:
        vector = torch.from_numpy(cue.vectors[name].copy())  # remembered vectors are read-only
        total += live.spaces[name].weight * (patterns[:, parts[name]] @ (vector / vector.norm()))
    return total


def heaviest(weights: Float[Tensor, " k"]) -> Int[Tensor, " n"]:
    """The fewest rows that hold `AMBIGUOUS_WEIGHT` of what is settled, the heaviest first; none of no weight."""
    falling = weights.sort(descending=True, stable=True)
    before = falling.values.cumsum(0) - falling.values
    return falling.indices[(before < AMBIGUOUS_WEIGHT) & (falling.values > 0)]
