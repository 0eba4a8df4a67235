"""Stored memories as callers ask for them: one, many, a page, a number; and their deletion."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from service.app.fields import (
    LIMIT_MAX,
    AtVersion,
    IdempotencyKey,
    MemoryId,
    Moment,
    Name,
    Payload,
    Reply,
    Request,
    Text,
    VectorOrNone,
)
from service.app.filter_schemas import IDS_MAX, FilterSpec
from service.app.schemas import ImageInput

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
    expires_at: str | None = Field(default=None, description="from then on it is not there any more; null: it stays")


class ScrollRequest(AtVersion):
    """Memories in the order in which they were first stored."""

    filter: FilterSpec | None = None
    limit: int = Field(default=10, ge=1, le=LIMIT_MAX)
    cursor: Cursor | None = Field(default=None, description="the reply's next_cursor, to go on where that page ended")


class ScrollReply(Reply):
    """`next_cursor` is null where nothing follows. Who goes on meets every memory that is there all the while, once."""

    version: int
    memories: list[MemoryInfo]
    next_cursor: str | None


class GetRequest(AtVersion):
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


class CountRequest(AtVersion):
    filter: FilterSpec | None = None


class CountReply(Reply):
    version: int
    count: int


class PatchRequest(Request):
    """What changes of a memory; what is absent stays. Only the spaces that a changed part fills are encoded again."""

    payload: Payload | None = Field(
        default=None, description="what changes of it: a key's null removes the key (RFC 7396); null removes it all"
    )
    payload_mode: Literal["merge", "replace"] = Field(
        default="merge", description="replace: the payload is all of it, not what changes"
    )
    text: Text | None = Field(default=None, description="null removes it, and its spaces")
    image: ImageInput | None = Field(default=None, description="null removes it, and its spaces")
    vectors: dict[Name, VectorOrNone] = Field(
        default_factory=dict, description="of spaces without an encoder; null: the memory has the space no more"
    )
    expires_at: Moment | None = Field(default=None, description="null: it stays")
    if_version: int | None = Field(default=None, ge=1, description="change it only if it is at this version")
    idempotency_key: IdempotencyKey | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.model_fields_set - {"payload_mode", "if_version", "idempotency_key"}:
            raise ValueError("nothing is to be changed: send payload, text, image, vectors or expires_at")
        return self


class DeleteOne(Request):
    """A single memory's deletion: its query."""

    if_version: int | None = Field(default=None, ge=1, description="delete it only if it is at this version")


class PatchReply(Reply):
    id: str
    version: int
    warnings: list[str]


class PayloadIndex(Reply):
    key: str
    memories: int = Field(description="those that have the key")
    bytes: int = Field(description="held in memory for it")


class PayloadIndexList(Reply):
    payload_indexes: list[PayloadIndex]
