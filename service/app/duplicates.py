"""Near-duplicates, found when they are stored: no cue tells such memories apart, and recall mixes them.

Strategy: keys are compared space by space, since a cue may fill some spaces alone: two pictures with one caption are
told apart by a picture, and by no text. A memory that was encoded is searched for in every space that it brings, in the
bank's own index; that is small beside encoding it. Callers' own vectors come faster than they can be searched for
(20,000 of 784 values took 2.4 s of a core to store, and 11.2 s where each was searched for), so of these only equal
ones are found, unless the collection refuses duplicates: few rows have the norm of another and some of its values, and
these are compared.

Rules:
- Near is a squared distance within `NEAR_DUPLICATE` in a space, as the similarity sees it.
- A memory that replaces another of its id is no duplicate of it; nor of one that its own batch replaces.
- Of one batch the first stands, and the later ones are duplicates of it.
- In a collection that refuses duplicates nothing of a duplicate is stored, and a memory that it would have replaced
  stays. From the search to the commit its stores wait for one another (`admitting`), so two requests of one moment
  cannot both be let in. What slips through: what a graph's search misses; a copy of what its own batch was to replace,
  where that replacement is itself refused.
- Where duplicates are only warned of, what several requests store at one moment may be missed, and vectors that are
  only nearly equal; the diagnostics find both.
- The largest inner product is not the nearest key, so by `dot` only equal ones are found, and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from service.app.live import LiveCollection
from service.bank import View
from service.bank.segment import Part
from service.core.diagnostics import NEAR_DUPLICATE
from service.core.similarity import normalise_rows
from service.errors import Duplicate

Memory = Mapping[str, NDArray[np.float32]]  # space → vector

NEAREST = 4  # rows of each space that are compared: of equal captions one may have the same picture as well
SAME_KEY_MAX = 16  # rows of one key that a new one is compared with: one that equals it is enough to warn
VALUES_MAX = 2**22  # values gathered at once, 16 MB


@dataclass(frozen=True)
class Alike:
    """Whom a memory is nearly the same as: `whole` in every space that it brings; `spaces`, in each of them."""

    whole: str | None = None
    spaces: Mapping[str, str] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        if self.whole is not None:
            return [f"nearly the same as memory {self.whole}: no cue will tell the two apart"]
        by_other: dict[str, list[str]] = {}
        for space, other in sorted(self.spaces.items()):
            by_other.setdefault(other, []).append(space)
        return [
            f"nearly the same as memory {other} in {' and '.join(spaces)}: a cue of that alone will not tell the two "
            "apart"
            for other, spaces in by_other.items()
        ]

    def refusal(self, live: LiveCollection) -> Duplicate | None:
        """Why the collection does not take it; None where it does."""
        refuses = live.config.duplicates
        if refuses == "warn":
            return None
        if refuses == "refuse":
            return None if self.whole is None else _refused(self.whole, "every space")
        return next((_refused(self.spaces[name], name) for name in refuses.refuse if name in self.spaces), None)


def _refused(other: str, where: str) -> Duplicate:
    return Duplicate(f"nearly the same as memory {other} in {where}, which this collection refuses")


@contextmanager
def admitting(live: LiveCollection) -> Iterator[None]:
    """Search for duplicates and commit within this block: where they are refused, others wait for its end."""
    if live.config.duplicates == "warn":
        yield
        return
    with live.admission:
        yield


@torch.inference_mode()
def find_near(live: LiveCollection, ids: Sequence[str], vectors: Sequence[Memory]) -> list[Alike]:
    """Whom each of a batch that is about to be stored is nearly the same as: the bank is searched, then the memories
    before it in the batch, but for those that are refused.
    """
    found = [Alike() for _ in ids]
    view = live.view()
    last = {memory_id: i for i, memory_id in enumerate(ids)}
    stored = frozenset(name for name in last if int(view.rows_of([name])) >= 0)
    others = view.restricted(None, stored)
    rivals: dict[int, tuple[Tensor, Tensor]] = {}  # by member: rows of the bank, nearest first; near, space by row
    for spaces, members in _groups(live, vectors, last.values()):
        for some in _chunks(members, NEAREST * len(spaces) * live.layout.dimension):
            cue = _stacked(vectors, some, spaces)
            if live.similarity == "dot" or not others.count:
                continue
            searched = [others.search({name: cue[name]}, {name: 1.0}, NEAREST).rows for name in spaces]
            rows = torch.cat(searched, dim=1)
            near = _near(live, _patterns(live, cue), view.gather(rows), spaces)
            rivals.update({i: (rows[place], near[place] & (rows[place] >= 0)) for place, i in enumerate(some)})
    beside = _near_beside(live, vectors, sorted(last.values()))
    admitted: list[int] = []
    for i in sorted(last.values()):
        spaces = tuple(name for name in live.spaces if name in vectors[i])
        names = [ids[j] for j in admitted]
        alike = _alike(spaces, names, torch.stack([beside[name][i, admitted] for name in spaces]))
        if i in rivals:
            rows, in_bank = rivals[i]
            first = _alike(spaces, [str(name) for (name,) in view.ids(rows[:, None])], in_bank)
            alike = Alike(first.whole or alike.whole, {**alike.spaces, **first.spaces})
        found[i] = alike
        if alike.refusal(live) is None:
            admitted.append(i)
    return found


@torch.inference_mode()
def find_equal(live: LiveCollection, ids: Sequence[str], vectors: Sequence[Memory]) -> list[Alike]:
    """Whom each of many memories that were just stored equals, in the bank beside it."""
    view = live.view()
    found = [Alike() for _ in ids]
    rows = view.rows_of(ids)  # -1: replaced or deleted meanwhile
    of_space = {name: _same_key(view, name, rows) for name in live.spaces if any(name in each for each in vectors)}
    for i, (row, brought) in enumerate(zip(rows.tolist(), vectors, strict=True)):
        spaces = tuple(name for name in live.spaces if name in brought)
        others = list(dict.fromkeys(r for name in spaces for r in of_space[name].get(row, ())))
        if row < 0 or not others:
            continue
        patterns = view.gather(torch.tensor([[row, *others]]))
        near = _near(live, patterns[:, 0], patterns[:, 1:], spaces)[0]
        names = [name for (name,) in view.ids(torch.tensor(others)[:, None])]
        # A row may be one that was replaced: then its id is at another row by now.
        alive = [name is not None and int(view.rows_of([name])) == at for name, at in zip(names, others, strict=True)]
        found[i] = _alike(spaces, [str(name) for name in names], near & torch.tensor(alive))
    return found


def _alike(spaces: Sequence[str], names: Sequence[str], near: Bool[Tensor, "spaces k"]) -> Alike:
    """From whether each of the others, nearest first, is near in each space."""
    if not bool(near.any()):
        return Alike()
    whole = torch.nonzero(near.all(dim=0)).flatten().tolist()
    firsts = zip(spaces, near.any(dim=1).tolist(), near.int().argmax(dim=1).tolist(), strict=True)
    return Alike(names[whole[0]] if whole else None, {space: names[first] for space, some, first in firsts if some})


def _near(
    live: LiveCollection, new: Float[Tensor, "n d"], others: Float[Tensor, "n k d"], spaces: Sequence[str]
) -> Bool[Tensor, "n spaces k"]:
    """Whether the squared distance is within that of near-duplicates, of the new key's square, space by space."""
    parts = dict(zip(live.spaces, live.blocks.slices, strict=True))
    apart = [(others[..., parts[s]] - new[:, None, parts[s]]).square().sum(dim=2) for s in spaces]
    bounds = [2 * NEAR_DUPLICATE * new[:, parts[s]].square().sum(dim=1, keepdim=True) for s in spaces]
    return torch.stack([distance <= bound for distance, bound in zip(apart, bounds, strict=True)], dim=1)


