"""What of a memory is checked beyond its schema, when it is stored and when it is changed.

Each raises the `EngramError` that says what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.app.cues import check_vector
from service.app.fields import PAYLOAD_BYTES_MAX, as_date
from service.app.live import LiveCollection
from service.errors import EmptyText, InvalidRequest
from service.storage.memories import microseconds_now

NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # as JSON writes it, and no backslash before a "u0000" of the text's own


def check_text(text: str) -> None:
    if not text.strip():
        raise EmptyText("the text has no characters but spaces")


def check_payload(payload: Mapping[str, Any]) -> None:
    if len(_packed(payload)) > PAYLOAD_BYTES_MAX:
        raise InvalidRequest(f"the payload is larger than {PAYLOAD_BYTES_MAX} bytes")


def check_moment(expires_at: int | None) -> None:
    if expires_at is not None and expires_at <= microseconds_now():
        raise InvalidRequest(f"expires_at: {as_date(expires_at)} is in the past")


def check_vectors(vectors: Mapping[str, NDArray[np.float32]], live: LiveCollection) -> dict[str, NDArray[np.float32]]:
    """Of spaces that callers fill."""
    for name in vectors:
        check_callers_space(name, live)
    return {name: check_vector(vector, name, live) for name, vector in vectors.items()}


def check_callers_space(name: str, live: LiveCollection) -> None:
    """That a space, if there is such a one, has no encoder."""
    if name in live.spaces and (encoder := live.spaces[name].config.encoder) is not None:
        raise InvalidRequest(f"space {name} is filled by its encoder {encoder}; send the image or text instead")


def _packed(payload: Mapping[str, Any]) -> bytes:
    try:
        json.dumps(payload, allow_nan=False)  # orjson would write a NaN as null, and say nothing
        packed = orjson.dumps(payload)
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest(
            "the payload is not JSON with finite numbers of at most 64 bits, 254 levels deep"
        ) from None
    if NUL.search(packed):
        raise InvalidRequest("the payload holds the character U+0000, where SQL's texts end: no filter would find it")
    return packed
