"""What servers that share a database follow each other by: revisions, and a log of deletions."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column("collections", sa.Column("revision", NUMBER, nullable=False, server_default="0"))
    op.add_column("collections", sa.Column("deletions_from", NUMBER, nullable=False, server_default="0"))
    op.create_table(
        "deletions",
        sa.Column("collection_id", NUMBER, nullable=False),
        sa.Column("version", NUMBER, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("deleted_at", sa.DateTime, nullable=False),
        sa.PrimaryKeyConstraint("collection_id", "version", "id", name="pk_deletions"),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name="fk_deletions_collection", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_memories_version", "memories", ["collection_id", "version"])
    op.create_table(
        "facts",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_facts"),
    )


def downgrade() -> None:
    op.drop_table("facts")
    op.drop_index("ix_memories_version", "memories")
    op.drop_table("deletions")
    op.drop_column("collections", "deletions_from")
    op.drop_column("collections", "revision")
