"""Stored memories as callers ask for them: one, many, a page, a number; and their deletion."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from service.app.fields import LIMIT_MAX, MemoryId, Payload, Reply, Request
from service.app.filter_schemas import IDS_MAX, FilterSpec

DELETED_LISTED_MAX = 10_000  # ids in one reply; more are counted


def _is_cursor(value: str) -> str:
    if re.fullmatch("[0-9a-f]{1,15}", value) is None:  # a place in the order of memories; within 64 bits
        raise ValueError("is not a next_cursor that a scroll has given")
    return value


Cursor = Annotated[str, AfterValidator(_is_cursor)]


class MemoryInfo(Reply):
    id: str
    version: int
    text: str | None
    payload: Payload | None
    spaces: list[str]
    has_content: bool = Field(description="whether its original bytes can be had at …/content")
    media_type: str | None
    created_at: str
    updated_at: str


class ScrollRequest(Request):
    """Memories in the order in which they were first stored."""

    filter: FilterSpec | None = None
    limit: int = Field(default=10, ge=1, le=LIMIT_MAX)
    cursor: Cursor | None = Field(default=None, description="the reply's next_cursor, to go on where that page ended")


class ScrollReply(Reply):
    """`next_cursor` is null where nothing follows. Who goes on meets every memory that is there all the while, once."""

    version: int
    memories: list[MemoryInfo]
    next_cursor: str | None


class GetRequest(Request):
    ids: list[MemoryId] = Field(min_length=1, max_length=LIMIT_MAX)


class GetReply(Reply):
    """Those that exist, in the order asked for, each once."""

    version: int
    memories: list[MemoryInfo]


class DeleteRequest(Request):
    """By ids, or all that a filter keeps."""

    ids: list[MemoryId] | None = Field(default=None, min_length=1, max_length=IDS_MAX)
    filter: FilterSpec | None = None
    dry_run: bool = Field(default=False, description="say what would be deleted, and delete nothing")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("send either ids or a filter")
        if self.filter is not None and self.filter.clause().empty:
            raise ValueError("an empty filter keeps all; to delete all memories, delete the collection")
        return self


class DeleteReply(Reply):
    version: int
    count: int = Field(description="how many were deleted, or would be")
    deleted: list[str] = Field(description=f"their ids, the first {DELETED_LISTED_MAX:,} of them")


class CountRequest(Request):
    filter: FilterSpec | None = None


class CountReply(Reply):
    version: int
    count: int
