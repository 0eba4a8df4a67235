"""What a check of a data folder finds, as data: of which kind, how many, the first names, and what to do.

Rules:
- A finding has one of four states. `note`: nothing is wrong. `repaired`, `repairable`: it was mended, or would be by
  `--repair` or the command that `remedy` names. `lost`: what it held is nowhere; only its owner can give it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

State = Literal["note", "repaired", "repairable", "lost"]

NAMED_MAX = 20  # of each finding; the count says how many there are

WHAT: Mapping[str, str] = {
    "database_damaged": "damage of the database itself",
    "index_damaged": "indexes of the database that do not fit its tables",
    "orphan_rows": "rows that belong to nothing",
    "pattern_damaged": "damaged patterns",
    "pattern_missing": "memories without a pattern that could be made",
    "payload_damaged": "payloads that cannot be read",
    "kernel_damaged": "damaged kernels",
    "bank_differs": "banks that do not hold what the database holds",
    "original_damaged": "damaged originals",
    "original_missing": "missing originals",
    "original_unnamed": "originals that nothing names",
    "snapshot_damaged": "damaged snapshots",
    "snapshot_unreadable": "snapshots that this version does not read",
    "database_compacted": "database written anew",
    "temporary_stale": "files left half written",
}


@dataclass(frozen=True)
class Named:
    name: str
    detail: str


@dataclass
class Found:
    """Findings of one kind, state and remedy: `count` of them, of which the `first` are named."""

    kind: str
    state: State
    what: str
    remedy: str
    count: int = 0
    first: list[Named] = field(default_factory=list)


@dataclass
class Report:
    """`checked`: how many of each thing were looked at. `found` is in the order in which it was met."""

    checked: dict[str, int] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)

    def add(self, kind: str, state: State, name: str, detail: str = "", remedy: str = "") -> None:
        for each in self.found:
            if (each.kind, each.state, each.remedy) == (kind, state, remedy):
                break
        else:
            each = Found(kind, state, WHAT[kind], remedy)
            self.found.append(each)
        each.count += 1
        if len(each.first) < NAMED_MAX:
            each.first.append(Named(name, detail))

    def count(self, what: str, number: int = 1) -> None:
        self.checked[what] = self.checked.get(what, 0) + number

    @property
    def exit_code(self) -> int:
        """0: nothing is wrong; 1: what was, is repaired or can be; 2: something cannot be repaired."""
        states = {each.state for each in self.found}
        return 2 if "lost" in states else 1 if states & {"repaired", "repairable"} else 0


def values_fault(values: Any, count: int, what: str = "values") -> str | None:
    """Why stored bytes are not so many finite float32; None where they are."""
    if not isinstance(values, bytes):
        return "it is not bytes"
    if len(values) != 4 * count:
        return f"it has {len(values):,} bytes, and {count:,} {what} take {4 * count:,}"
    if not np.isfinite(np.frombuffer(values, dtype="<f4")).all():
        return "it holds a NaN or an infinity"
    return None


def pattern_fault(dtype: Any, dimension: Any, vector: Any, wanted: int | None) -> str | None:
    """Why a pattern cannot be used in a space of `wanted` dimensions (None: the collection has no such space)."""
    if wanted is None:
        return "the collection has no such space"
    if dtype != "f4":
        return f"its values are {dtype!r}, not f4"
    if dimension != wanted:
        return f"it has {dimension} dimensions, and its space {wanted:,}"
    if (fault := values_fault(vector, wanted)) is not None:
        return fault
    return None if any(vector) else "it is zero, as if the memory lacked the space"
