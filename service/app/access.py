"""Who may do what, as rules over plain values: REST and gRPC ask the same function.

Rules:
- A scope names a collection, a beginning of names (`photos-*`) or everything (`*`), and gives a level there. Where
  several fit a collection the longest one decides, so a key that may write everything can be held to reading one.
- Each level includes those before it: read, write, admin.
- What an operation needs is told from the request alone, before anything is looked up: a refusal never says whether the
  collection is there.
- An operation that belongs to no collection, or to one that is gone, needs its level on everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from service.errors import Forbidden

Level = Literal["read", "write", "admin"]

EVERYTHING = "*"
RANKS: Mapping[str | None, int] = {None: 0, "read": 1, "write": 2, "admin": 3}


@dataclass(frozen=True)
class Need:
    """The level that an operation needs, on the collection that the request names, on everything, or anywhere: then
    what is answered is only what the caller may read.
    """

    level: Level
    on: Literal["collection", "everything", "anywhere"] = "collection"


@dataclass(frozen=True)
class Caller:
    """Whoever asks. `name` is None where no key was asked for; limits are those of the key's own."""

    name: str | None
    scopes: Mapping[str, Level]
    key_id: str | None = None
    rate_limit: str | None = None
    concurrent_max: int | None = None

    def level(self, collection: str) -> Level | None:
        """What this caller may do with a collection (`*`: with everything)."""
        if (level := self.scopes.get(collection)) is not None:
            return level
        fitting = [scope for scope in self.scopes if scope.endswith("*") and collection.startswith(scope[:-1])]
        return self.scopes[max(fitting, key=len)] if fitting else None

    def may_read(self, collection: str | None) -> bool:
        return self.level(collection or EVERYTHING) is not None


OWNER = Caller(None, {EVERYTHING: "admin"})
"""Who has the data folder open, and whoever asks a server that has no keys."""

CALLER: ContextVar[Caller] = ContextVar("caller", default=OWNER)
"""Who the work under way is done for."""


def check(caller: Caller, need: Need, collection: str | None = None) -> None:
    """Raises `Forbidden`, naming the scope that is missing."""
    if need.on == "anywhere":
        return  # a key has some scope, and none gives less than reading
    target = EVERYTHING if collection is None or need.on == "everything" else collection
    level = caller.level(target)
    if RANKS[level] < RANKS[need.level]:
        has = "has none there" if level is None else f"has {level} there"
        raise Forbidden(f"this needs the scope {need.level} on {target}; the key {caller.name} {has}")
