"""What the diagnostics of a collection say: the reply of GET /v1/collections/{c}/diagnostics.

Rules:
- A figure that cannot be had is null; where it is not plain why, a note beside it says so.
- A minimum over sampled memories is an upper bound of the minimum over all (`sampled` beside `memories` tells).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.app.fields import Reply
from service.app.gate_schemas import CalibrationState
from service.app.schemas import SeparationSpec, Support

IndexKind = Literal["scan", "graph", "scan and graph"]
RestsOn = Literal["the configured beta", "calibration cues", "stored memories as their own cues", "no margin"]


class Margins(Reply):
    """Δ_μ: a stored memory's similarity to itself less its best rival's, as its own cue; a damaged cue has less."""

    minimum: float = Field(description="Δ_min over the sampled memories, against every memory")
    share_95: float = Field(description="the margin that 95% of them have at least")
    median: float
    quantiles: dict[str, float] = Field(description="the margin that this share of them has at most")


class FixedPoints(Reply):
    """At β and the collection's separation and support: softmax within 1% of the largest norm, the others exactly."""

    share: float
    beta: float
    margin_needed: float = Field(description="the margin that is sure to make a memory a fixed point")


class RelativeRank(Reply):
    """rank / min(rows, dimension) of sampled memories; singular values under tolerance · the largest count as zero."""

    relative: float
    rank: int
    rows: int
    tolerance: float


class CapacityEstimate(Reply):
    """How many memories like these keep `margin_needed` in 95% of them: counted up to the memories there are,
    extrapolated by the law at which margins shrink beyond. An estimate for whole cues, not a bound.
    """

    memories: int | None
    at_least: bool
    extrapolated: bool
    growth: float | None = Field(description="a, where margins shrink like N^-a")
    note: str


class NearDuplicatePair(Reply):
    ids: tuple[str, str]
    similarity: float


class NearDuplicates(Reply):
    """Sampled memories whose nearest other is within half a squared distance of .001 of their squared norm (a cosine
    of .999): no usual β tells the two apart.
    """

    memories: int = Field(description="sampled memories that have a near-duplicate")
    pairs: list[NearDuplicatePair] = Field(description="the nearest ones, at most 20")


class Index(Reply):
    """Where a space's rows are searched; a replaced or deleted row counts until its segment is rebuilt."""

    kind: IndexKind
    exact: bool = Field(description="whether a search compares every memory: a scan does, a graph does not")
    scanned: int
    graph: int
    graphs: int


class SpaceReport(Reply):
    """One space, or the whole memory by all its spaces (`index` is null there)."""

    memories: int = Field(description="memories that have the space")
    sampled: int
    margin: Margins | None
    radius: float | None = Field(description="R, half the smallest distance, as the similarity sees it")
    fixed_points: FixedPoints | None
    rank: RelativeRank | None
    capacity: CapacityEstimate | None
    near_duplicates: NearDuplicates
    index: Index | None


class ModalityBeta(Reply):
    """β of one kind of cue, as a recall by the collection's own similarity and without a β of its own has it."""

    modality: str
    beta: float
    rests_on: RestsOn
    margin: float | None = Field(description="the margin that auto β is made for")
    share: float | None = Field(description="share of the calibration's cues with at least that margin")
    first_share: float | None = Field(description="share of the calibration's cues whose own memory came first")
    cues: int


class DiskUse(Reply):
    """What this collection takes by the layout of rows and pages (see sizing), from the memories stored last; and what
    the whole database is measured to take.
    """

    database: int
    originals: int
    whole_database: int


class DeviceUse(Reply):
    """Memory of a device other than the processor's; banks are held by the processor, so it is 0 there."""

    name: str
    bytes: int


class Diagnostics(Reply):
    version: int
    memories: int
    sampled: int = Field(description="memories compared with every other; equal to `memories` where all were")
    kernels: list[str] = Field(
        description="kernels in use: the figures here are by the collection's own similarity, without them"
    )
    separation: SeparationSpec
    support: Support
    betas: list[ModalityBeta]
    calibration: CalibrationState
    drift: float | None = Field(description="memories written or deleted since the calibration, as a share of those")
    whole: SpaceReport | None = Field(description="null in an empty collection")
    spaces: dict[str, SpaceReport]
    bytes: dict[str, int] = Field(description="memory held by the bank, by kind")
    bytes_per_memory: dict[str, float]
    disk: DiskUse
    device: DeviceUse
    seconds: float
