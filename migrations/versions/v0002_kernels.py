"""Learned kernels: their weights while they are used, and how each was trained."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "kernels",
        sa.Column("key", NUMBER, primary_key=True),
        sa.Column("collection_id", NUMBER, nullable=False),
        sa.Column("space", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("objective", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("rows", sa.Integer, nullable=False),
        sa.Column("dimension", sa.Integer, nullable=False),
        sa.Column("weight", sa.LargeBinary),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name="fk_kernels_collection", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("collection_id", "space", "number", name="uq_kernels_number"),
        sa.CheckConstraint("status IN ('active', 'retired', 'dropped')", name="ck_kernels_status"),
        sa.CheckConstraint(
            "CASE WHEN status = 'dropped' THEN weight IS NULL"
            " ELSE weight IS NOT NULL AND length(weight) = 4 * rows * dimension END",
            name="ck_kernels_weight",
        ),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    op.drop_table("kernels")
