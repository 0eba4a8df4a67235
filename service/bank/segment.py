"""Segments: where a bank's rows lie, and how one segment is searched.

Strategy: a segment only ever gets rows appended, by the one writer, beyond the length that readers hold. What a reader
sees is a `Part`: a segment, a length and a bitmap of dead rows, none of which ever changes. So readers need no lock.

Rules:
- The tail is the segment that grows; its buffers double, and readers of the old ones keep them. Any other segment is
  sealed: nothing is appended to it, and it may have a graph per space.
- Deleting or replacing a row copies the part's bitmap (a byte a row: about 30 µs for a million rows), once per write.
- Where a space has a graph over all of a segment's rows, the segment's matrix is the graph's storage. A graph leaves
  out rows that lack its space (equal rows would crowd it), and then keeps its own copy of the others.
- A filter, ids left out, and what has expired are more dead rows: a part that is restricted is a part like any other.
- A graph is of one metric: it serves the searches under the kernel that it was built on (or under none), and others
  scan. A graph under a kernel is over keys, and those are its own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.bank.filtering import Filtering
from service.bank.index import SEARCH_DEPTH, Alive, Graph
from service.bank.keys import Named, Projection, Scales
from service.bank.layout import NEVER, Layout, Prepared
from service.bank.queries import Queries
from service.core.filter import Clause
from service.core.similarity import Kernel

BLOCK_VALUES_MAX = 2**26
"""Values in one block of scores or gathered rows: 256 MB of float32. A scan of 10M rows by 256 cues at once would take
10 GB; blocks this large are already as fast as one."""

SQUARES_VALUES_MAX = 2**20
"""Values of a block whose squares are made for one search: 4 MB, which stay in the cache for the product with them."""

SPARSE_SHARE = 0.2
"""Under this share of alive rows a segment is scanned: HNSW under a selector returned 2.6 of 10 rows at a share of
.005."""

TAIL_BYTES, TAIL_ROWS_MIN, TAIL_ROWS_MAX = 2**20, 4, 256
"""A tail's first capacity: what fits in 1 MiB, so that many empty collections stay small whatever their dimension, but
no fewer rows than spare a wide one its first doublings (16 spaces of 65,536 values: 16 MiB), and no more than a small
collection has."""

FARTHEST = torch.finfo(torch.float32).min
"""The lowest score, above that of no row."""

STRING_BYTES = 49
"""What a Python string or bytes object takes besides its characters, nearly."""


class Segment:
    """`vectors[space]` (capacity, d_s), `norms[space]` (capacity,), ids and payloads by row.

    `capacity` is that of a tail unless told.
    """

    def __init__(self, layout: Layout, device: torch.device, capacity: int | None = None) -> None:
        if capacity is None:
            capacity = min(max(TAIL_BYTES // (4 * layout.dimension), TAIL_ROWS_MIN), TAIL_ROWS_MAX)
        self.layout = layout
        self.device = device
        self.count = 0
        self.vectors = {s.name: torch.zeros(capacity, s.dimension, device=device) for s in layout.spaces}
        self.norms = {s.name: torch.zeros(capacity, device=device) for s in layout.spaces}
        self.lacking = dict.fromkeys(layout.names, 0)
        self.norm_max = 0.0
        self.expires: Tensor | None = None
        """(capacity,) int64, when each row expires; None while no row ever does."""
        self.ids: list[str] = []
        self.payloads: list[bytes | None] = []
        self.filtering = Filtering(self.ids, self.payloads)
        self.graphs: dict[str, Graph] = {}
        self.built_on: dict[str, Kernel | None] = {}
        """Per space the kernel of its graph; a space that no row has is here, but has no graph. Empty until built."""
        self._newest: dict[str, int] = {}
        self._older: dict[int, int] = {}  # row → the row of the same id before it
        self._text_bytes = self._payload_bytes = 0

    @property
    def capacity(self) -> int:
        return len(self.norms[self.layout.names[0]])

    def append(self, rows: Prepared) -> None:
        """Add rows whose ids differ from one another. Only the writer calls this, and only on the tail."""
        start, stop = self.count, self.count + len(rows.ids)
        if stop > self.capacity:
            # By doubling alone, whatever the batches: so that what a tail takes is known beforehand (see sizing).
            grown = self.capacity
            while grown < stop:
                grown *= 2
            self.vectors = {name: _grown(block, grown, start) for name, block in self.vectors.items()}
            self.norms = {name: _grown(block, grown, start) for name, block in self.norms.items()}
        if rows.expires is not None or (self.expires is not None and len(self.expires) < stop):
            self._make_room_for_expiry(start)
        if rows.expires is not None and self.expires is not None:
            self.expires[start:stop] = rows.expires.to(self.device)
        for name in self.layout.names if rows.ids else ():
            self.norm_max = max(self.norm_max, float(rows.norms[name].max()))
            # Counted before they can be seen, so that no reader takes a lacking row for a present one.
            self.lacking[name] += int((rows.norms[name] == 0).sum())
            self.vectors[name][start:stop] = rows.vectors[name].to(self.device)
            self.norms[name][start:stop] = rows.norms[name].to(self.device)
        self.ids.extend(rows.ids)
        self.payloads.extend(rows.payloads)
        for row, memory_id in enumerate(rows.ids, start):
            if (older := self._newest.get(memory_id)) is not None:
                self._older[row] = older  # before `_newest`: a reader that finds the new row can step back from it
            self._newest[memory_id] = row
        self._text_bytes += sum(map(len, rows.ids)) + STRING_BYTES * len(rows.ids)
        self._payload_bytes += sum(len(payload) + STRING_BYTES for payload in rows.payloads if payload is not None)
        self.count = stop

    def _make_room_for_expiry(self, count: int) -> None:
        before = self.expires
        if before is not None and len(before) == self.capacity:
            return
        expires = torch.full((self.capacity,), NEVER, dtype=torch.int64, device=self.device)
        if before is not None:
            expires[:count] = before[:count]
        self.expires = expires

    def newest_row(self, memory_id: str, count: int) -> int | None:
        """The last row under `count` that has this id."""
        row = self._newest.get(memory_id)
        while row is not None and row >= count:
            row = self._older.get(row)
        return row

    def build_graphs(self, kernels: Mapping[str, tuple[Kernel, Projection, Scales]]) -> None:
        """Give a segment that nobody reads yet a graph per space, under its kernel if it has one. Without, the graph is
        its space's matrix where it has every row.

        While one space is built its rows (or keys) lie in memory twice.
        """
        for name in self.layout.names:
            vectors, norms, lacking = (
                self.vectors[name][: self.count],
                self.norms[name][: self.count],
                self.lacking[name],
            )
            kernel = None
            if name in kernels:
                kernel, projection, scales = kernels[name]
                norms, lacking = scales.inverse[: self.count], scales.lacking
                vectors = projection.keys(vectors, norms)
            self.built_on[name] = kernel
            if lacking == self.count:
                continue
            if lacking:
                present = torch.nonzero(norms).flatten()
                self.graphs[name] = Graph(vectors[present].numpy(), self.layout.similarity, present.numpy())
                continue
            graph = self.graphs[name] = Graph(vectors.numpy(), self.layout.similarity)
            if kernel is None:
                self.vectors[name] = torch.from_numpy(graph.matrix)

    def sizes(self) -> dict[str, int]:
        """Bytes per kind: `patterns`, `keys`, `graph` (with the copies of graphs that leave rows out), `payloads`,
        `columns` (of those, for filters), `ids`."""
        blocks = [*self.vectors.values(), *self.norms.values()]
        keyed = [graph for name, graph in self.graphs.items() if self.built_on[name] is not None]
        copies = [graph for graph in self.graphs.values() if graph not in keyed and graph.rows is not None]
        return {
            "patterns": sum(block.nbytes for block in blocks),
            "keys": sum(graph.matrix.nbytes for graph in keyed),
            "graph": sum(g.size_bytes for g in self.graphs.values()) + sum(g.matrix.nbytes for g in copies),
            "payloads": self._payload_bytes
            + sys.getsizeof(self.payloads)
            + (0 if self.expires is None else self.expires.nbytes),
            "columns": self.filtering.size_bytes,
            "ids": self._text_bytes
            + sys.getsizeof(self.ids)
            + sys.getsizeof(self._newest)
            + sys.getsizeof(self._older),
        }


def _grown(block: Tensor, capacity: int, count: int) -> Tensor:
    grown = torch.zeros(capacity, *block.shape[1:], device=block.device)
    grown[:count] = block[:count]
    return grown


@dataclass(frozen=True, eq=False)
class Part:
    """The first `count` rows of a segment, less the dead ones: what one version of the bank sees of it.

    `dead` is a bool bitmap of at least `count` rows, or None. `scales` are there for every kernel of the version.
    `scanned`: a scan is as quick as a graph, so few rows does a filter leave. Rows below are the segment's own, from 0.
    """

    segment: Segment
    count: int
    scales: Mapping[Named, Scales] = field(default_factory=dict)
    dead: Tensor | None = None
    dead_count: int = 0
    scanned: bool = False

    @property
    def alive(self) -> int:
        return self.count - self.dead_count

    def without(self, rows: Int[Tensor, " n"]) -> Part:
        """This part with further rows dead; they are alive here and differ."""
        if not len(rows):
            return self
        dead = self._dead_bitmap(self.segment.capacity)
        dead[rows] = True
        return replace(self, dead=dead, dead_count=self.dead_count + len(rows))

    def appended(self, rows: Prepared, inverses: Mapping[Named, Tensor]) -> Part:
        """This part with rows appended to its segment, and their 1/‖Wû‖ by kernel. Only the writer calls this, and only
        on the newest part of the tail."""
        self.segment.append(rows)
        capacity, dead = self.segment.capacity, self.dead
        if dead is not None and len(dead) < self.segment.count:
            dead = self._dead_bitmap(capacity)
        scales = {named: scales.appended(inverses[named], capacity) for named, scales in self.scales.items()}
        return replace(self, count=self.segment.count, scales=scales, dead=dead)

    def restricted(self, clause: Clause | None, left_out: Sequence[int], scan_values_max: int) -> Part:
        """This part with those rows alone that a filter keeps, less `left_out`; no rows are to be appended to it."""
        if clause is None and not left_out:
            return self
        if clause is None:
            kept = torch.ones(self.count, dtype=torch.bool, device=self.segment.device)
        else:
            kept = torch.from_numpy(self.segment.filtering.mask(clause, self.count)).to(self.segment.device, copy=True)
        kept[list(left_out)] = False
        if self.dead is not None:
            kept &= ~self.dead[: self.count]
        alive = int(kept.sum())
        scanned = alive * self.segment.layout.dimension <= scan_values_max
        return replace(self, dead=~kept, dead_count=self.count - alive, scanned=scanned)

    @cached_property
    def soonest(self) -> int:
        """When the first of its alive rows expires."""
        if self.segment.expires is None or not self.alive:
            return NEVER
        return int(self._expires().min())

    def unexpired(self, now: int) -> Part:
        """This part without the rows that have expired by `now`."""
        return self if now < self.soonest else self.without(torch.nonzero(self._expires() <= now).flatten())

    def _expires(self) -> Int[Tensor, " count"]:
        """When its rows expire; dead ones never do."""
        assert self.segment.expires is not None
        expires = self.segment.expires[: self.count]
        return expires if self.dead is None else expires.masked_fill(self.dead[: self.count], NEVER)

    def _dead_bitmap(self, capacity: int) -> Bool[Tensor, " capacity"]:
        bitmap = torch.zeros(capacity, dtype=torch.bool, device=self.segment.device)
        if self.dead is not None:
            bitmap[: len(self.dead)] = self.dead
        return bitmap

    def alive_rows(self) -> Int[Tensor, " alive"]:
        if self.dead is None:
            return torch.arange(self.count, device=self.segment.device)
        return torch.nonzero(~self.dead[: self.count]).flatten()

    def row_of(self, memory_id: str) -> int | None:
        row = self.segment.newest_row(memory_id, self.count)
        return None if row is None or (self.dead is not None and self.dead[row]) else row

    # --- search -------------------------------------------------------------------------------------------------------

    def search(self, queries: Queries, limit: int, exact: bool) -> tuple[Tensor, Tensor, bool]:
        """At most `limit` alive rows per cue by falling score: (batch, k) scores, rows (-1 and -inf where none), and
        whether every row was compared."""
        sparse = self.scanned or self.alive < SPARSE_SHARE * self.count
        if not exact and not sparse and self._has_graphs_for(queries):
            found = self._search_graphs(queries, limit)
            if found is not None:
                return *found, False
        return *self.scan(queries, limit), True

    def _has_graphs_for(self, queries: Queries) -> bool:
        built_on = self.segment.built_on
        return (
            bool(built_on)
            and not queries.raw
            and all(built_on[name] is queries.kernels.get(name) for name in queries.rows)
        )

    def _search_graphs(self, queries: Queries, limit: int) -> tuple[Tensor, Tensor] | None:
        """None where some graph found fewer rows than it has to give, or than were asked for."""
        # With several spaces a row that is good in all may be nobody's first: take all that a search keeps anyway.
        wanted = limit if len(queries.rows) == 1 else max(limit, SEARCH_DEPTH)
        found = []
        for name in queries.rows:
            if name not in self.segment.graphs:
                continue
            query = queries.keys[name] if name in queries.keys else queries.rows[name]
            graph, alive = self.segment.graphs[name], self._alive[name]
            most = min(wanted, graph.count if alive is None else alive.count)
            if most == 0:
                continue
            scores, rows = graph.search(query.numpy(), most, alive)
            if rows.min() < 0:
                return None
            found.append((torch.from_numpy(scores), torch.from_numpy(rows)))
        if len(queries.rows) == 1 and found:
            return found[0]
        if not found:
            return torch.empty(queries.batch, 0), torch.empty(queries.batch, 0, dtype=torch.int64)
        union = torch.cat([rows for _, rows in found], dim=1).sort(dim=1).values
        repeated = torch.zeros_like(union, dtype=torch.bool)
        repeated[:, 1:] = union[:, 1:] == union[:, :-1]
        return self._rescored(queries, union.masked_fill(repeated, -1), limit)

    @cached_property
    def _alive(self) -> dict[str, Alive | None]:
        """Per graph, the rows a search of it may return. Two readers may both compute it; the results are equal."""
        if self.dead is None:
            return dict.fromkeys(self.segment.graphs)
        alive = (~self.dead[: self.count]).numpy()
        graphs = self.segment.graphs
        return {name: Alive(alive if g.rows is None else alive[g.rows]) for name, g in graphs.items()}

    def scan(self, queries: Queries, limit: int) -> tuple[Tensor, Tensor]:
        """As `search`, comparing every alive row."""
        batch = queries.batch
        sparse = self.alive_rows() if self.alive < SPARSE_SHARE * self.count else None
        total = self.count if sparse is None else self.alive
        # A block is bounded both as scores (batch × rows) and as gathered rows (rows × values).
        values_max = BLOCK_VALUES_MAX if queries.shown is None else SQUARES_VALUES_MAX
        step = max(1, values_max // max(batch, self.segment.layout.dimension))
        best_scores = torch.empty(batch, 0, device=self.segment.device)
        best_rows = torch.empty(batch, 0, dtype=torch.int64, device=self.segment.device)
        for start in range(0, total, step):
            stop = min(start + step, total)
            scores = self._block_scores(queries, slice(start, stop) if sparse is None else sparse[start:stop])
            top = scores.topk(min(limit, stop - start))
            rows = top.indices + start if sparse is None else sparse[start:stop][top.indices]
            if start == 0:
                best_scores, best_rows = top.values, rows
            else:
                both = torch.cat([best_scores, top.values], dim=1)
                merged = both.topk(min(limit, both.shape[1]))
                best_scores, best_rows = merged.values, torch.cat([best_rows, rows], dim=1).gather(1, merged.indices)
        best_rows = best_rows.masked_fill(best_scores == -torch.inf, -1)
        if queries.distances:
            # 2⟨x, ξ⟩ − ‖ξ‖² − ‖x‖² loses digits where the three are large and the distance small.
            return self._rescored(queries, best_rows, limit)
        return best_scores, best_rows

    def _block_scores(self, queries: Queries, chosen: slice | Tensor) -> Float[Tensor, "batch rows"]:
        """Scores of a block of rows; -inf for dead rows and for those that lack every space of the cue."""
        segment = self.segment
        total: Tensor | None = None
        hidden = None if self.dead is None else self.dead[: self.count][chosen]
        lacking: Tensor | None = None
        for position, (name, query) in enumerate(queries.rows.items()):
            norms = segment.norms[name][: self.count][chosen]
            factors = self.factors(name, queries.kernels.get(name), queries.raw)
            block = segment.vectors[name][: self.count][chosen]
            scores = query @ block.T
            if factors is not None:
                factors = factors[chosen]
                scores = scores.mul_(factors)
            if queries.distances:
                sizes = norms.square()
                if queries.shown is not None:
                    # Of unit rows, so that the norm squared comes back in.
                    sizes = (queries.shown @ block.square().T).mul_(sizes)
                scores = scores.mul_(2).sub_(sizes).sub_(query.square().sum(dim=1, keepdim=True))
            if queries.raw:
                # Under cosine a norm may be too large for its square: then the row is as far as can be said.
                scores = scores.nan_to_num_(nan=FARTHEST, neginf=FARTHEST)
            total = scores if total is None else total.add_(scores)
            if self.lacking(name, queries.kernels.get(name)) == 0:
                lacking = None
            elif position == 0 or lacking is not None:
                absent = (norms if factors is None else factors) == 0
                lacking = absent if lacking is None else lacking & absent
        assert total is not None, "a cue observes at least one space"
        for mask in (hidden, lacking):
            if mask is not None:
                total.masked_fill_(mask, -torch.inf)
        return total

    def factors(self, space: str, kernel: Kernel | None, raw: bool) -> Float[Tensor, " count"] | None:
        """What a stored row is multiplied with to be as the metric sees it: 1/‖Wû‖ under a kernel, ‖ξ‖ for raw values
        under cosine; None: nothing."""
        if kernel is not None:
            return self.scales[space, kernel].inverse[: self.count]
        if raw and self.segment.layout.similarity == "cosine":
            return self.segment.norms[space][: self.count]
        return None

    def lacking(self, space: str, kernel: Kernel | None) -> int:
        """How many rows, dead ones among them, lack the space."""
        return self.segment.lacking[space] if kernel is None else self.scales[space, kernel].lacking

    def _rescored(self, queries: Queries, rows: Int[Tensor, "batch k"], limit: int) -> tuple[Tensor, Tensor]:
        """The best `limit` of given rows (-1: none) by scores computed row by row."""
        step = max(1, BLOCK_VALUES_MAX // max(1, rows.shape[1] * self.segment.layout.dimension))
        scores = torch.zeros(rows.shape, device=rows.device)
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            chosen = rows[some].clamp_min(0)
            for name, query in queries.rows.items():
                block = self.segment.vectors[name][chosen]
                factors = self.factors(name, queries.kernels.get(name), queries.raw)
                if queries.distances:
                    block = block if factors is None else block * factors[chosen].unsqueeze(2)
                    away = block - query[some, None]
                    away = away if queries.shown is None else away * queries.shown[some, None]
                    scores[some] -= away.square().sum(dim=2)
                else:
                    product = torch.bmm(block, query[some, :, None]).squeeze(2)
                    scores[some] += product if factors is None else product * factors[chosen]
        if queries.raw:
            scores = scores.clamp_min_(FARTHEST)
        top = scores.masked_fill_(rows < 0, -torch.inf).topk(min(limit, rows.shape[1]))
        return top.values, rows.gather(1, top.indices)
