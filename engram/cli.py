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
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from engram import browse, encoders_command, keys_command, recalled, reencode, training
from engram import diagnose as diagnosis
from engram.client import Client, Collection
from engram.files import ENDINGS, caption_of, find_pictures, read_captions
from engram.opening import Data, Url, calibrate, open_client
from engram.replies import CollectionInfo, StoreReply
from service import settings
from service.errors import (
    CollectionNotFound,
    EngramError,
    InvalidRequest,
    NotFound,
    TrainingRefused,
)

if TYPE_CHECKING:
    from service.app.engine import Engine

INTERRUPTED = 130  # what a shell gives for a program that Ctrl-C ended
ERRORS_SHOWN_MAX = 50  # rows of a table that a person reads; the count says how many there are

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
out = Console()

Name = Annotated[str, typer.Option("--collection", help="The collection.")]


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


@app.command()
def recall(
    cue: Annotated[str | None, typer.Argument(help="A sentence, or a picture's file.", show_default=False)] = None,
    like: Annotated[str | None, typer.Option(help="In place of a cue: more like this memory.", metavar="ID")] = None,
    collection: Name = "memories",
    limit: Annotated[int, typer.Option(help="How many matches, or groups of them, to list.")] = 5,
    offset: Annotated[int, typer.Option(help="How many to pass over.")] = 0,
    group_by: Annotated[str | None, typer.Option(help="List by the values of this key of the payload.")] = None,
    group_size: Annotated[int, typer.Option(help="How many matches of each group to list.")] = 1,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave this memory out.", metavar="ID")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="The least similarity of a match.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture, white where the cue's is missing.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Open the recalled picture beside its original.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the recalled picture to this file (.png or .webp).")] = None,
    original: Annotated[Path | None, typer.Option(help="Write the first match's original to this file.")] = None,
    kernel: Annotated[str, typer.Option(help="auto, none, or the id of one in use (engram kernels).")] = "auto",
    only: browse.Filtered = None,
    data: Data = None,
    url: Url = None,
) -> None:
    """Recall by a sentence, by a picture, or what is like a memory."""
    if (cue is None) == (like is None):
        raise typer.BadParameter("give a sentence or a picture, or --like")
    options: dict[str, Any] = {"limit": limit, "offset": offset, "exclude": exclude or [], "kernel": kernel}
    given = {"filter": browse.read_filter(only), "score_threshold": score_threshold, "group_by": group_by, "id": like}
    options |= {name: value for name, value in given.items() if value is not None}
    if group_by is not None:
        options["group_size"] = group_size
    if cue is None:
        pass
    elif Path(cue).is_file():
        options["image"] = Path(cue)
    elif Path(cue).suffix.lower() in ENDINGS:
        raise NotFound(f"{cue} looks like a picture, and there is no such file")
    else:
        options["text"] = cue
    if mask is not None:
        options["mask"] = mask
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        try:
            if client.in_process:
                calibrate(out, target)
            decodable = any(space["decodable"] for space in target.info().spaces.values()) if show else False
            if save is not None or decodable:
                options["reconstruct"] = recalled.drawing_of(save)
            answer = target.recall(**options)
        except CollectionNotFound as error:
            raise CollectionNotFound(f"{error.detail}; {_names(client)}") from None
        recalled.print_answer(out, answer)
        if save is not None:
            recalled.save_recalled(out, answer, save)
        if original is not None:
            recalled.save_original(out, target, answer, original)
        if show:
            recalled.show(out, target, answer, options.get("image"), mask)


@app.command()
def collections(data: Data = None, url: Url = None) -> None:
    """List the collections."""
    with open_client(data, url, must_exist=True) as client:
        found = client.collections()
    if not found:
        out.print("There are no collections yet; make one with: engram store PATH")
        return
    table = _table("collection", "memories", "spaces", "gate", "made")
    for info in found:
        spaces = ", ".join(_space(name, space) for name, space in info.spaces.items())
        table.add_row(escape(info.name), f"{info.count:,}", spaces, _gate(info), info.created_at[:16].replace("T", " "))
    out.print(table)


