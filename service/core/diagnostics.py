"""What a memory can recall, measured on the patterns that it holds.

Strategy: sampled patterns are compared with every stored one, chunk by chunk, and only the best few scores of each are
kept. All figures follow from these: margins, fixed points, the radius R, near-duplicates, and how many more patterns
like these would still be told apart.

Rules:
- A pattern's margin is Δ_μ = K(ξ_μ, ξ_μ) - max_{ν≠μ} K(ξ_ν, ξ_μ): what it has as its own cue. A damaged cue has less.
- Distances are those of the similarity: ‖ξ - ν‖² = K(ξ, ξ) + K(ν, ν) - 2 K(ξ, ν), and plain ones under neg_l2.
- A minimum over a sample is an upper bound of the minimum over all patterns.
- States are compared as the dynamics compares them (`overlaps`), so that a fixed point here is one there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.core.certificate import softmax_bound
from service.core.names import KSubsets, Separation, abstains, named
from service.core.separation import exact_recall_margin, separate
from service.core.similarity import Blocks, overlaps, self_similarity
from service.core.update import association
from service.errors import InvalidRequest

Gather = Callable[[Int[Tensor, "n k"]], Float[Tensor, "n k d"]]
"""Stored patterns by their row numbers, as the similarity sees them (unit blocks under cosine)."""

NEIGHBOURS = 32
"""Other patterns kept per sampled one. In a random quarter of the memory the nearest one is among them but for
(3/4)^32 = 1e-4 of the patterns, which is what the capacity's growth law is fitted on."""

CHUNK_VALUES = 2**24
"""Values gathered or compared at once (64 MB of float32)."""

NEAR_DUPLICATE = 1e-3
"""Half the squared distance, relative to the squared norm, up to which two patterns are near-duplicates; under cosine
a similarity of .999 and more. To settle on one of two such over 64 rows softmax needs a β of 9,400, and odds of 3:1
between them need 1,100."""

FIXED_ERROR = 0.01
"""ε / max‖ξ‖ within which a softmax step stays at a pattern that counts as fixed: what auto β promises."""

EXTRAPOLATED_MAX = 100
"""How many times the patterns there are a capacity may be extrapolated to."""

_FRACTIONS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Neighbours:
    """Sampled patterns and what is near them.

    rows: the sampled rows. own: K(ξ_μ, ξ_μ). square: ‖ξ_μ‖².
    scores: K(ξ_ν, ξ_μ) of the best other rows, falling; others: these rows. -∞ and -1 where there are fewer.
    nearest: the row at the smallest distance (not under dot the one of the largest score); distance: to it. -1 and ∞
    where there is no other.
    total: the rows compared with.
    """

    rows: Int[Tensor, " n"]
    own: Float[Tensor, " n"]
    square: Float[Tensor, " n"]
    scores: Float[Tensor, "n k"]
    others: Int[Tensor, "n k"]
    nearest: Int[Tensor, " n"]
    distance: Float[Tensor, " n"]
    total: int

    @property
    def gaps(self) -> Float[Tensor, "n k"]:
        """K(ξ_μ, ξ_μ) less each kept score; the first is the margin Δ_μ, ∞ where there is no other."""
        return self.own.unsqueeze(-1) - self.scores

    @property
    def margins(self) -> Float[Tensor, " n"]:
        return self.gaps[:, 0]

    @property
    def radius(self) -> float:
        """R = ½ min ‖ξ_μ - ξ_ν‖ (Wu et al., "U-Hop", 2024, section 2.1), over the sampled μ and all ν."""
        return float(self.distance.min()) / 2

    @property
    def near_duplicate(self) -> Bool[Tensor, " n"]:
        """Which sampled patterns have another within `NEAR_DUPLICATE`."""
        return self.distance.square() <= 2 * NEAR_DUPLICATE * self.square


