"""Which rows of a segment a filter keeps.

Rules:
- Rows are only ever appended and never change, so neither does what a filter says of them: both columns and answers
  are kept, and only rows that came since are looked at again.
- Readers come from any thread; one at a time is served here, mostly by a look into a table.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
import orjson

from service.bank.columns import Column, Mask
from service.core.filter import AnyOf, Clause, Except, Exists, Ids, Node, Null, Path, Prefix, Range, paths

BLOCK_ROWS = 8192
"""Rows of one block of columns: what is copied at most when a tail's last one grows, some ten microseconds an array."""

PATHS_MAX = 64
"""Paths whose columns are kept besides the indexed ones, the last asked for: what filters of one application ask
about."""

MASKS_BYTES_MAX = 2**24
"""Answers kept, a byte a row: some hundred filters over a hundred thousand rows."""


class Filtering:
    """The columns and answers of one segment, over its own (growing) lists of ids and payloads."""

    def __init__(self, ids: Sequence[str], payloads: Sequence[bytes | None]) -> None:
        self._ids = ids
        self._payloads = payloads
        self._blocks: OrderedDict[Path, dict[int, Column]] = OrderedDict()
        self._masks: OrderedDict[Clause, Mask] = OrderedDict()
        self._lock = threading.Lock()
        self._indexed: tuple[Path, ...] = ()
        self._grown = 0  # rows up to which those columns are known to reach

    def keep(self, indexed: Iterable[Path]) -> None:
        """Have the columns of these paths from now on, whatever filters ask for, and no longer those of paths that were
        indexed before."""
        with self._lock:
            before, self._indexed = self._indexed, tuple(indexed)
            for path in set(before) - set(self._indexed):
                self._blocks.pop(path, None)
        self._make_all(self._indexed)

    def grow(self) -> None:
        """Bring the columns of indexed paths up to the rows that were appended. Only the writer calls this."""
        if self._indexed:
            self._grown = self._make_all(self._indexed, since=self._grown)

    def mask(self, clause: Clause, count: int) -> Mask:
        """(count,) of the first `count` rows: True where the filter keeps one. Not to be written to."""
        with self._lock:
            mask = self._masks.pop(clause, None)
            done = 0 if mask is None else len(mask)
            if done < count:
                asked = list(dict.fromkeys(paths(clause)))
                parts = [] if mask is None else [mask]
                while done < count:
                    start, done = done, min(count, (done // BLOCK_ROWS + 1) * BLOCK_ROWS)
                    parts.append(self._evaluated(clause, asked, start, done))
                mask = np.concatenate(parts) if len(parts) > 1 else parts[0]
            elif mask is None:
                mask = np.zeros(0, np.bool_)
            self._masks[clause] = mask
            self._shrink()
            return mask[:count]

    def warm(self, asked: Iterable[Path]) -> None:
        """Make the columns of these paths, before anybody waits for them."""
        self._make_all(list(asked)[:PATHS_MAX])

    @property
    def paths(self) -> list[Path]:
        """Those whose columns are kept, the last asked for at the end."""
        with self._lock:
            return list(self._blocks)

    @property
    def size_bytes(self) -> int:
        with self._lock:
            columns = sum(column.size_bytes for blocks in self._blocks.values() for column in blocks.values())
            return columns + sum(len(mask) for mask in self._masks.values())

    def column_bytes(self, path: Path) -> int:
        with self._lock:
            return sum(column.size_bytes for column in self._blocks.get(path, {}).values())

    def _evaluated(self, clause: Clause, asked: Sequence[Path], start: int, stop: int) -> Mask:
        """Of rows from `start` to `stop`, which lie in one block."""
        block = start // BLOCK_ROWS
        self._make(asked, block, stop)
        first = block * BLOCK_ROWS
        columns = {path: self._blocks[path][block] for path in asked}
        return _Block(columns, self._ids[first:stop]).mask(clause)[start - first : stop - first]

    def _make_all(self, asked: Sequence[Path], since: int = 0) -> int:
        """Make the columns of all rows, those before `since` having theirs; how many rows that are."""
        count = len(self._payloads)
        for block in range(since // BLOCK_ROWS, -(-count // BLOCK_ROWS)):
            with self._lock:  # block by block, so that no reader waits for all of them
                self._make(asked, block, min((block + 1) * BLOCK_ROWS, count))
        return count

    def _make(self, asked: Sequence[Path], block: int, stop: int) -> None:
        """Bring a block's columns of the paths asked for up to row `stop`; each payload is parsed once."""
        first = block * BLOCK_ROWS
        due: dict[int, list[Column]] = {}  # by the rows that they have
        for path in asked:
            blocks = self._blocks.setdefault(path, {})
            self._blocks.move_to_end(path)
            column = blocks.setdefault(block, Column(path))
            if first + column.rows < stop:
                due.setdefault(first + column.rows, []).append(column)
        for start, columns in due.items():
            rows = [None if raw is None else orjson.loads(raw) for raw in self._payloads[start:stop]]
            for column in columns:
                column.extend(rows)

    def _shrink(self) -> None:
        asked = [path for path in self._blocks if path not in self._indexed]
        for path in asked[: max(0, len(asked) - PATHS_MAX)]:
            del self._blocks[path]
        kept = sum(len(mask) for mask in self._masks.values())
        while kept > MASKS_BYTES_MAX and len(self._masks) > 1:
            kept -= len(self._masks.popitem(last=False)[1])


class _Block:
    """One block of rows, for which a filter is evaluated."""

    def __init__(self, columns: dict[Path, Column], ids: Sequence[str]) -> None:
        self._columns = columns
        self._ids = ids

    def mask(self, node: Node) -> Mask:
        match node:
            case Clause(must, should, must_not):
                mask = np.ones(len(self._ids), np.bool_)
                for part in must:
                    mask &= self.mask(part)
                if should:
                    mask &= reduce(np.logical_or, map(self.mask, should))
                for part in must_not:
                    mask &= ~self.mask(part)
                return mask
            case Ids(ids):
                return np.fromiter((each in ids for each in self._ids), np.bool_, len(self._ids))
        return self._of_column(self._columns[node.path], node)[: len(self._ids)]

    @staticmethod
    def _of_column(column: Column, node: AnyOf | Except | Range | Exists | Null | Prefix) -> Mask:
        match node:
            case AnyOf(_, values):
                return column.any_of(values)
            case Except(_, values):
                return column.none_of(values)
            case Range(_, bounds, moments):
                return column.moments_within(bounds) if moments else column.within(bounds)
            case Exists():
                return column.exists()
            case Null():
                return column.null()
            case Prefix(_, text):
                return column.prefix(text)
