"""A cluster of real processes: servers and workers on one PostgreSQL database, on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
START_S = 120.0  # a loaded machine imports torch slowly


class Cluster:
    """Processes by name. A server keeps its port when it is started again."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self._folder, self._database_url = folder, database_url
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}
        self._grpc_ports: dict[str, int] = {}
        self.grpc_url = ""

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
            "ENGRAM_REDIS_URL": os.environ.get("TEST_REDIS", "redis://127.0.0.1:6379"),
            "OMP_NUM_THREADS": "1",
        }
        if is_server:
            port = self._ports.setdefault(name, free_port())
            command = [sys.executable, "-m", "engram", "serve", "--port", str(port)]
            environ["ENGRAM_JOBS"] = "false"
            environ["ENGRAM_GRPC_PORT"] = str(self._grpc_ports.setdefault(name, free_port()))
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        if is_server:
            self._wait_until_ready(name)

    def start_balancer(self) -> bool:
        """nginx in front of the servers that were started, with the deployment's own configuration. False where it is
        not installed.
        """
        if (nginx := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")) is None:
            return False
        self._ports["balancer"], grpc_port = free_port(), free_port()
        servers = [name for name in self._ports if name.startswith("api")]
        values = {
            "ENGRAM_RESOLVER": "",
            "ENGRAM_HTTP_SERVERS": " ".join(_upstream(self._ports[name]) for name in servers),
            "ENGRAM_GRPC_SERVERS": " ".join(_upstream(self._grpc_ports[name]) for name in servers),
            "ENGRAM_HTTP_PORT": f"127.0.0.1:{self._ports['balancer']}",
            "ENGRAM_GRPC_PORT": f"127.0.0.1:{grpc_port}",
        }
        rendered = (ROOT / "docker/nginx.conf.template").read_text()
        for name, value in values.items():
            rendered = rendered.replace(f"${{{name}}}", value)
        folder = self._folder / "nginx"
        folder.mkdir()
        paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy"))
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; {paths}\n{rendered}\n}}\n"
        )
        command = [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
        with (self._folder / "balancer.log").open("ab") as log:
            self._running["balancer"] = subprocess.Popen(command, stdout=log, stderr=log)
        self.grpc_url = f"grpc://127.0.0.1:{grpc_port}"
        self._wait_until_ready("balancer")
        return True

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


def _upstream(port: int) -> str:
    return f"server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;"


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
