"""Supports: which rows take part in a recall (Hu et al., "Nonparametric Modern Hopfield Models", 2024, section 3.2,
eq. 3.9).

    dense          every row
    top-K          the K best-scored rows                                    (eq. 3.11)
    random rows    as many drawn at random, whatever their scores            (the random mask, O(kL) for L cues)
    window         the rows around the cue's place in a sequence of cues     (the sliding window, O(L√L))

Rules:
- A support is gathered, `stored[rows]`, and `retrieve` iterates over it: a row outside has no logit at all, which is
  -∞ and not the 0 of the paper's code.
- A random support is drawn once for a recall and kept: drawn anew at each step the energy may rise.
- Where the paper keeps all ties at the K-th score, exactly K are kept here.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.errors import InvalidRequest


def top_k(
    scores: Float[Tensor, "batch rows"], k: int, valid: Bool[Tensor, "batch rows"] | None = None
) -> tuple[Float[Tensor, "batch kept"], Int[Tensor, "batch kept"]]:
    """The best min(k, rows) scores of each cue, best first, and their rows; equal scores come lowest row first.

    Where fewer rows are valid the rest is padded: score -∞, row -1. Which of several rows tied at the K-th score are
    kept is not defined. Raises InvalidRequest for k < 1.
    """
    _check_size(k)
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    values, rows = scores.topk(min(k, scores.shape[-1]), dim=-1)
    rows = rows.sort(dim=-1).values  # topk leaves ties in any order: back to row order, then a stable sort by score
    values, order = scores.gather(-1, rows).sort(dim=-1, descending=True, stable=True)
    rows = rows.gather(-1, order)
    return values, rows if valid is None else rows.masked_fill(values == -torch.inf, -1)


def random_rows(rows_total: int, k: int, batch: int, generator: torch.Generator) -> Int[Tensor, "batch kept"]:
    """min(k, rows_total) rows for each cue, ascending, every set of so many equally likely. Raises InvalidRequest for
    k < 1.
    """
    _check_size(k)
    lots = torch.rand(batch, rows_total, generator=generator, dtype=torch.float64, device=generator.device)
    return lots.topk(min(k, rows_total), dim=-1).indices.sort(dim=-1).values


def window(positions: Int[Tensor, " batch"], rows_total: int, width: int | None = None) -> Int[Tensor, "batch kept"]:
    """The min(width, rows_total) consecutive rows around each position, √rows_total of them (rounded up) by default.

    positions: the row at the middle (just behind it for an even width); near an end the window is moved inside, so that
    every cue has as many rows. Cue t of L over N rows lies at t·N/L. Raises InvalidRequest for a width < 1 or a
    position that is no row.
    """
    width = math.isqrt(max(rows_total - 1, 0)) + 1 if width is None else width
    _check_size(width)
    if positions.numel() and not ((positions >= 0) & (positions < rows_total)).all():
        raise InvalidRequest(f"positions are rows from 0 to {rows_total - 1}")
    width = min(width, rows_total)
    first = (positions - width // 2).clamp(0, rows_total - width)
    return first.unsqueeze(-1) + torch.arange(width, device=positions.device)


def _check_size(k: int) -> None:
    if k < 1:
        raise InvalidRequest(f"a support holds at least one row, not {k}")
