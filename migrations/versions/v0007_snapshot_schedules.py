"""Snapshots at set times: when the next of a collection is due, and what became of the last."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "snapshot_schedules",
        sa.Column("collection_id", NUMBER, nullable=False),
        sa.Column("every_s", sa.Integer, nullable=False),
        sa.Column("keep", sa.Integer, nullable=False),
        sa.Column("next_at", sa.DateTime, nullable=False),
        sa.Column("job_id", sa.String(36)),
        sa.Column("made", sa.LargeBinary, nullable=False),
        sa.Column("made_at", sa.DateTime),
        sa.Column("failed_at", sa.DateTime),
        sa.Column("error", sa.LargeBinary),
        sa.PrimaryKeyConstraint("collection_id", name="pk_snapshot_schedules"),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name="fk_snapshot_schedules_collection", ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    op.drop_table("snapshot_schedules")
