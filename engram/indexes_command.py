"""`engram indexes`: the keys of payloads that a collection keeps indexed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from engram.opening import Data, Name, Url, open_client
from engram.shown import AsJson, console, print_json, table


def indexes(
    collection: Name = "memories",
    add: Annotated[list[str] | None, typer.Option(help="Index this key, written as in filters.", metavar="KEY")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="No longer index this key.", metavar="KEY")] = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """List the indexed keys of payloads, after adding and dropping some."""
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        for key in add or ():
            target.create_payload_index(key)
        for key in drop or ():
            target.delete_payload_index(key)
        found = target.payload_indexes()
    if as_json:
        print_json(found)
        return
    made = table("key", "memories", "bytes")
    for index in found:
        made.add_row(escape(index["key"]), f"{index['memories']:,}", f"{index['bytes']:,}")
    console(as_json).print(made if found else "No key is indexed; index one with: engram indexes --add KEY")


def register(app: typer.Typer) -> None:
    app.command()(indexes)
