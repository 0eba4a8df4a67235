"""API keys as rows.

Rules:
- Of a key itself only its SHA-256 is here: 256 random bits cannot be guessed from it, and a copy of the database opens
  nothing.
- A revoked key stays as a row, so that who was let in can still be told, until its place is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, delete, insert, select, update

from service.errors import Conflict, KeyNotFound
from service.storage.database import Database
from service.storage.tables import api_keys
from service.storage.writer import Writer

KEYS_MAX = 1_000
"""Rows, revoked ones among them: all are kept in memory, and every one in use has lines of its own in /metrics."""


@dataclass(frozen=True)
class StoredKey:
    id: str
    name: str
    hash: str
    hint: str
    scopes: Mapping[str, str]
    rate_limit: str | None
    concurrent_max: int | None
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


Check = Callable[[Sequence[StoredKey]], None]


class ApiKeys:
    """The key methods of `Repository`."""

    _database: Database
    _writer: Writer

    def add_key(self, new: StoredKey, check: Check) -> None:
        """Add a key, unless `check` raises at those there are. Where there is no room, the key that was revoked first
        goes. Raises `Conflict` where none was.
        """

        def run(connection: Connection) -> None:
            known = _all(connection)
            check(known)
            if len(known) >= KEYS_MAX:
                revoked = [(key.revoked_at, key.id) for key in known if key.revoked_at is not None]
                if not revoked:
                    raise Conflict(f"there are {KEYS_MAX} keys already: revoke one that nobody uses")
                connection.execute(delete(api_keys).where(api_keys.c.id == min(revoked)[1]))
            connection.execute(insert(api_keys).values(**asdict(new)))

        self._writer.submit(run)

    def list_keys(self) -> list[StoredKey]:
        """All, in the order they were made."""
        with self._database.read() as connection:
            return _all(connection)

    def revoke_key(self, key_id: str, now: datetime, check: Check) -> None:
        """Revoke a key, unless `check` raises at those that would be left. Again is no error. Raises `KeyNotFound`."""

        def run(connection: Connection) -> None:
            known = _all(connection)
            found = [key for key in known if key.id == key_id]
            if not found:
                raise KeyNotFound(f"there is no key {key_id}")
            if found[0].revoked_at is None:
                check([key for key in known if key.id != key_id])
                connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(revoked_at=now))

        self._writer.submit(run)

    def note_used(self, used: Mapping[str, datetime]) -> None:
        """Keep when keys were last used, by id."""

        def run(connection: Connection) -> None:
            for key_id, when in used.items():
                connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=when))

        self._writer.submit(run)


def _all(connection: Connection) -> list[StoredKey]:
    return [StoredKey(*row) for row in connection.execute(_keys())]


def _keys() -> Select[Any]:
    c = api_keys.c
    return select(
        c.id, c.name, c.hash, c.hint, c.scopes, c.rate_limit, c.concurrent_max, c.created_at, c.expires_at,
        c.revoked_at, c.last_used_at,
    ).order_by(c.key)  # fmt: skip
