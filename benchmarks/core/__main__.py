"""One step of recall by every separation and support, beside the two matrix products that it cannot avoid, XΞᵀ and pΞ.

float32, one thread. A step is `retrieve` with its first point and the whole step from it: scores, weights, energy,
Ξᵀp and whether that is at rest. Writes results.md beside this file; takes under six minutes.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.core.measure import Spread, Timed, in_turn
from service.bank import Bank, Found, Layout, Rows, SpaceLayout
from service.core.names import Entmax, KSubsets, Polynomial, Separation, named
from service.core.retrieve import retrieve
from service.core.separation import separate
from service.core.similarity import Blocks

RESULTS = Path(__file__).with_name("results.md")
SIZES = ((1_000, 784), (100_000, 128), (1_000_000, 64))  # patterns and their dimension: 3, 51 and 256 MB
BATCHES = (1, 32, 256)
SEPARATIONS: tuple[Separation, ...] = (
    "softmax", "sparsemax", Entmax(1.5), Entmax(1.25), "max", "normmax", Polynomial(5), KSubsets(8),
)  # fmt: skip
SUPPORT = 64
BETA = 100.0
NOISE = 0.5  # of a cue, in norms of a pattern: its own is first by far, its rivals are not nothing
SEED = 0
VALUES_MAX = 4 * 2**20
"""Scores of one dense step at most, but for softmax: a batch of more is served in parts, at the same time per cue."""
BUDGET_S = 1.5  # of rounds, for each table's cell


def drawn(rows: int, d: int, batch: int) -> tuple[Tensor, Tensor]:
    """Unit patterns, and cues: some of them with noise."""
    g = torch.Generator().manual_seed(SEED)
    stored = torch.nn.functional.normalize(torch.randn(rows, d, generator=g), dim=1)
    own = torch.randint(rows, (batch,), generator=g)
    noise = torch.randn(batch, d, generator=g) * (NOISE / math.sqrt(d))
    return stored, stored[own] + noise


def products(stored: Tensor, cue: Tensor, weights: Tensor) -> Tensor:
    scores = cue @ stored.T
    del scores
    return weights @ stored


def dense(stored: Tensor, cue: Tensor) -> dict[str, Timed]:
    blocks = Blocks((stored.shape[1],), (1.0,))
    weights = separate("softmax", cue @ stored.T * BETA)
    what: dict[str, Callable[[], object]] = {"two products": partial(products, stored, cue, weights)}
    for kind in SEPARATIONS:
        if kind != "softmax" and len(stored) * len(cue) > VALUES_MAX:
            continue
        what[named(kind)] = partial(retrieve, blocks, stored, cue, beta=BETA, separation=kind, update_steps_max=0)
    return in_turn(what, "two products", BUDGET_S)


class Searched:
    """A bank over the patterns, and a top-K recall in it by its parts."""

    def __init__(self, stored: Tensor, cue: Tensor, graph: bool) -> None:
        rows, d = stored.shape
        bank = Bank(Layout((SpaceLayout("v", d),), "cosine"), scan_values_max=1 if graph else 2**60)
        bank.write(Rows([str(i) for i in range(rows)], {"v": stored.numpy()}, [None] * rows), [], 1)
        while bank.seal_due() and bank.seal():
            pass
        self.view, self.blocks = bank.view(), Blocks((d,), (1.0,))
        self.cues = cue
        self.ask(cue)

    def ask(self, cue: Tensor) -> None:
        self.cue = cue
        self.found = self.search()
        self.gathered = self.view.gather(self.found.rows)
        self.copied = torch.empty_like(self.gathered)

    def search(self) -> Found:
        return self.view.search({"v": self.cue}, {"v": 1.0}, SUPPORT)

    def gather(self) -> Tensor:
        return self.view.gather(self.found.rows)

    def step(self, found: Found, gathered: Tensor) -> object:
        return retrieve(self.blocks, gathered, self.cue, beta=BETA, first_scores=found.scores, update_steps_max=1)

    def recall(self) -> object:
        found = self.search()
        return self.step(found, self.view.gather(found.rows))

    def timed(self) -> dict[str, Timed]:
        what: dict[str, Callable[[], object]] = {
            "search": self.search,
            "search, gather, step": self.recall,
            "gather": self.gather,
            "step": lambda: self.step(self.found, self.gathered),
            "memcpy": lambda: self.copied.copy_(self.gathered),
        }
        return in_turn(what, "search", BUDGET_S)


def dense_table() -> list[str]:
    lines = [
        "## Dense: every row takes part", "",
        "A step over the two products XΞᵀ and pΞ of the same round: median (quartiles), and the memory that one call "
        "holds beside patterns and cues. –: more scores than one step is served with; such a batch is split, and takes "
        "per cue what a smaller one does.", "",
    ]  # fmt: skip
    for rows, d in SIZES:
        lines += [f"### {rows:,} patterns of {d} values", ""]
        cells: dict[str, list[str]] = {name: [] for name in ("two products", *map(named, SEPARATIONS))}
        for batch in BATCHES:
            stored, cue = drawn(rows, d, batch)
            timed = dense(stored, cue)
            say(f"dense, {rows:,} patterns, batch {batch}: softmax {timed['softmax'].ratio.median:.2f}")
            for name, column in cells.items():
                one = timed.get(name)
                if one is None:
                    column += ["–", "–"]
                else:
                    first = f"{_us(one, batch)} µs a cue" if name == "two products" else _ratio(one.ratio)
                    column += [first, _mb(one)]
        head = "".join(f" batch {batch} | MB |" for batch in BATCHES)
        lines += [f"| |{head}", "|---|" + "--:|--:|" * len(BATCHES)]
        lines += [f"| {name} | " + " | ".join(column) + " |" for name, column in cells.items()]
        lines.append("")
    return lines


def top_k_table() -> list[str]:
    lines = [
        f"## Top-{SUPPORT}, searched exactly", "",
        "Recall by search, gather and one step that reuses the search's scores (and the look whether it is at rest), "
        "over the search alone of the same round.", "",
        "| patterns | batch | search, µs a cue | recall ÷ search | MB |", "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for rows, d in SIZES[1:]:
        for batch in BATCHES:
            timed = Searched(*drawn(rows, d, batch), graph=False).timed()
            say(f"top-{SUPPORT} of {rows:,}, batch {batch}: {timed['search, gather, step'].ratio.median:.2f}")
            recall = timed["search, gather, step"]
            lines.append(
                f"| {rows:,} × {d} | {batch} | {_us(timed['search'], batch)} | {_ratio(recall.ratio)} | {_mb(recall)} |"
            )
    return [*lines, ""]


def gather_table() -> list[str]:
    lines = [
        "## Gather and step beside a memcpy", "",
        f"µs a cue for {SUPPORT} rows: the memcpy is of the same bytes, contiguous and warm; the graph is HNSW.", "",
        "| patterns | searched by | batch | memcpy | gather | step | search |", "|---|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for rows, d, graph in ((1_000, 784, False), (20_000, 784, True), (100_000, 128, False)):
        for batch in BATCHES:
            timed = Searched(*drawn(rows, d, batch), graph=graph).timed() if not graph else _graph_timed(rows, d, batch)
            say(f"gather of {rows:,}, batch {batch}")
            cells = " | ".join(_us(timed[name], batch) for name in ("memcpy", "gather", "step", "search"))
            lines.append(f"| {rows:,} × {d} | {'graph' if graph else 'scan'} | {batch} | {cells} |")
    return [*lines, ""]


@lru_cache(maxsize=1)
def _graph(rows: int, d: int) -> Searched:
    return Searched(*drawn(rows, d, max(BATCHES)), graph=True)


def _graph_timed(rows: int, d: int, batch: int) -> dict[str, Timed]:
    """One graph serves all batches: building it takes longer than the rest of the table."""
    searched = _graph(rows, d)
    searched.ask(searched.cues[:batch])
    return searched.timed()


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _us(timed: Timed, batch: int) -> str:
    seconds = timed.seconds
    return f"{1e6 * seconds.median / batch:,.1f} ({1e6 * seconds.low / batch:,.1f}–{1e6 * seconds.high / batch:,.1f})"


def _mb(timed: Timed) -> str:
    return "–" if timed.peak_mb is None else f"{timed.peak_mb:,.0f}"


def machine() -> list[str]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return [
        f"{cpu}, {os.cpu_count()} cores, load {load} at the end; torch {torch.__version__}, one thread, float32",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}",
    ]


def say(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument("--print", action="store_true", help="only print, and leave results.md as it is")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with torch.inference_mode():
        tables = [*dense_table(), *top_k_table(), *gather_table()]
    lines = [
        "# A step of recall beside the products that it cannot avoid", "",
        f"Unit patterns drawn at random, cues with noise of {NOISE:g} of their norm, β = {BETA:g}. Each median is over "
        "rounds in which everything of a cell runs in turn.", "",
        *tables, *(f"- {line}" for line in machine()),
        f"- {time.perf_counter() - started:.0f} s; `make bench-core`",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if not chosen.print:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
