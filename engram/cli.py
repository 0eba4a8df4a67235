"""The `engram` command.

Rules:
- A command reaches the memories through their owner (`opening`).
- An error is one line, `title: detail (code)`, on standard error. Exit codes: 0 done, 1 refused or failed, 2 misused,
  130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

from engram import (
    browse,
    collections_command,
    diagnose,
    encoders_command,
    keys_command,
    recall_command,
    reencode,
    training,
)
from engram.client import Client, Collection
from engram.files import ENDINGS, caption_of, find_pictures, read_captions
from engram.opening import Data, Name, Url, calibrate, open_client
from engram.replies import StoreReply
from engram.shown import table
from service import settings
from service.errors import (
    CollectionNotFound,
    EngramError,
    InvalidRequest,
    NotFound,
)

if TYPE_CHECKING:
    from service.app.engine import Engine

INTERRUPTED = 130  # what a shell gives for a program that Ctrl-C ended
ERRORS_SHOWN_MAX = 50  # rows of a table that a person reads; the count says how many there are

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
out = Console()


@app.callback()
def engram() -> None:
    """Associative memory: store pictures and texts, recall them whole from a part, and be told when nothing fits."""


@app.command()
def serve(
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="Where to listen (default: 127.0.0.1).", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000; 0 takes a free one.", show_default=False)] = None,
    grpc_port: Annotated[
        str | None,
        typer.Option(help="Default: the one after --port; 0 takes a free one; off: no gRPC.", show_default=False),
    ] = None,
) -> None:
    """Run the server on a data folder, until Ctrl-C."""
    from service.main import serve as run_server

    chosen = settings.load(os.environ, data=data, host=host, port=port, grpc_port=grpc_port)

    def background(engine: Engine) -> AbstractContextManager[None]:
        from workers.loop import running  # brings torch, which `run_server` prepares for first

        return running(engine)

    def started(url: str, grpc_url: str | None) -> None:
        beside = f" and {grpc_url}" if grpc_url is not None else ""
        where = f"{url}{beside} (the API: {url}/docs)"
        out.print(f"Serving [bold]{escape(str(chosen.data))}[/] at {where}. Ctrl-C stops it.", soft_wrap=True)

    run_server(chosen, background, started)


@app.command()
def store(
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders to search for them.")],
    collection: Name = "memories",
    captions: Annotated[Path | None, typer.Option(help="A CSV file of filename,caption.", show_default=False)] = None,
    data: Data = None,
    url: Url = None,
) -> None:
    """Store pictures, with captions from a CSV file or from text files of the same name beside them."""
    files = find_pictures(paths)
    if not files:
        raise NotFound(f"no picture ({', '.join(sorted(ENDINGS))}) in {', '.join(map(str, paths))}")
    texts = read_captions(captions) if captions else {}
    known = {*files, *(file.name for file in files.values())}
    for name in sorted(texts.keys() - known)[:ERRORS_SHOWN_MAX]:
        out.print(
            f"[yellow]{escape(str(captions))} has a caption for {escape(name)}, which is not among the pictures[/]"
        )
    columns = (TextColumn("storing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=out)
    task = progress.add_task("store", total=len(files))
    with open_client(data, url) as client:
        try:
            target = _made(client, collection)
            with progress:
                reply = target.store(_memories(files, texts), progress=lambda count: progress.advance(task, count))
        except KeyboardInterrupt:
            stored = int(progress.tasks[task].completed)
            out.print(
                f"stopped: {stored:,} of {len(files):,} stored, and maybe more that were sent; "
                "run the same command to go on"
            )
            raise typer.Exit(INTERRUPTED) from None
        _report(collection, reply)
        if client.in_process:
            calibrate(out, target)
    if reply.errors:
        raise typer.Exit(1)


app.command()(recall_command.recall)
collections_command.register(app)
browse.register(app)
training.register(app)
app.command()(reencode.reencode)
app.command()(diagnose.diagnose)


@app.command()
def demo(
    port: Annotated[int, typer.Option(envvar="PORT", help="Where its server listens; 0 takes a free port.")] = 8000,
    leave: Annotated[bool, typer.Option("--exit", envvar="DEMO_EXIT", help="Stop when all is shown.")] = False,
    output: Annotated[Path, typer.Option(help="Where the contact sheet and the log go.")] = Path("demo-output"),
    data: Annotated[Path | None, typer.Option(help="Default: memories, below the output.", show_default=False)] = None,
) -> None:
    """Store real pictures, recall them from parts, noise and sentences, and see strangers refused."""
    from engram.demo.run import run  # brings the demo's packages

    run(output, data or output / "memories", port, leave)


encoders_command.register(app)
keys_command.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        app(arguments)
    except EngramError as error:
        Console(stderr=True).print(f"[red]{error.title}[/]: {escape(error.detail)} ({error.code})", soft_wrap=True)
        for item in error.errors[:ERRORS_SHOWN_MAX]:
            Console(stderr=True).print(f"  item {item.item}: {escape(item.detail)} ({item.code})", soft_wrap=True)
        sys.exit(1)


def _made(client: Client, name: str) -> Collection:
    try:
        client.collection(name).info()
    except CollectionNotFound:
        client.create_collection(name)
        out.print(f"Made the collection [bold]{escape(name)}[/] with the default spaces.")
    return client.collection(name)


def _memories(files: dict[str, Path], captions: dict[str, str]) -> Iterator[dict[str, Any]]:
    for memory_id, file in files.items():
        try:
            text = caption_of(memory_id, file, captions)
        except InvalidRequest as error:
            out.print(f"[yellow]{escape(error.detail)}; {escape(memory_id)} is stored without it[/]")
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
