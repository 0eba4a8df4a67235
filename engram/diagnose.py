"""`engram diagnose`: the diagnostics of a collection, as tables for a person or as JSON."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.opening import Data, Name, Url, open_client
from engram.reports import Capacity, Diagnostics, SpaceReport
from engram.shown import AsJson, print_json

WHOLE = "whole memory"


def diagnose(collection: Name = "memories", as_json: AsJson = False, data: Data = None, url: Url = None) -> None:
    """Say how well a collection's memories are told apart, and what holds them."""
    with open_client(data, url, must_exist=True) as client:
        found = client.collection(collection).diagnostics()
    if as_json:
        print_json(found)
    else:
        show(Console(), collection, found)


def show(out: Console, name: str, found: Diagnostics) -> None:
    compared = "all of them" if found.sampled == found.memories else f"{found.sampled:,} sampled"
    out.print(f"[bold]{escape(name)}[/]: {found.memories:,} memories, {compared} compared with every other")
    if found.kernels:
        used = escape(", ".join(found.kernels))
        out.print(f"In use: {used}. What follows is by the collection's own similarity, without it.", style="dim")
    if found.whole is None:
        out.print("Nothing is stored yet.")
        return
    reports = {**found.spaces, **({WHOLE: found.whole} if len(found.spaces) > 1 else {})}
    separation = found.separation if isinstance(found.separation, str) else f"entmax {found.separation['entmax']:g}"
    out.print(_apart(reports, f"How far apart, and recalled by {escape(separation)} over {found.support} rows"))
    out.print(_held(reports, "What holds them"))
    out.print(_betas(found))
    _near_duplicates(out, reports)
    total = sum(found.bytes.values())
    kinds = ", ".join(f"{kind} {size:,.0f}" for kind, size in found.bytes_per_memory.items() if size)
    out.print(f"{total / 2**20:,.1f} MB in memory; bytes a memory: {kinds}")
    disk = found.disk
    out.print(
        f"about {disk['database'] / 2**20:,.1f} MB in the database (all of it: {disk['whole_database'] / 2**20:,.1f})"
        f" and {disk['originals'] / 2**20:,.1f} MB of originals; {found.device['bytes'] / 2**20:,.1f} MB on a device"
        f" ({found.device['name']})"
    )
    drift = "" if found.drift is None else f", {found.drift:.0%} of the memories changed since"
    out.print(f"calibration: {found.calibration}{drift}")
    out.print(f"{found.seconds:.2f} s", style="dim")


def _apart(reports: dict[str, SpaceReport], title: str) -> Table:
    table = _table("space", "least margin", "95% have", "needed", "fixed points", "radius", "can hold", title=title)
    for name, report in reports.items():
        margin, fixed = report.margin, report.fixed_points
        table.add_row(
            escape(name), _number(None if margin is None else margin.minimum),
            _number(None if margin is None else margin.share_95),
            _number(None if fixed is None else fixed.margin_needed),
            "–" if fixed is None else f"{fixed.share:.1%}",
            _number(report.radius), _capacity(report.capacity),
        )  # fmt: skip
    return table


def _held(reports: dict[str, SpaceReport], title: str) -> Table:
    table = _table("space", "memories", "relative rank", "near-duplicates", "searched by", title=title)
    for name, report in reports.items():
        rank, index = report.rank, report.index
        by = ""
        if index is not None:
            by = ", ".join(
                [f"scan of {index.scanned:,}"] * bool(index.scanned)
                + [f"{index.graphs} graph{'s' * (index.graphs != 1)} of {index.graph:,}"] * bool(index.graph)
            )
        table.add_row(
            escape(name), f"{report.memories:,}",
            "–" if rank is None else f"{rank.relative:.2f} ({rank.rank} of {rank.rows:,} rows)",
            f"{report.near_duplicates.memories:,}", by,
        )  # fmt: skip
    return table


def _betas(found: Diagnostics) -> Table:
    table = _table("cue", "β", "rests on", "margin", "share", "own first", title="β")
    for beta in found.betas:
        share, first = ("–" if value is None else f"{value:.1%}" for value in (beta.share, beta.first_share))
        table.add_row(escape(beta.modality), f"{beta.beta:.1f}", beta.rests_on, _number(beta.margin), share, first)
    return table


def _near_duplicates(out: Console, reports: dict[str, SpaceReport]) -> None:
    named: list[tuple[str, Any]] = [(name, pair) for name, r in reports.items() for pair in r.near_duplicates.pairs]
    if not named:
        return
    table = _table(
        "space", "memory", "and", "similarity", title="Nearly the same: no cue of that space alone tells these apart"
    )
    for name, pair in named:
        table.add_row(escape(name), escape(pair.ids[0]), escape(pair.ids[1]), f"{pair.similarity:.5f}")
    out.print(table)


def _capacity(capacity: Capacity | None) -> str:
    if capacity is None or capacity.memories is None:
        return "any" if capacity is not None and capacity.at_least else "–"
    return ("over " if capacity.at_least else "about " if capacity.extrapolated else "") + f"{capacity.memories:,}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(*headings: str, title: str) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
    for heading in headings:
        table.add_column(
            heading,
            justify="left" if heading in ("space", "cue", "rests on", "memory", "and", "searched by") else "right",
        )
    return table
