"""The composition root of the server: settings in, a served engine out."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from service.errors import InvalidSettings
from service.settings import Settings
from service.storage.folder import database_path

GRACE_S = 10  # requests under way at SIGTERM get this long to finish


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening address held before anything is loaded. Raises `InvalidSettings` when it is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise InvalidSettings(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return sock


def _exposed(settings: Settings) -> InvalidSettings:
    return InvalidSettings(
        f"listening on {settings.host} lets other machines in: set ENGRAM_API_KEY, or make a key first"
        " (engram keys create admin --scope '*=admin'), or listen on 127.0.0.1"
    )


def serve(
    settings: Settings,
    background: Callable[..., AbstractContextManager[None]],
    started: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C. `background(engine)` runs the jobs; `started(url)` is called once all requests are
    answered: while collections are loaded, only whether the server lives and how far it is.

    Raises `FolderInUse`, `StorageUnavailable`, `InvalidSettings`.
    """
    made = settings.database_url is not None or database_path(settings.data).exists()
    if not (settings.is_loopback or settings.api_key is not None or made):
        raise _exposed(settings)  # there can be no key, and a refusal leaves no folder behind
    # Read by OpenMP when torch and FAISS are first imported, hence before the imports below.
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    import torch
    import uvicorn

    from service.api.app import create_app
    from service.app.engine import Engine
    from service.observability import configure_logging

    configure_logging()
    torch.set_num_threads(settings.threads)
    sock = bound_socket(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{sock.getsockname()[1]}"

    with sock, Engine(settings, load=False) as engine, ExitStack() as work:
        if not (settings.is_loopback or engine.keys.has_admin):
            raise _exposed(settings)
        failed: list[BaseException] = []

        def prepare() -> None:
            try:
                engine.load(warm=True)
                if engine.loading is None:
                    work.enter_context(background(engine))
                    engine.folder.announce(url)
                    started(url)
            except BaseException as error:
                failed.append(error)
                server.should_exit = True

        preparing = threading.Thread(target=prepare, name="prepare")

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                preparing.start()

        app = create_app(engine, body_bytes_max=settings.body_bytes_max)
        server = Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S))
        # uvicorn raises the signal it stopped for once more; as an exit it leaves this block, which closes the engine.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            server.run(sockets=[sock])
        finally:
            engine.stop_loading()
            if preparing.ident is not None:
                preparing.join()  # before what it has entered is left
        if failed:
            raise failed[0]