def _near_beside(
    live: LiveCollection, vectors: Sequence[Memory], members: Sequence[int]
) -> dict[str, Bool[Tensor, "n n"]]:
    """Space → which memories of a batch are near which, by their places in it."""
    count = len(vectors)
    found = {name: torch.zeros(count, count, dtype=torch.bool) for name in live.spaces}
    for name in live.spaces:
        some = [i for i in members if name in vectors[i]]
        if len(some) < 2:
            continue
        patterns = _patterns(live, _stacked(vectors, some, [name]))
        squares = patterns.square().sum(dim=1)
        # By the expanded square, which rounds, within twice the distance; then by differences.
        apart = squares[:, None] + squares - 2 * patterns @ patterns.T
        firsts, seconds = torch.nonzero(apart <= 4 * NEAR_DUPLICATE * squares[:, None], as_tuple=True)
        places = torch.tensor(some)
        for a, b in zip(torch.split(firsts, 4096), torch.split(seconds, 4096), strict=True):
            near = _near(live, patterns[a], patterns[b][:, None], [name])[:, 0, 0]
            found[name][places[a[near]], places[b[near]]] = True
        found[name].fill_diagonal_(False)
    return found


def _same_key(view: View, space: str, rows: Int[Tensor, " n"]) -> dict[int, list[int]]:
    """For those of `rows` that share their key with others: these others, some at least."""
    keys = torch.cat([_keys(part, space) for part in view.parts])
    wanted = keys[rows[rows >= 0]].sort().values
    if not len(wanted):
        return {}
    place = torch.searchsorted(wanted, keys).clamp_max(len(wanted) - 1)
    candidates = torch.nonzero(wanted[place] == keys).flatten()
    of_key: dict[float, list[int]] = {}
    for row, key in zip(candidates.tolist(), keys[candidates].tolist(), strict=True):
        of_key.setdefault(key, []).append(row)
    shared = {row: of_key.get(float(keys[row]), []) for row in rows[rows >= 0].tolist()}
    return {row: [r for r in same if r != row][:SAME_KEY_MAX] for row, same in shared.items() if len(same) > 1}


