"""Stored memories: read by id, in order, by the number; and deleted.

A filter is evaluated in SQL, where they are; where its keys are indexed the bank, which has every commit before anybody
is answered, counts for it and says which memories SQL need look at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.app.fields import as_date
from service.app.filter_schemas import path_of
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
from service.core.filter import Clause, Ids, paths
from service.errors import CollectionNotFound
from service.storage.memories import Deleted, Memory, microseconds_now

NARROWED_MAX = 1_000  # ids that SQL is told: found by their index in milliseconds; a page of more comes soon anyway


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
    clause, at = (None, None) if request.filter is None else _narrowed(live, request.filter.clause())
    after = 0 if request.cursor is None else int(request.cursor, 16)
    page = resources.repository.scroll(live.id, clause, after, request.limit)
    next_cursor = None if page.after is None else f"{page.after:x}"
    version = page.version if at is None else min(at, page.version)
    return ScrollReply(version=version, memories=[info(each) for each in page.memories], next_cursor=next_cursor)


def count(resources: Resources, live: LiveCollection, request: CountRequest) -> CountReply:
    if request.filter is None:
        view = live.view()
        return CountReply(version=view.version, count=view.count)
    clause = request.filter.clause()
    if _is_indexed(live, clause):
        live.catch_up()
        view = live.view()
        return CountReply(version=view.version, count=view.restricted(clause).count)
    version, found = resources.repository.count_where(live.id, clause)
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
    clause, _ = _narrowed(live, request.filter.clause())
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


def _is_indexed(live: LiveCollection, clause: Clause) -> bool:
    """Whether the bank has the columns of all the keys that a filter asks about, one at least, at hand."""
    indexed = {path_of(key) for key in live.indexed}
    asked = set(paths(clause))
    return bool(asked) and asked <= indexed


def _narrowed(live: LiveCollection, clause: Clause) -> tuple[Clause, int | None]:
    """The filter with the ids of what it keeps, where the bank has them at hand and they are few: then SQL looks at
    these alone, instead of at every payload. With the version of which they are: what was stored since is left out.
    """
    if not _is_indexed(live, clause):
        return clause, None
    live.catch_up()  # with what other servers have committed
    view = live.view().restricted(clause)
    if view.count > NARROWED_MAX:
        return clause, None
    ids = view.ids(view.sample(view.count, 0)[None])[0]
    return Clause(must=(Ids(frozenset(name for name in ids if name is not None)), clause)), view.version


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
