"""What rows of an import are once they are read, and what is wrong with those that are not.

Rules:
- A batch holds vectors as one array per space, and everything else by row.
- A space of which vectors are passed over has no dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from service.app.fields import faults
from service.app.transfer_schemas import HEADER, Header
from service.errors import EngramError, InvalidRequest, UnknownSpace, WrongDimension

BATCH_ROWS = 1_000  # one transaction: a tenth of a second, which is how long another write may wait
BATCH_BYTES = 8 * 2**20
READ_BYTES = 2**20
VECTORS = "vectors."  # what a column of vectors is named with, before its space
Numbers = NDArray[np.float32]
Dimensions = Mapping[str, int | None]
"""Of the spaces that there are; None where the vectors that come for it are not taken."""


class Readable(Protocol):
    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, and none at the end alone."""


@dataclass(frozen=True)
class Fields:
    """A row but for its vectors."""

    id: str | None
    text: str | None
    payload: Any
    content: bytes | None
    expires_at: int | None  # in microseconds since 1970


@dataclass(frozen=True, eq=False)
class Block:
    """The vectors of a space: (rows, dimension) float32, and which rows have one, (rows,)."""

    values: Numbers
    has: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of the body from number `first` on (1 is the body's first)."""

    first: int
    rows: list[Fields | EngramError]
    vectors: dict[str, Block]


@dataclass(frozen=True, eq=False)
class Rows:
    """`header`: what the rows say of where they come from."""

    header: Header
    batches: Iterator[Batch]


def read_header(value: object) -> Header:
    """Raises `InvalidRequest`."""
    try:
        return Header.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest(f"{HEADER}: {faults(error)}") from None


def no_space(name: str, dimensions: Iterable[str]) -> EngramError:
    return UnknownSpace(f"there is no space {name}; there are {', '.join(dimensions)}")


def wrong_dimension(name: str, dimension: int, found: int) -> WrongDimension:
    return WrongDimension(f"space {name} takes {dimension} values, this vector has {found}")
