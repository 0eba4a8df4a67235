"""`engram list`, `count` and `delete`: memories chosen by a filter or their ids, without a cue."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.asking import PAGE
from engram.opening import Data, Url, open_client
from engram.replies import Memory
from service.errors import InvalidRequest

IDS_SHOWN_MAX = 20  # of what a filter would delete: enough to see whether it is what was meant

Name = Annotated[str, typer.Option("--collection", help="The collection.")]
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


def count(collection: Name = "memories", only: Filtered = None, data: Data = None, url: Url = None) -> None:
    """Count memories, all or those that a filter keeps."""
    with open_client(data, url, must_exist=True) as client:
        sys.stdout.write(f"{client.collection(collection).count(read_filter(only))}\n")


def delete(
    ids: Annotated[list[str] | None, typer.Argument(help="The memories' ids.", show_default=False)] = None,
    collection: Name = "memories",
    only: Filtered = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before what a filter keeps is deleted.")] = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Delete memories by their ids, or all that a filter keeps."""
    document = read_filter(only)
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        kept = 0 if document is None else target.count(document)
        if document is not None and not yes and not dry_run:
            typer.confirm(f"Delete {kept:,} memories of {collection}?", abort=True)
        deleted = target.delete(ids or None, filter=document, dry_run=dry_run)
    number = max(kept, len(deleted))  # a reply lists ten thousand ids at most
    out.print(f"{number:,} {'would be ' if dry_run else ''}deleted")
    if deleted:
        more = f" and {number - IDS_SHOWN_MAX:,} more" if number > IDS_SHOWN_MAX else ""
        out.print(escape(", ".join(deleted[:IDS_SHOWN_MAX])) + more)


def register(app: typer.Typer) -> None:
    app.command("list")(list_memories)
    app.command()(count)
    app.command()(delete)


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
            sys.stdout.write(json.dumps(asdict(memory), ensure_ascii=False) + "\n")
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("memory", "text", "payload", "stored"):
        table.add_column(heading)
    for memory in memories:
        payload = "" if memory.payload is None else json.dumps(memory.payload, ensure_ascii=False)
        table.add_row(
            escape(memory.id), escape(memory.text or ""), escape(payload), memory.created_at[:16].replace("T", " ")
        )
    out.print(table if table.row_count else "No memories.")
