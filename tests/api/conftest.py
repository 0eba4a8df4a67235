"""The API under test: a real server process on a free port, over a real folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.storage.folder import read_owner

START_TIMEOUT_S = 120  # importing torch on a busy machine takes tens of seconds


@dataclass
class Server:
    url: str
    data: Path
    process: subprocess.Popen[bytes]
    http: httpx.Client

    def kill(self) -> None:
        """As a power cut would: no handler runs."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait_calibrated(self, collection: str) -> dict[str, object]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            calibration: dict[str, object] = self.http.get(f"/v1/collections/{collection}").json()["calibration"]
            if calibration["state"] == "current":
                return calibration
            time.sleep(0.1)
        raise TimeoutError(f"{collection} was not calibrated in {START_TIMEOUT_S} s")


Serve = Callable[..., "contextmanager[Server]"]


@contextmanager
def serving(data: Path, cwd: Path | None = None, **environment: str) -> Iterator[Server]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "engram", "serve", "--data", str(data), "--port", "0"],
        env={**clean, **environment},
        stdout=subprocess.DEVNULL,
        cwd=cwd,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (owner := read_owner(data)) is None or owner.url is None:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        with httpx.Client(base_url=owner.url, timeout=120) as http:
            yield Server(owner.url, data, process, http)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="session")
def serve() -> Callable[..., object]:
    return serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that only need collections of their own."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def http(server: Server) -> httpx.Client:
    return server.http


@pytest.fixture
def make(server: Server) -> Callable[..., str]:
    """Create a collection of a name of its own; returns its address."""

    def create(**config: object) -> str:
        address = f"/v1/collections/c{uuid.uuid4().hex[:12]}"
        response = server.http.put(address, json=config)
        assert response.status_code == 201, response.text
        return address

    return create
