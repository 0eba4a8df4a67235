"""Filters over payloads: what a condition is, and what it means.

A filter is a tree of frozen values, equal where they mean the same, so that it can be a key of a cache. Whoever
evaluates one (the bank on its columns, storage in SQL) gives the same memories.

Rules:
- A path is the keys from the payload's root. An array on the way, or at its end, stands for each of its elements (not
  for those of arrays inside it): a condition holds where it holds for one of these *elements*.
- A memory without the key, or without a payload, meets no condition on it; only what negates one lets it in.
- Numbers are compared by value (1 = 1.0), truth values and numbers never are (true ≠ 1), texts by code point. An
  integer beyond 64 bits, sign included, is the float64 next to it, as databases have it.
- Moments are RFC 3339's, to the microsecond (further digits are cut); a date alone is its midnight, and what has no
  offset is in UTC.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any

INTEGER_MIN, INTEGER_MAX = -(2**63), 2**63 - 1

Path = tuple[str, ...]
Number = int | float


@dataclass(frozen=True)
class Values:
    """Scalars told apart by type: in a plain set true would be 1."""

    texts: frozenset[str] = frozenset()
    truths: frozenset[bool] = frozenset()
    numbers: frozenset[Number] = frozenset()

    @classmethod
    def of(cls, values: list[str | bool | int | float]) -> Values:
        """Raises OverflowError for an integer beyond float64."""
        return cls(
            frozenset(value for value in values if isinstance(value, str)),
            frozenset(value for value in values if isinstance(value, bool)),
            frozenset(number(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)),
        )


@dataclass(frozen=True)
class AnyOf:
    """Some element is one of these."""

    path: Path
    values: Values


@dataclass(frozen=True)
class Except:
    """Some element is neither null nor one of these."""

    path: Path
    values: Values


@dataclass(frozen=True)
class Bounds:
    """gt < x, gte ≤ x, x < lt, x ≤ lte, all that are given."""

    gt: Number | None = None
    gte: Number | None = None
    lt: Number | None = None
    lte: Number | None = None

    def given(self) -> list[tuple[str, Number]]:
        named = (("gt", self.gt), ("gte", self.gte), ("lt", self.lt), ("lte", self.lte))
        return [(name, bound) for name, bound in named if bound is not None]


@dataclass(frozen=True)
class Range:
    """Some element is a number within the bounds; with `moments` a text that is a moment within them (microseconds
    since 1970)."""

    path: Path
    bounds: Bounds
    moments: bool = False


@dataclass(frozen=True)
class Exists:
    """The key is there, whatever its value."""

    path: Path


@dataclass(frozen=True)
class Null:
    """Some element is null."""

    path: Path


@dataclass(frozen=True)
class Prefix:
    """Some element is a text that begins with this."""

    path: Path
    text: str


@dataclass(frozen=True)
class Ids:
    """The memory has one of these ids."""

    ids: frozenset[str]


@dataclass(frozen=True)
class Clause:
    """All of `must`, none of `must_not`, and one at least of `should` unless that is empty."""

    must: tuple[Node, ...] = field(default=())
    should: tuple[Node, ...] = field(default=())
    must_not: tuple[Node, ...] = field(default=())

    @property
    def empty(self) -> bool:
        return not (self.must or self.should or self.must_not)


Node = AnyOf | Except | Range | Exists | Null | Prefix | Ids | Clause


def number(value: Number) -> Number:
    """As it is compared: an integer of more than 64 bits as a float64. Raises OverflowError beyond float64."""
    return value if isinstance(value, float) or INTEGER_MIN <= value <= INTEGER_MAX else float(value)


def as_real(name: str, bound: Number) -> tuple[str, float]:
    """The bound (`gt`, `gte`, `lt` or `lte`) of float64 values that says the same, and is a float64."""
    near = float(bound)
    if near > bound:  # nothing lies between the bound and the float64 over it
        name = {"gt": "gte", "lte": "lt"}.get(name, name)
    elif near < bound:
        name = {"gte": "gt", "lt": "lte"}.get(name, name)
    return name, near


def paths(node: Node) -> Iterator[Path]:
    """The paths that a filter asks about."""
    if isinstance(node, Clause):
        for part in (*node.must, *node.should, *node.must_not):
            yield from paths(part)
    elif not isinstance(node, Ids):
        yield node.path


def elements(payload: object, path: Path) -> list[Any]:
    """What conditions on a path are asked of: the value there, or each value in an array."""
    found = [payload]
    for key in path:
        values = [holder[key] for holder in found if isinstance(holder, dict) and key in holder]
        found = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return found


_MOMENT = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[Tt ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]+))?)?(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))?)?"
)
_EPOCH_DAY = date(1970, 1, 1).toordinal()


def moment(text: str) -> int | None:
    """Microseconds since 1970 of an RFC 3339 date or date with time, negative before; None where it is neither.

    A leap second is the second after the 59th, as in POSIX time.
    """
    found = _MOMENT.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second, fraction, sign, hours, minutes = found.groups()
    try:
        seconds = 86_400 * (date(int(year), int(month), int(day)).toordinal() - _EPOCH_DAY)
    except ValueError:
        return None
    if hour is not None:
        clock = int(hour), int(minute), int(second or 0)
        offset = int(hours or 0), int(minutes or 0)
        if clock > (23, 59, 60) or clock[1] > 59 or clock[2] > 60 or offset > (23, 59) or offset[1] > 59:
            return None
        east = 3600 * offset[0] + 60 * offset[1]
        seconds += 3600 * clock[0] + 60 * clock[1] + clock[2] + (east if sign == "-" else -east)
    return 1_000_000 * seconds + (int(fraction[:6].ljust(6, "0")) if fraction else 0)
