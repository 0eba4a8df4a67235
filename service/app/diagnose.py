"""Diagnose: how well a collection's memories are told apart, and what holds them.

Rules:
- The work is bounded: sampled memories are compared with every one, and the sample shrinks as the collection grows.
- One view answers everything; nothing is written, and the same view gives the same figures.
"""

from __future__ import annotations

import math
import time

import torch
from jaxtyping import Int
from torch import Tensor

from service.app.calibrate import margin_for
from service.app.comparison import own
from service.app.cues import modality_of
from service.app.live import LiveCollection, spaces_of
from service.app.recall import beta_for
from service.app.reports import (
    CapacityEstimate,
    DeviceUse,
    Diagnostics,
    DiskUse,
    FixedPoints,
    Index,
    IndexKind,
    Margins,
    ModalityBeta,
    NearDuplicatePair,
    NearDuplicates,
    RelativeRank,
    RestsOn,
    SpaceReport,
)
from service.app.resources import Resources
from service.app.schemas import separation_of
from service.app.sizing import on_disk
from service.bank import View
from service.core.diagnostics import Gather, Neighbours, capacity, fixed_points, nearest, needed_margin, relative_rank
from service.core.similarity import Blocks, overlaps

SAMPLE_MAX = 4_096  # shares are then known to .008, and scores against a chunk of the bank stay under 64 MB
WORK_MAX = 3 * 10**10  # multiply-adds of all comparisons: half a second on one core
SAMPLE_MIN = 64  # whatever the size: a share of fixed points is worth little from fewer
RANK_ROWS_MAX = 1_024  # its eigenvalues take a tenth of a second
PAIRS_MAX = 20
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
CAPACITY_SHARE = 0.95
SEED = 0xD1A6_0515


