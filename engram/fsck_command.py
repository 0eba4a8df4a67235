"""`engram fsck`: check all that a data folder keeps, and mend what can be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engram.opening import Data, folder_of
from engram.shown import AsJson, console, print_error, print_json
from service import settings
from service.errors import EngramError

if TYPE_CHECKING:
    from service.app.findings import Found, Report

NOT_CHECKED = 3
COLOURS = {"note": "dim", "repaired": "green", "repairable": "yellow", "lost": "red"}

out = Console()


def fsck(
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Move damaged files aside, remove damaged patterns, mend indexes. No memory is deleted."
        ),
    ] = False,
    compact: Annotated[
        bool,
        typer.Option("--compact", help="Then write a sound SQLite database anew; takes as much free space as it has."),
    ] = False,
    as_json: AsJson = False,
    data: Data = None,
) -> None:
    """Check a data folder that no server has open: database, patterns, originals, kernels, snapshots, banks.

    Exit codes: 0 nothing is wrong; 1 what was wrong is mended, or can be; 2 something is lost; 3 it could not be
    checked.
    """
    from service.app.fsck import fsck as checked  # brings torch

    try:
        chosen = settings.load(os.environ, data=folder_of(data, must_exist=True))
        with _progress(console(True)) as tell:
            report = checked(chosen, repair=repair, compact=compact, tell=tell)
    except EngramError as error:
        print_error(error)
        raise typer.Exit(NOT_CHECKED) from None
    if as_json:
        found = [{**vars(each), "first": [vars(named) for named in each.first]} for each in report.found]
        print_json({"exit_code": report.exit_code, "checked": report.checked, "found": found})
    else:
        _show(report, repair)
    raise typer.Exit(report.exit_code)


@contextmanager
def _progress(told: Console) -> Iterator[Callable[[str, float], None]]:
    """On standard error, and gone at the end."""
    columns: tuple[Any, ...] = TextColumn("checking {task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=told, transient=True, disable=not told.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def _show(report: Report, repair: bool) -> None:
    out.print("checked: " + ", ".join(f"{what} {number:,}" for what, number in report.checked.items()), soft_wrap=True)
    for found in report.found:
        _show_found(found)
    if any(found.state == "repairable" for found in report.found) and not repair:
        out.print("Nothing was changed; engram fsck --repair mends what it can.")
    if report.exit_code == 0:
        out.print("[green]Nothing is wrong.[/]")


def _show_found(found: Found) -> None:
    out.print(f"[{COLOURS[found.state]}]{found.state}[/]: {found.count:,} {found.what}", soft_wrap=True)
    for named in found.first if found.state != "note" else ():
        out.print(f"  {escape(f'{named.name}: {named.detail}'.removesuffix(': '))}", soft_wrap=True)
    if found.count > len(found.first) and found.state != "note":
        out.print(f"  and {found.count - len(found.first):,} more")
    if found.remedy:
        out.print(f"  → {escape(found.remedy)}", soft_wrap=True)
