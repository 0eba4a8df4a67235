"""Changing encoders: drafts of a space's patterns under another encoder, and how often a collection has changed one."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column("collections", sa.Column("generation", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "pattern_drafts",
        sa.Column("job_key", NUMBER, nullable=False),
        sa.Column("memory_key", NUMBER, nullable=False),
        sa.Column("version", NUMBER, nullable=False),
        sa.Column("dimension", sa.Integer),
        sa.Column("vector", sa.LargeBinary),
        sa.Column("lost", sa.Text),
        sa.PrimaryKeyConstraint("job_key", "memory_key", name="pk_pattern_drafts"),
        sa.ForeignKeyConstraint(["job_key"], ["jobs.key"], name="fk_pattern_drafts_job", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["memory_key"], ["memories.key"], name="fk_pattern_drafts_memory", ondelete="CASCADE"),
        sa.CheckConstraint(
            "CASE WHEN vector IS NULL THEN lost IS NOT NULL"
            " ELSE dimension IS NOT NULL AND length(vector) = 4 * dimension END",
            name="ck_pattern_drafts_vector",
        ),
    )
    op.create_index("ix_pattern_drafts_memory", "pattern_drafts", ["memory_key"])
    if op.get_bind().dialect.name == "postgresql":  # floats hardly compress: trying to costs more than it saves
        op.execute("ALTER TABLE pattern_drafts ALTER COLUMN vector SET STORAGE EXTERNAL")


def downgrade() -> None:
    op.drop_table("pattern_drafts")
    op.drop_column("collections", "generation")
