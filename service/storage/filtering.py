"""A filter as SQL over the payload column: the same tree that a bank evaluates, with the same outcome.

Strategy: one visitor builds the expression, and a `Dialect` says how a database looks into JSON. The elements of a path
are rows: each key is a table-valued function over the rows of the key before it.

Rules:
- Values are bound, never written into the statement.
- An expression is true or false, never NULL, so that its negation is the opposite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import TextClause, text

from service.core.filter import AnyOf, Bounds, Clause, Except, Exists, Ids, Node, Null, Path, Prefix, Range, Values

LAST_CODE_POINT = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)


@dataclass(frozen=True)
class Dialect:
    """Templates. `{document}` is a JSON text, `{key}` a bound place of one key, as `key` gives it; `{row}` is a row of
    `elements`: its `value`, and its type by the conditions below.
    """

    document: str
    """The payload of the memories at hand; a JSON null where there is none."""
    elements: str
    """A table of the value's elements: of an array those in it, of any other value itself; of no value none."""
    has: str
    object: str
    """The row's value as a document; NULL unless it is an object."""
    null: str
    truth: str
    number: str
    text: str
    moment: str
    """Microseconds since 1970; NULL where the text is no RFC 3339 date."""
    listed: str
    """A query of the values in a bound JSON array."""

    def key(self, name: str) -> str:
        """How a key is bound."""
        return f'$."{name}"'


# Payloads are BLOBs, which SQLite's JSON functions do not take. `json_type` tells apart what `value` does not.
SQLITE = Dialect(
    document="CAST(memories.payload AS TEXT)",
    elements=(
        "json_each(CASE json_type({document}, {key}) WHEN 'array' THEN {document} -> {key}"
        " ELSE '[' || ({document} -> {key}) || ']' END)"
    ),
    has="json_type({document}, {key}) IS NOT NULL",
    object="CASE {row}.type WHEN 'object' THEN {row}.value END",
    null="{row}.type = 'null'",
    truth="{row}.type = {truth}",
    number="{row}.type IN ('integer', 'real')",
    text="{row}.type = 'text'",
    moment="engram_moment({row}.value)",  # `core.filter.moment`: SQLite's own dates stop at milliseconds
    listed="SELECT value FROM json_each({values})",
)


class Expression:
    """The SQL of a filter, with the values that it binds."""

    def __init__(self, clause: Clause, dialect: Dialect = SQLITE) -> None:
        self.values: dict[str, Any] = {}
        self._dialect = dialect
        self._rows = 0
        self.sql = self._node(clause)

    def bound(self) -> TextClause:
        return text(self.sql).bindparams(**self.values)

    def _bind(self, value: object) -> str:
        name = f"filter_{len(self.values)}"
        self.values[name] = value
        return f":{name}"

    def _node(self, node: Node) -> str:
        match node:
            case Clause(must, should, must_not):
                parts = [self._node(part) for part in must]
                if should:
                    parts.append(_joined(" OR ", [self._node(part) for part in should]))
                parts += [f"NOT {self._node(part)}" for part in must_not]
                return _joined(" AND ", parts) if parts else "(1 = 1)"
            case Ids(ids):
                return f"(memories.id IN ({self._listed(ids)}))"
            case Exists(path):
                return self._exists(path)
        return self._some(node)

    def _exists(self, path: Path) -> str:
        tables, document = self._walk(path[:-1])
        has = self._dialect.has.format(document=document, key=self._key(path[-1]))
        return f"EXISTS (SELECT 1 FROM {', '.join(tables)} WHERE {has})" if tables else f"({has})"

    def _some(self, node: AnyOf | Except | Range | Null | Prefix) -> str:
        """Whether some element of the path meets the condition."""
        tables, _ = self._walk(node.path)
        row = f"e{self._rows}"
        return f"EXISTS (SELECT 1 FROM {', '.join(tables)} WHERE {self._condition(node, row)})"

    def _walk(self, path: Sequence[str]) -> tuple[list[str], str]:
        """The tables whose last one has the elements of `path`, and its rows' objects as documents."""
        tables, document = [], self._dialect.document
        for name in path:
            self._rows += 1
            row = f"e{self._rows}"
            tables.append(f"{self._dialect.elements.format(document=document, key=self._key(name))} AS {row}")
            document = self._dialect.object.format(row=row)
        return tables, document

    def _key(self, name: str) -> str:
        return self._bind(self._dialect.key(name))

    def _condition(self, node: AnyOf | Except | Range | Null | Prefix, row: str) -> str:
        dialect, value = self._dialect, f"{row}.value"
        number, string = dialect.number.format(row=row), dialect.text.format(row=row)
        match node:
            case Null():
                return dialect.null.format(row=row)
            case AnyOf(_, values):
                return self._among(values, row)
            case Except(_, values):
                return f"NOT {dialect.null.format(row=row)} AND NOT {self._among(values, row)}"
            case Prefix(_, start):
                # Between the prefix and the text after all that begin with it: exact by code points, and no function
                # of characters is asked, which databases disagree on.
                after = _after(start)
                below = "" if after is None else f" AND {value} < {self._bind(after)}"
                return f"{string} AND {value} >= {self._bind(start)}{below}"
            case Range(_, bounds, moments):
                if moments:
                    return f"{string} AND {self._within(bounds, dialect.moment.format(row=row))}"
                return f"{number} AND {self._within(bounds, value)}"

    def _among(self, values: Values, row: str) -> str:
        dialect, parts = self._dialect, []
        if values.texts:
            parts.append(f"{dialect.text.format(row=row)} AND {row}.value IN ({self._listed(values.texts)})")
        if values.numbers:
            parts.append(f"{dialect.number.format(row=row)} AND {row}.value IN ({self._listed(values.numbers)})")
        parts += [dialect.truth.format(row=row, truth=f"'{str(truth).lower()}'") for truth in values.truths]
        return _joined(" OR ", [f"({part})" for part in parts]) if parts else "(1 = 0)"

    def _listed(self, values: frozenset[Any]) -> str:
        """As one bound array: databases bound the number of values in a statement."""
        return self._dialect.listed.format(values=self._bind(orjson.dumps(list(values)).decode()))

    def _within(self, bounds: Bounds, value: str) -> str:
        signs = {">": bounds.gt, ">=": bounds.gte, "<": bounds.lt, "<=": bounds.lte}
        given = [f"{value} {sign} {self._bind(bound)}" for sign, bound in signs.items() if bound is not None]
        return f"coalesce({' AND '.join(given)}, 1 = 0)"


def _joined(word: str, parts: Sequence[str]) -> str:
    return f"({word.join(parts)})"


def _after(start: str) -> str | None:
    """The first text, by code points, after all that begin with `start`; None where there is none."""
    while start and ord(start[-1]) == LAST_CODE_POINT:
        start = start[:-1]
    if not start:
        return None
    following = ord(start[-1]) + 1
    return start[:-1] + chr(SURROGATES.stop if following in SURROGATES else following)
