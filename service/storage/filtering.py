"""A filter as SQL over the payload column: the same tree that a bank evaluates, with the same outcome.

Strategy: one visitor builds the expression, and a `Dialect` says how a database looks into JSON. The elements of a path
are rows: each key is a table of the elements of the rows before it.

Rules:
- Values are bound, never written into the statement.
- An expression is true or false, never NULL, so that its negation is the opposite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from sqlalchemy import TextClause, text

from service.core.filter import AnyOf, Clause, Except, Exists, Ids, Node, Null, Path, Prefix, Range, Values
from service.storage.dialects import SIGNS, Dialect

LAST_CODE_POINT = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)


class Expression:
    """The SQL of a filter, with the values that it binds."""

    def __init__(self, clause: Clause, dialect: Dialect) -> None:
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
        has = self._dialect.has(document, self._key(path[-1]))
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
            tables.append(f"{self._dialect.elements(document, self._key(name))} AS {row}")
            document = self._dialect.object(row)
        return tables, document

    def _key(self, name: str) -> str:
        return self._bind(self._dialect.key(name))

    def _condition(self, node: AnyOf | Except | Range | Null | Prefix, row: str) -> str:
        dialect = self._dialect
        match node:
            case Null():
                return dialect.null(row)
            case AnyOf(_, values):
                return self._among(values, row)
            case Except(_, values):
                return f"NOT {dialect.null(row)} AND NOT {self._among(values, row)}"
            case Prefix(_, start):
                # Between the prefix and the text after all that begin with it: exact by code points, and no function
                # of characters is asked, which databases disagree on.
                after, string = _after(start), dialect.text(row)
                below = "" if after is None else f" AND {string} < {self._bind(after)}"
                return f"{string} >= {self._bind(start)}{below}"
            case Range(_, bounds, moments):
                if not moments:
                    return dialect.within(row, bounds, self._bind)
                at = dialect.moment(row)
                return " AND ".join(f"{at} {SIGNS[name]} {self._bind(bound)}" for name, bound in bounds.given())

    def _among(self, values: Values, row: str) -> str:
        dialect, parts = self._dialect, []
        if values.texts:
            parts.append(f"coalesce({dialect.text(row)} IN ({self._listed(values.texts)}), 1 = 0)")
        if values.numbers:
            parts.append(dialect.among(row, values.numbers, self._bind))
        parts += [dialect.truth(row, truth) for truth in values.truths]
        return _joined(" OR ", [f"({part})" for part in parts]) if parts else "(1 = 0)"

    def _listed(self, values: frozenset[str]) -> str:
        """As one bound array: databases bound the number of values in a statement."""
        return self._dialect.listed(self._bind(orjson.dumps(list(values)).decode()))


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
