"""`engram operations`: what goes on in the background, or did; and `--retry`, `--cancel`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.completion import complete_operation
from engram.opening import Data, Url, open_client
from engram.replies import Operation
from engram.shown import AsJson, print_json, table
from service.errors import InvalidRequest

COLOURS = {"done": "green", "failed": "red", "dead": "red", "cancelled": "yellow"}

out = Console()


def operations(
    retry: Annotated[
        str | None,
        typer.Option(
            help="Queue this one again: it failed, died or was cancelled.",
            show_default=False,
            autocompletion=complete_operation,
        ),
    ] = None,
    cancel: Annotated[
        str | None,
        typer.Option(
            help="End this one; what it has done is kept.", show_default=False, autocompletion=complete_operation
        ),
    ] = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """List the last operations: stores, calibrations, trainings, re-encodings."""
    if retry is not None and cancel is not None:
        raise InvalidRequest("give --retry or --cancel, not both")
    with open_client(data, url, must_exist=True) as client:
        if retry is not None:
            found = [client.retry(retry)]
        elif cancel is not None:
            found = [client.cancel(cancel)]
        else:
            found = client.operations()
    if as_json:
        print_json(found)
    elif not found:
        out.print("There are no operations.")
    else:
        out.print(_table(found))


def _table(found: list[Operation]) -> Table:
    failed = any(operation.error for operation in found)
    shown = table("operation", "kind", "collection", "status", "%", *["error"] * failed)
    shown.columns[0].no_wrap = True  # what --retry and --cancel take
    for operation in found:
        colour = COLOURS.get(operation.status)
        status = f"[{colour}]{operation.status}[/]" if colour else operation.status
        error = "" if operation.error is None else f"{operation.error.detail} ({operation.error.code})"
        shown.add_row(
            operation.id, operation.kind, escape(operation.collection or ""), status, f"{100 * operation.progress:.0f}",
            *[escape(error)] * failed,
        )  # fmt: skip
    return shown


def register(app: typer.Typer) -> None:
    app.command()(operations)
