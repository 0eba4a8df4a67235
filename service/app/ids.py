"""The ids that we give memories: UUIDs of version 7 (RFC 9562), in the order in which they are made."""

from __future__ import annotations

import secrets
import threading
import time
import uuid

_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """48 bits of milliseconds, 12 of the millisecond's 4,096th parts (the RFC's method 3), the rest at random.

    Of two made in one process the later is the larger, also where the clock stands still or goes back.
    """
    global _last
    with _lock:
        _last = max(_last + 1, time.time_ns() * 4096 // 1_000_000)
        ticks = _last
    value = (ticks >> 12) << 80 | 7 << 76 | (ticks & 0xFFF) << 64 | 2 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=value))
