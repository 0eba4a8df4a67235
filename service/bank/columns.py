"""Payload columns: of the keys that filters ask for, the values of a segment's rows, laid out by type.

Strategy: payloads are kept as JSON. The first filter on a key parses them once and keeps what the key has, in blocks of
rows; from then on a condition is a few comparisons of numpy arrays. (Arrow's reader of JSON refuses a key whose
values differ in type, its package takes 170 MB, and its comparisons are no faster.)

Rules:
- A column says of each element (see `core.filter`) its row and its value; a row has any number of elements.
- A payload never changes, so a full block is made once. The last block of a tail is made again when it has grown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from service.core.filter import INTEGER_MAX, INTEGER_MIN, Bounds, Number, Path, Values, as_real, moment

Mask = NDArray[np.bool_]

TEXT_BYTES: Final = 90
"""What a distinct text of usual length takes in a column, nearly: a Python string and its place in a table."""

NO_MOMENT: Final = np.iinfo(np.int64).min


class Column:
    """The elements that one path has in a block of rows, numbered from 0."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._present: list[int] = []
        self._nulls: list[int] = []
        self._nested: list[int] = []  # objects, and arrays within arrays
        self._truths: list[tuple[int, bool]] = []
        self._integers: list[tuple[int, int]] = []
        self._reals: list[tuple[int, float]] = []
        self._texts: list[tuple[int, int]] = []  # row, place in the table
        self._table: dict[str, int] = {}

    def add(self, row: int, payload: dict[str, Any], path: Path) -> None:
        """Take in a row's elements; `freeze` ends it."""
        holders: Sequence[Any] = (payload,)
        for key in path[:-1]:
            holders = [each for holder in holders if isinstance(holder, dict) for each in _elements(holder, key)]
        there = False
        for holder in holders:
            if isinstance(holder, dict) and path[-1] in holder:
                there = True
                for value in _elements(holder, path[-1]):
                    self._take(row, value)
        if there:
            self._present.append(row)

    def _take(self, row: int, value: object) -> None:
        if isinstance(value, str):
            self._texts.append((row, self._table.setdefault(value, len(self._table))))
        elif isinstance(value, bool):
            self._truths.append((row, value))
        elif isinstance(value, int) and INTEGER_MIN <= value <= INTEGER_MAX:
            self._integers.append((row, value))
        elif isinstance(value, int | float):
            self._reals.append((row, float(value)))
        else:
            (self._nulls if value is None else self._nested).append(row)

    def freeze(self) -> Column:
        """Lists to arrays."""
        self.present, self.nulls, self.nested = map(_rows, (self._present, self._nulls, self._nested))
        self.truth_rows, self.truths = _split(self._truths, np.bool_)
        self.integer_rows, self.integers = _split(self._integers, np.int64)
        self.real_rows, self.reals = _split(self._reals, np.float64)
        self.text_rows, self.texts = _split(self._texts, np.int32)
        del self._present, self._nulls, self._nested, self._truths, self._integers, self._reals, self._texts
        return self

    @property
    def size_bytes(self) -> int:
        arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays) + TEXT_BYTES * len(self._table)

    # --- conditions: (rows,) masks ------------------------------------------------------------------------------------

    def exists(self) -> Mask:
        return self._mask(self.present)

    def null(self) -> Mask:
        return self._mask(self.nulls)

    def any_of(self, values: Values) -> Mask:
        truth, integer, real, text = self._hits(values)
        return self._mask(
            self.truth_rows[truth], self.integer_rows[integer], self.real_rows[real], self.text_rows[text]
        )

    def none_of(self, values: Values) -> Mask:
        """Rows with an element, other than null, that is none of `values`."""
        truth, integer, real, text = self._hits(values)
        return self._mask(
            self.nested, self.truth_rows[~truth], self.integer_rows[~integer], self.real_rows[~real],
            self.text_rows[~text],
        )  # fmt: skip

    def prefix(self, start: str) -> Mask:
        begins = np.fromiter((text.startswith(start) for text in self._table), np.bool_, len(self._table))
        return self._mask(self.text_rows[begins[self.texts]])

    def within(self, bounds: Bounds) -> Mask:
        integers, reals = np.ones(len(self.integers), np.bool_), np.ones(len(self.reals), np.bool_)
        for name, bound in bounds.given():
            integers &= _integers_within(self.integers, name, bound)
            reals &= _reals_within(self.reals, name, bound)
        return self._mask(self.integer_rows[integers], self.real_rows[reals])

    def moments_within(self, bounds: Bounds) -> Mask:
        moments = self._moments
        kept = moments != NO_MOMENT
        for name, bound in bounds.given():
            kept &= _integers_within(moments, name, bound)
        return self._mask(self.text_rows[kept[self.texts]])

    @cached_property
    def _moments(self) -> NDArray[np.int64]:
        found = (moment(text) for text in self._table)
        return np.fromiter((NO_MOMENT if each is None else each for each in found), np.int64, len(self._table))

    def _hits(self, values: Values) -> tuple[Mask, Mask, Mask, Mask]:
        """Which truths, integers, reals and texts are among `values`."""
        truths = np.zeros(len(self.truths), np.bool_)
        for truth in values.truths:
            truths |= self.truths == truth
        codes = [self._table[text] for text in values.texts if text in self._table]
        whole = [int(v) for v in values.numbers if v == math.floor(v) and INTEGER_MIN <= v <= INTEGER_MAX]
        real = [float(v) for v in values.numbers if float(v) == v]
        return (
            truths,
            _among(self.integers, np.array(whole, np.int64)),
            _among(self.reals, np.array(real, np.float64)),
            _among(self.texts, np.array(codes, np.int32)),
        )

    def _mask(self, *rows: NDArray[np.int32]) -> Mask:
        mask = np.zeros(self.rows, np.bool_)
        for some in rows:
            mask[some] = True
        return mask


