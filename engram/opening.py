"""How a command reaches the memories.

Rules:
- Through their owner: a server named by `--url`; else the server that has the data folder open; else this process opens
  the folder itself.
- A folder that this process opened is calibrated before the process ends or recalls: nobody else would do it. A server
  does it meanwhile, and is not waited for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from engram.client import Client, Collection
from engram.completion import complete_collection
from service import settings
from service.errors import InvalidRequest, NotFound, Unavailable
from service.storage.folder import read_owner

CALIBRATION_WAIT_S = 300.0  # a big folder's calibration takes minutes; what is left goes on with the next command

Data = Annotated[
    Path | None, typer.Option(help="The data folder (ENGRAM_DATA; default: memories).", show_default=False)
]
Url = Annotated[
    str | None, typer.Option(envvar="ENGRAM_URL", help="A server's address, instead of a folder.", show_default=False)
]


Name = Annotated[str, typer.Option("--collection", "-c", help="The collection.", autocompletion=complete_collection)]


def open_client(data: Path | None, url: str | None, must_exist: bool = False) -> Client:
    """A client of whoever owns the memories. `must_exist`: a command that only reads makes no folder."""
    server = open_server(data, url)
    if server is not None:
        return server
    return Client(path=folder_of(data, must_exist))


def open_server(data: Path | None, url: str | None) -> Client | None:
    """A client of the server that is named, or that has the folder open; None where there is none."""
    if url is not None and data is not None:
        raise InvalidRequest("give either --data (a folder) or --url (a server; ENGRAM_URL counts)")
    if url is None:
        owner = read_owner(folder_of(data))
        url = owner.url if owner is not None else None
    return None if url is None else Client(url, api_key=os.environ.get("ENGRAM_API_KEY"))


def folder_of(data: Path | None, must_exist: bool = False) -> Path:
    """Raises `NotFound`."""
    folder = settings.load(os.environ, data=data).data
    if must_exist and not folder.is_dir():
        raise NotFound(f"there is no data folder {folder}; name another with --data, or a server with --url")
    return folder


def calibrate(out: Console, collection: Collection) -> None:
    """Wait for the calibration in this process, where one is due and no space waits for being encoded again."""
    info = collection.info()
    if info.problem is not None or info.calibration.state not in ("pending", "stale"):
        return
    with Progress(SpinnerColumn(), TextColumn("calibrating…"), TimeElapsedColumn(), console=out) as progress:
        progress.add_task("calibrate", total=None)
        try:
            collection.wait_until_calibrated(CALIBRATION_WAIT_S)
        except Unavailable as error:
            progress.stop()
            out.print(f"[yellow]{escape(error.detail)}; it goes on with the next command[/]")
