"""`engram store`: pictures with their captions, from files and folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from engram.client import Client, Collection
from engram.files import ENDINGS, caption_of, find_pictures, read_captions
from engram.opening import Data, Name, Url, calibrate, open_client
from engram.replies import StoreReply
from engram.shown import AsJson, console, print_json, table
from service.errors import CollectionNotFound, InvalidRequest, NotFound

INTERRUPTED = 130  # what a shell gives for a program that Ctrl-C ended
ERRORS_SHOWN_MAX = 50  # rows of a table that a person reads; the count says how many there are

out = Console()


def store(
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders to search for them.")],
    collection: Name = "memories",
    captions: Annotated[Path | None, typer.Option(help="A CSV file of filename,caption.", show_default=False)] = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Store pictures, with captions from a CSV file or from text files of the same name beside them."""
    told = console(as_json)
    files = find_pictures(paths)
    if not files:
        raise NotFound(f"no picture ({', '.join(sorted(ENDINGS))}) in {', '.join(map(str, paths))}")
    texts = read_captions(captions) if captions else {}
    known = {*files, *(file.name for file in files.values())}
    for name in sorted(texts.keys() - known)[:ERRORS_SHOWN_MAX]:
        told.print(
            f"[yellow]{escape(str(captions))} has a caption for {escape(name)}, which is not among the pictures[/]"
        )
    columns = (TextColumn("storing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=told)
    task = progress.add_task("store", total=len(files))
    with open_client(data, url) as client:
        try:
            target = made(told, client, collection)
            with progress:
                reply = target.store(
                    _memories(told, files, texts), progress=lambda count: progress.advance(task, count)
                )
        except KeyboardInterrupt:
            stored = int(progress.tasks[task].completed)
            told.print(
                f"stopped: {stored:,} of {len(files):,} stored, and maybe more that were sent; "
                "run the same command to go on"
            )
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            print_json(reply)
        else:
            _report(collection, reply)
        if client.in_process:
            calibrate(told, target)
    if reply.errors:
        raise typer.Exit(1)


def made(told: Console, client: Client, name: str) -> Collection:
    try:
        client.collection(name).info()
    except CollectionNotFound:
        client.create_collection(name)
        told.print(f"Made the collection [bold]{escape(name)}[/] with the default spaces.")
    return client.collection(name)


def _memories(told: Console, files: dict[str, Path], captions: dict[str, str]) -> Iterator[dict[str, Any]]:
    for memory_id, file in files.items():
        try:
            text = caption_of(memory_id, file, captions)
        except InvalidRequest as error:
            told.print(f"[yellow]{escape(error.detail)}; {escape(memory_id)} is stored without it[/]")
            text = None
        yield {"id": memory_id, "image": file, "text": text}


def _report(collection: str, reply: StoreReply) -> None:
    count = {
        status: sum(result.status == status for result in reply.results) for status in ("stored", "updated", "queued")
    }
    words = [f"{count['stored']:,} stored"]
    words += [f"{count['updated']:,} replaced"] if count["updated"] else []
    words += [f"{count['queued']:,} still being encoded"] if count["queued"] else []
    words += [f"[red]{len(reply.errors):,} refused[/]"] if reply.errors else []
    out.print(f"{escape(collection)}: {', '.join(words)}")
    noted = [(result.id, "warning", warning) for result in reply.results for warning in result.warnings]
    refused = [(result.id, result.error.code, result.error.detail) for result in reply.errors if result.error]
    for title, rows in (("What was done to pictures and texts", noted), ("Refused", refused)):
        if rows:
            listed = table("memory", "code", "what", title=title)
            for memory_id, code, what in rows[:ERRORS_SHOWN_MAX]:
                listed.add_row(escape(str(memory_id)), code, escape(what))
            out.print(listed)
            if len(rows) > ERRORS_SHOWN_MAX:
                out.print(f"and {len(rows) - ERRORS_SHOWN_MAX:,} more")
