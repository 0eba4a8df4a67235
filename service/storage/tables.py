"""The tables, as SQLAlchemy Core sees them. `migrations/` creates them; a test holds the two equal.

Rules:
- Nothing here is particular to one database.
- JSON is kept as UTF-8 bytes: what was stored comes back byte for byte, and a bank's load hands payloads on without
  parsing them.
- Patterns are raw little-endian float32, one row per memory and space, so that a bank's load is a copy.
- Deleting a collection takes its rows with it by foreign keys; only the name's last version stays.
- Keys are never used twice, so nothing old can attach itself to a new row.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)


class Json(TypeDecorator[Any]):
    """A JSON value as UTF-8 bytes; None is SQL's NULL."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Any | None, dialect: Dialect) -> bytes | None:
        return None if value is None else orjson.dumps(value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> Any | None:
        return None if value is None else orjson.loads(value)


class Time(TypeDecorator[datetime]):
    """A moment in UTC. SQLite keeps no zone, so it is taken off on the way in and put on again on the way out."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


Number = BigInteger().with_variant(Integer, "sqlite")
"""A number that only grows: of a row, or a version. SQLite's integers are as large as they need to be."""

metadata = MetaData()

collections = Table(
    "collections",
    metadata,
    Column("id", Number, primary_key=True),
    Column("name", Text, nullable=False),
    Column("config", Json, nullable=False),
    Column("version", Number, nullable=False),  # the number of its last write
    Column("created_at", Time, nullable=False),
    Column("generation", Integer, nullable=False, server_default="0"),  # how often an encoder of it has changed
    Column("revision", Number, nullable=False, server_default="0"),  # how often what was learned of it has changed
    Column("deletions_from", Number, nullable=False, server_default="0"),  # `deletions` are complete above this version
    UniqueConstraint("name", name="uq_collections_name"),
    sqlite_autoincrement=True,
)

name_versions = Table(  # where the sequence of a deleted collection's name stopped
    "name_versions",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Number, nullable=False),
)

deletions = Table(  # what other servers have to forget (see `following`)
    "deletions",
    metadata,
    Column(
        "collection_id",
        ForeignKey("collections.id", name="fk_deletions_collection", ondelete="CASCADE"),
        nullable=False,
    ),
    Column("version", Number, nullable=False),
    Column("id", Text, nullable=False),
    Column("deleted_at", Time, nullable=False),
    PrimaryKeyConstraint("collection_id", "version", "id", name="pk_deletions"),
)

