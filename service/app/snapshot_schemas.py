"""The snapshots' part of the contract: what is asked for, what is told of one; and the lines inside a snapshot's file.

Rules:
- What a file holds was written by anybody: each line is checked as a request is, field by field, before it is used.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from service.app.fields import SPACES_MAX, MemoryId, Name, Payload, Reply, Request, Text
from service.app.schemas import Problem
from service.encoders.protocol import DIMENSION_MAX

FORMAT, FORMAT_VERSION = "engram-snapshot", 1

EVERY_MIN_S = 60  # a whole copy each: oftener a collection of some size would be copied all the time
EVERY_MAX_S = 366 * 24 * 3600  # what comes less than once a year is no schedule, but a diary
KEEP_MAX = 1_000  # their ids are in one row, and a list of more is read by nobody

SnapshotId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[int, Field(ge=0, lt=2**62, strict=True)]


class SnapshotInfo(Reply):
    """A snapshot that is kept. `sha256` is of all of the file but its last 2,048 bytes, which say it."""

    id: str
    collection: str = Field(description="where it is kept: what it was made of may have had another name")
    size_bytes: int
    sha256: str
    made_of: str = Field(description="the collection that it was made of")
    version: int = Field(description="the version that it is of")
    made_at: str
    memories: int
    originals: int
    originals_missing: int = Field(description="originals that were named and not there, or damaged, when it was made")
    spaces: dict[str, str | None] = Field(description="each space's encoder, as a fingerprint; null: callers' vectors")


class SnapshotList(Reply):
    """`damaged`: those that cannot be read, by their names, with why."""

    snapshots: list[SnapshotInfo]
    damaged: dict[str, Problem]


class ScheduleRequest(Request):
    """PUT …/snapshot_schedule."""

    every_s: int = Field(ge=EVERY_MIN_S, le=EVERY_MAX_S, description="seconds from one snapshot to the next")
    keep: int = Field(default=7, ge=1, le=KEEP_MAX, description="how many of those that it makes are kept: the newest")


class SnapshotSchedule(Reply):
    """When snapshots of a collection are made, and what became of the last one."""

    every_s: int
    keep: int
    next_at: str = Field(description="when the next one is due")
    operation: str | None = Field(description="of the one under way")
    snapshot: str | None = Field(description="the last that was made, and is kept")
    made_at: str | None = Field(description="when a last one was made")
    failed_at: str | None = Field(description="null unless the last one that was tried failed")
    error: Problem | None = Field(description="why it failed")


class RestoreRequest(Request):
    """POST …/snapshots/{s}/restore. Over the collection that it is kept under, or into another name."""

    into: Name | None = Field(default=None, description="the collection to be; absent: the one it is kept under")
    replace: bool = Field(default=False, description="it may take the place of a collection that holds memories")


class RestoreRecord(Reply):
    """What a restore did. `problems`: by space, why its encoder cannot be used here, and what to run."""

    collection: str
    snapshot: str
    memories: int
    originals: int
    originals_missing: int
    problems: dict[str, Problem]
    seconds: float
    version: int | None = None


# --- inside a file ----------------------------------------------------------------------------------------------------


class SnapshotHead(Request):
    """snapshot.json. `config` is the collection's row; `spaces` the dimension of each."""

    format: Literal["engram-snapshot"]
    format_version: Literal[1]
    engram: str = Field(max_length=100)
    collection: Name
    version: Number
    made_at: datetime
    created_at: datetime
    generation: int = Field(ge=0, lt=2**31)
    memories: Number
    kernels: int = Field(ge=0, lt=10**6)
    gates: int = Field(ge=0, lt=10**4)
    spaces: dict[Name, Annotated[int, Field(ge=1, le=DIMENSION_MAX)]] = Field(min_length=1, max_length=SPACES_MAX)
    config: dict[str, Any]


class KernelLine(Request):
    """kernels/….json; its weight is beside it."""

    space: Name
    number: int = Field(ge=1, lt=2**31)
    objective: str = Field(max_length=100)
    status: Literal["active", "retired", "dropped"]
    rows: int = Field(ge=1, le=DIMENSION_MAX)
    dimension: int = Field(ge=1, le=DIMENSION_MAX)
    record: dict[str, Any]
    created_at: datetime


class GateLine(Request):
    """gates/….json"""

    modality: str = Field(max_length=4_000)
    record: dict[str, Any]
    created_at: datetime


MEDIA_TYPES = Literal["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff"]


class MemoryLine(Request):
    """A line of memories/….ndjson. `spaces`: those that have a row in patterns/<space>/, in the lines' order."""

    id: MemoryId
    version: Number
    text: Text | None
    payload: Payload | None
    original: Sha256 | None
    media_type: MEDIA_TYPES | None
    created_at: datetime
    updated_at: datetime
    expires_at: Annotated[int, Field(ge=-(2**62), lt=2**62, strict=True)] | None = Field(
        default=None, description="in microseconds since 1970"
    )
    spaces: list[Name] = Field(max_length=SPACES_MAX)
