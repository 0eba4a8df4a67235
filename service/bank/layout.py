"""What a bank is told: the spaces its memories have, and the rows that are written to it.

Rules:
- Vectors come in raw. Normalisation belongs to the similarity: under `cosine` a bank keeps unit rows and their norms,
  under `dot` and `neg_l2` the rows as they came (and their norms too).
- A zero row says that the memory lacks the space: under `cosine` it adds 0 to a score, and a memory that lacks every
  space of a cue is no candidate.
- `dot` and `neg_l2` see raw values, whose sizes differ from space to space; so a bank with one of them has one space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from service.core.names import Similarity
from service.errors import InvalidRequest, InvalidVector, ItemError, UnknownSpace, WrongDimension

NEVER: Final = int(np.iinfo(np.int64).max)
"""When a memory expires that does not: after any moment, in microseconds since 1970."""


@dataclass(frozen=True)
class SpaceLayout:
    name: str
    dimension: int


@dataclass(frozen=True)
class Layout:
    """The spaces in their fixed order, which is the order of concatenated blocks. Raises InvalidRequest."""

    spaces: tuple[SpaceLayout, ...]
    similarity: Similarity = "cosine"

    def __post_init__(self) -> None:
        if not self.spaces:
            raise InvalidRequest("A bank needs at least one space.")
        if len(set(self.names)) < len(self.spaces):
            raise InvalidRequest(f"Space names must differ: {', '.join(self.names)}.")
        if any(space.dimension < 1 for space in self.spaces):
            raise InvalidRequest("A space's dimension must be at least 1.")
        if self.similarity != "cosine" and len(self.spaces) > 1:
            raise InvalidRequest(f"Similarity {self.similarity!r} compares raw values and takes one space.")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(space.name for space in self.spaces)

    @property
    def dimension(self) -> int:
        """D, the length of a memory's concatenated blocks."""
        return sum(space.dimension for space in self.spaces)

    def space(self, name: str) -> SpaceLayout:
        for space in self.spaces:
            if space.name == name:
                return space
        raise UnknownSpace(f"There is no space {name!r}; there are: {', '.join(self.names)}.")


@dataclass(frozen=True, eq=False)
class Rows:
    """n memories to write, in order; of rows with one id the last counts.

    `vectors[space]` is (n, d_s) float32, raw, a zero row where the memory lacks the space; every space of the layout is
    there. `payloads` are JSON bytes or None. `expires` (n,) says when each expires, in microseconds since
    1970 or NEVER; None: none does.
    """

    ids: Sequence[str]
    vectors: Mapping[str, NDArray[np.float32]]
    payloads: Sequence[bytes | None]
    expires: NDArray[np.int64] | None = None

    def only(self, places: Sequence[int]) -> Rows:
        """Some of them, by their places."""
        chosen = list(places)
        return Rows(
            [self.ids[at] for at in chosen],
            {name: block[chosen] for name, block in self.vectors.items()},
            [self.payloads[at] for at in chosen],
            None if self.expires is None else self.expires[chosen],
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows as a segment stores them: ids differ; `vectors` (n, d_s) are unit rows under cosine, raw otherwise; `norms`
    (n,); `expires` (n,) int64, or None."""

    ids: list[str]
    vectors: dict[str, Tensor]
    norms: dict[str, Tensor]
    payloads: list[bytes | None]
    expires: Tensor | None = None


def unit_rows(raw: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Unit rows and norms; a zero row stays zero, with norm 0.

    Norms are taken in float64: squares of float32 values neither overflow nor vanish there.
    """
    norms = torch.linalg.vector_norm(raw, dim=1, dtype=torch.float64)
    unit = raw / norms.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return unit.to(torch.float32), norms.to(torch.float32)


def prepare(layout: Layout, rows: Rows) -> Prepared:
    """Check rows against the layout and bring them to their stored form.

    Raises UnknownSpace, WrongDimension (shapes), InvalidVector (a NaN, an infinity, or a norm beyond float32).
    """
    n = len(rows.ids)
    if len(rows.payloads) != n:
        raise InvalidRequest(f"{n} ids came with {len(rows.payloads)} payloads.")
    for name in rows.vectors:
        layout.space(name)
    last = {memory_id: row for row, memory_id in enumerate(rows.ids)}
    kept = None if len(last) == n else torch.tensor(list(last.values()))
    vectors: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for space in layout.spaces:
        raw = rows.vectors.get(space.name)
        if raw is None or raw.shape != (n, space.dimension):
            found = "nothing" if raw is None else raw.shape
            raise WrongDimension(f"Space {space.name!r} takes {(n, space.dimension)}, found {found}.")
        block = torch.tensor(raw, dtype=torch.float32)  # a copy: the caller may reuse its array
        unit, norm = unit_rows(block)
        if not bool(torch.isfinite(norm).all()):
            bad = torch.nonzero(~torch.isfinite(norm)).flatten().tolist()
            detail = f"Space {space.name!r}: a value or the norm is not finite in float32."
            raise InvalidVector(detail, errors=tuple(ItemError(item, InvalidVector.code, detail) for item in bad))
        stored = unit if layout.similarity == "cosine" else block
        vectors[space.name] = stored if kept is None else stored[kept]
        norms[space.name] = norm if kept is None else norm[kept]
    expires = None
    if rows.expires is not None and int(rows.expires.min(initial=NEVER)) != NEVER:
        expires = torch.tensor(rows.expires)
        expires = expires if kept is None else expires[kept]
    return Prepared(list(last), vectors, norms, [rows.payloads[row] for row in last.values()], expires)
