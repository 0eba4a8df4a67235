"""What requests and replies are built of: strict models, binary content, vectors, names; and faults put into words.

Rules:
- Requests refuse unknown fields: a misspelt option is an error, never ignored.
- Binary content is `bytes` here and base64 in JSON; in process, bytes and arrays are passed as they are.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from service.core.filter import moment
from service.encoders.protocol import DIMENSION_MAX

BATCH_MAX = 1_000  # memories or cues in one request: a batch is decoded and held in memory whole
LIMIT_MAX = 1_000  # matches in one answer; a page a person or program can still use
GROUP_SIZE_MAX = 100  # matches of one group; more of them are what a filter on its value is for
SUPPORT_MAX = 4_096  # rows gathered per cue: at 3,072 values a row, 50 MB a cue
STEPS_MAX = 100  # updates of one recall; modern Hopfield dynamics settles in a handful
TEXT_MAX = 10_000  # characters of one text; every text tower here cuts far below it
PAYLOAD_BYTES_MAX = 64 * 2**10  # payloads are kept in memory beside the patterns
SPACES_MAX = 16
WAIT_MAX_S = 600.0  # of a request that waits for what is done in the background
KEY_MAX = 255  # characters of a request's own key: a UUID has 36, and an index of PostgreSQL's takes a third of a page
FAULTS_MAX = 10  # of a request with hundreds of faults the first ones are enough to mend it


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


class Reply(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)


class AtVersion(Request):
    """A read of what has been written up to a version at least."""

    min_version: int | None = Field(
        default=None, ge=0, description="read what was written up to this version at least, as a reply has given it"
    )
    timeout_s: float = Field(default=30, gt=0, le=WAIT_MAX_S, description="how long to wait for `min_version`")


def _to_bytes(value: object) -> object:
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("not valid base64") from None
    return value


def to_array(value: object) -> NDArray[np.float32]:
    """A list of numbers, or an array of one axis, as float32. A NaN passes: it is refused later, with a code of its
    own.
    """
    if isinstance(value, bytes):
        raise ValueError(f"packed values are float32, of 4 bytes each; these are {len(value)} bytes")
    if not isinstance(value, (list, np.ndarray)):
        raise ValueError("a vector is a list of numbers")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise ValueError("a vector is a list of numbers") from None
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise ValueError("a vector is a list of numbers")
    if not 1 <= array.shape[0] <= DIMENSION_MAX:
        raise ValueError(f"a vector has 1 to {DIMENSION_MAX} values, this has {array.shape[0]}")
    with np.errstate(over="ignore"):  # what does not fit float32 becomes infinite and is refused as such
        return array.astype(np.float32)


BASE64 = {"type": "string", "contentEncoding": "base64"}
FLOATS: dict[str, Any] = {"type": "array", "items": {"type": "number", "format": "float"}}
Base64 = Annotated[
    bytes,
    BeforeValidator(_to_bytes),
    PlainSerializer(lambda data: base64.b64encode(data).decode(), return_type=str),
    WithJsonSchema(BASE64),
]
if TYPE_CHECKING:
    Vector = NDArray[np.float32]
else:
    # Not `list[float]`: checking 784 values one by one takes longer than the search they are for.
    Vector = Annotated[
        Any,
        BeforeValidator(to_array),
        WithJsonSchema({**FLOATS, "minItems": 1, "maxItems": DIMENSION_MAX}),
    ]
VectorList = Annotated[list[float], WithJsonSchema(FLOATS)]
"""A vector in a reply: values that are float32."""
Base64Text = Annotated[str, WithJsonSchema(BASE64)]
"""Bytes in a reply that is not checked."""
if TYPE_CHECKING:
    VectorOrNone = NDArray[np.float32] | None
else:
    VectorOrNone = Annotated[
        Any,
        BeforeValidator(lambda value: None if value is None else to_array(value)),
        WithJsonSchema({"anyOf": [{**FLOATS, "minItems": 1, "maxItems": DIMENSION_MAX}, {"type": "null"}]}),
    ]


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = moment("9999-12-31T23:59:59.999999Z")
_ZONED = re.compile(r".{10}[Tt ].*([Zz]|[+-]\d\d:\d\d)")


def _to_moment(value: object) -> object:
    """A date and time with its zone (in process also a `datetime`) as microseconds since 1970."""
    if isinstance(value, datetime) and value.tzinfo is not None:
        return (value - EPOCH) // timedelta(microseconds=1)
    found = moment(value) if isinstance(value, str) and _ZONED.fullmatch(value) else None
    if found is None or _LAST is None or found > _LAST:
        raise ValueError("is a date and time with its zone, as in 2030-12-31T23:59:59Z (RFC 3339)")
    return found


def as_datetime(microseconds: int) -> datetime:
    """Raises `OverflowError` beyond the years 1 to 9999."""
    return EPOCH + timedelta(microseconds=microseconds)


def as_date(microseconds: int) -> str:
    """A moment as replies say it."""
    return as_datetime(microseconds).isoformat()


Moment = Annotated[
    int,
    BeforeValidator(_to_moment),
    WithJsonSchema({"type": "string", "format": "date-time", "description": "RFC 3339, with its zone"}),
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$", description="letters, digits, _ . -")]


def _check_id(value: str) -> str:
    if value != value.strip() or not value.isprintable():
        raise ValueError("an id has no surrounding space and no control characters")
    if value.endswith("/content"):
        raise ValueError("an id cannot end in /content: that address is its original's")
    return value


MemoryId = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_check_id)]


def _check_key(value: str) -> str:
    if not value.isprintable():
        raise ValueError("a key has printable characters alone")
    return value


IdempotencyKey = Annotated[
    str,
    Field(
        min_length=1, max_length=KEY_MAX,
        description="of the caller's making, one for each request: the same request under the same key within a day is "
        "done once, and answered alike. Over HTTP also the header Idempotency-Key",
    ),
    AfterValidator(_check_key),
]  # fmt: skip


def _check_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("a text has no NUL character: PostgreSQL keeps none")
    return value


Text = Annotated[str, Field(max_length=TEXT_MAX), AfterValidator(_check_text)]
Payload = dict[str, Any]


class ValidationFailure(Protocol):
    def errors(self) -> Sequence[Any]: ...


def faults(error: ValidationFailure) -> str:
    """What validation found, a clause each: `cue.text: String should have at most 10000 characters`."""
    found = error.errors()
    clauses = []
    for fault in found[:FAULTS_MAX]:
        where = ".".join(str(part) for part in fault["loc"] if part != "body")
        message = str(fault["msg"]).removeprefix("Value error, ")
        if fault["type"] == "string_pattern_mismatch":
            message = (
                f"a name has letters, digits, _ . and -, begins with a letter or digit, and is not {fault['input']!r}"
            )
        elif fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
            name = str(fault["ctx"]["discriminator"]).strip("'")
            tags = fault["ctx"].get("expected_tags")
            where = f"{where}.{name}" if where else name
            message = f"is one of {tags}, not {fault['ctx']['tag']!r}" if tags else "is missing"
        elif fault["type"] == "extra_forbidden":
            message = "is not a field of this request"
        clauses.append(f"{where}: {message}" if where else message)
    if len(found) > FAULTS_MAX:
        clauses.append(f"and {len(found) - FAULTS_MAX} more")
    return "; ".join(dict.fromkeys(clauses))
