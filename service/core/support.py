"""Supports: which rows take part in a recall.

`dense` is every row. Top-K keeps the K best-scored rows and gives the others logit -∞ (Hu et al., "Nonparametric
Modern Hopfield Models", 2024, section 3.9; there ties at the K-th score are all kept, here exactly K are).
"""

from __future__ import annotations

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
    if k < 1:
        raise InvalidRequest(f"a support holds at least one row, not {k}")
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    values, rows = scores.topk(min(k, scores.shape[-1]), dim=-1)
    rows = rows.sort(dim=-1).values  # topk leaves ties in any order: back to row order, then a stable sort by score
    values, order = scores.gather(-1, rows).sort(dim=-1, descending=True, stable=True)
    rows = rows.gather(-1, order)
    return values, rows if valid is None else rows.masked_fill(values == -torch.inf, -1)
