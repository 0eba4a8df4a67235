"""A view: all of a bank at one version, and every question that a recall asks of it.

Rules:
- A view never changes, and taking one is a single attribute read. Whoever answers a request takes one view and asks
  only it.
- Row numbers are a view's own: they mean nothing to another view. -1 stands for "no row" everywhere.
- score = Σ_s w_s cos(x_s, ξ_s) / Σ_s w_s over the cue's spaces under cosine, cos(Wx_s, Wξ_s) where a search names a
  kernel; ⟨x, ξ⟩ under dot; −‖x − ξ‖² under neg_l2, and of raw values.
- What has expired is not there: `at` leaves it out, and whoever answers asks a view of its moment.
- Tensors come back on the bank's device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from service.bank.keys import Named, Projection
from service.bank.layout import Layout
from service.bank.queries import Queries, make_queries
from service.bank.segment import Part, Segment
from service.core.filter import Clause
from service.core.similarity import Kernel
from service.errors import InvalidRequest

MATRIX_BYTES_MAX = 2**30
"""What `View.matrix` copies at most, and a view keeps of such copies: a dense recall over more takes seconds a step,
and every version would keep a copy."""

SCAN_VALUES_MAX = 8_000_000
"""Rows × D scanned at most: about 2 ms for one cue on one CPU core, 10,000 rows of 784 values."""

RESTRICTIONS_KEPT = 8
"""Restrictions that a view keeps: each has a bitmap or two and the numbers of its rows, up to ten bytes a row."""

Restriction = tuple[Clause | None, frozenset[str]]


@dataclass(frozen=True, eq=False)
class Found:
    """`rows` (batch, limit) int64, -1 padded; `scores` (batch, limit) float32, falling, -inf padded.

    `exact`: every row was compared, so nothing outside scores above the last one (ties are broken at will; of raw
    distances up to the rounding of 2⟨x, ξ⟩ − ‖ξ‖² − ‖x‖², under a kernel up to that of ⟨ξ, WᵀWx⟩).
    """

    rows: Int[Tensor, "batch limit"]
    scores: Float[Tensor, "batch limit"]
    exact: bool


class View:
    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        parts: tuple[Part, ...],
        version: int,
        kernels: Mapping[Named, Projection],
        scan_values_max: int = SCAN_VALUES_MAX,
    ) -> None:
        self.layout = layout
        self.device = device
        self.parts = parts
        self.version = version
        self.kernels = kernels
        """The kernels that may be asked for, with the space that each is for."""
        self.count = sum(part.alive for part in parts)
        """Memories in this view."""
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.count)
        self.starts = tuple(starts)
        """Part i has the rows from starts[i] up to starts[i + 1], dead ones among them."""

        self.scan_values_max = scan_values_max
        self._matrices: dict[tuple[frozenset[Named], bool], Tensor] = {}
        self._matrices_share = 1  # one part in so many of what copies may take
        self._restricted: dict[Restriction, View] = {}
        self._unexpired: tuple[int, View] | None = None  # the last that `at` made, and for when

    @property
    def norm_max(self) -> float:
        """A bound of ‖ξ‖ over patterns as `gather` gives them; rows that died since the last seal may hold it up."""
        return self.norm_bound()

    def norm_bound(self, kernels: Mapping[str, Kernel] | None = None, raw: bool = False) -> float:
        """As `norm_max`, of what `gather` gives with these arguments."""
        kernels = self._known(kernels, raw)
        if self.layout.similarity != "cosine":
            return max(part.segment.norm_max for part in self.parts)
        bounds = [
            max(part.segment.norm_max for part in self.parts) if raw
            else 1.0 if name not in kernels
            else max(part.scales[name, kernels[name]].largest for part in self.parts)
            for name in self.layout.names
        ]  # fmt: skip
        return math.hypot(*bounds)

    def _known(self, kernels: Mapping[str, Kernel] | None, raw: bool) -> Mapping[str, Kernel]:
        """Raises ValueError for a kernel that the bank did not have, and for kernels with raw values."""
        for name, kernel in (kernels or {}).items():
            if (name, kernel) not in self.kernels:
                raise ValueError(f"this view does not know the kernel asked for in space {name!r}")
        if kernels and raw:
            raise ValueError("a kernel compares directions, not raw values")
        return kernels or {}

    @cached_property
    def soonest(self) -> int:
        """When the first memory of this view expires, in microseconds since 1970; NEVER where none does."""
        return min(part.soonest for part in self.parts)

    def at(self, now: int) -> View:
        """This view without the memories that have expired by `now`; the same one where none has. Its rows have the
        same numbers.

        What was made last is kept until the next memory expires.
        """
        if now < self.soonest:
            return self
        if (kept := self._unexpired) is not None and kept[0] <= now < kept[1].soonest:
            return kept[1]
        parts = tuple(part.unexpired(now) for part in self.parts)
        view = View(self.layout, self.device, parts, self.version, self.kernels, self.scan_values_max)
        self._unexpired = (now, view)
        return view

    def restricted(self, clause: Clause | None, exclude: frozenset[str] = frozenset()) -> View:
        """This view with those memories alone that a filter keeps, less those whose ids are in `exclude`. Its rows have
        the same numbers.

        The last few are kept: the filters of an application recur, and between two writes nothing of them changes.
        """
        if (clause is None or clause.empty) and not exclude:
            return self
        if (kept := self._restricted.get((clause, exclude))) is not None:
            return kept
        parts = []
        for part in self.parts:
            rows = (part.row_of(memory_id) for memory_id in exclude)
            parts.append(part.restricted(clause, [row for row in rows if row is not None], self.scan_values_max))
        view = View(self.layout, self.device, tuple(parts), self.version, self.kernels, self.scan_values_max)
        view._matrices_share = RESTRICTIONS_KEPT  # together no more than this view's own
        # Replaced by one assignment, as other readers may be looking.
        others = dict(list(self._restricted.items())[-RESTRICTIONS_KEPT + 1 :])
        self._restricted = {**others, (clause, exclude): view}
        return view

    # --- search -------------------------------------------------------------------------------------------------------

    def search(
        self,
        cue: Mapping[str, Float[Tensor, "batch d"]],
        weights: Mapping[str, float],
        limit: int,
        exact: bool = False,
        exclude: Int[Tensor, " batch"] | None = None,
        kernels: Mapping[str, Kernel] | None = None,
        raw: bool = False,
        observed: bool = False,
    ) -> Found:
        """The `limit` best memories for each cue.

        `cue` has the observed spaces alone, raw; `weights` at least theirs, positive. `exact` compares every row, else
        graphs may be used. `exclude` names one row per cue to leave out (-1: none), as when a stored memory is its own
        cue.

        `kernels` are those to compare spaces under, the cue's or others; the rest are compared as they are. `raw`
        scores −‖x − ξ‖² over the raw values of a cue's one space, under cosine; with `observed` over those values that
        are not 0 in the cue. Raises UnknownSpace, WrongDimension, NothingObserved, InvalidRequest; ValueError for a
        kernel that `Bank.add_kernel` had not brought.
        """
        if limit < 1:
            raise InvalidRequest(f"limit must be at least 1, found {limit}.")
        queries = make_queries(
            self.layout, self.device, cue, weights, self._known(kernels, raw), self.kernels, raw, observed
        )
        wanted = limit if exclude is None else limit + 1
        scores, rows, all_compared = self._merged(queries, wanted, exact)
        if exclude is not None:
            # The one row more makes up for the row that is left out.
            left_out = (rows == exclude.to(rows.device)[:, None]) & (rows >= 0)
            top = scores.masked_fill(left_out, -torch.inf).topk(min(limit, rows.shape[1]))
            scores, rows = top.values, rows.masked_fill(left_out, -1).gather(1, top.indices)
        if (short := limit - rows.shape[1]) > 0:
            scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
            rows = torch.nn.functional.pad(rows, (0, short), value=-1)
        return Found(rows, scores, all_compared)

    def _merged(self, queries: Queries, limit: int, exact: bool) -> tuple[Tensor, Tensor, bool]:
        found = [
            (start, *part.search(queries, limit, exact))
            for start, part in zip(self.starts, self.parts, strict=False)
            if part.alive
        ]
        if not found:
            nothing = torch.empty(queries.batch, 0, device=self.device)
            return nothing, nothing.to(torch.int64), True
        all_compared = all(compared for *_, compared in found)
        # A segment's row -1 stays -1 wherever the segment starts.
        moved = [rows if start == 0 else torch.where(rows < 0, rows, rows + start) for start, _, rows, _ in found]
        if len(found) == 1:
            return found[0][1], moved[0], all_compared
        scores = torch.cat([scores for _, scores, _, _ in found], dim=1)
        top = scores.topk(min(limit, scores.shape[1]))
        return top.values, torch.cat(moved, dim=1).gather(1, top.indices), all_compared

    # --- patterns -----------------------------------------------------------------------------------------------------

    def gather(
        self, rows: Int[Tensor, "batch k"], kernels: Mapping[str, Kernel] | None = None, raw: bool = False
    ) -> Float[Tensor, "batch k D"]:
        """Blocks of rows as the similarity sees them, concatenated in the layout's order; zeros at -1.

        Under cosine unit rows û; under a kernel û/‖Wû‖, zero where it lacks the space; `raw`: ξ. Raises as `search`.
        """
        kernels = self._known(kernels, raw)
        split = self._split(rows)
        blocks = []
        for name in self.layout.names:
            block = self._block(rows, name, split)
            if (factors := self._factors(rows, name, kernels.get(name), raw, split)) is not None:
                block = block * factors.unsqueeze(2)
            blocks.append(block)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)

    def read_out(
        self, rows: Int[Tensor, "batch k"], weights: Float[Tensor, "batch k"], space: str
    ) -> Float[Tensor, "batch d"]:
        """Σ_μ p_μ ξ_μ over raw values: what a recalled state is in the space's own units (for a decoder)."""
        self.layout.space(space)
        split = self._split(rows)
        if (norms := self._factors(rows, space, None, True, split)) is not None:
            weights = weights * norms
        return torch.bmm(weights[:, None, :].to(torch.float32), self._block(rows, space, split)).squeeze(1)

    def lacking(
        self, spaces: Sequence[str], rows: Int[Tensor, " n"], kernels: Mapping[str, Kernel] | None = None
    ) -> Bool[Tensor, " n"]:
        """Which rows have a zero vector in every one of `spaces`, and so are no candidates for a cue of these; True at
        -1. Raises UnknownSpace.

        The same under every similarity, as in `search`; under `kernels` a row that its kernel annihilates lacks the
        space.
        """
        kernels = self._known(kernels, raw=False)
        for name in spaces:
            self.layout.space(name)
        if any(not any(part.lacking(name, kernels.get(name)) for part in self.parts) for name in spaces):
            return rows < 0  # the usual case: every memory has one of the spaces
        lacking = torch.ones(rows.shape, dtype=torch.bool, device=self.device)
        for part, there, local in self._split(rows):
            present = torch.zeros(local.shape, dtype=torch.bool, device=self.device)
            for name in spaces:
                factors = part.factors(name, kernels.get(name), raw=False)
                present |= (part.segment.norms[name] if factors is None else factors)[local] != 0
            lacking[slice(None) if there is None else there] = ~present
        return lacking

    def matrix(
        self, kernels: Mapping[str, Kernel] | None = None, raw: bool = False
    ) -> tuple[Float[Tensor, "count D"], Int[Tensor, " count"]]:
        """All memories for a dense support: their concatenated blocks (as `gather`) and their row numbers.

        Those that lack a cue's spaces are among them: see `lacking`. With one space, one segment, no dead row and
        nothing to scale this is the segment's own matrix (do not write to it); else a copy, which the view keeps.
        Raises InvalidRequest where the copy would exceed 1 GiB (MATRIX_BYTES_MAX), and as `search`.
        """
        kernels, rows = self._known(kernels, raw), self._alive_rows
        filled = [part for part in self.parts if part.count]
        scaled = bool(kernels) or (raw and self.layout.similarity == "cosine")
        if len(filled) == 1 and len(self.layout.spaces) == 1 and filled[0].dead is None and not scaled:
            return filled[0].segment.vectors[self.layout.names[0]][: filled[0].count], rows
        metric = (frozenset(kernels.items()), raw)
        if (kept := self._matrices.get(metric)) is not None:
            return kept, rows
        size_bytes = 4 * self.count * self.layout.dimension
        if size_bytes > MATRIX_BYTES_MAX:
            raise InvalidRequest(
                f"A dense support over {self.count} memories needs a copy of {size_bytes:,} bytes, and "
                f"{MATRIX_BYTES_MAX:,} is the most: ask for a number of rows as support."
            )
        matrix = self.gather(rows[None], kernels, raw).squeeze(0)
        kept_bytes_max = MATRIX_BYTES_MAX // self._matrices_share
        if size_bytes <= kept_bytes_max:
            # Replaced by one assignment, as other readers may be looking.
            others = self._matrices if (len(self._matrices) + 1) * size_bytes <= kept_bytes_max else {}
            self._matrices = {**others, metric: matrix}
        return matrix, rows

    def _block(self, rows: Tensor, space: str, split: list[tuple[Part, Tensor | None, Tensor]]) -> Tensor:
        dimension = self.layout.space(space).dimension
        if len(split) == 1 and split[0][1] is None:
            part, _, local = split[0]
            return part.segment.vectors[space].index_select(0, local).view(*rows.shape, dimension)
        block = torch.zeros(*rows.shape, dimension, device=self.device)
        for part, there, local in split:
            block[there] = part.segment.vectors[space][local]
        return block

    def _factors(
        self,
        rows: Tensor,
        space: str,
        kernel: Kernel | None,
        raw: bool,
        split: list[tuple[Part, Tensor | None, Tensor]],
    ) -> Tensor | None:
        """`Part.factors` of rows, 0 at -1; None where there are none."""
        if kernel is None and not (raw and self.layout.similarity == "cosine"):
            return None
        factors = torch.zeros(rows.shape, device=self.device)
        for part, there, local in split:
            of_part = part.factors(space, kernel, raw)
            assert of_part is not None
            if there is None:
                return of_part[local].view(rows.shape)
            factors[there] = of_part[local]
        return factors

    def _split(self, rows: Tensor) -> list[tuple[Part, Tensor | None, Tensor]]:
        """Per part that some rows lie in: the part, where in `rows` they are (None: everywhere), and their numbers in
        its segment."""
        filled = [
            (start, stop, part)
            for start, stop, part in zip(self.starts, self.starts[1:], self.parts, strict=False)
            if part.count
        ]
        if len(filled) == 1 and rows.numel() and int(rows.min()) >= 0:  # a bank at rest: nothing to tell apart
            start, _, part = filled[0]
            return [(part, None, rows.reshape(-1) - start if start else rows.reshape(-1))]
        split: list[tuple[Part, Tensor | None, Tensor]] = []
        for start, stop, part in filled:
            there = (rows >= start) & (rows < stop)
            if bool(there.any()):
                split.append((part, there, rows[there] - start))
        return split

    # --- ids and payloads ---------------------------------------------------------------------------------------------

    def ids(self, rows: Int[Tensor, "batch k"]) -> list[list[str | None]]:
        """The ids of rows; None at -1."""
        return [[None if at is None else at[0].ids[at[1]] for at in line] for line in self._located(rows)]

    def payloads(self, rows: Int[Tensor, "batch k"]) -> list[list[bytes | None]]:
        """The JSON payloads of rows; None where a memory has none, and at -1."""
        return [[None if at is None else at[0].payloads[at[1]] for at in line] for line in self._located(rows)]

    def rows_of(self, ids: Iterable[str]) -> Int[Tensor, " n"]:
        """The rows of ids, -1 for those that this view does not have."""
        return torch.tensor([self._row_of(memory_id) for memory_id in ids], dtype=torch.int64, device=self.device)

    def _row_of(self, memory_id: str) -> int:
        for start, part in zip(self.starts, self.parts, strict=False):
            if (row := part.row_of(memory_id)) is not None:
                return start + row
        return -1

    def _located(self, rows: Tensor) -> list[list[tuple[Segment, int] | None]]:
        return [[self._locate(row) for row in line] for line in rows.tolist()]

    def _locate(self, row: int) -> tuple[Segment, int] | None:
        if row == -1:
            return None
        for start, stop, part in zip(self.starts, self.starts[1:], self.parts, strict=False):
            if start <= row < stop:
                return part.segment, row - start
        raise IndexError(f"this view has no row {row}")

    def sample(self, n: int, seed: int) -> Int[Tensor, " n"]:
        """Rows of min(n, count) memories, drawn without replacement; the same for one view and seed."""
        chosen = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))[:n]
        return self._alive_rows[chosen.to(self.device)]

    def all_ids(self) -> list[str]:
        """Of every memory."""
        return [memory_id for (memory_id,) in self.ids(self._alive_rows[:, None]) if memory_id is not None]

    @cached_property
    def _alive_rows(self) -> Tensor:
        return torch.cat([part.alive_rows() + start for start, part in zip(self.starts, self.parts, strict=False)])
