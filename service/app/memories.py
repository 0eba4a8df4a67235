"""Stored memories: read by id, in order, by the number; and deleted. A filter is evaluated in SQL, where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.app.fields import as_date
from service.app.live import LiveCollection
from service.app.memory_schemas import (
    DELETED_LISTED_MAX,
    CountReply,
    CountRequest,
    DeleteReply,
    DeleteRequest,
    GetReply,
    GetRequest,
    MemoryInfo,
    ScrollReply,
    ScrollRequest,
)
from service.app.resources import Resources
from service.errors import CollectionNotFound
from service.storage.memories import Deleted, Memory, microseconds_now


def info(memory: Memory) -> MemoryInfo:
    return MemoryInfo(
        id=memory.id, version=memory.version, text=memory.text, payload=memory.payload, spaces=list(memory.spaces),
        has_content=memory.blob_hash is not None, media_type=memory.media_type,
        created_at=memory.created_at.isoformat(), updated_at=memory.updated_at.isoformat(),
        expires_at=None if memory.expires_at is None else as_date(memory.expires_at),
    )  # fmt: skip


def get(resources: Resources, live: LiveCollection, request: GetRequest) -> GetReply:
    page = resources.repository.get_memories(live.id, request.ids)
    return GetReply(version=page.version, memories=[info(memory) for memory in page.memories])


def scroll(resources: Resources, live: LiveCollection, request: ScrollRequest) -> ScrollReply:
    clause = None if request.filter is None else request.filter.clause()
    after = 0 if request.cursor is None else int(request.cursor, 16)
    page = resources.repository.scroll(live.id, clause, after, request.limit)
    next_cursor = None if page.after is None else f"{page.after:x}"
    return ScrollReply(version=page.version, memories=[info(each) for each in page.memories], next_cursor=next_cursor)


def count(resources: Resources, live: LiveCollection, request: CountRequest) -> CountReply:
    if request.filter is None:
        view = live.view()
        return CountReply(version=view.version, count=view.count)
    version, found = resources.repository.count_where(live.id, request.filter.clause())
    return CountReply(version=version, count=found)


def delete(resources: Resources, live: LiveCollection, request: DeleteRequest) -> DeleteReply:
    """By ids, or what a filter keeps; or say what that would be."""
    repository = resources.repository
    if request.filter is None:
        ids = request.ids or ()
        if not request.dry_run:
            return delete_ids(resources, live, ids)
        found = repository.get_memories(live.id, ids)
        return _deleted(Deleted(found.version, [memory.id for memory in found.memories]))
    clause = request.filter.clause()
    if request.dry_run:
        return _deleted(repository.ids_where(live.id, clause))
    deleted = repository.delete_where(live.id, clause, _follow(resources, live))
    if deleted.ids:
        resources.after_write(resources.live_by_id(live.id))
    return _deleted(deleted)


def delete_ids(
    resources: Resources, live: LiveCollection, ids: Sequence[str], if_version: int | None = None
) -> DeleteReply:
    """Ids that are not there are left out of the answer. Raises `PreconditionFailed`."""
    deleted = resources.repository.delete_memories(live.id, ids, _follow(resources, live), if_version)
    if deleted.ids:
        resources.after_write(resources.live_by_id(live.id))
    return _deleted(deleted)


def delete_expired(resources: Resources) -> None:
    """Delete what has expired: nobody is given it any more, and this is what makes room."""
    for live in list(resources.lives.values()):
        if live.bank.view().soonest <= microseconds_now():
            try:
                resources.repository.delete_expired(live.id, _follow(resources, live))
                resources.after_write(resources.live_by_id(live.id))
            except CollectionNotFound:
                continue


def _follow(resources: Resources, live: LiveCollection) -> Callable[[Deleted], None]:
    """Tells the bank of a delete. It is the collection's of when that is committed: `live` may be of former encoders by
    then.
    """
    live.wait_writable()

    def then(deleted: Deleted) -> None:
        if deleted.ids:  # else it took no version
            resources.live_by_id(live.id).follow(None, deleted.ids, deleted.version)

    return then


def _deleted(deleted: Deleted) -> DeleteReply:
    return DeleteReply(version=deleted.version, count=len(deleted.ids), deleted=deleted.ids[:DELETED_LISTED_MAX])
