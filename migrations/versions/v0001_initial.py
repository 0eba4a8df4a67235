"""The first schema: collections, memories, patterns, gates, jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "collections",
        sa.Column("id", NUMBER, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("config", sa.LargeBinary, nullable=False),
        sa.Column("version", NUMBER, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.UniqueConstraint("name", name="uq_collections_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "name_versions",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("version", NUMBER, nullable=False),
    )
    op.create_table(
        "memories",
        sa.Column("key", NUMBER, primary_key=True),
        sa.Column("collection_id", NUMBER, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("version", NUMBER, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("payload", sa.LargeBinary),
        sa.Column("blob_hash", sa.String(64)),
        sa.Column("media_type", sa.Text),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("updated_at", sa.DateTime, nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name="fk_memories_collection", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("collection_id", "id", name="uq_memories_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_memories_order", "memories", ["collection_id", "key"])
    op.create_index("ix_memories_blob", "memories", ["blob_hash"])
    op.create_table(
        "patterns",
        sa.Column("memory_key", NUMBER, nullable=False),
        sa.Column("space", sa.Text, nullable=False),
        sa.Column("dtype", sa.String(2), nullable=False),
        sa.Column("dimension", sa.Integer, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("memory_key", "space", name="pk_patterns"),
        sa.ForeignKeyConstraint(["memory_key"], ["memories.key"], name="fk_patterns_memory", ondelete="CASCADE"),
        sa.CheckConstraint("dtype = 'f4' AND length(vector) = 4 * dimension", name="ck_patterns_vector"),
    )
    op.create_table(
        "gates",
        sa.Column("collection_id", NUMBER, nullable=False),
        sa.Column("modality", sa.Text, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.PrimaryKeyConstraint("collection_id", "modality", name="pk_gates"),
        sa.ForeignKeyConstraint(["collection_id"], ["collections.id"], name="fk_gates_collection", ondelete="CASCADE"),
    )
    op.create_table(
        "jobs",
        sa.Column("key", NUMBER, primary_key=True),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("collection_id", NUMBER),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("progress", sa.Float, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("result", sa.LargeBinary),
        sa.Column("error", sa.LargeBinary),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("lease_until", sa.DateTime),
        sa.Column("owner", sa.Text),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("updated_at", sa.DateTime, nullable=False),
        sa.ForeignKeyConstraint(["collection_id"], ["collections.id"], name="fk_jobs_collection", ondelete="CASCADE"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'done', 'failed', 'cancelled', 'dead')", name="ck_jobs_status"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_status", "jobs", ["status", "key"])
    op.create_index("ix_jobs_collection", "jobs", ["collection_id"])
    op.create_table(
        "job_items",
        sa.Column("job_key", NUMBER, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("blob_hash", sa.String(64)),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("result", sa.LargeBinary),
        sa.PrimaryKeyConstraint("job_key", "position", name="pk_job_items"),
        sa.ForeignKeyConstraint(["job_key"], ["jobs.key"], name="fk_job_items_job", ondelete="CASCADE"),
        sa.CheckConstraint("status IN ('queued', 'done', 'failed')", name="ck_job_items_status"),
    )
    op.create_index("ix_job_items_blob", "job_items", ["blob_hash"])
    if op.get_bind().dialect.name == "postgresql":  # floats hardly compress: trying to costs more than it saves
        op.execute("ALTER TABLE patterns ALTER COLUMN vector SET STORAGE EXTERNAL")


def downgrade() -> None:
    for table in ("job_items", "jobs", "gates", "patterns", "memories", "name_versions", "collections"):
        op.drop_table(table)
