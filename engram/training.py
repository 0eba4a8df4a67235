"""`engram train` and `engram kernels`: a training with how far it is and what came of it, and the kernels there are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engram.client import Client
from engram.completion import complete_kernel, complete_space
from engram.opening import Data, Name, Url, open_client
from engram.replies import Operation
from engram.shown import AsJson, console, minute, print_json, table
from service.errors import TrainingRefused

POLL_S = 0.3

out = Console()


def train(
    what: Annotated[
        str,
        typer.Argument(
            help="kernel, or gate (the calibration of verdicts).", autocompletion=lambda: ["kernel", "gate"]
        ),
    ] = "kernel",
    collection: Name = "memories",
    space: Annotated[
        str | None,
        typer.Option(help="The space a kernel is for; default: the first.", autocompletion=complete_space),
    ] = None,
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
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Train a kernel on a collection's own memories, or calibrate its gate again."""
    given = {"space": space, "objective": objective, "time_limit_s": time_limit_s}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with open_client(data, url, must_exist=True) as client:
        started = client.collection(collection).train(what, **options)
        operation = follow(console(as_json), client, started, f"training the {what}")
    if operation.status != "done" or operation.result is None:
        error = operation.error
        raise TrainingRefused(f"the training is {operation.status}" if error is None else error.detail)
    if as_json:
        print_json(operation)
    elif what == "kernel":
        show_kernel(out, operation.result)
    else:
        show_gate(out, operation.result["modalities"])


def kernels(
    collection: Name = "memories",
    retire: Annotated[
        str | None, typer.Option(help="Go on without this one, which is in use.", autocompletion=complete_kernel)
    ] = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """List the kernels that were trained, and what became of them."""
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        if retire is not None:
            target.retire_kernel(retire)
            console(as_json).print(f"{escape(retire)} is retired.")
        found = target.kernels()
    if as_json:
        print_json(found)
        return
    if not found:
        out.print("None was trained yet; train one with: engram train kernel")
        return
    listed = table("kernel", "status", "trained", "for", "what came of it")
    for kernel in found:
        record = kernel["record"]
        listed.add_row(
            escape(kernel["id"]), {"active": "in use"}.get(kernel["status"], kernel["status"]),
            minute(kernel["created_at"]), record["objective"], escape(record["why"]),
        )  # fmt: skip
    out.print(listed)


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(kernels)


def follow(out: Console, client: Client, operation: Operation, doing: str) -> Operation:
    """Show the progress until the operation has ended; Ctrl-C cancels it."""
    columns = TextColumn(doing), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=out) as progress:
            task = progress.add_task(doing, total=1.0)
            while operation.status in ("queued", "running"):
                progress.update(task, completed=operation.progress)
                time.sleep(POLL_S)
                operation = client.operation(operation.id)
            progress.update(task, completed=operation.progress)
    except KeyboardInterrupt:
        client.cancel(operation.id)
        out.print("Cancelled: nothing has changed.")
        raise
    return operation


def show_kernel(out: Console, record: dict[str, Any]) -> None:
    """A kernel's training record."""
    out.print(
        f"{record['steps']:,} steps in {record['seconds']:.0f} s over {record['memories']:,} memories "
        f"(stopped by {record['stopped']}); the best was step {record['best_step']:,}"
    )
    if record["trial"]:
        table = Table("held-out cues", "before", "with it", title="Own memory first", box=box.SIMPLE)
        for row in record["trial"]:
            table.add_row(
                f"{escape(row['corruption'])} × {row['cues']}", f"{row['before']:.1%}", f"{row['chosen']:.1%}"
            )
        out.print(table)
    verdict = "[green]in use[/]" if record["kept"] else "[yellow]dropped[/]"
    out.print(f"The kernel is {verdict}: {escape(record['why'])}.")


def show_gate(out: Console, records: Sequence[dict[str, Any]]) -> None:
    """What a calibration found, by kind of cue."""
    if not records:
        out.print("No cue could be made: there is nothing to calibrate with.")
        return
    table = Table("cues that fill", "cues", "own first", "strangers let in", "threshold", box=box.SIMPLE)
    for record in records:
        strangers = record["stranger_accept_rate"]
        table.add_row(
            escape(record["modality"]), str(record["cues"]), f"{record['first_share']:.0%}",
            "–" if strangers is None else f"{strangers:.0%}",
            "set" if record["refused"] is None else f"[yellow]none: {escape(record['refused'])}[/]",
        )  # fmt: skip
    out.print(table)
    out.print("Strangers: the same cues with their own memory left out. Where most get in, a verdict says little.")
