"""One row of the report, and how a stage in a process of its own hands its rows over."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

LIMIT = 5
"""Matches asked for, the API's default."""

SUPPORT = 64
"""Rows that take part in a recall by default, hence the neighbours that FAISS alone is asked for."""


@dataclass(frozen=True)
class Row:
    name: str
    first_share: float  # of cues whose own image comes first
    median_ms: float
    p95_ms: float
    per_s: float
    load_s: float | None  # until the last memory was acknowledged, or the index stood
    rss_mb: float | None  # of the process that searches, data included
    note: str = ""


def row(
    name: str,
    first_share: float,
    seconds: Sequence[float],
    *,
    elapsed_s: float,
    load_s: float | None,
    rss_mb: float | None,
    note: str = "",
) -> Row:
    median, p95 = np.percentile(seconds, [50, 95]) * 1e3
    return Row(name, first_share, float(median), float(p95), len(seconds) / elapsed_s, load_s, rss_mb, note)


def rss_mb(pid: int) -> float:
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) / 1024


def hand_over(rows: Sequence[Row]) -> None:
    print(json.dumps([asdict(one) for one in rows]))


def in_own_process(module: str, *arguments: str) -> list[Row]:
    """Run a stage as its own process, so that the memory it holds and the threads it takes are its own."""
    printed = subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE).stdout
    return [Row(**one) for one in json.loads(printed.splitlines()[-1])]
