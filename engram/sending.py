"""Memories and cues as they are sent: their pictures read, in requests of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

from engram.pictures import sent_image
from engram.replies import Problem, StoredItem
from engram.steps import Steps, Work
from engram.transport import Body
from service.errors import EngramError, InvalidRequest

Item = TypeVar("Item")

BATCH_BYTES_MAX = 24 * 2**20  # pictures in one request: well under what a server accepts by default (64 MiB)

Request = list[Body | StoredItem]
"""Memories, each as it is sent, or already with its answer where it could not be."""


def store_requests(memories: Iterable[Mapping[str, Any]], count_max: int) -> Iterator[Request]:
    """Memories with their pictures read, in bounded lists; one whose picture cannot be read is its own answer."""
    if count_max < 1:
        raise InvalidRequest(f"batch is {count_max}, and must be at least 1")
    return in_requests(map(_sent_memory, memories), count_max, picture_bytes)


def in_requests(items: Iterable[Item], count_max: int, bytes_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of at most `count_max` items, and of pictures of at most `BATCH_BYTES_MAX` where they are several."""
    some: list[Item] = []
    size_bytes = 0
    for item in items:
        item_bytes = bytes_of(item)
        if some and (len(some) == count_max or size_bytes + item_bytes > BATCH_BYTES_MAX):
            yield some
            some, size_bytes = [], 0
        some.append(item)
        size_bytes += item_bytes
    if some:
        yield some


def picture_bytes(item: Body | StoredItem) -> int:
    if not isinstance(item, dict):
        return 0
    return sum(len(item[name]["base64"]) for name in ("image", "mask") if name in item)


def _sent_memory(memory: Mapping[str, Any]) -> Body | StoredItem:
    try:
        return with_pictures(memory)
    except EngramError as error:
        return StoredItem(memory.get("id"), "error", error=Problem(error.code, error.detail))


def sent_cues(cues: list[Mapping[str, Any]]) -> Steps[list[Body]]:
    def read() -> list[Body]:
        return [with_pictures(cue) for cue in cues]

    if any(cue.get(name) is not None for cue in cues for name in ("image", "mask")):
        sent: list[Body] = yield Work(read)
        return sent
    return read()


def with_pictures(fields: Mapping[str, Any]) -> Body:
    """What is given of a memory or a cue, its pictures read."""
    return {name: _sent(name, value) for name, value in fields.items() if value is not None}


def _sent(name: str, value: Any) -> Any:
    if name in ("image", "mask"):
        return sent_image(value)
    return value.isoformat() if name == "expires_at" and isinstance(value, datetime) else value
