"""A cluster of real processes: servers and workers on one PostgreSQL database, on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

START_S = 120.0  # a loaded machine imports torch slowly


class Cluster:
    """Processes by name. A server keeps its port when it is started again."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self._folder, self._database_url = folder, database_url
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    def start(self, name: str) -> None:
        """`api…` is a server, anything else a worker. A server is waited for until it is ready."""
        is_server = name.startswith("api")
        command = [sys.executable, "-m", "workers"]
        environ = {key: value for key, value in os.environ.items() if not key.startswith("ENGRAM_")} | {
            "ENGRAM_DATA": str(self._folder / name),
            "ENGRAM_DATABASE_URL": self._database_url,
            "ENGRAM_ORIGINALS": str(self._folder / "originals"),
            "OMP_NUM_THREADS": "1",
        }
        if is_server:
            port = self._ports.setdefault(name, free_port())
            command = [sys.executable, "-m", "engram", "serve", "--port", str(port)]
            environ["ENGRAM_JOBS"] = "false"
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        if is_server:
            self._wait_until_ready(name)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self._running.pop(name)
        process.send_signal(number)
        process.wait()

    def stop(self) -> None:
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            process.wait()

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def _wait_until_ready(self, name: str) -> None:
        deadline = time.monotonic() + START_S
        while True:
            assert self._running[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            try:
                if httpx.get(f"{self.url(name)}/readyz", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def cluster(tmp_path: Path, postgres_schema: Callable[[], str]) -> Iterator[Cluster]:
    made = Cluster(tmp_path, postgres_schema())
    yield made
    made.stop()
    for log in tmp_path.glob("*.log"):
        assert "Traceback" not in log.read_text(), log.read_text()
