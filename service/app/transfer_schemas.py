"""What is said about an import and an export: the header of a file of rows, the options, the lines of an answer.

A row has `id`, `text`, `payload`, `vectors`, `content` (the original's bytes), `expires_at` and, of an export,
`media_type`, `created_at`, `updated_at` and `version`, which an import passes over: they are the other collection's
history.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from service.app.fields import Reply, Request
from service.app.filter_schemas import FilterSpec

Format = Literal["ndjson", "parquet", "arrow"]
MEDIA_TYPES: dict[Format, str] = {
    "ndjson": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.stream",
}
HEADER = "engram"  # the first line's one key in NDJSON; the key in the metadata of an Arrow or a Parquet schema
HISTORY = ("media_type", "created_at", "updated_at", "version")
ROW_MAX = 2**53  # the largest number that every JSON reader keeps
REFUSALS_LISTED_MAX = 100  # in the last line; every one has a line of its own besides


class SpaceOfRows(BaseModel):
    """A space as it was where the rows come from."""

    model_config = ConfigDict(extra="ignore")

    encoder: str | None = None
    fingerprint: str | None = None
    dimension: int | None = None


class Header(BaseModel):
    """Where rows come from. What a newer version adds is passed over."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    collection: str | None = None
    version: int | None = None
    config: dict[str, Any] | None = None
    spaces: dict[str, SpaceOfRows] = Field(default_factory=dict)


class ExportRequest(Request):
    format: Format = "ndjson"
    vectors: bool = Field(default=True, description="with the vectors of every space")
    content: bool = Field(default=False, description="with the originals' bytes")
    filter: FilterSpec | None = None


def _check_prefix(value: str) -> str:
    if value != value.lstrip() or not value.isprintable():
        raise ValueError("an id has no surrounding space and no control characters")
    return value


class ImportOptions(Request):
    """`offset`: how many rows of a longer file come before this body's first, for the numbers that rows have."""

    from_row: int = Field(default=1, ge=1, le=ROW_MAX, description="rows of the body before this one are passed over")
    offset: int = Field(default=0, ge=0, le=ROW_MAX, description="rows of a longer file that come before this body")
    prefix: Annotated[str, AfterValidator(_check_prefix)] | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="rows without an id get this and their number as one; absent: an id is made, and such rows are "
        "refused where an import is gone on with, which could store them twice",
    )


class ImportStarted(Reply):
    """The first line: the rows can be read."""

    event: Literal["started"] = "started"
    collection: str
    format: Format
    encoded: list[str] = Field(
        description="spaces whose vectors are made here, from texts and originals: the rows bring none by this encoder"
    )


class Totals(Reply):
    """`durable_row`: this row and all before it are on disk and answered, or refused."""

    event: str
    rows: int
    stored: int
    updated: int
    refused: int
    durable_row: int
    version: int | None


class ImportProgress(Totals):
    event: Literal["progress"] = "progress"


class Refusal(Reply):
    event: Literal["refused"] = "refused"
    row: int
    id: str | None
    code: str
    detail: str


class ImportDone(Totals):
    """The last line. `refusals`: the first of them."""

    event: Literal["done"] = "done"
    seconds: float
    refusals: list[Refusal]


class ImportFailed(Totals):
    """The last line of an import that could not go on: what is durable stays."""

    event: Literal["failed"] = "failed"
    status: int
    code: str
    detail: str


Event = ImportStarted | ImportProgress | Refusal | ImportDone | ImportFailed
