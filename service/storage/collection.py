"""A collection's row, as everything that reads one sees it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select

from service.storage.tables import collections, memories

HIDDEN = "~"
"""What the names of collections begin with that nobody is to see (see `copies`); no caller's name may."""


@dataclass(frozen=True)
class Collection:
    """`version` is the number of its last write, `count` the number of its memories, `generation` how often an encoder
    of it has changed."""

    id: int
    name: str
    config: dict[str, Any]
    version: int
    created_at: datetime
    count: int
    generation: int = 0
    revision: int = 0


def collection_rows() -> Select[Any]:
    """The columns of `Collection`, of all of them."""
    c = collections.c
    count = select(func.count()).where(memories.c.collection_id == c.id).scalar_subquery()
    return select(c.id, c.name, c.config, c.version, c.created_at, count, c.generation, c.revision)