def make_columns(payloads: Sequence[bytes | None], paths: Sequence[Path]) -> list[Column]:
    """The columns of `paths` over these rows; each payload is parsed once."""
    columns = [Column(len(payloads)) for _ in paths]
    for row, raw in enumerate(payloads):
        if raw is not None:
            payload = orjson.loads(raw)
            for column, path in zip(columns, paths, strict=True):
                column.add(row, payload, path)
    return [column.freeze() for column in columns]


def _elements(holder: dict[str, Any], key: str) -> Sequence[Any]:
    if key not in holder:
        return ()
    value = holder[key]
    return value if isinstance(value, list) else (value,)


def _rows(rows: list[int]) -> NDArray[np.int32]:
    return np.array(rows, np.int32)


def _split(pairs: list[tuple[int, Any]], dtype: Any) -> tuple[NDArray[np.int32], NDArray[Any]]:
    rows, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(rows, np.int32), np.array(values, dtype)


def _among(values: NDArray[Any], wanted: NDArray[Any]) -> Mask:
    if len(wanted) == 1:
        mask: Mask = values == wanted[0]
        return mask
    return np.isin(values, wanted)


def _integers_within(values: NDArray[np.int64], name: str, bound: Number) -> Mask:
    """Integers against a bound of any size, exactly."""
    # Against the whole number on the bound's side, so that nothing is rounded.
    whole = math.ceil(bound) if name in ("gte", "lt") else math.floor(bound)
    if whole > INTEGER_MAX:
        return np.full(len(values), name in ("lt", "lte"))
    if whole < INTEGER_MIN:
        return np.full(len(values), name in ("gt", "gte"))
    return _compared(values, name, np.int64(whole))


def _reals_within(values: NDArray[np.float64], name: str, bound: Number) -> Mask:
    """Float64 values against a bound that float64 may not hold, exactly."""
    name, near = as_real(name, bound)
    return _compared(values, name, np.float64(near))


def _compared(values: NDArray[Any], name: str, bound: Any) -> Mask:
    mask: Mask = {"gt": np.greater, "gte": np.greater_equal, "lt": np.less, "lte": np.less_equal}[name](values, bound)
    return mask
