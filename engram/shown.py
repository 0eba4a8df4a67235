"""How a command prints: tables for a person, or with `--json` one document and nothing else on standard output.

Rules:
- With `--json` what is only for a person (progress, hints) goes to standard error: `console` gives where.
- JSON is the client's reply field by field, bytes in base64. A list of unknown length is a document a line.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Annotated, Any

import orjson
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.errors import EngramError

ERRORS_SHOWN_MAX = 50  # rows of a table that a person reads; the count says how many there are

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RIGHT = ("weight", "similarity", "memories", "%")  # headings over numbers


def console(as_json: bool) -> Console:
    """Where what is for a person goes."""
    return Console(stderr=as_json)


def print_error(error: EngramError) -> None:
    """One line, and one for each item of a batch, on standard error."""
    told = Console(stderr=True)
    told.print(f"[red]{error.title}[/]: {escape(error.detail)} ({error.code})", soft_wrap=True)
    for item in error.errors[:ERRORS_SHOWN_MAX]:
        told.print(f"  item {item.item}: {escape(item.detail)} ({item.code})", soft_wrap=True)


def print_json(value: Any, *, line: bool = False) -> None:
    """A reply, several, or a dictionary of them."""
    document = orjson.dumps(value, default=_binary, option=0 if line else orjson.OPT_INDENT_2)
    sys.stdout.write(document.decode() + "\n")


def table(*headings: str, title: str | None = None) -> Table:
    made = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in RIGHT else "left", overflow="fold")
    return made


def shown_payload(payload: Any) -> str:
    """As JSON, which is what a filter or an update takes."""
    return "" if payload is None else json.dumps(payload, ensure_ascii=False)


def minute(moment: str) -> str:
    """`2026-11-25T19:30:00Z` to the minute."""
    return moment[:16].replace("T", " ")


def _binary(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
