"""The commands about encoders: which there are, and weights made ready for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.client import Client
from engram.replies import EncoderInfo
from engram.shown import AsJson, print_json
from service.errors import UnknownEncoder

out = Console()


def register(app: typer.Typer) -> None:
    app.command("encoders")(encoders)
    app.command("convert-dvae")(convert_dvae)
    app.command("convert-weights")(convert_weights)


def encoders(
    name: Annotated[str | None, typer.Argument(help="One of them, told in full.", show_default=False)] = None,
    as_json: AsJson = False,
    url: Annotated[
        str | None, typer.Option(envvar="ENGRAM_URL", help="Ask the server at this address.", show_default=False)
    ] = None,
) -> None:
    """List the encoders, and whether their weights are here."""
    if url is not None:
        with Client(url, api_key=os.environ.get("ENGRAM_API_KEY")) as client:
            found = client.encoders()
    else:
        from service.encoders.cards import cards  # brings torch

        found = [EncoderInfo.of(card.model_dump()) for card in cards()]
    if name is not None:
        there = ", ".join(info.name for info in found)
        found = [info for info in found if info.name == name]
        if not found:
            raise UnknownEncoder(f"there is no encoder {name!r}; there are {there}")
    if as_json:
        print_json(found)
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("encoder", "takes", "draws", "values", "on disk", "licence", "weights"):
        table.add_column(heading, justify="right" if heading in ("values", "on disk") else "left")
    for info in found:
        values = "" if info.dimension is None else f"{info.dimension:,}"
        weights = "[green]here[/]" if info.here else f"[yellow]{escape(info.needs or '')}[/]"
        table.add_row(
            info.name, " ".join(info.takes), "yes" if info.decodes else "no", values, _size(info.size_bytes),
            escape(info.licence or ""), weights,
        )  # fmt: skip
    out.print(table)
    if name is None:
        out.print("More of one, and models to begin with: engram encoders NAME")
        return
    info = found[0]
    out.print(f"{escape(info.about)} Documentation: {info.page}", soft_wrap=True)
    for model in info.models:
        here = f"here, {_size(model.size_bytes)}" if model.here else "not here"
        out.print(f"  {escape(json.dumps(model.options))}: {here}; licence {escape(model.licence)}", soft_wrap=True)


def convert_dvae(
    encoder: Annotated[Path, typer.Argument(help="The published encoder.pkl.")],
    decoder: Annotated[Path, typer.Argument(help="The published decoder.pkl.")],
    folder: Annotated[Path, typer.Argument(help="Where dvae.safetensors goes.")],
) -> None:
    """Make safetensors of DALL-E's dVAE, once: its pickles are read without running what is in them."""
    from service.encoders.conversion import convert_dvae  # brings torch

    written = convert_dvae(encoder, decoder, folder)
    out.print(f"Wrote {escape(str(written))}; use it as the encoder dvae with {{'model': '{escape(str(folder))}'}}.")


def convert_weights(
    file: Annotated[Path, typer.Argument(help="A pickled state dict: .bin, .pt, .pth, .ckpt.")],
    to: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Make safetensors of a pickled state dict, once: it is read without running what is in it."""
    from service.encoders.conversion import convert_weights  # brings torch

    out.print(f"Wrote {escape(str(convert_weights(file, to)))}.")


def _size(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 1e6:,.1f} MB"
