"""How Alembic runs the migrations: on the connection it is handed, inside the transaction that is open there.

`service/storage/database.py` upgrades every database when it opens it; there is no other way in. A new version is
written by hand in `versions/`, and tests/storage compares its outcome with `service/storage/tables.py`. A migration
never imports the tables: it describes them as they were when it was written.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
