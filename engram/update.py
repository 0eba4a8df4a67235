"""`engram update`: a part of a memory changes, the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from engram.opening import Data, Name, Url, open_client
from engram.shown import AsJson, console, print_json
from service.errors import InvalidRequest

NONE = "none"  # as an option's value: remove it


def update(
    memory_id: Annotated[str, typer.Argument(metavar="ID", help="The memory's id.")],
    collection: Name = "memories",
    payload: Annotated[
        str | None, typer.Option(help="JSON, merged into what there is; a null removes its key.", show_default=False)
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="The payload is all of it, not what changes.")] = False,
    text: Annotated[str | None, typer.Option(help="A caption; none removes it.", show_default=False)] = None,
    image: Annotated[str | None, typer.Option(help="A picture's file; none removes it.", show_default=False)] = None,
    expires_at: Annotated[
        str | None,
        typer.Option(help="A date and time with its zone: 2030-12-31T23:59:59Z; none: it stays.", show_default=False),
    ] = None,
    if_version: Annotated[
        int | None, typer.Option(help="Only if the memory is at this version.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Change a part of a memory; what is not named stays."""
    changes: dict[str, Any] = {}
    if payload is not None:
        changes["payload"] = _json(payload)
    for name, value in (("text", text), ("expires_at", expires_at), ("image", image)):
        if value is not None:
            changes[name] = None if value == NONE else Path(value) if name == "image" else value
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        changed = target.update(memory_id, replace_payload=replace, if_version=if_version, **changes)
    if as_json:
        print_json(changed)
    out = console(as_json)
    out.print(f"{escape(memory_id)} is at version {changed.version}.")
    for warning in changed.warnings:
        out.print(f"[yellow]{escape(warning)}[/]")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"--payload takes JSON, and this is none: {error}") from None


def register(app: typer.Typer) -> None:
    app.command()(update)
