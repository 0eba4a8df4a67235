"""`engram keys create`, `list` and `revoke`: who may ask the server, and for what.

Rules:
- Through the server that has the data folder open, or that `--url` names; else on the folder's database itself, so that
  the first key can be made before a server is started beyond loopback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.client import Client
from engram.opening import Data, Url, folder_of, open_server
from engram.replies import ApiKey, NewKey
from engram.shown import AsJson, print_json
from service import settings
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from service.app.keys import Keys

out = Console()
keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for; the name under which its use is counted.")],
    scope: Annotated[
        list[str], typer.Option(help="COLLECTION=LEVEL: read, write or admin on a collection, on photos-* or on *.")
    ],
    expires: Annotated[
        str | None, typer.Option(help="When it ends: 90d, 12h, or 2027-01-01T00:00:00Z.", show_default=False)
    ] = None,
    rate_limit: Annotated[
        str | None, typer.Option(help="Requests, instead of the server's limit: 100/second;2000/minute.")
    ] = None,
    concurrent_max: Annotated[int | None, typer.Option(help="Requests at once, instead of the server's limit.")] = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Make a key. The first one is admin on everything: --scope '*=admin'."""
    given: dict[str, Any] = {"rate_limit": rate_limit, "concurrent_max": concurrent_max}
    given["expires_at"] = None if expires is None else read_expiry(expires)
    with opened(data, url, must_exist=False) as client:
        made = client.create_key(name, dict(map(read_scope, scope)), **given)
    if as_json:
        print_json(made)
        return
    sys.stdout.write(made.key + "\n")  # alone on its line, for a program that reads it
    told = f"This is the key [bold]{escape(made.name)}[/] ({made.id}). It is not stored and will not be shown again."
    Console(stderr=True).print(told, soft_wrap=True)


@keys.command("list")
def list_keys(as_json: AsJson = False, data: Data = None, url: Url = None) -> None:
    """List the keys, revoked ones among them."""
    with opened(data, url) as client:
        found = client.keys()
    if as_json:
        print_json(found)
        return
    if not found:
        out.print("There are no keys yet; make one with: engram keys create admin --scope '*=admin'")
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("id", "name", "begins with", "scopes", "made", "last used", "state"):
        table.add_column(heading, no_wrap=heading in ("id", "begins with"), overflow="fold")  # what is copied whole
    for key in found:
        scopes = ", ".join(f"{target}={level}" for target, level in key.scopes.items())
        table.add_row(
            key.id, escape(key.name), key.hint, escape(scopes), _when(key.created_at), _when(key.last_used_at),
            _state(key),
        )  # fmt: skip
    out.print(table)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as list shows it.")],
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Refuse a key from now on."""
    with opened(data, url) as client:
        client.revoke_key(key_id)
    if as_json:
        print_json({"id": key_id})
    else:
        out.print(f"{escape(key_id)} is revoked.")


def register(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys")


def read_scope(text: str) -> tuple[str, str]:
    """`photos=read`. Raises `InvalidRequest`."""
    target, _, level = text.rpartition("=")
    if not target or not level:
        raise InvalidRequest(f"--scope takes COLLECTION=LEVEL, like photos=read or '*=admin', not {text!r}")
    return target, level


def read_expiry(text: str) -> datetime:
    """A span from now, or a moment. Raises `InvalidRequest`."""
    now = datetime.now().astimezone()
    try:
        if text[-1:] in ("d", "h"):
            return now + timedelta(hours=float(text[:-1]) * (24 if text[-1] == "d" else 1))
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise InvalidRequest(f"--expires takes 90d, 12h or a moment like 2027-01-01T00:00:00Z, not {text!r}") from None


class FolderKeys:
    """A client's methods for keys, on a database that no server has open."""

    def __init__(self, known: Keys) -> None:
        self._known = known

    def create_key(self, name: str, scopes: Mapping[str, str], **given: Any) -> NewKey:
        from service.app.fields import faults
        from service.app.key_schemas import KeyRequest

        try:
            request = KeyRequest.model_validate({"name": name, "scopes": dict(scopes), **given})
        except ValidationError as error:
            raise InvalidRequest(faults(error)) from None
        return NewKey.of(self._known.create(request).model_dump())

    def keys(self) -> list[ApiKey]:
        return [ApiKey.of(key.model_dump()) for key in self._known.listed().keys]

    def revoke_key(self, key_id: str) -> None:
        self._known.revoke(key_id)


@contextmanager
def opened(data: Path | None, url: str | None, must_exist: bool = True) -> Iterator[Client | FolderKeys]:
    """Whoever keeps the keys. Of a folder only the database is opened: no memory is loaded."""
    server = open_server(data, url)
    if server is not None:
        with server:
            yield server
        return
    from service.app.keys import Keys
    from service.storage.database import Database
    from service.storage.folder import DataFolder
    from service.storage.repository import Repository
    from service.storage.writer import Writer

    known = settings.load(os.environ, data=folder_of(data, must_exist))
    with ExitStack() as stack:
        folder = DataFolder.open(known.data)
        stack.callback(folder.close)
        where = known.database_url
        database = Database.open(folder.database_path if where is None else where.get_secret_value())
        stack.callback(database.close)
        writer = Writer(database)
        stack.callback(writer.close)
        key = None if known.api_key is None else known.api_key.get_secret_value()
        yield FolderKeys(Keys(Repository(database, writer), key))


def _when(moment: str | None) -> str:
    return "–" if moment is None else moment[:16].replace("T", " ")


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return f"[red]revoked[/] {_when(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    past = datetime.fromisoformat(key.expires_at) <= datetime.now().astimezone()
    return f"[red]expired[/] {_when(key.expires_at)}" if past else f"until {_when(key.expires_at)}"