def _keys(part: Part, space: str) -> Float[Tensor, " count"]:
    """A number per row that equal rows share and others hardly do: of its norm and of values along it, since unit
    vectors all have one norm.
    """
    vectors, keys = part.segment.vectors[space], part.segment.norms[space][: part.count].double()
    last = vectors.shape[1] - 1
    for place in (0, last // 3, 2 * last // 3, last):
        keys = keys * 1.6180339887 + vectors[: part.count, place].double()
    return keys


def _groups(
    live: LiveCollection, vectors: Sequence[Memory], members: Iterable[int]
) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """The spaces that memories bring, and which of `members` bring just these."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in members:
        groups.setdefault(tuple(name for name in live.spaces if name in vectors[i]), []).append(i)
    return iter(groups.items())


def _chunks(members: Sequence[int], values_each: int) -> Iterator[Sequence[int]]:
    size = max(1, VALUES_MAX // values_each)
    return (members[start : start + size] for start in range(0, len(members), size))


def _stacked(vectors: Sequence[Memory], members: Sequence[int], spaces: Sequence[str]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([vectors[i][name] for i in members])) for name in spaces}


def _patterns(live: LiveCollection, raw: Mapping[str, Tensor]) -> Float[Tensor, "n d"]:
    """Raw vectors of some spaces as the bank's patterns are: concatenated, zero elsewhere, unit blocks under cosine."""
    count = len(next(iter(raw.values())))
    whole = torch.zeros(count, live.layout.dimension)
    for name, part in zip(live.spaces, live.blocks.slices, strict=True):
        if name in raw:
            whole[:, part] = raw[name]
    return normalise_rows(whole, live.blocks)
