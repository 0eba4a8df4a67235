"""`engram sizing N`: what so many memories would need, before they are stored."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.opening import Data, Url, open_client
from engram.reports import Sizing
from service.errors import InvalidRequest

out = Console()


def sizing(
    memories: Annotated[int, typer.Argument(help="How many there would be.")],
    collection: Annotated[str, typer.Option("--collection", help="The collection they would be in.")] = "memories",
    space: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUES, instead of the collection's spaces.", show_default=False)
    ] = None,
    payload_bytes: Annotated[float | None, typer.Option(help="Of a payload; default: the mean stored.")] = None,
    text_bytes: Annotated[float | None, typer.Option(help="Of a caption; default: the mean stored.")] = None,
    image_bytes: Annotated[float | None, typer.Option(help="Of an original; default: the mean stored.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Say what so many memories would need: RAM, disk, time to load and to build the index."""
    given: dict[str, Any] = {"payload_bytes": payload_bytes, "text_bytes": text_bytes, "image_bytes": image_bytes}
    if space:
        given["spaces"] = dict(map(read_space, space))
    with open_client(data, url, must_exist=True) as client:
        found = client.collection(collection).sizing(memories, **given)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
    else:
        show(out, collection, found)


def register(app: typer.Typer) -> None:
    app.command()(sizing)


def read_space(text: str) -> tuple[str, int]:
    """`image=784`. Raises `InvalidRequest`."""
    name, _, values = text.partition("=")
    if not name or not values.isdigit():
        raise InvalidRequest(f"--space takes NAME=VALUES, like image=784, not {text!r}")
    return name, int(values)


def show(out: Console, name: str, found: Sizing) -> None:
    spaces = ", ".join(f"{escape(space)} {values:,}" for space, values in found.spaces.items())
    out.print(f"[bold]{escape(name)}[/] with {found.memories:,} memories of {spaces} values, about:")
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading, justify in (("what", "left"), ("MB", "right"), ("bytes a memory", "right"), ("of it", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for what, amount in (("RAM", found.ram), ("disk", found.disk), ("device", found.device)):
        parts = ", ".join(f"{part} {_mb(size)}" for part, size in amount.parts.items() if size)
        table.add_row(what, _mb(amount.bytes), f"{amount.bytes_per_memory:,.0f}", parts)
    out.print(table)
    searched = "one graph or more" if found.index == "graph" else "a scan, exact"
    out.print(
        f"A recall: {searched}, {found.recall_ms:g} ms ({found.latency}). Graphs from {found.graph_from:,} memories on."
    )
    out.print(
        f"Start: {found.load_s:g} s to load, {found.seal_s:g} s more for graphs, with {_mb(found.ram_peak_bytes)} MB"
        " of RAM meanwhile."
    )
    for line in found.how:
        out.print(escape(line), style="dim")


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f}"
