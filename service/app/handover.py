"""Pictures that were decoded to check them, kept for who encodes them.

A store request decodes its pictures to refuse the bad ones at once, and its job needs them decoded again moments later.

Rules:
- Bounded by `PIXELS_MAX`. What finds no room is decoded again: the first ones in are the first ones needed.
- Nobody may come for a picture (its job was cancelled, its vectors are remembered): after `STALE_S` it makes room.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from service.encoders.protocol import Picture

PIXELS_MAX = 32 * 2**20  # 100 MB: a batch or two of photographs of a megapixel or less
STALE_S = 60.0  # some batches of a slow model


@dataclass(frozen=True, eq=False)
class _Kept:
    picture: Picture
    pixels: int
    since_s: float


class Handover:
    """Pictures by their content. Thread-safe."""

    def __init__(self, pixels_max: int = PIXELS_MAX) -> None:
        self._pixels_max = pixels_max
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the oldest first
        self._pixels = 0
        self._lock = threading.Lock()

    def give(self, content: str, picture: Picture) -> None:
        now, pixels = time.monotonic(), picture.pixels[..., 0].size
        with self._lock:
            self._forget(content)
            while self._kept and now - next(iter(self._kept.values())).since_s > STALE_S:
                self._forget(next(iter(self._kept)))
            if self._pixels + pixels <= self._pixels_max:
                self._kept[content] = _Kept(picture, pixels, now)
                self._pixels += pixels

    def take(self, content: str) -> Picture | None:
        """The picture, which is not kept any longer."""
        with self._lock:
            kept = self._forget(content)
        return None if kept is None else kept.picture

    def _forget(self, content: str) -> _Kept | None:
        kept = self._kept.pop(content, None)
        if kept is not None:
            self._pixels -= kept.pixels
        return kept
