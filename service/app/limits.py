"""How much a key, or an address without one, may ask: requests in a window of time, and requests at once.

Counted in this process: several servers on one database each allow as much.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from functools import lru_cache

from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from service.errors import RateLimited
from service.settings import rates

BUSY_RETRY_S = 1  # a request at once too many: most requests are done in less

_rates = lru_cache(maxsize=1024)(rates)


class Limiter:
    """`rate_limit` and `concurrent_max` hold where a key has none of its own. Safe to use from several threads."""

    def __init__(self, rate_limit: str | None, concurrent_max: int | None) -> None:
        self._rate_limit = rate_limit
        self._concurrent_max = concurrent_max
        self._windows = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, who: str, rate_limit: str | None = None) -> None:
        """Count a request. Raises `RateLimited`; a request that is refused is not counted."""
        limit = rate_limit or self._rate_limit
        if limit is None:
            return
        windows = _rates(limit)
        with self._lock:  # else two would pass the look and then be counted
            for window in windows:
                if not self._windows.test(window, who):
                    raise self._refusal(window, who)
            for window in windows:
                self._windows.hit(window, who)

    def start(self, who: str, concurrent_max: int | None = None) -> None:
        """A request begins; `end` is to follow. Raises `RateLimited`."""
        most = concurrent_max or self._concurrent_max
        with self._lock:
            if most is not None and self._running[who] >= most:
                raise RateLimited(f"{most} requests are under way already", retry_after_s=BUSY_RETRY_S)
            self._running[who] += 1

    def end(self, who: str) -> None:
        with self._lock:
            self._running[who] -= 1
            if not self._running[who]:
                del self._running[who]

    def _refusal(self, window: RateLimitItem, who: str) -> RateLimited:
        found = self._windows.get_window_stats(window, who)
        wait_s = max(1, math.ceil(found.reset_time - time.time()))
        return RateLimited(
            f"{window} are allowed; ask again in {wait_s} s", retry_after_s=wait_s,
            allowance=(window.amount, found.remaining, wait_s),
        )  # fmt: skip