facts = Table(  # of the database as a whole: `originals` names the folder or store that its originals are in
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

memories = Table(
    "memories",
    metadata,
    Column("key", Number, primary_key=True),
    Column(
        "collection_id", ForeignKey("collections.id", name="fk_memories_collection", ondelete="CASCADE"), nullable=False
    ),
    Column("id", Text, nullable=False),
    Column("version", Number, nullable=False),
    Column("text", Text),
    Column("payload", Json),
    Column("blob_hash", String(64)),
    Column("media_type", Text),
    Column("created_at", Time, nullable=False),
    Column("updated_at", Time, nullable=False),
    Column("expires_at", BigInteger),  # in microseconds since 1970, as in the bank; NULL: never
    UniqueConstraint("collection_id", "id", name="uq_memories_id"),
    Index("ix_memories_order", "collection_id", "key"),  # a bank loads a collection in the order of its keys
    Index("ix_memories_blob", "blob_hash"),
    Index("ix_memories_version", "collection_id", "version"),  # what was written since
    Index(  # of those that expire alone: the others pay nothing
        "ix_memories_expires_at", "collection_id", "expires_at",
        sqlite_where=text("expires_at IS NOT NULL"), postgresql_where=text("expires_at IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
)  # fmt: skip

patterns = Table(
    "patterns",
    metadata,
    Column("memory_key", ForeignKey("memories.key", name="fk_patterns_memory", ondelete="CASCADE"), nullable=False),
    Column("space", Text, nullable=False),
    Column("dtype", String(2), nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("vector", LargeBinary, nullable=False),
    PrimaryKeyConstraint("memory_key", "space", name="pk_patterns"),
    CheckConstraint("dtype = 'f4' AND length(vector) = 4 * dimension", name="ck_patterns_vector"),
)

pattern_drafts = Table(  # a space's patterns under another encoder, until they take the place of those in use
    "pattern_drafts",
    metadata,
    Column("job_key", ForeignKey("jobs.key", name="fk_pattern_drafts_job", ondelete="CASCADE"), nullable=False),
    Column(
        "memory_key", ForeignKey("memories.key", name="fk_pattern_drafts_memory", ondelete="CASCADE"), nullable=False
    ),
    Column("version", Number, nullable=False),  # the memory's, when it was read: a draft of another one is void
    Column("dimension", Integer),
    Column("vector", LargeBinary),
    Column("lost", Text),  # why there is no vector
    PrimaryKeyConstraint("job_key", "memory_key", name="pk_pattern_drafts"),
    CheckConstraint(
        "CASE WHEN vector IS NULL THEN lost IS NOT NULL"
        " ELSE dimension IS NOT NULL AND length(vector) = 4 * dimension END",
        name="ck_pattern_drafts_vector",
    ),
    Index("ix_pattern_drafts_memory", "memory_key"),
)

receipts = Table(  # what was answered to a request that has a key of its own, for when it comes again
    "receipts",
    metadata,
    Column(
        "collection_id", ForeignKey("collections.id", name="fk_receipts_collection", ondelete="CASCADE"), nullable=False
    ),
    Column("idempotency_key", Text, nullable=False),
    Column("digest", String(64), nullable=False),  # of what was asked
    Column("reply", Json, nullable=False),
    Column("created_at", Time, nullable=False),
    PrimaryKeyConstraint("collection_id", "idempotency_key", name="pk_receipts"),
    Index("ix_receipts_created_at", "created_at"),
)

gates = Table(
    "gates",
    metadata,
    Column(
        "collection_id", ForeignKey("collections.id", name="fk_gates_collection", ondelete="CASCADE"), nullable=False
    ),
    Column("modality", Text, nullable=False),
    Column("record", Json, nullable=False),
    Column("created_at", Time, nullable=False),
    PrimaryKeyConstraint("collection_id", "modality", name="pk_gates"),
)

kernels = Table(
    "kernels",
    metadata,
    Column("key", Number, primary_key=True),
    Column(
        "collection_id", ForeignKey("collections.id", name="fk_kernels_collection", ondelete="CASCADE"), nullable=False
    ),
    Column("space", Text, nullable=False),
    Column("number", Integer, nullable=False),  # counts up per collection and space
    Column("objective", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("weight", LargeBinary),  # little-endian float32, row by row; of a dropped kernel only the record stays
    Column("record", Json, nullable=False),
    Column("created_at", Time, nullable=False),
    UniqueConstraint("collection_id", "space", "number", name="uq_kernels_number"),
    CheckConstraint("status IN ('active', 'retired', 'dropped')", name="ck_kernels_status"),
    CheckConstraint(
        "CASE WHEN status = 'dropped' THEN weight IS NULL"
        " ELSE weight IS NOT NULL AND length(weight) = 4 * rows * dimension END",
        name="ck_kernels_weight",
    ),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    Column("key", Number, primary_key=True),  # the order in which jobs were queued
    Column("id", String(36), nullable=False),
    Column("collection_id", ForeignKey("collections.id", name="fk_jobs_collection", ondelete="CASCADE")),
    Column("kind", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("progress", Float, nullable=False),
    Column("payload", Json, nullable=False),
    Column("result", Json),
    Column("error", Json),
    Column("attempts", Integer, nullable=False),
    Column("lease_until", Time),
    Column("owner", Text),
    Column("created_at", Time, nullable=False),
    Column("updated_at", Time, nullable=False),
    UniqueConstraint("id", name="uq_jobs_id"),
    CheckConstraint(
        "status IN ('queued', 'running', 'done', 'failed', 'cancelled', 'dead')",
        name="ck_jobs_status",
    ),
    Index("ix_jobs_status", "status", "key"),  # a claim takes the oldest of a status
    Index("ix_jobs_collection", "collection_id"),
    sqlite_autoincrement=True,
)

job_items = Table(
    "job_items",
    metadata,
    Column("job_key", ForeignKey("jobs.key", name="fk_job_items_job", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("body", Json, nullable=False),
    Column("blob_hash", String(64)),  # the original that waits to be encoded: not to be removed before
    Column("status", Text, nullable=False),
    Column("result", Json),
    PrimaryKeyConstraint("job_key", "position", name="pk_job_items"),
    CheckConstraint("status IN ('queued', 'done', 'failed')", name="ck_job_items_status"),
    Index("ix_job_items_blob", "blob_hash"),
)

snapshot_schedules = Table(
    "snapshot_schedules",
    metadata,
    Column(
        "collection_id",
        ForeignKey("collections.id", name="fk_snapshot_schedules_collection", ondelete="CASCADE"),
        nullable=False,
    ),
    Column("every_s", Integer, nullable=False),
    Column("keep", Integer, nullable=False),
    Column("next_at", Time, nullable=False),
    Column("job_id", String(36)),  # of the snapshot under way; no foreign key: that it is gone is seen, too
    Column("made", Json, nullable=False),  # the ids of those that are kept, the oldest first
    Column("made_at", Time),  # the last of them
    Column("failed_at", Time),
    Column("error", Json),  # of the last one that was tried, if it failed
    PrimaryKeyConstraint("collection_id", name="pk_snapshot_schedules"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key", Number, primary_key=True),
    Column("id", String(16), nullable=False),
    Column("name", Text, nullable=False),
    Column("hash", String(64), nullable=False),  # SHA-256 of the key, which is kept nowhere
    Column("hint", String(16), nullable=False),  # its first characters, by which a person knows it
    Column("scopes", Json, nullable=False),
    Column("rate_limit", Text),
    Column("concurrent_max", Integer),
    Column("created_at", Time, nullable=False),
    Column("expires_at", Time),
    Column("revoked_at", Time),
    Column("last_used_at", Time),
    UniqueConstraint("id", name="uq_api_keys_id"),
    UniqueConstraint("hash", name="uq_api_keys_hash"),
    sqlite_autoincrement=True,
)
