"""Memories that expire, and receipts: what was answered to a request that has a key of its own."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
EXPIRING = sa.text("expires_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("memories", sa.Column("expires_at", sa.BigInteger))
    op.create_index(
        "ix_memories_expires_at", "memories", ["collection_id", "expires_at"],
        sqlite_where=EXPIRING, postgresql_where=EXPIRING,
    )  # fmt: skip
    op.create_table(
        "receipts",
        sa.Column("collection_id", NUMBER, nullable=False),
        sa.Column("idempotency_key", sa.Text, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("reply", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.PrimaryKeyConstraint("collection_id", "idempotency_key", name="pk_receipts"),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name="fk_receipts_collection", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_receipts_created_at", "receipts", ["created_at"])


def downgrade() -> None:
    op.drop_table("receipts")
    op.drop_index("ix_memories_expires_at", "memories")
    op.drop_column("memories", "expires_at")
