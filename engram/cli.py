"""The `engram` command.

Rules:
- A command reaches the memories through their owner (`opening`).
- An error is one line, `title: detail (code)`, on standard error. Exit codes: 0 done, 1 refused or failed, 2 misused,
  130 interrupted
  (`fsck` has its own: 0 nothing wrong, 1 mended or to be mended, 2 lost, 3 not checked).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from engram import (
    browse,
    collections_command,
    diagnose,
    encoders_command,
    fsck_command,
    indexes_command,
    keys_command,
    operations,
    recall_command,
    reencode,
    sizing,
    snapshot_command,
    storing,
    training,
    transfer_commands,
    update,
)
from engram.opening import Data
from engram.shown import print_error
from service import settings
from service.errors import EngramError

if TYPE_CHECKING:
    from service.app.engine import Engine

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
out = Console()


@app.callback()
def engram() -> None:
    """Associative memory: store pictures and texts, recall them whole from a part, and be told when nothing fits."""


@app.command()
def serve(
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="Where to listen (default: 127.0.0.1).", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000; 0 takes a free one.", show_default=False)] = None,
    grpc_port: Annotated[
        str | None,
        typer.Option(help="Default: the one after --port; 0 takes a free one; off: no gRPC.", show_default=False),
    ] = None,
) -> None:
    """Run the server on a data folder, until Ctrl-C."""
    from service.main import serve as run_server

    chosen = settings.load(os.environ, data=data, host=host, port=port, grpc_port=grpc_port)

    def background(engine: Engine) -> AbstractContextManager[None]:
        from workers.loop import running  # brings torch, which `run_server` prepares for first

        return running(engine)

    def started(url: str, grpc_url: str | None) -> None:
        beside = f" and {grpc_url}" if grpc_url is not None else ""
        where = f"{url}{beside} (the API: {url}/docs)"
        out.print(f"Serving [bold]{escape(str(chosen.data))}[/] at {where}. Ctrl-C stops it.", soft_wrap=True)

    run_server(chosen, background, started)


app.command()(storing.store)
app.command("import")(transfer_commands.import_rows)
app.command("export")(transfer_commands.export_rows)
app.command()(recall_command.recall)
collections_command.register(app)
browse.register(app)
indexes_command.register(app)
training.register(app)
app.command()(reencode.reencode)
app.command()(diagnose.diagnose)
update.register(app)
operations.register(app)


@app.command()
def demo(
    port: Annotated[int, typer.Option(envvar="PORT", help="Where its server listens; 0 takes a free port.")] = 8000,
    leave: Annotated[bool, typer.Option("--exit", envvar="DEMO_EXIT", help="Stop when all is shown.")] = False,
    output: Annotated[Path, typer.Option(help="Where the contact sheet and the log go.")] = Path("demo-output"),
    data: Annotated[Path | None, typer.Option(help="Default: memories, below the output.", show_default=False)] = None,
) -> None:
    """Store real pictures, recall them from parts, noise and sentences, and see strangers refused."""
    from engram.demo.run import run  # brings the demo's packages

    run(output, data or output / "memories", port, leave)


encoders_command.register(app)
keys_command.register(app)
sizing.register(app)
snapshot_command.register(app)
app.command()(fsck_command.fsck)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        app(arguments)
    except EngramError as error:
        print_error(error)
        sys.exit(1)
