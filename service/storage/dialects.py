"""How each database looks into a payload: the parts of SQL that a filter (see `filtering`) is put together from.

Rules:
- A payload is JSON in bytes. A *document* is an expression of that JSON, a *row* the name of a table of one element.
- Numbers are compared as `core.filter` says: an integer exactly, whatever the other side; a float64 as what it is, not
  as the decimals that it is written in.
- Databases may look at the parts of a condition in any order, so what would fail on a value of another type stands
  behind a CASE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Protocol

import orjson

from service.core.filter import INTEGER_MAX, INTEGER_MIN, Bounds, Number, as_real

Bind = Callable[[object], str]
"""Keeps a value for the statement; gives its place there."""

SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class Dialect(Protocol):
    document: str
    """The payload of the memories at hand; NULL, or a JSON null, where there is none."""

    def key(self, name: str) -> str:
        """How a key is bound, for the three below."""
        ...

    def elements(self, document: str, key: str) -> str:
        """A table of the key's elements: of an array those in it, of any other value itself; of no value none."""
        ...

    def has(self, document: str, key: str) -> str: ...

    def object(self, row: str) -> str:
        """The row's value as a document, in which no key is found unless it is an object."""
        ...

    def null(self, row: str) -> str: ...
    def truth(self, row: str, truth: bool) -> str: ...

    def text(self, row: str) -> str:
        """The row's text, ordered by code points; NULL unless it is one."""
        ...

    def moment(self, row: str) -> str:
        """Microseconds since 1970; NULL unless the row's value is a text by RFC 3339."""
        ...

    def within(self, row: str, bounds: Bounds, bind: Bind) -> str:
        """Whether the row's value is a number within the bounds."""
        ...

    def among(self, row: str, numbers: Iterable[Number], bind: Bind) -> str:
        """Whether the row's value is one of the numbers."""
        ...

    def listed(self, texts: str) -> str:
        """A query of the texts in a JSON array of texts."""
        ...


class Sqlite:
    """Payloads are BLOBs, which SQLite's JSON functions do not take. `json_type` tells apart what `value` does not.
    Integers and floats are compared by their exact values.
    """

    document = "CAST(memories.payload AS TEXT)"

    def key(self, name: str) -> str:
        return f'$."{name}"'

    def elements(self, document: str, key: str) -> str:
        found = f"{document} -> {key}"
        listed = f"CASE json_type({document}, {key}) WHEN 'array' THEN {found} ELSE '[' || ({found}) || ']' END"
        return f"json_each({listed})"

    def has(self, document: str, key: str) -> str:
        return f"json_type({document}, {key}) IS NOT NULL"

    def object(self, row: str) -> str:
        return f"CASE {row}.type WHEN 'object' THEN {row}.value END"

    def null(self, row: str) -> str:
        return f"{row}.type = 'null'"

    def truth(self, row: str, truth: bool) -> str:
        return f"{row}.type = '{str(truth).lower()}'"

    def text(self, row: str) -> str:
        return f"CASE {row}.type WHEN 'text' THEN {row}.value END"

    def moment(self, row: str) -> str:
        return f"engram_moment({self.text(row)})"  # `core.filter.moment`: SQLite's own dates stop at milliseconds

    def within(self, row: str, bounds: Bounds, bind: Bind) -> str:
        given = [f"{row}.value {SIGNS[name]} {bind(bound)}" for name, bound in bounds.given()]
        return " AND ".join([self._number(row), *given])

    def among(self, row: str, numbers: Iterable[Number], bind: Bind) -> str:
        return f"{self._number(row)} AND {row}.value IN ({self.listed(bind(_packed(numbers)))})"

    def listed(self, texts: str) -> str:
        return f"SELECT value FROM json_each({texts})"

    @staticmethod
    def _number(row: str) -> str:
        return f"{row}.type IN ('integer', 'real')"


