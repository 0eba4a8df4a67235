"""Which memories a reply lists, in what order: pages, a least similarity, and groups by a payload's key.

Rules:
- What takes part in the dynamics comes by falling weight, then by falling similarity; what does not has the weight 0.
- A memory is in the group of each scalar value that its key has (an array stands for its elements); values are equal as
  in filters. A memory without one is in no group, and not listed.
- Groups never cost groups. Where those that take part make up too few, the search goes on among the memories that can
  still add to them, over ever more rows: exactly where it scans, as well as the graph finds them where that is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import orjson
import torch
from torch import Tensor

from service.app.recall_options import Resolved
from service.bank import Found, View
from service.core.filter import AnyOf, Clause, Except, Path, Values, elements

GROWTH = 4  # how many times more rows each further search for groups asks for: a sixteenth of a million takes eight
RANKED_AT_ONCE = 256  # rows whose payloads are read together: a page's groups are mostly among the first ones

GroupValue = str | bool | int | float
Search = Callable[[View, int, int], Found]
"""(view, cue, limit): the best rows of a view for one cue of the batch."""


@dataclass(frozen=True, eq=False)
class Listed:
    """`rows` (batch, n), -1 padded; the others a list a cue. `groups` is None where none were asked for."""

    rows: Tensor
    weights: list[list[float]]
    similarities: list[list[float]]
    groups: list[list[GroupValue]] | None = None


def listed(view: View, found: Found, weights: Tensor, options: Resolved, search: Search) -> Listed:
    """`found` and the settled `weights` (batch, support) in the order of their rows; `search` is asked for groups
    alone.
    """
    # Candidates come by falling similarity, so a stable sort by weight leaves ties in that order.
    rows, ranks = found.rows, weights
    if options.score_threshold is not None:
        under = found.scores < options.score_threshold
        rows, ranks = rows.masked_fill(under, -1), ranks.masked_fill(under, -1.0)
    order = ranks.argsort(dim=1, descending=True, stable=True)
    if options.group_by is None:
        order = order[:, options.offset : options.reach]
        return Listed(rows.gather(1, order), weights.gather(1, order).tolist(), found.scores.gather(1, order).tolist())
    ranked = Found(rows.gather(1, order), found.scores.gather(1, order), found.exact)
    weights = weights.gather(1, order)
    pages = [_grouped(view, ranked, weights, i, options.group_by, options, search) for i in range(len(rows))]
    longest = max(len(page) for page in pages)
    padded = torch.full((len(pages), longest), -1, dtype=torch.int64, device=rows.device)
    for i, page in enumerate(pages):
        padded[i, : len(page)] = torch.tensor([member.row for _, member in page], dtype=torch.int64)
    return Listed(
        padded,
        [[member.weight for _, member in page] for page in pages],
        [[member.similarity for _, member in page] for page in pages],
        [[value for value, _ in page] for page in pages],
    )


@dataclass(frozen=True)
class _Member:
    row: int
    weight: float
    similarity: float


class _Groups:
    """The first `count` groups that are met, each of the first `size` members that are."""

    def __init__(self, path: Path, count: int, size: int) -> None:
        self._path, self._count, self._size = path, count, size
        self._members: dict[tuple[bool, GroupValue], list[_Member]] = {}  # true is no number: told apart by the first

    @property
    def full(self) -> bool:
        return len(self._members) == self._count and all(map(self._is_full, self._members.values()))

    def _is_full(self, members: list[_Member]) -> bool:
        return len(members) == self._size

    def take(self, member: _Member, payload: bytes | None) -> None:
        for value in () if payload is None else elements(orjson.loads(payload), self._path):
            if not isinstance(value, str | bool | int | float):
                continue
            name = (isinstance(value, bool), value)
            if name not in self._members and len(self._members) == self._count:
                continue
            members = self._members.setdefault(name, [])
            if not self._is_full(members) and member not in members:
                members.append(member)

    def wanting(self) -> Clause:
        """A filter that keeps every memory that can still add to the groups."""
        complete = len(self._members) == self._count
        named = [value for (_, value), members in self._members.items() if self._is_full(members) != complete]
        values = Values.of(list(named))
        return Clause(must=(AnyOf(self._path, values) if complete else Except(self._path, values),))

    def page(self, offset: int) -> list[tuple[GroupValue, _Member]]:
        some = list(self._members.items())[offset:]
        return [(value, member) for (_, value), members in some for member in members]


def _grouped(
    view: View, ranked: Found, weights: Tensor, cue: int, path: Path, options: Resolved, search: Search
) -> list[tuple[GroupValue, _Member]]:
    """The groups of one cue: of the rows that take part, then of others by their similarity."""
    groups = _Groups(path, options.reach, options.group_size)
    seen: set[int] = set()
    for member, payload in _members(view, ranked, weights[cue].tolist(), cue):
        groups.take(member, payload)
        if groups.full:
            return groups.page(options.offset)
        seen.add(member.row)
    limit = max(len(seen), RANKED_AT_ONCE // GROWTH)
    everything = len(seen) >= view.count
    while not everything:
        left = view.restricted(groups.wanting())
        limit = min(GROWTH * limit, left.count)
        if limit == 0:
            break
        found = search(left, cue, limit)
        if options.score_threshold is not None:
            found = Found(found.rows.masked_fill(found.scores < options.score_threshold, -1), found.scores, found.exact)
        for member, payload in _members(view, found, [0.0] * limit, 0):
            if member.row not in seen:
                seen.add(member.row)
                groups.take(member, payload)
        last = float(found.scores[0, -1])
        below = options.score_threshold is not None and last < options.score_threshold
        everything = groups.full or below or limit == left.count
    return groups.page(options.offset)


def _members(view: View, found: Found, weights: list[float], cue: int) -> Iterator[tuple[_Member, bytes | None]]:
    """The rows of one cue with their payloads, those of -1 left out."""
    rows, scores = found.rows[cue], found.scores[cue].tolist()
    for start in range(0, len(rows), RANKED_AT_ONCE):
        some = rows[start : start + RANKED_AT_ONCE]
        payloads = view.payloads(some[None])[0]
        for place, (row, payload) in enumerate(zip(some.tolist(), payloads, strict=True), start):
            if row >= 0:
                yield _Member(row, weights[place], scores[place]), payload
