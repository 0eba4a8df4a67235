"""Filters as callers send them.

Rules:
- One model for every condition, so that a fault is named by its place in the document: `filter.must.0.range.gte`.
- A condition is one of: a key with what is asked of its value; ids; or a filter of its own.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictStr,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from service.app.fields import MemoryId, Request
from service.core.filter import (
    AnyOf,
    Bounds,
    Clause,
    Except,
    Exists,
    Ids,
    Node,
    Null,
    Path,
    Prefix,
    Range,
    Values,
    moment,
    number,
)

FILTER_DEPTH_MAX = 8  # filters within filters: more than a program writes that was made by hand
FILTER_CONDITIONS_MAX = 256  # of one filter, over all depths: each is a pass over the memories
VALUES_MAX = 1_000  # in one list: what a page of a program has chosen
IDS_MAX = 10_000  # ids in one list, as in a delete
KEY_MAX = 512  # characters of a key with its dots
KEY_DEPTH_MAX = 32

ASKS = ("match", "any", "except", "range", "exists", "null", "prefix")
GROUPS = ("must", "should", "must_not")
ABSENT: Any = None  # a default is not checked against its type, so a null that is sent is a fault of its field

# A name, or one in double quotes where it holds a dot or a bracket; `[]` says "its elements", which is meant anyway.
_NAME = r'(?:"[^"\\\x00-\x1f]+"|[^".\[\]\\\x00-\x1f]+)(?:\[\])?'
_KEY = re.compile(rf"{_NAME}(?:\.{_NAME})*")


def _storable(text: str) -> str:
    """A text that a payload can hold."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds a character that no payload can hold")
    return text


