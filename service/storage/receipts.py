"""Receipts: what was answered to a request that its caller gave a key, so that the same request is never done twice.

Rules:
- A receipt is kept in the transaction that does what it is for: there are both, or neither.
- Only what was done has a receipt. A request that was refused whole may be sent again, changed or not, under its key.
- Of two requests with one key at one moment the second finds the receipt of the first when its transaction begins, and
  does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, delete, insert, select

from service.errors import IdempotencyKeyReused
from service.storage.database import Database
from service.storage.tables import receipts
from service.storage.writer import Writer

T = TypeVar("T")

KEPT_S = 24 * 3600.0
"""How long a key stands for its request: far longer than any client goes on trying."""

_c = receipts.c


@dataclass(frozen=True)
class Asked:
    """A request by its key, and the digest of what it asks for."""

    key: str
    digest: str


@dataclass(frozen=True)
class Receipt(Generic[T]):
    """What is to be kept of a request: `reply` says what is answered, of what was done."""

    asked: Asked
    reply: Callable[[T], dict[str, Any]]


class AlreadyDone(Exception):
    """What is asked was done before; `reply` is what was answered."""

    def __init__(self, reply: dict[str, Any]) -> None:
        super().__init__("done before")
        self.reply = reply


class Receipts:
    """The receipt methods of `Repository`."""

    _database: Database
    _writer: Writer

    def check_new(self, collection_id: int, asked: Asked) -> None:
        """Raises `AlreadyDone`, and `IdempotencyKeyReused` if the key was another request's."""
        with self._database.read() as connection:
            check_new(connection, collection_id, asked)

    def remove_receipts(self, older_than_s: float = KEPT_S) -> int:
        """Remove the receipts older than this; their number is returned."""
        old = delete(receipts).where(_c.created_at <= datetime.now(UTC) - timedelta(seconds=older_than_s))
        return self._writer.submit(lambda connection: connection.execute(old).rowcount)


def check_new(connection: Connection, collection_id: int, asked: Asked) -> None:
    """As the method; under the collection's lock nobody else keeps a receipt before the transaction ends."""
    since = datetime.now(UTC) - timedelta(seconds=KEPT_S)
    row = connection.execute(
        select(_c.digest, _c.reply).where(_this(collection_id, asked), _c.created_at > since)
    ).first()
    if row is None:
        return
    if row.digest != asked.digest:
        raise IdempotencyKeyReused(
            f"the Idempotency-Key {asked.key!r} was another request's; each takes a key of its own"
        )
    raise AlreadyDone(row.reply)


def keep_receipt(connection: Connection, collection_id: int, asked: Asked, reply: dict[str, Any]) -> None:
    """Keep what is answered, after `check_new` in the same transaction."""
    connection.execute(delete(receipts).where(_this(collection_id, asked)))  # one that has run out
    connection.execute(
        insert(receipts).values(
            collection_id=collection_id, idempotency_key=asked.key, digest=asked.digest, reply=reply,
            created_at=datetime.now(UTC),
        )
    )  # fmt: skip


def _this(collection_id: int, asked: Asked) -> Any:
    return (_c.collection_id == collection_id) & (_c.idempotency_key == asked.key)
