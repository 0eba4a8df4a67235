"""Near-duplicates, found when they are stored: no cue tells such memories apart, and recall mixes them.

Strategy: a memory that was encoded is searched for, by the spaces that it brings; that is small beside encoding it.
Callers' own vectors come faster than they can be searched for (over 60,000 of 784 values the searches took five times
as long as storing them), so of these only equal ones are found: few rows have the norm of another and some of its
values, and these are compared.

Rules:
- A memory that replaces another of its id is no duplicate of it.
- What several requests store at one moment may be missed among encoded memories; the diagnostics find it, and vectors
  that are only nearly equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from service.app.live import LiveCollection
from service.bank.segment import Part
from service.core.diagnostics import NEAR_DUPLICATE
from service.core.similarity import normalise_rows

Memory = Mapping[str, NDArray[np.float32]]  # space → vector

SAME_KEY_MAX = 16  # rows of one key that a new one is compared with: one that equals it is enough to warn


def warn_encoded(live: LiveCollection, ids: Sequence[str], vectors: Sequence[Memory]) -> list[list[str]]:
    """Warnings for each of a few memories that are about to be stored: the bank and one another are searched."""
    view = live.bank.view()
    warnings: list[list[str]] = [[] for _ in ids]
    for spaces, members in _groups(live, vectors):
        cue = {name: torch.from_numpy(np.stack([vectors[i][name] for i in members])) for name in spaces}
        weights = live.weights_of(spaces)
        rows = view.search(cue, weights, 1, exclude=view.rows_of([ids[i] for i in members])).rows
        names = [name for (name,) in view.ids(rows)]
        new = torch.zeros(len(members), live.layout.dimension)
        for name, part in zip(live.spaces, live.blocks.slices, strict=True):
            if name in cue:
                new[:, part] = cue[name]
        own = _compared(live, normalise_rows(new, live.blocks), spaces)
        found = _near(own, _compared(live, view.gather(rows)[:, 0], spaces))
        for place, i in enumerate(members):
            rival = names[place] if found[place] else None
            if rival is None and place:
                earlier = torch.nonzero(_near(own[place : place + 1], own[:place])).flatten().tolist()
                rival = next((ids[members[j]] for j in earlier if ids[members[j]] != ids[i]), None)
            if rival is not None:
                warnings[i].append(_warning(rival))
    return warnings


def warn_equal(live: LiveCollection, ids: Sequence[str], vectors: Sequence[Memory]) -> list[list[str]]:
    """Warnings for each of many memories that were just stored, where an equal one is in the bank beside it."""
    view = live.bank.view()
    warnings: list[list[str]] = [[] for _ in ids]
    for spaces, members in _groups(live, vectors):
        rows = view.rows_of([ids[i] for i in members])
        keys = torch.cat([_keys(part, spaces[0]) for part in view.parts])
        wanted = keys[rows[rows >= 0]].sort().values  # -1: replaced or deleted meanwhile
        if not len(wanted):
            continue
        place = torch.searchsorted(wanted, keys).clamp_max(len(wanted) - 1)
        candidates = torch.nonzero(wanted[place] == keys).flatten()
        of_key: dict[float, list[int]] = {}
        for row, key in zip(candidates.tolist(), keys[candidates].tolist(), strict=True):
            of_key.setdefault(key, []).append(row)
        for i, row in zip(members, rows.tolist(), strict=True):
            others = [] if row < 0 else [other for other in of_key[float(keys[row])] if other != row]
            if not others:
                continue
            compared = torch.tensor([row, *others[:SAME_KEY_MAX]])
            patterns = _compared(live, view.gather(compared[None])[0], spaces)
            near = compared[1:][_near(patterns[:1], patterns[1:])]
            # A row may be one that was replaced: then its id is at another row by now.
            found = zip(view.ids(near[:, None]), near.tolist(), strict=True)
            alive = [name for (name,), at in found if name is not None and int(view.rows_of([name])) == at]
            if alive:
                warnings[i].append(_warning(alive[0]))
    return warnings


def _keys(part: Part, space: str) -> Float[Tensor, " count"]:
    """A number per row that equal rows share and others hardly do: of its norm and of values along it, since unit
    vectors all have one norm.
    """
    vectors, keys = part.segment.vectors[space], part.segment.norms[space][: part.count].double()
    last = vectors.shape[1] - 1
    for place in (0, last // 3, 2 * last // 3, last):
        keys = keys * 1.6180339887 + vectors[: part.count, place].double()
    return keys


def _groups(live: LiveCollection, vectors: Sequence[Memory]) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """The spaces that memories bring, and which memories bring just these."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, filled in enumerate(vectors):
        groups.setdefault(tuple(name for name in live.spaces if name in filled), []).append(i)
    return iter(groups.items())


def _compared(
    live: LiveCollection, patterns: Float[Tensor, "n d"], spaces: Sequence[str]
) -> Float[Tensor, "n d_spaces"]:
    """The blocks of `spaces`, scaled so that squared distances add up by the spaces' weights."""
    total = sum(live.weights_of(spaces).values())
    return torch.cat(
        [
            patterns[:, part] * math.sqrt(live.spaces[name].weight / total)
            for name, part in zip(live.spaces, live.blocks.slices, strict=True)
            if name in spaces
        ],
        dim=1,
    )


def _near(new: Float[Tensor, "n d"], stored: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Whether the squared distance is within that of near-duplicates, of the new pattern's square."""
    return (new - stored).square().sum(1) <= 2 * NEAR_DUPLICATE * new.square().sum(1)


def _warning(memory_id: str) -> str:
    return f"nearly the same as memory {memory_id}: no cue will tell the two apart"