@app.command()
def diagnose(
    collection: Name = "memories",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Say how well a collection's memories are told apart, and what holds them."""
    with open_client(data, url, must_exist=True) as client:
        found = client.collection(collection).diagnostics()
    if as_json:
        sys.stdout.write(diagnosis.as_json(found) + "\n")
    else:
        diagnosis.show(out, collection, found)


@app.command()
def train(
    what: Annotated[str, typer.Argument(help="kernel, or gate (the calibration of verdicts).")] = "kernel",
    collection: Name = "memories",
    space: Annotated[str | None, typer.Option(help="The space a kernel is for; default: the first.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="cues (the default), separation or separation_plus.", show_default=False)
    ] = None,
    time_limit_s: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            show_default=False,
            help="Seconds a kernel may train (300); making its cues, its trial and a calibration come on top.",
        ),
    ] = None,
    data: Data = None,
    url: Url = None,
) -> None:
    """Train a kernel on a collection's own memories, or calibrate its gate again."""
    given = {"space": space, "objective": objective, "time_limit_s": time_limit_s}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with open_client(data, url, must_exist=True) as client:
        started = client.collection(collection).train(what, **options)
        operation = training.follow(out, client, started, f"training the {what}")
    if operation.status != "done" or operation.result is None:
        error = operation.error
        raise TrainingRefused(f"the training is {operation.status}" if error is None else error.detail)
    if what == "kernel":
        training.show_kernel(out, operation.result)
    else:
        training.show_gate(out, operation.result["modalities"])


app.command()(reencode.reencode)
browse.register(app)


@app.command()
def kernels(
    collection: Name = "memories",
    retire: Annotated[str | None, typer.Option(help="Go on without this one, which is in use.")] = None,
    data: Data = None,
    url: Url = None,
) -> None:
    """List the kernels that were trained, and what became of them."""
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        if retire is not None:
            target.retire_kernel(retire)
            out.print(f"{escape(retire)} is retired.")
        found = target.kernels()
    if not found:
        out.print("None was trained yet; train one with: engram train kernel")
        return
    table = _table("kernel", "status", "trained", "for", "what came of it")
    for kernel in found:
        record = kernel["record"]
        table.add_row(
            escape(kernel["id"]), {"active": "in use"}.get(kernel["status"], kernel["status"]),
            kernel["created_at"][:16].replace("T", " "), record["objective"], escape(record["why"]),
        )  # fmt: skip
    out.print(table)


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


def _space(name: str, space: dict[str, Any]) -> str:
    by = escape(space["encoder"] or "your vectors")
    return f"{name} ({by})" if space.get("problem") is None else f"{name} ({by}, [yellow]{space['problem']['code']}[/])"


def _gate(info: CollectionInfo) -> str:
    if info.calibration.state != "current":
        return {"none": "nothing stored", "pending": "being calibrated"}.get(
            info.calibration.state, "being recalibrated"
        )
    refused = [record.refused is not None for record in info.calibration.modalities]
    return "too few" if all(refused) else "partly" if any(refused) else "calibrated"


def _names(client: Client) -> str:
    names = [info.name for info in client.collections()]
    if not names:
        return "there is none yet"
    more = f" and {len(names) - ERRORS_SHOWN_MAX:,} more" if len(names) > ERRORS_SHOWN_MAX else ""
    return f"there {'is' if len(names) == 1 else 'are'} {', '.join(names[:ERRORS_SHOWN_MAX])}{more}"


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
            table = _table("memory", "code", "what", title=title)
            for memory_id, code, what in rows[:ERRORS_SHOWN_MAX]:
                table.add_row(escape(str(memory_id)), code, escape(what))
            out.print(table)
            if len(rows) > ERRORS_SHOWN_MAX:
                out.print(f"and {len(rows) - ERRORS_SHOWN_MAX:,} more")


def _table(*headings: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("weight", "similarity", "memories") else "left")
    return table
