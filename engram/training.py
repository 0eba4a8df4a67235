"""What `engram train` shows: how far a training is, and what came of it."""

from __future__ import annotations

import time
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engram.client import Client
from engram.replies import Operation

POLL_S = 0.3
NAMES = {"own": "as before", "neg_l2": "−L2", "observed_neg_l2": "−L2 of what is shown"}


def follow(out: Console, client: Client, operation: Operation, what: str) -> Operation:
    """Show the progress until the operation has ended; Ctrl-C cancels it."""
    columns = TextColumn(f"training the {what}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=out) as progress:
            task = progress.add_task("train", total=1.0)
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
        alone = list(record["trial"][0]["alone"])
        table = Table(
            "held-out cues", *(NAMES.get(name, name) for name in alone), "without it", "with it", "at best",
            title="Own memory first, by each comparison alone and by the choice for each cue", box=box.SIMPLE,
        )  # fmt: skip
        for row in record["trial"]:
            shares = [row["alone"][name] for name in alone]
            values = [*shares, row["before"], row["chosen"], row["oracle"]]
            table.add_row(f"{escape(row['corruption'])} × {row['cues']}", *(f"{value:.1%}" for value in values))
        out.print(table)
    verdict = "[green]in use[/]" if record["kept"] else "[yellow]dropped[/]"
    out.print(f"The kernel is {verdict}: {escape(record['why'])}.")
