"""The commands about encoders: which there are, and weights made ready for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

out = Console()


def register(app: typer.Typer) -> None:
    app.command("convert-dvae")(convert_dvae)
    app.command("convert-weights")(convert_weights)


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
