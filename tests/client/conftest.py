"""Real servers on free ports and real folders; every test of the client runs over both transports."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engram import AsyncClient, AsyncCollection, Client
from service.storage.folder import read_owner


def run_environ(**extra: str) -> dict[str, str]:
    """The environment without any setting of Engram's own, so that a developer's do not leak in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **extra}


@pytest.fixture(scope="session")
def run_environment() -> Callable[..., dict[str, str]]:
    return run_environ


@contextmanager
def serve_folder(folder: Path, **environ: str) -> Iterator[str]:
    """A server process on `folder`, at the address it announced."""
    command = [sys.executable, "-m", "engram", "serve", "--data", str(folder), "--port", "0"]
    process = subprocess.Popen(command, env=run_environ(**environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while (owner := read_owner(folder)) is None or owner.url is None or owner.pid != process.pid:
            assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
            time.sleep(0.05)
        yield owner.url
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
    assert "Traceback" not in output.decode()


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[str]]:
    """`with serving(folder, **environ) as url`."""
    return serve_folder


@pytest.fixture(scope="session")
def run_engram() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The `engram` command as a process; `environ` adds to its environment."""

    def run(*arguments: object, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "engram", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=run_environ(**environ), cwd=cwd, check=False)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def start_engram() -> Callable[..., subprocess.Popen[str]]:
    """The same, left running, with one stream of what it says."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "engram", *map(str, arguments)]
        return subprocess.Popen(command, env=run_environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def server_url(served_folder: Path) -> Iterator[str]:
    with serve_folder(served_folder) as url:
        yield url


@pytest.fixture(scope="session")
def http_client(server_url: str) -> Iterator[Client]:
    with Client(server_url) as client:
        yield client


@pytest.fixture(scope="session")
def local_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(path=tmp_path_factory.mktemp("local")) as client:
        yield client


class Waiting:
    """An `AsyncClient` or `AsyncCollection` that is called as the other client is: what it gives is waited for."""

    def __init__(self, awaited: AsyncClient | AsyncCollection, loop: asyncio.AbstractEventLoop) -> None:
        self._awaited, self._loop = awaited, loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._awaited, name)
        return (lambda *args, **options: self._plain(found(*args, **options))) if callable(found) else found

    def _plain(self, given: Any) -> Any:
        if isinstance(given, AsyncIterator):
            return self._each(given)
        if inspect.isawaitable(given):
            given = self._wait(given)
        return Waiting(given, self._loop) if isinstance(given, AsyncClient | AsyncCollection) else given

    def _each(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        while (item := self._wait(anext(items, self))) is not self:
            yield item

    def _wait(self, awaitable: Awaitable[Any]) -> Any:
        async def waiting() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(waiting(), self._loop).result()


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="session")
def awaited_http_client(server_url: str, loop: asyncio.AbstractEventLoop) -> Iterator[Waiting]:
    client = Waiting(AsyncClient(server_url), loop)
    yield client
    client.close()


@pytest.fixture(scope="session")
def awaited_local_client(
    tmp_path_factory: pytest.TempPathFactory, loop: asyncio.AbstractEventLoop
) -> Iterator[Waiting]:
    client = Waiting(AsyncClient(path=tmp_path_factory.mktemp("awaited")), loop)
    yield client
    client.close()


@pytest.fixture(scope="session")
def grpc_url(served_folder: Path, server_url: str) -> str:
    """Of the same server, over its other port."""
    owner = read_owner(served_folder)
    assert owner is not None
    assert owner.grpc_url is not None
    return owner.grpc_url


@pytest.fixture(scope="session")
def grpc_client(grpc_url: str) -> Iterator[Client]:
    with Client(grpc_url) as client:
        yield client


@pytest.fixture(scope="session")
def awaited_grpc_client(grpc_url: str, loop: asyncio.AbstractEventLoop) -> Iterator[Waiting]:
    client = Waiting(AsyncClient(grpc_url), loop)
    yield client
    client.close()


EVERY_WAY = (
    "http_client", "grpc_client", "local_client", "awaited_http_client", "awaited_grpc_client", "awaited_local_client",
)  # fmt: skip


@pytest.fixture
def every_client(request: pytest.FixtureRequest) -> dict[str, Client]:
    """Every way to an engine, by its name."""
    return {name: request.getfixturevalue(name) for name in EVERY_WAY}


@pytest.fixture(params=EVERY_WAY)
def client_of_any_way(request: pytest.FixtureRequest) -> Client:
    """One test body, every way to an engine."""
    found: Client = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["http_client", "grpc_client", "local_client"])
def client(request: pytest.FixtureRequest) -> Client:
    """One test body, the ways to the engine; for what every client asks for by the same code, whatever carries it."""
    found: Client = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def new_name() -> Callable[[], str]:
    """Names that no other test uses: the servers are shared."""
    return lambda: f"c{uuid.uuid4().hex[:12]}"
