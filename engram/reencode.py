"""`engram reencode`: change the encoder of a space, with progress, and say what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from engram import training
from engram.completion import complete_collection, complete_space
from engram.opening import Data, Url, calibrate, open_client
from engram.shown import AsJson, console, print_json
from service.errors import InvalidRequest

out = Console()


def reencode(
    collection: Annotated[str, typer.Argument(help="The collection.", autocompletion=complete_collection)],
    space: Annotated[str, typer.Argument(help="The space to encode again.", autocompletion=complete_space)],
    encoder: Annotated[
        str | None, typer.Option(help="Another encoder; default: the configured one, as it is now.", show_default=False)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the encoder, as name=value; may be given several times.", show_default=False),
    ] = None,
    drop_without_original: Annotated[
        bool,
        typer.Option(
            "--drop-without-original",
            help="Memories whose original is missing or unreadable lose the space; else nothing is changed.",
        ),
    ] = False,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Encode a space again from the kept originals, by another encoder or after its encoder has changed."""
    options = None if option is None else dict(map(_option, option))
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        started = target.reencode(space, encoder, options, drop_without_original=drop_without_original, wait=False)
        told = console(as_json)
        operation = training.follow(told, client, started, f"encoding {space} again")
        operation.check()
        if as_json:
            print_json(operation)
        elif operation.result is not None:
            _show(operation.result)
        if client.in_process:
            calibrate(told, target)


def _option(given: str) -> tuple[str, Any]:
    """`size=16` → ("size", 16); what is no JSON is a text."""
    name, equals, value = given.partition("=")
    if not equals or not name:
        raise InvalidRequest(f"an option is name=value, not {given}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _show(result: dict[str, Any]) -> None:
    out.print(
        f"{result['memories']:,} memories are now encoded by [bold]{escape(result['encoder'])}[/] "
        f"({result['dimension']:,} values each), in {result['seconds']:.1f} s."
    )
    out.print(f"before: {escape(result['former'])}\nnow:    {escape(result['fingerprint'])}", soft_wrap=True)
    dropped = result["dropped"]
    if dropped["count"]:
        out.print(f"[yellow]{dropped['count']:,} could not be encoded and lost the space[/]:")
        for memory_id, why in dropped["first"].items():
            out.print(f"  {escape(memory_id)}: {escape(why)}", soft_wrap=True)
    if result["deleted"]:
        out.print(f"[yellow]{result['deleted']:,} of them had no other space and are deleted[/]")
    _listed("kernels dropped, since they were trained on the former patterns", result["kernels_dropped"])
    _listed("supplied cues forgotten, since they were encoded by the former encoder", result["cues_forgotten"])


def _listed(what: str, names: Sequence[str]) -> None:
    if names:
        out.print(f"{what}: {escape(', '.join(names))}")
