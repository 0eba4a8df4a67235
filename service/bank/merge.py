"""Merging: the alive rows of several parts as one new segment, with all that is known of each.

Rules:
- Parts are only read, so it needs no lock, and writes go on meanwhile: who merges looks up afterwards what died.
- Rows keep their order. What was computed of a row (its norms, 1/‖Wû‖) is carried over, not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from service.bank.keys import Projection, Scales
from service.bank.layout import Prepared
from service.bank.segment import Part, Segment
from service.core.similarity import Kernel


def merge(
    parts: Sequence[Part], graph_kernels: Mapping[str, tuple[Kernel, Projection]] | None
) -> tuple[Segment, list[Int[Tensor, " count"]]]:
    """One sealed segment of the alive rows of `parts`, and for each part where its rows went (-1: dead).

    With graphs unless `graph_kernels` is None: of the spaces it names under these kernels. It takes as long as its
    graphs take to build.
    """
    layout, device = parts[0].segment.layout, parts[0].segment.device
    kept = [part.alive_rows() for part in parts]
    merged = Segment(layout, device, capacity=max(1, sum(map(len, kept))))
    moved = []
    for part, rows in zip(parts, kept, strict=True):
        segment = part.segment
        target = torch.full((part.count,), -1, device=device)
        target[rows] = torch.arange(merged.count, merged.count + len(rows), device=device)
        moved.append(target)
        chosen: slice | Tensor = slice(part.count) if part.dead is None else rows
        numbers = rows.tolist()
        merged.append(
            Prepared(
                [segment.ids[row] for row in numbers],
                {name: block[chosen] for name, block in segment.vectors.items()},
                {name: block[chosen] for name, block in segment.norms.items()},
                [segment.payloads[row] for row in numbers],
                None if segment.expires is None else segment.expires[: part.count][chosen],
            )
        )
    if graph_kernels is not None:
        merged.build_graphs(
            {
                name: (kernel, projection, merged_scales([part.scales[name, kernel] for part in parts], moved, device))
                for name, (kernel, projection) in graph_kernels.items()
            }
        )
    return merged, moved


def merged_scales(scales: Sequence[Scales], moved: Sequence[Int[Tensor, " count"]], device: torch.device) -> Scales:
    """The scales of a merged segment's rows, from those of the parts that it was made of."""
    alive = [each.inverse[: len(target)][target >= 0] for each, target in zip(scales, moved, strict=True)]
    merged = Scales(torch.zeros(0, device=device))
    return merged.appended(torch.cat(alive), capacity=0)
