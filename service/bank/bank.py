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
- A kernel is brought to the bank before a search may name it: 1/‖Wû‖ of every row is computed beside writes, what they
  brought meanwhile is caught up with under `_writing`, and from then on each write brings its own. Views taken before
  do not know it; views taken before it is dropped still do.
- Graphs are of one metric per space, chosen by `set_graph_kernel`. A segment built on another is due: its old graph
  serves until its successor, rebuilt alone, is swapped in.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from service.bank.keys import Named, Projection, Scales
from service.bank.layout import Layout, Prepared, Rows, prepare
from service.bank.merge import merge, merged_scales
from service.bank.segment import Part, Segment
from service.bank.view import SCAN_VALUES_MAX, View
from service.core.filter import Path
from service.core.similarity import Kernel
from service.errors import InvalidRequest, WrongDimension

SCAN_SHARE_BESIDE_GRAPHS = 1 / 16
"""Half a million values are scanned in the 0.1 ms that one search of a graph takes."""

GROWTH_BUSY, GROWTH_QUIET = 2, 8
"""How much larger than what is being sealed a segment may be, to be rebuilt with it (see the rules above)."""

DEAD_ROWS_MIN = 1024
"""A part is rebuilt when more of its rows are dead than alive, but not for fewer than this: so few cost nothing to
skip."""


KERNELS_MAX = 8
"""Kernels at once, over all spaces: each costs every write rows × r × d multiplications. Enough for one in use and one
on trial in each of a few spaces."""

CATCH_UP_ROWS = 1024
"""Rows whose ‖Wû‖ may be computed while writes wait: some 20 ms at 784 × 784."""

