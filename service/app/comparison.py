"""How cues are compared with memories: by the collection's own similarity, under learned kernels, or by the distance of
raw values.

A comparison knows what the bank must be asked, and on which blocks the dynamics then runs; everything after the search
is the same whatever compared.

- `own`: the collection's similarity.
- `kernel`: cosine under the kernels that are active in the cue's spaces, plain cosine in the others.
- `neg_l2`: −‖x − ξ‖² over the raw values of the cue's one space.
- `observed_neg_l2`: the same over the values that the cue shows, the others being 0 ("says nothing"). A part of a
  memory is at distance 0 from it, which no comparison of the whole sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from service.app.cues import whole_state
from service.app.gate_schemas import ComparisonName
from service.bank import Found, View
from service.core.similarity import Blocks, Kernel, scores

if TYPE_CHECKING:
    from service.app.live import LiveCollection


SCORE_ERROR = 1e-6  # float32 rounding of a cosine over some thousand values, or of a distance as a share of ‖ξ‖²


@dataclass(frozen=True, eq=False)
class ActiveKernel:
    """A kernel in use; `number` counts the kernels of its space."""

    space: str
    number: int
    kernel: Kernel

    @property
    def id(self) -> str:
        return f"{self.space}-{self.number}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """`blocks`: what the dynamics runs on; `part`: where they lie among the collection's, None for all of them.

    `kernels` by space; `raw`: values are compared as they were stored.
    """

    name: ComparisonName
    blocks: Blocks
    part: slice | None = None
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    raw: bool = False

    def search(
        self, view: View, cue: Mapping[str, Tensor], weights: Mapping[str, float], limit: int, *, exact: bool = False,
        exclude: Tensor | None = None,
    ) -> Found:  # fmt: skip
        """As `View.search`."""
        observed = self.name == "observed_neg_l2"
        return view.search(
            cue, weights, limit, exact, exclude, kernels=self.kernels, raw=self.raw, observed=observed
        )  # fmt: skip

    def gather(self, view: View, rows: Tensor) -> Tensor:
        """(batch, k) rows → the patterns that the dynamics runs on, (batch, k, d)."""
        patterns = view.gather(rows, self.kernels, self.raw)
        return patterns if self.part is None else patterns[..., self.part]

    def matrix(self, view: View) -> tuple[Tensor, Tensor]:
        """Every memory's pattern (n, d), and the rows they are. Raises as `View.matrix`."""
        patterns, rows = view.matrix(self.kernels, self.raw)
        return (patterns if self.part is None else patterns[..., self.part]), rows

    def state(self, live: LiveCollection, cue: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The state that the dynamics starts from, and which blocks are observed (None: all)."""
        if self.raw:
            return next(iter(cue.values())), None
        return whole_state(live, cue)

    def scores(self, stored: Tensor, state: Tensor, observed: Tensor | None) -> Tensor:
        """(batch, n) of patterns (n, d), or gathered (batch, n, d), to cues as `state` gives them."""
        if self.name != "observed_neg_l2":
            return scores(self.blocks, stored, state, observed)
        shown = (state != 0).to(state.dtype)
        if stored.ndim == 3:
            return -((stored - state[:, None]) * shown[:, None]).square().sum(dim=2)
        sizes = shown @ stored.square().T - 2.0 * state @ stored.T + state.square().sum(dim=1, keepdim=True)
        return -sizes.clamp_min(0.0)

    def length(self, difference: Tensor) -> Tensor:
        """How far apart two states are, (batch, d) → (batch,), as `norm_max` measures patterns."""
        parts = zip(self.blocks.slices, self.blocks.kernels or (None,) * len(self.blocks.widths), strict=True)
        images = [difference[:, part] if k is None else difference[:, part] @ k.weight.T for part, k in parts]
        length: Tensor = torch.linalg.vector_norm(torch.cat(images, dim=1), dim=1)
        return length

    def norm_max(self, view: View) -> float:
        """max‖ξ‖ as the comparison measures it: 1 for each block that it normalises."""
        if self.blocks.similarity == "cosine":
            return math.sqrt(len(self.blocks.widths))
        return view.norm_bound(raw=self.raw)

    def distances(self, found: Tensor) -> Tensor:
        """Scores as distances from 0 up: 1 - cos, or ‖x - ξ‖². No row is infinitely far."""
        return 1.0 - found if self.blocks.similarity == "cosine" else -found

    def reweighted(self, weights: tuple[float, ...]) -> Comparison:
        """With other weights of the blocks."""
        return replace(self, blocks=replace(self.blocks, weights=weights))


def own(live: LiveCollection) -> Comparison:
    return Comparison("own", live.blocks)


def comparisons(
    live: LiveCollection, kernels: Mapping[str, Kernel], spaces: tuple[str, ...], masked: bool, raw: bool = False
) -> tuple[Comparison, ...]:
    """What cues that fill `spaces` can be compared by, `own` first. Where no kernel is in these spaces there is nothing
    else, but the distances of raw values if `raw` asks for them.

    Raw values are compared of one space alone. What a cue shows is told apart where a mask says so, or where the
    caller's vectors are 0.
    """
    used = {name: kernels[name] for name in spaces if name in kernels}
    found = [own(live)]
    if used:
        under = Blocks(
            live.blocks.widths, live.blocks.weights, live.similarity, tuple(used.get(name) for name in live.spaces)
        )
        found.append(Comparison("kernel", under, kernels=used))
    if len(spaces) == 1 and (used or raw):
        position = list(live.spaces).index(spaces[0])
        alone = Blocks((live.blocks.widths[position],), (1.0,), "neg_l2")
        part = None if len(live.spaces) == 1 else live.blocks.slices[position]
        found.append(Comparison("neg_l2", alone, part, raw=True))
        if masked or live.spaces[spaces[0]].encoder is None:
            found.append(Comparison("observed_neg_l2", alone, part, raw=True))
    return tuple(found)