class Postgres:
    """Payloads are read as `json`, not `jsonb`, which would forget whether 4.611686018427388e18 was written as an
    integer. All is bound as text, and cast: an integer beyond 64 bits has no type of the driver's.
    """

    document = "CAST(convert_from(memories.payload, 'UTF8') AS json)"

    def key(self, name: str) -> str:
        return name

    def elements(self, document: str, key: str) -> str:
        found = f"{document} -> {key}"
        one = f"CAST('[' || CAST({found} AS text) || ']' AS json)"
        listed = f"CASE json_typeof({found}) WHEN 'array' THEN {found} ELSE {one} END"
        return f"LATERAL (SELECT json_array_elements({listed}) AS value)"

    def has(self, document: str, key: str) -> str:
        return f"({document} -> {key}) IS NOT NULL"

    def object(self, row: str) -> str:
        return f"{row}.value"  # of anything else -> gives NULL

    def null(self, row: str) -> str:
        return f"json_typeof({row}.value) = 'null'"

    def truth(self, row: str, truth: bool) -> str:
        return f"CAST({row}.value AS text) = '{str(truth).lower()}'"

    def text(self, row: str) -> str:
        return f"""(CASE json_typeof({row}.value) WHEN 'string' THEN {row}.value #>> '{{}}' END COLLATE "C")"""

    def moment(self, row: str) -> str:
        return MOMENT.replace("TEXT", self.text(row))

    def within(self, row: str, bounds: Bounds, bind: Bind) -> str:
        given = bounds.given()
        whole = [f"{WHOLE} {SIGNS[name]} CAST({bind(str(Decimal(bound)))} AS numeric)" for name, bound in given]
        near = [(SIGNS[name], repr(real)) for name, real in (as_real(name, bound) for name, bound in given)]
        real = [f"{REAL} {sign} CAST({bind(bound)} AS float8)" for sign, bound in near]
        return self._number(row, " AND ".join(whole), " AND ".join(real))

    def among(self, row: str, numbers: Iterable[Number], bind: Bind) -> str:
        wanted = list(numbers)
        integers = [str(int(n)) for n in wanted if n == int(n) and INTEGER_MIN <= n <= INTEGER_MAX]
        reals = [repr(float(n)) for n in wanted if float(n) == n]
        listed = {
            kind: f"SELECT CAST(value AS {kind}) FROM json_array_elements_text(CAST({bind(_packed(some))} AS json))"
            for kind, some in (("numeric", integers), ("float8", reals))
        }
        return self._number(row, f"{WHOLE} IN ({listed['numeric']})", f"{REAL} IN ({listed['float8']})")

    def listed(self, texts: str) -> str:
        return f"SELECT value FROM json_array_elements_text(CAST({texts} AS json))"

    @staticmethod
    def _number(row: str, whole: str, real: str) -> str:
        """One condition of an integer of 64 bits, another of any other number."""
        is_whole = f"ROW ~ '^-?[0-9]+$' AND {WHOLE} BETWEEN {INTEGER_MIN} AND {INTEGER_MAX}"
        of_number = f"CASE WHEN {is_whole} THEN {whole} ELSE {real} END"
        sql = f"CASE json_typeof({row}.value) WHEN 'number' THEN {of_number} ELSE 1 = 0 END"
        return sql.replace("ROW", f"({row}.value #>> '{{}}')")


WHOLE, REAL = "CAST(ROW AS numeric)", "CAST(ROW AS float8)"

MOMENT = r"""(
  SELECT CASE
    WHEN year > 0 AND month BETWEEN 1 AND 12 AND day > 0 AND day <= CASE
        WHEN month IN (4, 6, 9, 11) THEN 30
        WHEN month <> 2 THEN 31
        WHEN year % 4 = 0 AND (year % 100 <> 0 OR year % 400 = 0) THEN 29
        ELSE 28
      END
      AND hour < 24 AND minute < 60 AND second < 61 AND hours < 24 AND minutes < 60
    THEN 1000000 * (
        86400 * CAST(make_date(year, month, day) - DATE '1970-01-01' AS bigint)
        + 3600 * hour + 60 * minute + second + CASE sign WHEN '-' THEN 1 ELSE -1 END * (3600 * hours + 60 * minutes)
      ) + micros
    END
  FROM (
    SELECT
      CAST(substr(said, 1, 4) AS integer) AS year, CAST(substr(said, 6, 2) AS integer) AS month,
      CAST(substr(said, 9, 2) AS integer) AS day, CAST('0' || substr(said, 12, 2) AS integer) AS hour,
      CAST('0' || substr(said, 15, 2) AS integer) AS minute,
      CASE WHEN substr(said, 17, 1) = ':' THEN CAST(substr(said, 18, 2) AS integer) ELSE 0 END AS second,
      CASE WHEN substr(said, 20, 1) = '.' THEN CAST(rpad(left(rtrim(
          substr(said, 21, length(said) - 20 - CASE WHEN zoned THEN 6 ELSE 0 END), 'Zz'
        ), 6), 6, '0') AS integer) ELSE 0 END AS micros,
      CASE WHEN zoned THEN substr(right(said, 6), 1, 1) END AS sign,
      CASE WHEN zoned THEN CAST(left(right(said, 5), 2) AS integer) ELSE 0 END AS hours,
      CASE WHEN zoned THEN CAST(right(said, 2) AS integer) ELSE 0 END AS minutes
    FROM (
      SELECT said, length(said) > 16 AND left(right(said, 6), 1) IN ('+', '-') AS zoned
      FROM (SELECT TEXT AS said OFFSET 0) AS given
      WHERE said ~ (
        '^[0-9]{4}-[0-9]{2}-[0-9]{2}'
        '([Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?([Zz]|[+-][0-9]{2}:[0-9]{2})?)?$'
      )
      OFFSET 0
    ) AS fitting
    OFFSET 0
  ) AS parts
)"""
"""`core.filter.moment` as an expression: PostgreSQL's own dates take more than RFC 3339, and fail on what is none."""


def _packed(values: Iterable[object]) -> str:
    """As one bound array: databases bound the number of values in a statement."""
    return orjson.dumps(list(values)).decode()
