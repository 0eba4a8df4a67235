"""What every test shares: shape checks on, warnings as errors, property counts by profile.

`TEST_PROFILE=full` (`make test-full`) runs the counts that a release is judged by; the default is one small
instance of everything.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads under load are slower than one on small machines

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Every jaxtyping shape annotation in the core is checked at run time while tests run. Before any import of the package.
install_import_hook("service.core", "beartype.beartype")

import sqlalchemy  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=50, **COMMON)
settings.register_profile("full", max_examples=500, **COMMON)
settings.load_profile(os.environ.get("TEST_PROFILE", "quick"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of the quick profile what is marked `full` (or of it what runs over PostgreSQL, `full("postgres")`): it
    takes long, and something quicker shows the same.
    """
    if os.environ.get("TEST_PROFILE") == "full":
        return
    left = [
        item
        for item in items
        if (mark := item.get_closest_marker("full")) and all(in_ in item.name for in_ in mark.args)
    ]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


POSTGRES = os.environ.get("TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/postgres")


@pytest.fixture(scope="session")
def postgres_schema() -> Iterator[Callable[[], str]]:
    """Makes the URL of a new, empty schema in a running PostgreSQL; skips where there is none, which CI=true makes a
    failure.
    """
    url = POSTGRES.replace("postgresql:", "postgresql+psycopg:")
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    made: list[str] = []

    def new() -> str:
        schema = f"test_{uuid.uuid4().hex}"
        try:
            with engine.begin() as connection:
                connection.execute(sqlalchemy.text(f"CREATE SCHEMA {schema}"))
        except sqlalchemy.exc.OperationalError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no PostgreSQL at {POSTGRES} (TEST_POSTGRES names another): {error}")
        made.append(schema)
        return f"{POSTGRES}?options=-csearch_path%3D{schema}"

    yield new
    for schema in made:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(f"DROP SCHEMA {schema} CASCADE"))


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def new_database(request: pytest.FixtureRequest) -> Callable[[Path], Path | str]:
    """Where a new database in a folder is to be opened: its file, or (postgres) a schema that the folder stands for."""
    schema: Callable[[], str] = request.getfixturevalue("postgres_schema") if request.param == "postgres" else str
    places: dict[Path, Path | str] = {}

    def place(folder: Path) -> Path | str:
        if folder not in places:
            places[folder] = folder / "engram.db" if request.param == "sqlite" else schema()
        return places[folder]

    return place
