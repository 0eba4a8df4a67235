"""What a request asks for, under the key that its caller gave it (see `storage.receipts`).

Rules:
- The digest is of what is to be stored. How long to wait for it is not part of that, nor is the form in which it came:
  JSON, or the parts of a form, whose boundaries differ each time it is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson
from pydantic import BaseModel

from service.storage.receipts import Asked


def asked(key: str | None, parts: Iterable[object]) -> Asked | None:
    """The request of which `parts` are what it asks for; None without a key."""
    if key is None:
        return None
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_packed(part))
        digest.update(b"\n")
    return Asked(key, digest.hexdigest())


def _packed(part: object) -> bytes:
    try:
        return orjson.dumps(part, default=_plain, option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError, RecursionError):
        return b"?"  # it is no JSON: the item will be refused, whatever it is


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, np.ndarray):
        return [value.dtype.str, *value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in sorted(value.model_fields_set)}
    raise TypeError