@torch.inference_mode()
def diagnose(resources: Resources, live: LiveCollection) -> Diagnostics:
    """Blocking and CPU-bound: call it from a worker thread."""
    started = time.perf_counter()
    view = live.view()
    rows = view.sample(view.count, SEED).sort().values
    passes = 1 if len(live.spaces) == 1 else 2  # each space, then the whole memory
    affordable = WORK_MAX // max(1, view.count * live.layout.dimension * passes)
    sample = view.sample(min(SAMPLE_MAX, max(SAMPLE_MIN, affordable)), SEED).sort().values
    betas = _betas(live, view)
    spaces: dict[str, SpaceReport] = {}
    whole = None
    for b, name in enumerate(live.spaces):
        have = rows[~view.lacking([name], rows)]
        alone = Blocks(live.blocks.widths[b : b + 1], (1.0,), live.similarity, live.blocks.kernels[b : b + 1])
        found = _neighbours(alone, _gather(view, live.blocks.slices[b]), have, sample[torch.isin(sample, have)])
        spaces[name] = _report(live, view, alone, live.blocks.slices[b], have, found, (name,), betas)
        spaces[name].index = _index(view, name)
    if view.count and len(live.spaces) == 1:
        whole = next(iter(spaces.values())).model_copy(update={"index": None})
    elif view.count:
        everything = slice(0, live.layout.dimension)
        found = _neighbours(live.blocks, _gather(view, everything), rows, sample)
        whole = _report(live, view, live.blocks, everything, rows, found, tuple(live.spaces), betas)
    sizes = live.bank.sizes()
    disk = on_disk(resources, live, view.count)
    elsewhere = live.bank.device.type != "cpu"
    return Diagnostics(
        version=view.version, memories=view.count, sampled=len(sample),
        kernels=[kernel.id for kernel in live.learned.kernels.values()], separation=live.config.recall.separation,
        support=live.config.recall.support, betas=list(betas.values()), calibration=live.calibration_state(),
        drift=live.changed_rows / live.calibrated_rows if live.calibrated_rows else None, whole=whole, spaces=spaces,
        bytes=sizes, bytes_per_memory={kind: size / max(1, view.count) for kind, size in sizes.items()},
        disk=DiskUse(**disk, whole_database=resources.repository.size_bytes()),
        device=DeviceUse(name=str(live.bank.device), bytes=sizes.get("patterns", 0) if elsewhere else 0),
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip


def _gather(view: View, part: slice) -> Gather:
    return lambda rows: view.gather(rows)[..., part]


def _neighbours(
    blocks: Blocks, gather: Gather, rows: Int[Tensor, " all"], sample: Int[Tensor, " n"]
) -> Neighbours | None:
    return nearest(blocks, gather, rows, sample) if len(sample) else None


def _report(
    live: LiveCollection, view: View, blocks: Blocks, part: slice, have: Tensor, found: Neighbours | None,
    spaces: tuple[str, ...], betas: dict[str, ModalityBeta],
) -> SpaceReport:  # fmt: skip
    if found is None:
        nothing = NearDuplicates(memories=0, pairs=[])
        return SpaceReport(
            memories=0, sampled=0, margin=None, radius=None, fixed_points=None, rank=None, capacity=None,
            near_duplicates=nothing, index=None,
        )  # fmt: skip
    gather = _gather(view, part)
    separation, support = separation_of(live.config.recall.separation), _support(live, view)
    beta = (betas.get(modality_of(spaces, False)) or _beta(live, view, modality_of(spaces, False), spaces)).beta
    unit = blocks.similarity == "cosine" and not any(blocks.kernels)
    fixed = fixed_points(
        blocks, gather, found, beta=beta, separation=separation, support=support,
        norm_max=math.sqrt(len(blocks.widths)) if unit else view.norm_max,
    )  # fmt: skip
    needed = needed_margin(separation, beta, min(support, found.total))
    margin = None
    if found.total > 1:
        at = found.margins.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        quantiles = {f"{share:g}": value for share, value in zip(QUANTILES, at, strict=True)}
        margin = Margins(
            minimum=float(found.margins.min()), share_95=quantiles["0.05"], median=quantiles["0.5"], quantiles=quantiles
        )
    drawn = have[torch.randperm(len(have), generator=torch.Generator().manual_seed(SEED))[:RANK_ROWS_MAX]]
    rank = relative_rank(gather(drawn[None])[0])
    held = capacity(found, needed, CAPACITY_SHARE)
    return SpaceReport(
        memories=found.total, sampled=len(found.rows), margin=margin,
        radius=found.radius if math.isfinite(found.radius) else None,
        fixed_points=FixedPoints(share=float(fixed.double().mean()), beta=beta, margin_needed=needed),
        rank=RelativeRank(relative=rank.relative, rank=rank.rank, rows=len(drawn), tolerance=rank.tolerance),
        capacity=CapacityEstimate(
            memories=held.memories, at_least=held.at_least, extrapolated=held.extrapolated, growth=held.growth,
            note=held.note,
        ),
        near_duplicates=_near_duplicates(view, blocks, gather, found), index=None,
    )  # fmt: skip


def _near_duplicates(view: View, blocks: Blocks, gather: Gather, found: Neighbours) -> NearDuplicates:
    """Each memory with its nearest other, once a pair, nearest first."""
    close = torch.nonzero(found.near_duplicate).flatten()
    nearest_first = close[found.distance[close].argsort(stable=True)].tolist()
    pairs = list(dict.fromkeys(tuple(sorted((int(found.rows[i]), int(found.nearest[i])))) for i in nearest_first))
    if not pairs:
        return NearDuplicates(memories=0, pairs=[])
    rows = torch.tensor(pairs[:PAIRS_MAX], device=found.rows.device)
    similarities = overlaps(blocks, gather(rows[:, 1:]), gather(rows[:, :1])[:, 0])[:, 0].tolist()
    named = [
        NearDuplicatePair(ids=(str(first), str(second)), similarity=similarity)
        for (first, second), similarity in zip(view.ids(rows), similarities, strict=True)
    ]
    return NearDuplicates(memories=len(close), pairs=named)


def _support(live: LiveCollection, view: View) -> int:
    support = live.config.recall.support
    return max(1, view.count) if support == "dense" else support


def _betas(live: LiveCollection, view: View) -> dict[str, ModalityBeta]:
    """β of every modality that was calibrated, else of cues that fill every space."""
    if not view.count:
        return {}
    known = {name: spaces_of(name) for name in live.records}
    if not known:
        known = {modality_of(tuple(live.spaces), False): tuple(live.spaces)}
    return {name: _beta(live, view, name, spaces) for name, spaces in known.items()}


def _beta(live: LiveCollection, view: View, modality: str, spaces: tuple[str, ...]) -> ModalityBeta:
    default, record = live.config.recall, live.records.get(modality)
    margin = margin_for(live, view, own(live), record, spaces)
    rests_on: RestsOn = "no margin" if margin is None else "stored memories as their own cues"
    if record is not None and record.margin is not None:
        rests_on = "calibration cues"
    if default.beta != "auto":
        beta, rests_on = default.beta, "the configured beta"
    else:
        beta = beta_for(margin, separation_of(default.separation), view.norm_max, _support(live, view))
    return ModalityBeta(
        modality=modality, beta=beta, rests_on=rests_on, margin=margin,
        share=None if record is None else record.share,
        first_share=None if record is None else record.first_share, cues=0 if record is None else record.cues,
    )  # fmt: skip


def _index(view: View, space: str) -> Index:
    graphs = [part.segment.graphs[space].count for part in view.parts if space in part.segment.graphs]
    scanned = sum(part.count for part in view.parts if space not in part.segment.graphs)
    kind: IndexKind = "scan" if not graphs else "scan and graph" if scanned else "graph"
    return Index(kind=kind, exact=not graphs, scanned=scanned, graph=sum(graphs), graphs=len(graphs))