def nearest(
    blocks: Blocks, gather: Gather, rows: Int[Tensor, " all"], sample: Int[Tensor, " n"], kept: int = NEIGHBOURS
) -> Neighbours:
    """Compare the patterns at `sample` with those at all of `rows`, of which `sample` is a part.

    n · all · d multiply-adds; memory of one chunk of patterns and of its scores. Both are in rising order. Under neg_l2
    the best are found by the expanded square, which rounds, and then measured by differences.
    Raises InvalidRequest for an empty sample.
    """
    if not len(sample):
        raise InvalidRequest("neighbours need at least one sampled pattern")
    state = gather(sample[None])[0]
    n, width = state.shape
    expanded = blocks if blocks.similarity != "neg_l2" else Blocks(blocks.widths, blocks.weights, "dot")
    square = self_similarity(expanded, state)
    best = state.new_full((n, 0), -torch.inf)
    others = sample.new_zeros(n, 0)
    closest = square.new_full((n,), torch.inf)
    closest_row = torch.full_like(sample, -1)
    step = max(1, CHUNK_VALUES // max(n, width))
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        stored = gather(chunk[None])[0]
        height = _heights(expanded, stored)
        score = overlaps(expanded, stored, state)
        if blocks.similarity == "neg_l2":
            score = score.mul_(2).sub_(height).sub_(square.unsqueeze(-1))
        inside = torch.nonzero((sample >= chunk[0]) & (sample <= chunk[-1])).flatten()
        itself = torch.searchsorted(chunk, sample[inside])
        score[inside, itself] = -torch.inf
        top = score.topk(min(kept, len(chunk)))
        if blocks.similarity == "neg_l2":
            apart, place = -top.values[:, 0], top.indices[:, 0]
        elif bool((height == height[0]).all()):  # as under cosine: the best score is the nearest
            apart, place = square + height[0] - 2 * top.values[:, 0], top.indices[:, 0]
        else:
            apart, place = torch.sub(height, score, alpha=2).min(-1)
            apart = apart + square
        closest_row = torch.where(apart < closest, chunk[place], closest_row)
        closest = torch.minimum(apart, closest)
        best, order = torch.cat([best, top.values], 1).topk(min(kept, best.shape[1] + top.values.shape[1]))
        others = torch.cat([others, chunk[top.indices]], 1).gather(1, order)
    others = others.masked_fill(best == -torch.inf, -1)
    own = square
    if blocks.similarity == "neg_l2":
        own = torch.zeros_like(square)
        best, others = _by_differences(blocks, gather, state, others)
    # Measured again from the difference itself: near-duplicates leave nothing of a difference of squares.
    difference = state.double() - gather(closest_row.clamp_min(0)[:, None])[:, 0].double()
    distance = self_similarity(expanded, difference).clamp_min(0).sqrt().masked_fill(closest_row < 0, torch.inf)
    return Neighbours(sample, own, square, best, others, closest_row, distance, len(rows))


def fixed_points(
    blocks: Blocks,
    gather: Gather,
    found: Neighbours,
    *,
    beta: float,
    separation: Separation,
    support: int,
    norm_max: float,
) -> Bool[Tensor, " n"]:
    """Which sampled patterns one step over their `support` best rows leaves where they are.

    Sparse separations: β Δ_μ ≥ m, exactly (`exact_recall_margin`). softmax: ‖T(ξ_μ) - ξ_μ‖ ≤ `FIXED_ERROR` · norm_max,
    with rows of the support beyond the kept neighbours counted at their bound (`softmax_bound`), so that none is called
    fixed that is not. Raises InvalidRequest for separations that abstain and k-subsets.
    """
    exact = exact_recall_margin(separation)
    if abstains(separation) or isinstance(separation, KSubsets):
        raise InvalidRequest(f"fixed points under {named(separation)} are not told by the margins kept here")
    if exact is not None:
        return (found.margins > 0) & (found.margins * beta >= exact)
    scores = torch.cat([found.own.unsqueeze(-1), found.scores], 1)
    rows = torch.cat([found.rows.unsqueeze(-1), found.others], 1)
    scores, order = scores.topk(min(support, scores.shape[1]))
    rows = rows.gather(1, order)
    weights = separate("softmax", scores * beta)
    missed = softmax_bound(scores, min(support, found.total), beta, norm_max)[1]
    allowed = FIXED_ERROR * norm_max - missed
    # ‖T(ξ_μ) - ξ_μ‖ ≤ 2m (1 - p_μ) settles most without a look at the patterns.
    own = torch.where(rows == found.rows.unsqueeze(-1), weights, 0.0).sum(-1)
    fixed = 2 * norm_max * (1 - own) <= allowed
    unclear = torch.nonzero(~fixed & (allowed >= 0)).flatten()
    step = max(1, CHUNK_VALUES // (rows.shape[1] * blocks.dimension))
    for some in torch.split(unclear, step):
        state = gather(found.rows[some, None])[:, 0]
        reached = association(gather(rows[some].clamp_min(0)), weights[some].to(state.dtype))
        fixed[some] = torch.linalg.vector_norm(reached - state, dim=-1) <= allowed[some]
    return fixed


@dataclass(frozen=True)
class Rank:
    """rank: singular values over `tolerance` times the largest; most: min(rows, d), the largest there could be."""

    rank: int
    most: int
    tolerance: float

    @property
    def relative(self) -> float:
        return self.rank / self.most


def relative_rank(patterns: Float[Tensor, "rows d"]) -> Rank:
    """The numerical rank of patterns over the largest possible (as HEN compares recalled with stored ones; Krotov's
    relative rank).

    The tolerance is max(rows, d) times the rounding of float32, numpy's for the precision that patterns are kept in.
    """
    rows, width = patterns.shape
    wide = patterns.double()
    gram = wide @ wide.T if rows <= width else wide.T @ wide
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    tolerance = max(rows, width) * torch.finfo(torch.float32).eps
    rank = int((singular > tolerance * singular.max()).sum())
    return Rank(rank, min(rows, width), tolerance)


def needed_margin(separation: Separation, beta: float, support: int) -> float:
    """The margin at which a pattern is sure to be a fixed point at β: m/β for the sparse separations (there it is
    necessary too), (1/β) log(2(K-1)/ε) with ε = `FIXED_ERROR` for softmax over K rows (a tighter
    Theorem 4.1 of Hu et al. 2024; sufficient only).
    """
    exact = exact_recall_margin(separation)
    if exact is not None:
        return exact / beta
    return math.log(2 * (support - 1) / FIXED_ERROR) / beta if support > 1 else 0.0


@dataclass(frozen=True)
class Capacity:
    """memories: how many patterns like these keep the margin, or None where it cannot be said. at_least: there may be
    more. extrapolated: whether it is beyond the patterns there are. growth: a, where margins shrink like N^-a. note:
    what it rests on.
    """

    memories: int | None
    at_least: bool
    extrapolated: bool
    growth: float | None
    note: str


def capacity(found: Neighbours, needed: float, share: float) -> Capacity:
    """How many patterns like the stored ones could be held so that a share of them keeps a margin of `needed`.

    Up to the N there are it is counted: in a random part of n patterns, one with c rows nearer than `needed` keeps its
    margin with probability (1 - n/N)^c. Beyond, it is extrapolated: the (1 - share) quantile of the margins in a random
    quarter, half and all of the patterns is fitted by N^-a, as when patterns fill a manifold evenly (a = 2 / its
    dimension for cosine). An estimate, not a bound; the papers' exponential bound (Ramsauer et al. 2021, Theorem 3; Hu
    et al. 2024, Lemma 4.2) is for patterns uniform on a sphere of dimension d, which encoders do not give.
    """
    if found.total < 2:
        return Capacity(None, False, False, None, "one memory alone has no margin")
    if needed <= 0:
        return Capacity(None, True, False, None, "no margin is needed: the best row is taken at any beta")
    gaps = found.gaps.double()
    nearer = (gaps < needed).sum(-1).double()
    total = found.total
    if float((nearer == 0).double().mean()) >= share:
        return _extrapolated(gaps, total, needed, share)
    # (1 - f)^c falls in f: the largest part of the memory that keeps the share, by bisection.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        kept = float(((1.0 - middle) ** nearer).mean())
        low, high = (middle, high) if kept >= share else (low, middle)
    return Capacity(max(1, 1 + int(low * (total - 1))), False, False, None, "counted in random parts of the memories")


def _extrapolated(gaps: Float[Tensor, "n k"], total: int, needed: float, share: float) -> Capacity:
    quantiles = [_margin_in(gaps, part, share) for part in _FRACTIONS]
    most = EXTRAPOLATED_MAX * total
    beyond = f"margins shrink so little that over {EXTRAPOLATED_MAX} times as many keep theirs"
    if not all(0 < q < math.inf for q in quantiles):
        return Capacity(total, True, False, None, "too few patterns to see how margins shrink")
    points = torch.tensor([[math.log(part), math.log(q)] for part, q in zip(_FRACTIONS, quantiles, strict=True)])
    centred = points - points.mean(0)
    growth = -float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum())
    if growth <= 0 or math.log(quantiles[-1] / needed) / growth >= math.log(EXTRAPOLATED_MAX):
        return Capacity(most, True, True, growth, beyond)
    memories = int(total * (quantiles[-1] / needed) ** (1 / growth))
    return Capacity(memories, False, True, growth, "extrapolated from how margins shrink as patterns are added")


def _margin_in(gaps: Float[Tensor, "n k"], part: float, share: float) -> float:
    """The margin that a share of the patterns has at least, in a random part of the memory: the j-th neighbour is the
    nearest one there with probability part · (1 - part)^(j-1).
    """
    n, kept = gaps.shape
    odds = part * (1.0 - part) ** torch.arange(kept, dtype=torch.float64, device=gaps.device)
    odds[-1] += 1.0 - odds.sum()
    values, order = gaps.flatten().sort()
    under = odds.expand(n, kept).flatten()[order].cumsum(0) / n
    place = int((under <= 1.0 - share).sum())
    return float(values[min(place, len(values) - 1)])


def _heights(blocks: Blocks, stored: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
    """K(ξ, ξ) of stored rows. Under cosine a block is unit or zero, whatever its kernel, so nothing is multiplied."""
    if blocks.similarity != "cosine":
        return self_similarity(blocks, stored)
    present = torch.stack([stored[:, part].any(-1) for part in blocks.slices], dim=-1)
    shares = stored.new_tensor(blocks.weights) / sum(blocks.weights)
    return present.to(stored.dtype) @ shares


def _by_differences(
    blocks: Blocks, gather: Gather, state: Float[Tensor, "n d"], others: Int[Tensor, "n k"]
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The scores of given rows measured again, falling."""
    measured = torch.empty(others.shape, dtype=state.dtype, device=state.device)
    step = max(1, CHUNK_VALUES // max(1, others.shape[1] * blocks.dimension))
    for start in range(0, len(others), step):
        some = slice(start, start + step)
        measured[some] = overlaps(blocks, gather(others[some].clamp_min(0)), state[some])
    scores, order = measured.masked_fill(others < 0, -torch.inf).sort(dim=1, descending=True)
    return scores, others.gather(1, order)
