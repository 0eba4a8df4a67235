"""Names in a data folder, read without opening it: for a shell that completes them. Raises what sqlite3 raises.

Only what SQLite keeps in the folder; of a folder whose memories are in PostgreSQL nothing is known here.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from service.storage.folder import database_path

LISTED_MAX = 100  # operations: the last ones, as the API lists them


def collections(folder: Path) -> list[str]:
    return [name for (name,) in _rows(folder, "SELECT name FROM collections ORDER BY name")]


def operations(folder: Path) -> list[str]:
    return [each for (each,) in _rows(folder, "SELECT id FROM jobs ORDER BY key DESC LIMIT ?", LISTED_MAX)]


def spaces(folder: Path, collection: str) -> list[str]:
    found = _rows(folder, "SELECT config FROM collections WHERE name = ?", collection)
    return [space for (config,) in found for space in json.loads(config)["config"]["spaces"]]


def kernels(folder: Path, collection: str) -> list[str]:
    statement = (
        "SELECT space, number FROM kernels JOIN collections ON collections.id = kernels.collection_id"
        " WHERE name = ? AND status = 'active' ORDER BY kernels.key"
    )
    return [f"{space}-{number}" for space, number in _rows(folder, statement, collection)]


def _rows(folder: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"{database_path(folder.absolute()).as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute(statement, values).fetchall()
