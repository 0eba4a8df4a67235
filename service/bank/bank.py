"""A bank: a collection's patterns in memory, written by one writer at a time, read by any number of threads without a
lock.

Strategy: what readers see is one immutable `View`, replaced by one assignment. Writes go to the tail, the last part of
the view. A background job seals: it merges parts into a new segment, with HNSW graphs where that is worth it, while
writes go on.

Rules:
- Locks: `_writing` is held for the length of one write or one swap, never while a graph is built; `_sealing` by the one
  seal.
- A seal first freezes the tail (a new one takes the writes), then merges from what it saw, then swaps under `_writing`.
  Rows that died meanwhile are looked up in the old parts' bitmaps and die in the new segment too. A seal that fails
  leaves its parts in place.
- What is scanned stays under a budget of values (rows × D): `scan_values_max` while there is no graph, then a
  sixteenth, which is what searching one more graph costs. Beyond it the scanned parts are sealed.
- A seal takes along every segment at most twice the rows it has so far, so a row's segment grows by half or more each
  time it is rebuilt: N rows cost O(N log N), and each segment is more than twice all smaller ones together. In a quiet
  moment segments up to eight times as large are taken along, so that a big load ends as one graph.
- A device other than the CPU has no graphs: there a scan is one matmul and one top-k.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Sequence

import torch

from service.bank.layout import Layout, Rows, prepare
from service.bank.segment import Part, Segment, merge
from service.bank.view import View

SCAN_VALUES_MAX = 8_000_000
"""Rows × D scanned at most: about 2 ms for one cue on one CPU core, 10,000 rows of 784 values."""

SCAN_SHARE_BESIDE_GRAPHS = 1 / 16
"""Half a million values are scanned in the 0.1 ms that one search of a graph takes."""

GROWTH_BUSY, GROWTH_QUIET = 2, 8
"""How much larger than what is being sealed a segment may be, to be rebuilt with it (see the rules above)."""

DEAD_ROWS_MIN = 1024
"""A part is rebuilt when more of its rows are dead than alive, but not for fewer than this: so few cost nothing to
skip."""


class Bank:
    """`scan_values_max`: see the rules above. `quiet_s`: how long no write must have come for a moment to be quiet."""

    def __init__(
        self,
        layout: Layout,
        *,
        scan_values_max: int = SCAN_VALUES_MAX,
        quiet_s: float = 2.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.device = torch.device(device)
        self._scan_values_max = scan_values_max
        self._quiet_s = quiet_s
        self._writing = threading.Lock()
        self._sealing = threading.Lock()
        self._written_at = time.monotonic()
        self._view = self._viewed((Part(Segment(layout, self.device), 0),), version=0)

    @property
    def version(self) -> int:
        return self._view.version

    def view(self) -> View:
        return self._view

    def sizes(self) -> dict[str, int]:
        """Bytes by kind: `patterns`, `graph`, `payloads`, `ids` (strings and tables by estimate)."""
        total: Counter[str] = Counter()
        for part in self._view.parts:
            total.update(part.segment.sizes())
        return dict(total)

    def write(self, rows: Rows | None, deletes: Sequence[str], version: int) -> None:
        """Delete, then insert or replace, and be at `version`, which never goes back. Ids that are not there are no
        error.

        Readers see all of a write or nothing. Raises what `prepare` raises, and then nothing is written.
        """
        prepared = None if rows is None else prepare(self.layout, rows)
        with self._writing:
            view = self._view
            if version < view.version:
                raise ValueError(f"a bank at version {view.version} was given version {version}")
            gone = view.rows_of({*deletes, *(prepared.ids if prepared else ())})
            gone = gone[gone >= 0]
            parts = [
                part.without(gone[(gone >= start) & (gone < stop)] - start) if len(gone) else part
                for start, stop, part in zip(view.starts, view.starts[1:], view.parts, strict=False)
            ]
            if prepared is not None:
                parts[-1].segment.append(prepared)
                parts[-1] = parts[-1].grown()
            self._written_at = time.monotonic()
            self._view = self._viewed(tuple(parts), version)

    def seal_due(self) -> bool:
        """Whether `seal` has something to do. To be asked after writes, and each second or so for the quiet moments."""
        return bool(self._due(self._view))

    def seal(self) -> bool:
        """Merge what is due into one new segment. False where nothing is due or another seal is running.

        Takes as long as building the graphs (some 0.2 ms a row on one core at 784 values), on FAISS's OpenMP threads.
        """
        if not self._sealing.acquire(blocking=False):
            return False
        try:
            with self._writing:
                view = self._view
                due = self._due(view)
                if not due:
                    return False
                if view.parts[-1].segment in {part.segment for part in due}:
                    tail = Part(Segment(self.layout, self.device), 0)
                    self._view = self._viewed((*view.parts, tail), view.version)
            beside_graphs = any(part.segment.graphs for part in view.parts if part not in due)
            alive_values = self.layout.dimension * sum(part.alive for part in due)
            merged, moved = merge(due, with_graphs=alive_values > self._scan_budget(beside_graphs))
            with self._writing:
                self._swap(due, merged, moved)
            return True
        finally:
            self._sealing.release()

    def _swap(self, due: list[Part], merged: Segment, moved: list[torch.Tensor]) -> None:
        now = {part.segment: part for part in self._view.parts}
        sealed = Part(merged, merged.count)
        for before, target in zip(due, moved, strict=True):
            dead = now[before.segment].dead
            if dead is not None:
                died = target[dead[: before.count]]
                sealed = sealed.without(died[died >= 0])
        replaced = {part.segment for part in due}
        kept = [part for part in self._view.parts if part.segment not in replaced]
        self._view = self._viewed((*([sealed] if sealed.alive else []), *kept), self._view.version)

    def _viewed(self, parts: tuple[Part, ...], version: int) -> View:
        return View(self.layout, self.device, parts, version)

    def _scan_budget(self, beside_graphs: bool) -> float:
        if self.device.type != "cpu":
            return math.inf
        return self._scan_values_max * (SCAN_SHARE_BESIDE_GRAPHS if beside_graphs else 1)

    def _due(self, view: View) -> list[Part]:
        """The parts to merge now, by the rules above; empty when all is well."""
        filled = sorted((part for part in view.parts if part.count), key=lambda part: part.alive)
        graphed = [part for part in filled if part.segment.graphs]
        scanned = [part for part in filled if not part.segment.graphs]
        crowded = self.layout.dimension * sum(part.count for part in scanned) > self._scan_budget(bool(graphed))
        wasteful = [part for part in filled if part.dead_count > max(part.alive, DEAD_ROWS_MIN)]
        if crowded or wasteful:
            due = [part for part in filled if part in wasteful or (crowded and part in scanned)]
            return self._with_larger(due, graphed, GROWTH_BUSY)
        if len(graphed) > 1 and time.monotonic() - self._written_at >= self._quiet_s:
            due = self._with_larger([*scanned, graphed[0]], graphed, GROWTH_QUIET)
            return due if len(due) > len(scanned) + 1 else []
        return []

    @staticmethod
    def _with_larger(due: list[Part], graphed: list[Part], growth: int) -> list[Part]:
        """`due` and the segments, smallest first, at most `growth` times what is there already."""
        alive = sum(part.alive for part in due)
        for part in graphed:
            if part not in due and part.alive <= growth * alive:
                due = [*due, part]
                alive += part.alive
        return due
