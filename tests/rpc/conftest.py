"""A real server process with both of its ports, and what talks to each."""

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
from typing import Any

import grpc
import httpx
import pytest

from service.rpc.convert import to_dict, to_message
from service.rpc.messages import Stub
from service.rpc.methods import rpc_name
from service.rpc.problems import error_in
from service.storage.folder import read_owner

START_TIMEOUT_S = 120  # importing torch on a busy machine takes tens of seconds


@dataclass
class Served:
    data: Path
    process: subprocess.Popen[bytes]
    http: httpx.Client
    grpc_url: str
    channel: grpc.Channel
    stub: Stub

    def ask(self, operation: str, body: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """An operation over gRPC; an error of the engine raises as such."""
        name = rpc_name(operation)
        try:
            reply = getattr(self.stub, name)(to_message(f"{name}Request", body or {}), timeout=60, **options)
        except grpc.RpcError as error:
            told = error_in(error.trailing_metadata() or ())
            if told is None:
                raise
            raise told from None
        return to_dict(reply, asked=False)


@contextmanager
def serving(data: Path, **environment: str) -> Iterator[Served]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "engram", "serve", "--data", str(data), "--port", "0"],
        env={**clean, **environment},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (owner := read_owner(data)) is None or owner.url is None:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        assert owner.grpc_url is not None
        options = [("grpc.max_receive_message_length", -1)]
        with (
            httpx.Client(base_url=owner.url, timeout=120) as http,
            grpc.insecure_channel(owner.grpc_url.removeprefix("grpc://"), options=options) as channel,
        ):
            yield Served(data, process, http, owner.grpc_url, channel, Stub(channel))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="session")
def serve() -> Callable[..., object]:
    return serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("rpc")) as running:
        yield running


@pytest.fixture
def make(served: Served) -> Callable[..., str]:
    """Create a collection of a name of its own, over gRPC."""

    def create(**config: object) -> str:
        name = f"c{uuid.uuid4().hex[:12]}"
        served.ask("create_collection", {"collection": name, **config})
        return name

    return create