def _scalar(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """One sentence in place of a fault from every member of the union; no text is taken for a number."""
    if isinstance(value, str):
        return _storable(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return _number(value)
    hint = {type(None): "; null is asked for by null", list: "; a list by any", dict: ""}.get(type(value), "")
    raise ValueError(f"is a text, a number, or true or false{hint}")


def _number(value: int | float) -> int | float:
    try:
        if abs(value) < float("inf"):
            return number(value)
    except OverflowError:
        pass
    raise ValueError("is a finite number")


def _bound(value: object, check: ValidatorFunctionWrapHandler) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value)
    if not isinstance(value, str) or moment(value) is None:
        raise ValueError("is a number, or a date by RFC 3339 as in 2026-11-25T16:00:00Z")
    return value


def _text(value: object) -> object:
    return _storable(value) if isinstance(value, str) else value


def _well_formed(key: str) -> str:
    if _KEY.fullmatch(_storable(key)) is None:
        raise ValueError(
            "is names joined by dots; a name with a dot or a bracket is put in double quotes, and none has a double "
            "quote, a backslash or a control character. Elements of arrays are meant by themselves, not by number"
        )
    if len(path_of(key)) > KEY_DEPTH_MAX:
        raise ValueError(f"is nested deeper than {KEY_DEPTH_MAX}")
    return key


def path_of(key: str) -> Path:
    """The names that a well-formed key joins."""
    names = (found.group().removesuffix("[]") for found in re.finditer(_NAME, key))
    return tuple(name[1:-1] if name.startswith('"') else name for name in names)


def key_of(path: Path) -> str:
    """The key of a path, in quotes only where they are needed."""
    return ".".join(f'"{name}"' if set(name) & set(".[]") else name for name in path)


Key = Annotated[str, Field(min_length=1, max_length=KEY_MAX), AfterValidator(_well_formed)]
"""A payload's key, as in seller.city or "opening hours".monday."""

Prefixed = Annotated[StrictStr, BeforeValidator(_text)]
Scalar = Annotated[str | bool | int | float, WrapValidator(_scalar)]
Bound = Annotated[int | float | str, WrapValidator(_bound)]


class RangeCondition(Request):
    """Numbers or RFC 3339 dates, not both; one bound at least."""

    gt: Bound | None = None
    gte: Bound | None = None
    lt: Bound | None = None
    lte: Bound | None = None

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        given = [bound for bound in (self.gt, self.gte, self.lt, self.lte) if bound is not None]
        if not given:
            raise ValueError("give one of gt, gte, lt, lte at least")
        if len({isinstance(bound, str) for bound in given}) > 1:
            raise ValueError("the bounds are all numbers or all dates")
        return self

    def node(self, path: Path) -> Range:
        given = {name: getattr(self, name) for name in ("gt", "gte", "lt", "lte")}
        dates = any(isinstance(bound, str) for bound in given.values())
        return Range(path, Bounds(**{k: moment(b) if isinstance(b, str) else b for k, b in given.items()}), dates)


class Filter(Request):
    """All of `must`, none of `must_not`, one at least of `should` (where there are any). An empty filter keeps all."""

    must: list[Condition] = Field(default_factory=list)
    should: list[Condition] = Field(default_factory=list)
    must_not: list[Condition] = Field(default_factory=list)

    def clause(self) -> Clause:
        return _clause(self)


class Condition(Request):
    """A `key` with one of `match`, `any`, `except`, `range`, `exists`, `null`, `prefix`; or `ids`; or a filter again.

    A condition on a key holds where it holds for one element of the value: an array, at the key or on the way to it,
    stands for its elements.
    """

    key: Key = Field(
        default=ABSENT,
        description="a payload's key; nested ones by dots: seller.city. A name with a dot is put in double quotes",
    )
    match: Scalar = Field(default=ABSENT, description="the value is this one")
    any: list[Scalar] = Field(default=ABSENT, max_length=VALUES_MAX, description="the value is one of these")
    except_: list[Scalar] = Field(
        default=ABSENT,
        alias="except",
        max_length=VALUES_MAX,
        description="there is a value, not null and none of these",
    )
    range: RangeCondition = Field(default=ABSENT, description="the value is a number, or a date, within these bounds")
    exists: StrictBool = Field(default=ABSENT, description="whether the key is there, whatever its value")
    null: StrictBool = Field(default=ABSENT, description="whether the value is null; false: the opposite")
    prefix: Prefixed = Field(default=ABSENT, max_length=KEY_MAX, description="the value is a text that begins so")
    ids: list[MemoryId] = Field(default=ABSENT, max_length=IDS_MAX, description="the memory has one of these ids")
    must: list[Condition] = Field(default=ABSENT)
    should: list[Condition] = Field(default=ABSENT)
    must_not: list[Condition] = Field(default=ABSENT)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        given = {"except" if name == "except_" else name for name in self.model_fields_set}
        asked = [name for name in ASKS if name in given]
        if "key" in given and (len(asked) != 1 or len(given) > 2):
            raise ValueError(f"a key goes with one of {', '.join(ASKS)}, not with {_said(given - {'key'})}")
        if "key" not in given and asked:
            raise ValueError(f"{asked[0]} needs a key")
        if "ids" in given and len(given) > 1:
            raise ValueError(f"ids stand alone, not with {_said(given - {'ids'})}")
        if not given:
            raise ValueError("a condition has a key, ids, or must, should, must_not")
        return self

    def node(self) -> Node:
        given = self.model_fields_set
        if "ids" in given:
            return Ids(frozenset(self.ids))
        if "key" not in given:
            return _clause(self)
        path = path_of(self.key)
        if "match" in given:
            return AnyOf(path, Values.of([self.match]))
        if "any" in given:
            return AnyOf(path, Values.of(self.any))
        if "except_" in given:
            return Except(path, Values.of(self.except_))
        if "range" in given:
            return self.range.node(path)
        if "prefix" in given:
            return Prefix(path, self.prefix)
        node, holds = (Exists(path), self.exists) if "exists" in given else (Null(path), self.null)
        return node if holds else Clause(must_not=(node,))


def _clause(groups: Filter | Condition) -> Clause:
    return Clause(*(tuple(each.node() for each in getattr(groups, group) or ()) for group in GROUPS))


def _said(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _bounded(value: object) -> object:
    """Refuse what is too deep or too large before it is walked recursively."""
    level, conditions = [value], 0
    for depth in range(FILTER_DEPTH_MAX + 1):
        below: list[object] = []
        for each in level:
            groups = (each.get(group) for group in GROUPS) if isinstance(each, dict) else ()
            below += (part for parts in groups if isinstance(parts, list) for part in parts)
        conditions += len(below)
        if depth == FILTER_DEPTH_MAX and below:
            raise ValueError(f"is nested deeper than {FILTER_DEPTH_MAX}")
        if conditions > FILTER_CONDITIONS_MAX:
            raise ValueError(f"has more than {FILTER_CONDITIONS_MAX} conditions")
        level = below
    return value


FilterSpec = Annotated[Filter, BeforeValidator(_bounded)]
