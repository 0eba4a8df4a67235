"""`engram list`, `get`, `content`, `count` and `delete`: memories chosen by a filter or their ids, without a cue."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from engram.asking import PAGE
from engram.opening import Data, Name, Url, open_client
from engram.replies import Memory
from engram.shown import AsJson, minute, print_json, shown_payload, table
from service.errors import InvalidRequest, MemoryNotFound, NotWritable

IDS_SHOWN_MAX = 20  # of what a filter would delete: enough to see whether it is what was meant

Filtered = Annotated[
    str | None,
    typer.Option("--filter", show_default=False, help='As JSON: {"must": [{"key": "year", "range": {"gte": 2020}}]}'),
]

out = Console()


def list_memories(
    collection: Name = "memories",
    only: Filtered = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a memory.")] = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """List memories in the order they were first stored, all or those that a filter keeps."""
    with open_client(data, url, must_exist=True) as client:
        found = client.collection(collection).scroll(read_filter(only), batch=min(limit, PAGE))
        _show(islice(found, limit), as_json)


def get(
    ids: Annotated[list[str], typer.Argument(help="The memories' ids.", show_default=False)],
    collection: Name = "memories",
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a memory.")] = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Show memories by their ids."""
    with open_client(data, url, must_exist=True) as client:
        found = client.collection(collection).get_many(ids)
    _show(found, as_json)
    if missing := set(ids) - {memory.id for memory in found}:
        raise MemoryNotFound(", ".join(sorted(missing)[:IDS_SHOWN_MAX]))


def content(
    memory_id: Annotated[str, typer.Argument(help="The memory's id.")],
    file: Annotated[
        Path | None, typer.Argument(help="Where it goes; default: standard output.", show_default=False)
    ] = None,
    collection: Name = "memories",
    data: Data = None,
    url: Url = None,
) -> None:
    """Write a memory's original to a file, byte for byte."""
    with open_client(data, url, must_exist=True) as client:
        original = client.collection(collection).content(memory_id)
    if file is None:
        sys.stdout.buffer.write(original)
        return
    try:
        file.write_bytes(original)
    except OSError as error:
        raise NotWritable(f"{file}: {error.strerror}") from None


def count(
    collection: Name = "memories",
    only: Filtered = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Count memories, all or those that a filter keeps."""
    with open_client(data, url, must_exist=True) as client:
        found = client.collection(collection).count(read_filter(only))
    if as_json:
        print_json({"count": found})
    else:
        sys.stdout.write(f"{found}\n")


def delete(
    ids: Annotated[list[str] | None, typer.Argument(help="The memories' ids.", show_default=False)] = None,
    collection: Name = "memories",
    only: Filtered = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before what a filter keeps is deleted.")] = False,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Delete memories by their ids, or all that a filter keeps."""
    document = read_filter(only)
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        kept = 0 if document is None else target.count(document)
        if document is not None and not yes and not dry_run:
            typer.confirm(f"Delete {kept:,} memories of {collection}?", abort=True, err=as_json)
        deleted = target.delete(ids or None, filter=document, dry_run=dry_run)
    number = max(kept, len(deleted))  # a reply lists ten thousand ids at most
    if as_json:
        print_json({"count": number, "dry_run": dry_run, "deleted": deleted})
        return
    out.print(f"{number:,} {'would be ' if dry_run else ''}deleted")
    if deleted:
        more = f" and {number - IDS_SHOWN_MAX:,} more" if number > IDS_SHOWN_MAX else ""
        out.print(escape(", ".join(deleted[:IDS_SHOWN_MAX])) + more)


def register(app: typer.Typer) -> None:
    app.command("list")(list_memories)
    for command in (get, content, count, delete):
        app.command()(command)


def read_filter(text: str | None) -> dict[str, Any] | None:
    """A filter as JSON. Raises `InvalidRequest`."""
    if text is None:
        return None
    try:
        document: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"--filter takes JSON, and this is none: {error}") from None
    return document


def _show(memories: Iterable[Memory], as_json: bool) -> None:
    """A table, or a line of JSON a memory."""
    if as_json:
        for memory in memories:
            print_json(memory, line=True)
        return
    listed = table("memory", "text", "payload", "stored")
    for memory in memories:
        listed.add_row(
            escape(memory.id),
            escape(memory.text or ""),
            escape(shown_payload(memory.payload)),
            minute(memory.created_at),
        )
    out.print(listed if listed.row_count else "No memories.")
