"""What a shell completes of itself: names and ids that only the memories know.

Rules:
- A person waits at a prompt: a server is asked once and for a second at most, a folder that nobody serves is read as it
  is, without opening the engine.
- Whatever fails, nothing is completed and nothing is said.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from engram.client import Client
from service import settings
from service.storage import peek
from service.storage.folder import read_owner

ASK_S = 1.0

Completer = Callable[[typer.Context, str], list[str]]


def _completer(ask: Callable[[Client, str], Iterable[str]], read: Callable[[Path, str], Iterable[str]]) -> Completer:
    """`ask` and `read` take the collection that the line names so far."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            given = ctx.params
            data, collection = given.get("data"), str(given.get("collection") or "memories")
            folder = settings.load(os.environ, data=None if data is None else Path(data)).data
            owner = read_owner(folder)
            url = given.get("url") or os.environ.get("ENGRAM_URL") or (None if owner is None else owner.url)
            if url is None:
                found = list(read(folder, collection))
            else:
                with Client(url, api_key=os.environ.get("ENGRAM_API_KEY"), timeout_s=ASK_S, retries=0) as client:
                    found = list(ask(client, collection))
        except Exception:  # a traceback between the keys of somebody's command line helps nobody
            return []
        return [each for each in found if each.startswith(incomplete)]

    return complete


complete_collection = _completer(
    lambda client, _: (info.name for info in client.collections()), lambda folder, _: peek.collections(folder)
)
complete_operation = _completer(
    lambda client, _: (operation.id for operation in client.operations()), lambda folder, _: peek.operations(folder)
)
complete_kernel = _completer(
    lambda client, name: (kernel["id"] for kernel in client.collection(name).kernels()), peek.kernels
)
complete_space = _completer(lambda client, name: client.collection(name).info().spaces, peek.spaces)
