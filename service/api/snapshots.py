"""Snapshots over HTTP: files of any size, sent and received piece by piece."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from service.app.engine import Engine
from service.app.snapshot_schemas import SnapshotInfo
from service.errors import MalformedBody

TAR = "application/x-tar"
PIECE_BYTES = 2**20  # written at once: each time a thread is asked to

Run = Callable[..., Awaitable[Any]]


async def send(run: Run, engine: Engine, collection: str, snapshot: str) -> Response:
    """Raises `SnapshotNotFound`."""
    size, pieces = await run(engine.snapshot_content, collection, snapshot)
    name = f"{collection}-{snapshot}.tar"  # both are letters, digits, _ . and - alone
    headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(pieces, media_type=TAR, headers=headers)


async def receive(run: Run, engine: Engine, collection: str, snapshot: str, request: Request) -> SnapshotInfo:
    """Raises `InvalidRequest`, `InvalidSnapshot`, `SnapshotExists`, `BodyTooLarge`."""
    with engine.receive_snapshot(collection, snapshot) as receiving:
        held = bytearray()
        try:
            async for piece in request.stream():
                held += piece
                if len(held) >= PIECE_BYTES:
                    await run(receiving.write, bytes(held))
                    held.clear()
        except ClientDisconnect:
            raise MalformedBody("the snapshot was cut off before its end") from None
        await run(receiving.write, bytes(held))
        kept: SnapshotInfo = await run(receiving.keep)
        return kept
