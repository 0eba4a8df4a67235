"""Payload columns: of the keys that filters ask for, the values of a segment's rows, laid out by type.

Strategy: payloads are kept as JSON. They are parsed once for a key, at the first filter on it or, where it is indexed,
as they come, and what the key has is kept in blocks of rows; from then on a condition is a few comparisons of numpy
arrays. (Arrow's reader of JSON refuses a key whose
values differ in type, its package takes 170 MB, and its comparisons are no faster.)

Rules:
- A column says of each element (see `core.filter`) its row and its value; a row has any number of elements.
- A payload never changes, so each is read once for a column; that of a tail's last block grows with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from service.core.filter import INTEGER_MAX, INTEGER_MIN, Bounds, Number, Path, Values, as_real, moment

Mask = NDArray[np.bool_]

TEXT_BYTES: Final = 90
"""What a distinct text of usual length takes in a column, nearly: a Python string and its place in a table."""

NO_MOMENT: Final = np.iinfo(np.int64).min


class Column:
    """The elements that one path has in the first `rows` rows of a block, numbered from 0."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path = path
        self.present, self.nulls, self.nested = _empty(np.int32), _empty(np.int32), _empty(np.int32)
        self.truth_rows, self.truths = _empty(np.int32), _empty(np.bool_)
        self.integer_rows, self.integers = _empty(np.int32), _empty(np.int64)
        self.real_rows, self.reals = _empty(np.int32), _empty(np.float64)
        self.text_rows, self.texts = _empty(np.int32), _empty(np.int32)  # a text by its place in the table
        self._table: dict[str, int] = {}
        self._moments: NDArray[np.int64] = _empty(np.int64)  # of the table, as far as it was asked for

    def extend(self, payloads: Sequence[dict[str, Any] | None]) -> None:
        """Take in the rows that follow."""
        new = _Elements(self._table)
        for row, payload in enumerate(payloads, self.rows):
            if payload is not None:
                new.add(row, payload, self._path)
        self.rows += len(payloads)
        self.present, self.nulls = _longer(self.present, new.present), _longer(self.nulls, new.nulls)
        self.nested = _longer(self.nested, new.nested)
        self.truth_rows, self.truths = _longer(self.truth_rows, new.truth_rows), _longer(self.truths, new.truths)
        self.integer_rows = _longer(self.integer_rows, new.integer_rows)
        self.integers = _longer(self.integers, new.integers)
        self.real_rows, self.reals = _longer(self.real_rows, new.real_rows), _longer(self.reals, new.reals)
        self.text_rows, self.texts = _longer(self.text_rows, new.text_rows), _longer(self.texts, new.texts)

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
        moments = self._made_moments()
        kept = moments != NO_MOMENT
        for name, bound in bounds.given():
            kept &= _integers_within(moments, name, bound)
        return self._mask(self.text_rows[kept[self.texts]])

    def _made_moments(self) -> NDArray[np.int64]:
        new = list(self._table)[len(self._moments) :]
        found = [NO_MOMENT if at is None else at for at in map(moment, new)]
        self._moments = _longer(self._moments, found)
        return self._moments

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


class _Elements:
    """The elements of further rows, by type; texts by their place in the column's table, which grows."""

    def __init__(self, table: dict[str, int]) -> None:
        self._table = table
        self.present: list[int] = []
        self.nulls: list[int] = []
        self.nested: list[int] = []  # objects, and arrays within arrays
        self.truth_rows: list[int] = []
        self.truths: list[bool] = []
        self.integer_rows: list[int] = []
        self.integers: list[int] = []
        self.real_rows: list[int] = []
        self.reals: list[float] = []
        self.text_rows: list[int] = []
        self.texts: list[int] = []

    def add(self, row: int, payload: dict[str, Any], path: Path) -> None:
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
            self.present.append(row)

    def _take(self, row: int, value: object) -> None:
        if isinstance(value, str):
            self.text_rows.append(row)
            self.texts.append(self._table.setdefault(value, len(self._table)))
        elif isinstance(value, bool):
            self.truth_rows.append(row)
            self.truths.append(value)
        elif isinstance(value, int) and INTEGER_MIN <= value <= INTEGER_MAX:
            self.integer_rows.append(row)
            self.integers.append(value)
        elif isinstance(value, int | float):
            self.real_rows.append(row)
            self.reals.append(float(value))
        else:
            (self.nulls if value is None else self.nested).append(row)


def _elements(holder: dict[str, Any], key: str) -> Sequence[Any]:
    if key not in holder:
        return ()
    value = holder[key]
    return value if isinstance(value, list) else (value,)


def _empty(dtype: Any) -> NDArray[Any]:
    return np.empty(0, dtype)


def _longer(array: NDArray[Any], more: list[Any]) -> NDArray[Any]:
    return np.concatenate([array, np.array(more, array.dtype)]) if more else array


def _among(values: NDArray[Any], wanted: NDArray[Any]) -> Mask:
    if not (len(values) and len(wanted)):
        return np.zeros(len(values), np.bool_)
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
