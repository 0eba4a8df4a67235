"""What an engine tells: its log, in a program of its own and in the server, and its metrics."""

from __future__ import annotations

import gc
import os
import pty
import subprocess
import sys
import weakref
from pathlib import Path

from prometheus_client import generate_latest

from service.observability import Metrics

FAILS = """
def fail():
    password = "hunter" + "2"
    try:
        raise KeyError("lost")
    except KeyError:
        structlog.get_logger().exception("a job failed")
"""

IN_PROCESS = f"""
import sys, structlog
from engram import Client
{FAILS}
with Client(path=sys.argv[1]):
    structlog.get_logger().info("said in passing")
    structlog.get_logger().warning("said in earnest")
    fail()
"""

CONFIGURED_BEFORE = """
import sys, structlog
from engram import Client
structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
before = structlog.get_config()
with Client(path=sys.argv[1]):
    assert structlog.get_config() == before
    structlog.get_logger().info("the program's own way")
"""

SERVER = f"""
import structlog
from service.observability import configure_logging
{FAILS}
configure_logging()
structlog.get_logger().info("said in passing")
fail()
"""


def test_in_process_only_warnings_and_errors_are_told_on_standard_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, tmp_path / "m"], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "said in passing" not in done.stderr
    assert "said in earnest" in done.stderr
    assert "KeyError: 'lost'" in done.stderr
    assert "hunter2" not in done.stderr


def test_a_programs_own_logging_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONFIGURED_BEFORE, tmp_path / "m"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == 'event="the program\'s own way"\n'


def test_a_traceback_on_a_terminal_is_plain() -> None:
    terminal, end = pty.openpty()
    done = subprocess.run([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=end, check=True)
    os.close(end)
    told = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert done.stdout == b""
    assert "said in passing" in told
    assert "Traceback (most recent call last):" in told
    assert "KeyError: 'lost'" in told
    assert "hunter2" not in told
    assert "password" not in told, "no locals, and no lines around the one that failed"


def test_metrics_go_with_their_engine() -> None:
    metrics = Metrics()
    metrics.recalled("c", {"search": 0.1}, ["known"])
    metrics.answered("GET", 200)
    gone = weakref.ref(metrics)
    del metrics
    gc.collect()
    assert gone() is None


def test_a_forgotten_collection_is_in_no_metric() -> None:
    metrics = Metrics()
    for name in ("kept", "gone"):
        metrics.recalled(name, {"search": 0.1}, ["known", "unknown", None])
        metrics.stored.labels(name).inc(3)
        metrics.memories.labels(name).set_function(lambda: 3)
    metrics.forget("gone")
    told = generate_latest(metrics.registry).decode()
    assert 'collection="gone"' not in told
    assert 'engram_recalls_total{collection="kept",verdict="error"} 1.0' in told
    assert 'engram_stored_total{collection="kept"} 3.0' in told
    metrics.forget("gone")
    metrics.forget("never there")
    metrics.recalled("gone", {}, ["known"])
    assert 'engram_recalls_total{collection="gone",verdict="known"} 1.0' in generate_latest(metrics.registry).decode()
