"""Encoding items of any collections together, and remembering vectors by what they were made of.

Strategy: every (encoder, source) is run once over all items that need it; spaces that share an encoder share its rows.
A row is kept under the encoder's fingerprint and the sha-256 of the bytes it was made of, so that the same picture or
sentence is never encoded twice while it is remembered.

Rules:
- A bad item fails alone: an encoder refuses a batch whole, so after a refusal each item is tried by itself.
- An error that is none of ours is logged, and fails the item it belongs to, not those that happened to share a batch.
- A remembered row comes with its warnings: what was lost of a text is said every time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from service.encoders.halving import is_out_of_memory
from service.encoders.protocol import Encoder, Picture, Source
from service.errors import EngramError, OutOfMemory
from service.observability import Metrics

log = structlog.get_logger()

Vectors = dict[str, NDArray[np.float32]]
Row = tuple[NDArray[np.float32], tuple[str, ...]]
"""A vector, (dimension,), and what was lost in making it."""

Need = tuple[str, Source]
"""An encoder by its fingerprint, and the part of an item that it reads."""

Wanted = Mapping[str, tuple[Encoder, Source]]
"""Space → what fills it, and from which part of the item."""

ENTRY_BYTES = 500
"""What a remembered row takes beside its vector's values: keys, objects, its place in the order (measured: 470)."""


@dataclass(eq=False)
class Parts:
    """What a cue or a memory consists of, read and checked, before encoding.

    `content` names the bytes that the picture (with its mask) was read from, where its rows may be remembered. `known`
    are rows that are there already: a picture of which no more is needed may be None.
    """

    picture: Picture | None = None
    text: str | None = None
    vectors: Vectors = field(default_factory=dict)
    content: str | None = None
    known: dict[Need, Row] = field(default_factory=dict)


def content_of(image: bytes, mask: bytes | None = None) -> str:
    """The name of a picture file's content, and its mask's."""
    name = hashlib.sha256(image).hexdigest()
    return name if mask is None else f"{name}:{hashlib.sha256(mask).hexdigest()}"


class EncodeCache:
    """Rows by what they were made of, at most `bytes_max` of them; the one used longest ago goes first. Thread-safe."""

    def __init__(self, bytes_max: int, metrics: Metrics) -> None:
        self._bytes_max = bytes_max
        self._metrics = metrics
        self._rows: OrderedDict[tuple[Need, str], Row] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return self._bytes

    def look_up(self, parts: Parts, wanted: Wanted) -> None:
        """Add the rows that are remembered to what is known of an item."""
        for encoder, source in wanted.values():
            need = (encoder.fingerprint, source)
            content = _content(parts, source)
            if need in parts.known or content is None:
                continue
            with self._lock:
                row = self._rows.get((need, content))
                if row is not None:
                    self._rows.move_to_end((need, content))
                    parts.known[need] = row

    def count(self, encoder: Encoder, source: Source, hit: bool) -> None:
        self._metrics.looked_up(encoder.name, source, hit)

    def count_batch(self, encoder: Encoder, source: Source, items: int) -> None:
        self._metrics.encode_batch.labels(encoder.name, source).observe(items)

    def keep(self, parts: Parts, need: Need, row: Row) -> None:
        content = _content(parts, need[1])
        if content is None:
            return
        vector = row[0].copy()  # a row is a view of its batch, which must not stay for its sake
        vector.setflags(write=False)
        with self._lock:
            if (need, content) in self._rows:
                return
            self._rows[need, content] = (vector, row[1])
            self._bytes += _size(vector, row[1])
            while self._bytes > self._bytes_max:
                _, (gone, warnings) = self._rows.popitem(last=False)
                self._bytes -= _size(gone, warnings)


def encode(
    items: Sequence[tuple[Parts, Wanted]], cache: EncodeCache | None = None
) -> list[tuple[Vectors, list[str]] | EngramError]:
    """Each item's vectors by space, with what was lost; or why it could not be encoded."""
    needing: dict[tuple[Encoder, Source], list[int]] = defaultdict(list)
    for i, (parts, wanted) in enumerate(items):
        if cache is not None:
            cache.look_up(parts, wanted)
        for encoder, source in set(wanted.values()):
            known = (encoder.fingerprint, source) in parts.known
            if not known:
                needing[encoder, source].append(i)
            if cache is not None:
                cache.count(encoder, source, hit=known)
    failed: dict[int, EngramError] = {}
    for (encoder, source), members in needing.items():
        need = (encoder.fingerprint, source)
        if cache is not None:
            cache.count_batch(encoder, source, len(members))
        for i, row in zip(members, _run(encoder, source, [items[i][0] for i in members]), strict=True):
            if isinstance(row, EngramError):
                failed[i] = row
                continue
            items[i][0].known[need] = row
            if cache is not None:
                cache.keep(items[i][0], need, row)
    outcomes: list[tuple[Vectors, list[str]] | EngramError] = []
    for i, (parts, wanted) in enumerate(items):
        if i in failed:
            outcomes.append(failed[i])
            continue
        found = {name: parts.known[encoder.fingerprint, source] for name, (encoder, source) in wanted.items()}
        lost = dict.fromkeys(warning for _, warnings in found.values() for warning in warnings)
        outcomes.append(({name: vector for name, (vector, _) in found.items()}, list(lost)))
    return outcomes


def run_once(encoder: Encoder) -> None:
    """Encode one tiny item of each kind the encoder takes: what its first run makes or loads is there afterwards."""
    if "image" in encoder.takes:
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        pixels[:, 32:] = 255  # a uniform picture may leave nothing to encode
        encoder.encode_images([Picture(pixels)])
    if "text" in encoder.takes:
        encoder.encode_texts(["a photo"])


def _run(encoder: Encoder, source: Source, parts: Sequence[Parts]) -> list[Row | EngramError]:
    if not parts:
        return []
    try:
        if source == "image":
            encoded = encoder.encode_images([part.picture for part in parts if part.picture is not None])
        else:
            encoded = encoder.encode_texts([part.text for part in parts if part.text is not None])
        return list(zip(encoded.vectors, encoded.warnings or [()] * len(parts), strict=True))
    except EngramError as error:
        failure = error
    except Exception as error:
        if is_out_of_memory(error):
            failure = OutOfMemory(f"the encoder {encoder.name} has no memory left for this item")
        else:
            if len(parts) == 1:
                log.exception("an encoder failed", encoder=encoder.name, source=source)
            detail = f"the encoder {encoder.name} met an error of its own; the server's log has the details"
            failure = EngramError(detail)
    if len(parts) == 1:
        return [failure]
    # Not within `except`, whose traceback would keep the batch's tensors.
    return [row for part in parts for row in _run(encoder, source, [part])]


def _content(parts: Parts, source: Source) -> str | None:
    if source == "image":
        return parts.content
    return None if parts.text is None else hashlib.sha256(parts.text.encode()).hexdigest()


def _size(vector: NDArray[np.float32], warnings: tuple[str, ...]) -> int:
    return vector.nbytes + sum(map(len, warnings)) + ENTRY_BYTES
