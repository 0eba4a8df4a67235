"""Which keys of payloads a collection keeps indexed: in its row, so that whatever copies the row copies them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select, update

from service.storage.database import Database
from service.storage.following import revise
from service.storage.memories import lock_version, set_version
from service.storage.tables import collections
from service.storage.writer import Writer

PAYLOAD_INDEXES = "payload_indexes"  # in a collection's configuration


@dataclass(frozen=True)
class IndexedKeys:
    """The collection's version and revision after (None where nothing was changed), and its indexed keys in the order
    they came.
    """

    version: int
    revision: int | None
    keys: tuple[str, ...]


def indexed_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a collection's row."""
    return tuple(config.get(PAYLOAD_INDEXES, ()))


class PayloadIndexes:
    """The payload index methods of `Repository`."""

    _database: Database
    _writer: Writer

    def change_payload_indexes(
        self,
        collection_id: int,
        change: Callable[[tuple[str, ...]], tuple[str, ...]],
        then: Callable[[IndexedKeys], None] = lambda _: None,
    ) -> IndexedKeys:
        """Replace the keys by what `change` makes of them, under a version of its own (so that a re-encoding, which
        writes the configuration too, sees it). Raises `CollectionNotFound`, and what `change` raises.
        """

        def run(connection: Connection) -> IndexedKeys:
            version = lock_version(connection, collection_id)
            this = collections.c.id == collection_id
            config: dict[str, Any] = connection.execute(select(collections.c.config).where(this)).scalar_one()
            before = indexed_keys(config)
            keys = change(before)
            if keys == before:
                return IndexedKeys(version, None, keys)
            connection.execute(update(collections).where(this).values(config={**config, PAYLOAD_INDEXES: list(keys)}))
            set_version(connection, collection_id, version + 1)
            return IndexedKeys(version + 1, revise(connection, collection_id), keys)

        return self._writer.submit(run, then, on=collection_id)