CATCH_UP_ROUNDS = 20
"""Each round handles what came during the one before, and rows come slower than they are handled, so a few are
enough; after this many the rest is done while writes wait."""


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
        self._written = threading.Condition(self._writing)
        self._sealing = threading.Lock()
        self._written_at = time.monotonic()
        self._graph_kernels: dict[str, Kernel] = {}
        self._indexed: tuple[Path, ...] = ()
        self._view = self._seen((Part(Segment(layout, self.device), 0),), 0, {})

    @property
    def version(self) -> int:
        return self._view.version

    @property
    def scan_values_max(self) -> int:
        """Rows × D up to which there is no graph."""
        return self._scan_values_max

    def view(self) -> View:
        return self._view

    def _seen(self, parts: Sequence[Part], version: int, kernels: Mapping[Named, Projection]) -> View:
        return View(self.layout, self.device, tuple(parts), version, kernels, self._scan_values_max)

    @property
    def scanned_values(self) -> int:
        """Of rows that no graph is over yet, dead ones among them."""
        return self.layout.dimension * sum(part.count for part in self._view.parts if not part.segment.built_on)

    def sizes(self) -> dict[str, int]:
        """Bytes by kind: `patterns`, `keys` (all that kernels take), `graph`, `payloads`, `ids` (strings and tables by
        estimate)."""
        total: Counter[str] = Counter()
        for part in self._view.parts:
            total.update(part.segment.sizes())
            total["keys"] += sum(scales.inverse.nbytes for scales in part.scales.values())
        return dict(total)

    def write(self, rows: Rows | None, deletes: Sequence[str], version: int) -> None:
        """Delete, then insert or replace, and be at `version`, which never goes back. Ids that are not there are no
        error.

        Readers see all of a write or nothing. Raises what `prepare` raises, and then nothing is written.
        """
        prepared = None if rows is None else prepare(self.layout, rows)
        inverses = {} if prepared is None else self._inverses(prepared, self._view.kernels)
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
                new = {named: each for named, each in view.kernels.items() if named not in inverses}
                parts[-1] = parts[-1].appended(prepared, inverses | self._inverses(prepared, new))
            self._written_at = time.monotonic()
            self._view = self._seen(parts, version, view.kernels)
            if prepared is not None:
                parts[-1].segment.filtering.grow()
            self._written.notify_all()

    def wait_for(self, version: int, timeout_s: float) -> bool:
        """Wait until the bank is at `version`; False if it is not within `timeout_s`."""
        with self._written:
            return self._written.wait_for(lambda: self._view.version >= version, timeout_s)

    def index(self, paths: Iterable[Path]) -> None:
        """Keep the columns of these paths of payloads, and only these, from now on: as rows come, not at the first
        filter that asks for one. Takes some two microseconds a row and path (1 + 1), while writes wait for what is new.
        """
        wanted = tuple(paths)
        with self._writing:  # a segment that is made from here on is told by who makes it
            self._indexed = wanted
            view = self._view
        for part in view.parts:
            part.segment.filtering.keep(wanted)

    def column_bytes(self, path: Path) -> int:
        """What the columns of one path take."""
        return sum(part.segment.filtering.column_bytes(path) for part in self._view.parts)

    def _inverses(self, rows: Prepared, kernels: Mapping[Named, Projection]) -> dict[Named, torch.Tensor]:
        empty = Scales(torch.zeros(0, device=self.device))
        return {
            (space, kernel): empty.up_to(rows.vectors[space].to(self.device), projection, len(rows.ids)).inverse
            for (space, kernel), projection in kernels.items()
        }

    # --- kernels ------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # what is kept here is written to later, which tensors of inference mode refuse
    @torch.no_grad()
    def add_kernel(self, space: str, kernel: Kernel) -> None:
        """Let searches of `space` name `kernel`, W (r, d_s). Its weight is not to change any more.

        Takes rows × r × d multiplications; writes and searches go on meanwhile. Adding one twice changes nothing.
        Raises UnknownSpace; WrongDimension; InvalidRequest for a similarity other than cosine, a weight that is not
        finite, and more than `KERNELS_MAX` kernels.
        """
        dimension = self.layout.space(space).dimension
        if self.layout.similarity != "cosine":
            raise InvalidRequest(f"A kernel compares directions, but the similarity is {self.layout.similarity!r}.")
        if kernel.weight.ndim != 2 or kernel.weight.shape[1] != dimension:
            raise WrongDimension(
                f"A kernel of space {space!r} is (r, {dimension}), found {tuple(kernel.weight.shape)}."
            )
        projection = Projection(kernel, self.device)
        if not math.isfinite(projection.null_length):
            raise InvalidRequest("A kernel's weight is finite.")
        scales: dict[Segment, Scales] = {}
        for rounds_left in reversed(range(CATCH_UP_ROUNDS)):
            scales = self._caught_up(scales, self._view, space, projection)
            with self._writing:
                view = self._view
                if (space, kernel) in view.kernels:
                    return
                if len(view.kernels) >= KERNELS_MAX:
                    raise InvalidRequest(f"A bank holds {KERNELS_MAX} kernels at once: drop one first.")
                known = {segment: each.count for segment, each in scales.items()}
                if rounds_left and sum(part.count - known.get(part.segment, 0) for part in view.parts) > CATCH_UP_ROWS:
                    continue
                scales = self._caught_up(scales, view, space, projection)
                parts = [
                    replace(part, scales={**part.scales, (space, kernel): scales[part.segment]}) for part in view.parts
                ]
                kernels = {**view.kernels, (space, kernel): projection}
                self._view = self._seen(parts, view.version, kernels)
                return

    def _caught_up(
        self, scales: Mapping[Segment, Scales], view: View, space: str, projection: Projection
    ) -> dict[Segment, Scales]:
        """For the segments of `view`: what is in `scales` of them, and the rows that are not there yet."""
        nothing = Scales(torch.zeros(0, device=self.device))
        return {
            part.segment: scales.get(part.segment, nothing).up_to(
                part.segment.vectors[space][: part.count], projection, part.segment.capacity
            )
            for part in view.parts
        }

    def drop_kernel(self, kernel: Kernel) -> None:
        """Forget a kernel, in every space. Raises ValueError while graphs are to be built on it."""
        with self._writing:
            if any(kernel is used for used in self._graph_kernels.values()):
                raise ValueError("graphs are built on this kernel: set_graph_kernel another first")
            view = self._view
            parts = [
                replace(part, scales={named: each for named, each in part.scales.items() if named[1] is not kernel})
                for part in view.parts
            ]
            kernels = {named: each for named, each in view.kernels.items() if named[1] is not kernel}
            self._view = self._seen(parts, view.version, kernels)

    def set_graph_kernel(self, space: str, kernel: Kernel | None) -> None:
        """Build the graphs of `space` on this kernel's keys, or (None) on the rows as they are.

        Until `seal` has rebuilt a segment, searches under `kernel` scan it. Raises UnknownSpace; ValueError for a
        kernel that was not added.
        """
        self.layout.space(space)
        with self._writing:
            others = {name: each for name, each in self._graph_kernels.items() if name != space}
            if kernel is not None and (space, kernel) not in self._view.kernels:
                raise ValueError(f"add_kernel comes first: space {space!r} does not have this one")
            self._graph_kernels = others if kernel is None else {**others, space: kernel}

    # --- sealing ------------------------------------------------------------------------------------------------------

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
                    nothing = dict.fromkeys(view.kernels, Scales(torch.zeros(0, device=self.device)))
                    tail = Part(Segment(self.layout, self.device), 0, nothing)
                    tail.segment.filtering.keep(self._indexed)
                    self._view = self._seen((*view.parts, tail), view.version, view.kernels)
                kernels = {s: (kernel, view.kernels[s, kernel]) for s, kernel in self._graph_kernels.items()}
            beside_graphs = any(part.segment.built_on for part in view.parts if part not in due)
            alive_values = self.layout.dimension * sum(part.alive for part in due)
            with_graphs = alive_values > self._scan_budget(beside_graphs)
            merged, moved = merge(due, kernels if with_graphs else None)
            # In the background, as the graphs are: the first to filter need not wait for what was there before.
            merged.filtering.warm({path: None for part in due for path in part.segment.filtering.paths})
            merged.filtering.keep(self._indexed)
            with self._writing:
                self._swap(due, merged, moved)
            merged.filtering.keep(self._indexed)  # what was indexed between the two, the merged one being in no view
            return True
        finally:
            self._sealing.release()

    def _swap(self, due: list[Part], merged: Segment, moved: list[torch.Tensor]) -> None:
        view = self._view
        now = {part.segment: part for part in view.parts}
        scales = {
            named: merged_scales([now[before.segment].scales[named] for before in due], moved, self.device)
            for named in view.kernels
        }
        sealed = Part(merged, merged.count, scales)
        for before, target in zip(due, moved, strict=True):
            dead = now[before.segment].dead
            if dead is not None:
                died = target[dead[: before.count]]
                sealed = sealed.without(died[died >= 0])
        replaced = {part.segment for part in due}
        kept = [part for part in view.parts if part.segment not in replaced]
        parts = (*([sealed] if sealed.alive else []), *kept)
        self._view = self._seen(parts, view.version, view.kernels)

    def _scan_budget(self, beside_graphs: bool) -> float:
        if self.device.type != "cpu":
            return math.inf
        return self._scan_values_max * (SCAN_SHARE_BESIDE_GRAPHS if beside_graphs else 1)

    def _due(self, view: View) -> list[Part]:
        """The parts to merge now, by the rules above; empty when all is well."""
        filled = sorted((part for part in view.parts if part.count), key=lambda part: part.alive)
        graphed = [part for part in filled if part.segment.built_on]
        scanned = [part for part in filled if not part.segment.built_on]
        crowded = self.layout.dimension * sum(part.count for part in scanned) > self._scan_budget(bool(graphed))
        wasteful = [part for part in filled if part.dead_count > max(part.alive, DEAD_ROWS_MIN)]
        if crowded or wasteful:
            due = [part for part in filled if part in wasteful or (crowded and part in scanned)]
            return self._with_larger(due, graphed, GROWTH_BUSY)
        wanted = self._graph_kernels
        for part in graphed:
            if any(kernel is not wanted.get(space) for space, kernel in part.segment.built_on.items()):
                return [part]
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
