"""The composition root of the server: settings in, a served engine out."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

from service.errors import InvalidSettings
from service.settings import Settings
from service.storage.folder import database_path

GRACE_S = 10  # requests under way at SIGTERM get this long to finish


def bound_socket(host: str, port: int) -> socket.socket:
    """An address held before anything is loaded. Raises `InvalidSettings` when it is taken or not ours."""
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


def bound_grpc_socket(settings: Settings) -> socket.socket | None:
    """The same for gRPC, which takes a number and not a socket: let go when it listens. None where it is off.

    Raises `InvalidSettings`, saying how else.
    """
    if settings.grpc_listens_on is None:
        return None
    try:
        return bound_socket(settings.host, settings.grpc_listens_on)
    except InvalidSettings as error:
        raise InvalidSettings(f"gRPC {error.detail}; ENGRAM_GRPC_PORT names another, or is off") from None


def serve(
    settings: Settings,
    background: Callable[..., AbstractContextManager[None]],
    started: Callable[[str, str | None], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C. `background(engine)` runs the jobs; `started(url, grpc_url)` is called once all
    requests are answered: while collections are loaded, only whether the server lives and how far it is.

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
    from service.app.serving import Pool
    from service.observability import configure_logging
    from service.rpc.server import RpcServer

    configure_logging()
    torch.set_num_threads(settings.threads)
    sock = bound_socket(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{sock.getsockname()[1]}"
    grpc_sock = bound_grpc_socket(settings)
    grpc_port = None if grpc_sock is None else int(grpc_sock.getsockname()[1])
    grpc_url = None if grpc_port is None else f"grpc://{host}:{grpc_port}"

    with sock, grpc_sock or nullcontext(), Engine(settings, load=False) as engine, ExitStack() as work:
        if not (settings.is_loopback or engine.keys.has_admin):
            raise _exposed(settings)
        failed: list[BaseException] = []

        def prepare() -> None:
            try:
                engine.load(warm=True)
                if engine.loading is None:
                    work.enter_context(background(engine))
                    server.all_answered()
                    engine.folder.announce(url, grpc_url)
                    started(url, grpc_url)
            except BaseException as error:
                failed.append(error)
                server.should_exit = True

        preparing = threading.Thread(target=prepare, name="prepare")
        pool = Pool()

        class Server(uvicorn.Server):
            """REST and gRPC on one loop: both listen before anything is loaded, and drain at the same time."""

            rpc: RpcServer | None = None
            loop: asyncio.AbstractEventLoop

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                self.loop = asyncio.get_running_loop()
                if grpc_sock is not None and grpc_port is not None:
                    self.rpc = RpcServer(engine, pool, body_bytes_max=settings.body_bytes_max)
                    grpc_sock.close()
                    await self.rpc.start(settings.host, grpc_port)
                await super().startup(sockets)
                preparing.start()

            def all_answered(self) -> None:
                """From the thread that prepares. Not waited for without end: at SIGTERM the loop may be gone."""
                if self.rpc is not None:
                    with suppress(RuntimeError):
                        wait([asyncio.run_coroutine_threadsafe(self.rpc.serving(), self.loop)], GRACE_S)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                stopping = [self.rpc.stop(GRACE_S)] if self.rpc is not None else []
                await asyncio.gather(super().shutdown(sockets), *stopping)

        app = create_app(engine, pool, body_bytes_max=settings.body_bytes_max)
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
