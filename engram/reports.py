"""The diagnostics of a collection as the client gives them: frozen dataclasses, as in `replies`.

What each field means is said in the API (`service/app/reports.py`, or /docs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from engram.replies import Parts, Reply


@dataclass(frozen=True)
class Margins(Reply):
    minimum: float
    share_95: float
    median: float
    quantiles: dict[str, float]


@dataclass(frozen=True)
class FixedPoints(Reply):
    share: float
    beta: float
    margin_needed: float


@dataclass(frozen=True)
class RelativeRank(Reply):
    relative: float
    rank: int
    rows: int
    tolerance: float


@dataclass(frozen=True)
class Capacity(Reply):
    memories: int | None
    at_least: bool
    extrapolated: bool
    growth: float | None
    note: str


@dataclass(frozen=True)
class NearDuplicatePair(Reply):
    ids: tuple[str, str]
    similarity: float


@dataclass(frozen=True)
class NearDuplicates(Reply):
    PARTS: ClassVar[Parts] = {"pairs": NearDuplicatePair}

    memories: int
    pairs: tuple[NearDuplicatePair, ...]


@dataclass(frozen=True)
class Index(Reply):
    kind: str
    scanned: int
    graph: int
    graphs: int
    exact: bool


@dataclass(frozen=True)
class SpaceReport(Reply):
    """One space, or the whole memory by all its spaces."""

    PARTS: ClassVar[Parts] = {
        "margin": Margins,
        "fixed_points": FixedPoints,
        "rank": RelativeRank,
        "capacity": Capacity,
        "near_duplicates": NearDuplicates,
        "index": Index,
    }

    memories: int
    sampled: int
    margin: Margins | None
    radius: float | None
    fixed_points: FixedPoints | None
    rank: RelativeRank | None
    capacity: Capacity | None
    near_duplicates: NearDuplicates
    index: Index | None


@dataclass(frozen=True)
class Amount(Reply):
    bytes: int
    bytes_per_memory: float
    parts: dict[str, int]


@dataclass(frozen=True)
class Sizing(Reply):
    """`how`: the arithmetic, line by line."""

    PARTS: ClassVar[Parts] = {"ram": Amount, "disk": Amount, "device": Amount}

    memories: int
    spaces: dict[str, int]
    assumed: dict[str, float]
    ram: Amount
    ram_peak_bytes: int
    disk: Amount
    device: Amount
    index: str
    graph_from: int
    load_s: float
    seal_s: float
    recall_ms: float
    latency: str
    how: tuple[str, ...]


@dataclass(frozen=True)
class ModalityBeta(Reply):
    modality: str
    beta: float
    rests_on: str
    margin: float | None
    share: float | None
    first_share: float | None
    cues: int


@dataclass(frozen=True)
class Diagnostics(Reply):
    PARTS: ClassVar[Parts] = {"betas": ModalityBeta, "whole": SpaceReport}

    version: int
    memories: int
    sampled: int
    kernels: tuple[str, ...]
    separation: str | dict[str, float]
    support: str | int
    betas: tuple[ModalityBeta, ...]
    calibration: str
    drift: float | None
    whole: SpaceReport | None
    spaces: dict[str, SpaceReport]
    bytes: dict[str, int]
    bytes_per_memory: dict[str, float]
    disk: dict[str, int]
    device: dict[str, Any]
    seconds: float

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        spaces = {name: SpaceReport.of(report) for name, report in body.get("spaces", {}).items()}
        return super().of({**body, "spaces": spaces})
