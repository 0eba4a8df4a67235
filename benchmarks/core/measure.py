"""Timing things against each other on a machine that is never quite quiet.

Rules:
- What is compared runs in turn, round after round, so that a busy moment falls on all alike; ratios are taken within
  a round.
- Medians and quartiles over rounds, never one timing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

ROUNDS_MIN, ROUNDS_MAX = 5, 200
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Spread:
    """Median, and the quartiles below and above it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timed:
    seconds: Spread
    ratio: Spread  # to the baseline of the same round
    peak_mb: float | None  # memory above what was held before; None where the system does not say


def in_turn(what: Mapping[str, Callable[[], object]], baseline: str, budget_s: float) -> dict[str, Timed]:
    """Time each of `what`, over as many rounds as fit in `budget_s`."""
    peaks = {name: _peak_mb(run) for name, run in what.items()}  # warms everything up as well
    seconds: dict[str, list[float]] = {name: [] for name in what}
    started = time.perf_counter()
    for done in range(ROUNDS_MAX):
        if done >= ROUNDS_MIN and time.perf_counter() - started > budget_s:
            break
        for name, run in what.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    base = seconds[baseline]
    return {
        name: Timed(_spread(taken), _spread([one / other for one, other in zip(taken, base, strict=True)]), peaks[name])
        for name, taken in seconds.items()
    }


def _spread(values: list[float]) -> Spread:
    low, median, high = quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def _peak_mb(run: Callable[[], object]) -> float | None:
    """The most memory that one call held at once, by Linux's own count of the process."""
    gc.collect()
    try:
        CLEAR_REFS.write_text("5")  # resets the peak
        before = _status_mb("VmRSS")
        run()
        return _status_mb("VmHWM") - before
    except OSError:
        run()
        return None


def _status_mb(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
