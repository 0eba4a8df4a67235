"""A batch of cues as segments compare them: the metric folded into the cue, once per search.

score = Σ_s w_s K_s / Σ_s w_s over the cue's spaces, K_s being
    ⟨û, x̂⟩                              cosine
    ⟨Wû, Wx̂⟩ / (‖Wû‖‖Wx̂‖)             cosine under a kernel W
and of one space alone
    ⟨ξ, x⟩                               dot
    -‖ξ - x‖²                            neg_l2, and under cosine where raw values are asked for; over the values that
                                         the cue shows (those that are not 0) where that is asked for

Rules:
- A space under a kernel is asked twice over: of rows by WᵀWx̂/‖Wx̂‖, of a graph's keys by Wx̂/‖Wx̂‖.
- A cue without a direction (zero, or in W's null space) scores 0: cos(0, ·) = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from service.bank.keys import Named, Projection
from service.bank.layout import Layout, unit_rows
from service.core.similarity import Kernel
from service.errors import InvalidRequest, NothingObserved, WrongDimension


@dataclass(frozen=True, eq=False)
class Queries:
    """`rows[space]` (batch, d_s): inner products with a row, times the row's factor (`Part.factors`), add up to its
    score; under `distances` −‖ξ − x‖² is made of them.

    `keys[space]` (batch, r) asks a graph over the keys of `kernels[space]`. `raw`: rows are compared with their norms.
    `shown` (batch, d_s): 1 where a value counts, of one space's distances; None: all do.
    """

    rows: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    kernels: Mapping[str, Kernel]
    distances: bool
    raw: bool
    shown: Tensor | None

    @property
    def batch(self) -> int:
        return len(next(iter(self.rows.values())))


def make_queries(
    layout: Layout,
    device: torch.device,
    cue: Mapping[str, Tensor],
    weights: Mapping[str, float],
    kernels: Mapping[str, Kernel],
    registered: Mapping[Named, Projection],
    raw: bool,
    observed: bool,
) -> Queries:
    """`kernels` may name spaces that the cue lacks. Raises UnknownSpace, WrongDimension, NothingObserved,
    InvalidRequest."""
    if not cue:
        raise NothingObserved("A cue needs at least one space.")
    total = sum(weights[name] for name in cue)
    if min(weights[name] for name in cue) <= 0:
        raise InvalidRequest("The weights of a cue's spaces must be positive.")
    if raw and (layout.similarity != "cosine" or len(cue) > 1 or kernels):
        raise InvalidRequest("Raw values are compared in one space, without a kernel, where similarity is cosine.")
    if observed and not raw:
        raise InvalidRequest("What a cue shows is told apart of raw values alone.")
    rows, keys = {}, {}
    for name, block in cue.items():
        dimension = layout.space(name).dimension
        if block.ndim != 2 or block.shape[1] != dimension:
            raise WrongDimension(f"Space {name!r} takes (batch, {dimension}), found {tuple(block.shape)}.")
        query = block.detach().to(device, torch.float32)
        if layout.similarity == "cosine" and not raw:
            query = unit_rows(query)[0]
            if name in kernels:
                projection = registered[name, kernels[name]]
                image = projection.images(query)
                scale = projection.inverse_lengths(image)[:, None]
                image = image * (scale if len(cue) == 1 else scale * (weights[name] / total))
                keys[name], query = image.contiguous(), image @ projection.weight
            elif len(cue) > 1:
                query = query * (weights[name] / total)
        rows[name] = query.contiguous()
    asked = {name: kernels[name] for name in keys}
    shown = (next(iter(rows.values())) != 0).to(torch.float32) if observed else None
    return Queries(rows, keys, asked, distances=raw or layout.similarity == "neg_l2", raw=raw, shown=shown)
