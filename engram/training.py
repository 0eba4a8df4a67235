"""What `engram train` shows: how far a training is, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engram.client import Client
from engram.replies import Operation

POLL_S = 0.3


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
