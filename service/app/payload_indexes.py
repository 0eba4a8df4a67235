"""Payload indexes: keys of payloads whose columns the bank keeps at hand.

What one does: the key's columns are made when the collection is loaded and as memories come, not while the first filter
waits; and a filter all of whose keys are indexed is counted by the bank, and looked up there before SQL reads or
deletes what it keeps (see `memories`).
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import TypeAdapter, ValidationError

from service.app.fields import faults
from service.app.filter_schemas import Key, key_of, path_of
from service.app.live import LiveCollection
from service.app.memory_schemas import PayloadIndex, PayloadIndexList
from service.app.resources import Resources
from service.core.filter import Clause, Exists
from service.errors import InvalidRequest
from service.storage.payload_indexes import IndexedKeys

INDEXES_MAX = 32
"""Of one collection: every write reads its payload for each (a microsecond), and each takes up to a hundred bytes a
memory."""

_key: TypeAdapter[str] = TypeAdapter(Key)


def put(resources: Resources, live: LiveCollection, key: str) -> PayloadIndex:
    """Index a key; at return its columns are made. Nothing changes where it is indexed. Raises `InvalidRequest`."""
    key = _canonical(key)

    def added(keys: tuple[str, ...]) -> tuple[str, ...]:
        if key not in keys and len(keys) >= INDEXES_MAX:
            raise InvalidRequest(f"a collection has at most {INDEXES_MAX} payload indexes: delete one first")
        return keys if key in keys else (*keys, key)

    _change(resources, live, added)
    return _info(resources.live_by_id(live.id), key)


def delete(resources: Resources, live: LiveCollection, key: str) -> None:
    """Nothing happens where it is not indexed. Raises `InvalidRequest` for what is no key."""
    key = _canonical(key)
    _change(resources, live, lambda keys: tuple(each for each in keys if each != key))


def listed(live: LiveCollection) -> PayloadIndexList:
    return PayloadIndexList(payload_indexes=[_info(live, key) for key in live.indexed])


def _change(resources: Resources, live: LiveCollection, change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> None:
    def then(now: IndexedKeys) -> None:
        if now.revision is None:
            return
        current = resources.live_by_id(live.id)
        current.indexed = now.keys
        current.follow(None, [], now.version)
        if now.revision == current.revision + 1:  # else what other servers have learned before is to be learned as well
            current.revision = now.revision

    live.wait_writable()
    resources.repository.change_payload_indexes(live.id, change, then)
    resources.live_by_id(live.id).index()  # not on the writer's thread


def _info(live: LiveCollection, key: str) -> PayloadIndex:
    path = path_of(key)
    view = live.view()
    memories = view.restricted(Clause(must=(Exists(path),))).count
    return PayloadIndex(key=key, memories=memories, bytes=live.bank.column_bytes(path))


def _canonical(key: str) -> str:
    """One way of writing what several keys mean."""
    try:
        return key_of(path_of(_key.validate_python(key)))
    except ValidationError as error:
        raise InvalidRequest(f"payload index {key!r}: {faults(error)}") from None
