"""Similarities K(ξ, x) between stored patterns and a state, over the blocks of a hetero-associative memory.

Strategy: everything that depends on the state alone (norms, block weights, which blocks are observed) is folded into
the state once; what remains is one matrix product per batch, whatever the number of blocks.

Rules:
- cosine compares a cue block by block, Σ_b w_b cos_b / Σ_b w_b over the observed blocks, and cos(0, ·) = 0: a block
  that a memory lacks is zero and adds 0.
- A state on its way is a mean of unit blocks and is compared as it is, Σ_b w_b ⟨ξ_b, x_b⟩ / Σ_b w_b (`overlaps`), not
  normalised again. Where the winning memory lacks a block, the state's block is a trace of the others; normalised, it
  would count as much as a whole block and let another memory win. So compared the energy never rises whatever the
  norms of the values (uᵀAv with A ⪰ 0), zero blocks included.
- A block under a kernel W is compared by ⟨Wξ, Wx⟩ instead of ⟨ξ, x⟩, and by cosine in the image of W at the cue
  (U-Hop, eq. 2.9, normalised). The kernel is applied to the state, WᵀWx, so stored rows stay in the input space; they
  are only scaled, ‖Wξ‖ = 1. uᵀWᵀWv is positive semi-definite: the energy never rises under it either.
- dot and neg_l2 see raw values, so their scale would mix spaces: they take exactly one block.
- -‖ξ - x‖² is summed from differences, not expanded: expansion cancels in float32, and a pattern's distance to itself
  must be 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from service.core.names import Similarity
from service.errors import InvalidRequest

# Raw values (dot, neg_l2) stay under this, so that a score over 10^5 values stays under 10^30 and its product with
# `BETA_MAX` inside float32.
MAGNITUDE_MAX = 1e12

# A unit row with ‖Wu‖ under this share of ‖W‖ lies in W's null space up to float32 rounding over a thousand values.
KERNEL_NULL = 1e-5


@dataclass(frozen=True, eq=False)
class Kernel:
    """A learned linear kernel φ(u) = Wu / ‖Wu‖ of one block; equal only to itself, so that it can name what was made
    with it. `weight` is W.
    """

    weight: Float[Tensor, "r d"]


@dataclass(frozen=True)
class Blocks:
    """How the last axis splits into spaces: block b is `widths[b]` values, compared with weight `weights[b]` and under
    `kernels[b]` (None: as it is; empty: no block has a kernel).

    Raises InvalidRequest for no block, a width < 1, a weight that is not positive and finite, several blocks with
    dot or neg_l2, or a kernel that does not fit.
    """

    widths: tuple[int, ...]
    weights: tuple[float, ...]
    similarity: Similarity = "cosine"
    kernels: tuple[Kernel | None, ...] = ()

    def __post_init__(self) -> None:
        if self.similarity not in get_args(Similarity):
            raise InvalidRequest(f"similarity is one of {', '.join(get_args(Similarity))}, not {self.similarity!r}")
        if not self.widths or len(self.widths) != len(self.weights):
            raise InvalidRequest(f"blocks need one weight each: {len(self.widths)} widths, {len(self.weights)} weights")
        if min(self.widths) < 1:
            raise InvalidRequest(f"a block holds at least one value; widths are {self.widths}")
        if not all(w > 0 and math.isfinite(w) for w in self.weights):
            raise InvalidRequest(f"block weights are positive and finite, not {self.weights}")
        if self.similarity != "cosine" and len(self.widths) != 1:
            raise InvalidRequest(f"{self.similarity} compares raw values of one space, not of {len(self.widths)}")
        if not self.kernels:
            return
        if self.similarity != "cosine" or len(self.kernels) != len(self.widths):
            raise InvalidRequest("kernels come one for each block, or None, and under cosine alone")
        for kernel, width in zip(self.kernels, self.widths, strict=True):
            if kernel is not None and (kernel.weight.ndim != 2 or kernel.weight.shape[1] != width):
                raise InvalidRequest(f"a kernel {tuple(kernel.weight.shape)} does not fit a block of {width} values")

    @property
    def dimension(self) -> int:
        """Values over all blocks."""
        return sum(self.widths)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where each block lies on the last axis."""
        return tuple(slice(end - width, end) for end, width in zip(accumulate(self.widths), self.widths, strict=True))


def normalise_rows(x: Float[Tensor, "*rows d"], blocks: Blocks) -> Float[Tensor, "*rows d"]:
    """Unit blocks for cosine, in at least float32 (a zero block stays zero); `x` itself for dot and neg_l2.

    Under a kernel W the unit is ‖Wx‖ = 1, and a block in W's null space becomes zero.
    """
    if blocks.similarity != "cosine":
        return x
    parts = zip(blocks.slices, _kernels(blocks), strict=True)
    return _concatenated([_scaled_to(1.0, x[..., part], kernel) for part, kernel in parts])


def scores(
    blocks: Blocks,
    stored: Float[Tensor, "rows d"] | Float[Tensor, "batch rows d"],
    state: Float[Tensor, "batch d"],
    observed: Bool[Tensor, "batch spaces"] | None = None,
) -> Float[Tensor, "batch rows"]:
    """K(ξ_μ, x) of every row for every state: Σ_{observed} w_b K_b / Σ_{observed} w_b.

    `stored` is shared by the batch or gathered per cue; for cosine its rows are unit per block already, and the state
    is normalised here. `observed` marks the blocks that take part (None: all); each state has at least one.
    """
    if blocks.similarity == "neg_l2":
        return -_squared_distances(stored, state)
    return _products(stored, _folded(blocks, state, observed) if blocks.similarity == "cosine" else state)


def _products(
    stored: Float[Tensor, "rows d"] | Float[Tensor, "batch rows d"], state: Float[Tensor, "batch d"]
) -> Float[Tensor, "batch rows"]:
    query = state.to(stored.dtype)
    # The row vector goes first: a batch of matrix times column vector takes a path fourteen times slower on a CPU.
    product = query @ stored.T if stored.ndim == 2 else torch.bmm(query.unsqueeze(1), stored.mT).squeeze(1)
    return product.to(torch.promote_types(product.dtype, torch.float32))


def overlaps(
    blocks: Blocks,
    stored: Float[Tensor, "rows d"] | Float[Tensor, "batch rows d"],
    state: Float[Tensor, "batch d"],
) -> Float[Tensor, "batch rows"]:
    """K(ξ_μ, x) of every row for states that the dynamics has reached: as `scores`, with no norm taken of the state."""
    if blocks.similarity == "neg_l2":
        return -_squared_distances(stored, state)
    return _products(stored, _carrying(blocks, state if len(blocks.widths) == 1 else state * _shares(blocks, state)))


def self_similarity(
    blocks: Blocks, state: Float[Tensor, "batch d"], observed: Bool[Tensor, "batch spaces"] | None = None
) -> Float[Tensor, " batch"]:
    """K(x, x) as `overlaps` has it; over the observed blocks alone if these are given. 0 for neg_l2."""
    if blocks.similarity == "neg_l2":
        return state.new_zeros(state.shape[0])
    squares = state * _carrying(blocks, state) if blocks.kernels else state.square()
    if len(blocks.widths) == 1:
        return squares.sum(-1)
    whole = squares @ _shares(blocks, state)
    return whole if observed is None else whole / _observed_share(blocks, observed).to(whole.dtype)


def spread(per_block: Bool[Tensor, "batch spaces"], blocks: Blocks) -> Bool[Tensor, "batch d"]:
    """A mark per block, repeated for the values of that block."""
    marks = torch.split(per_block, 1, dim=-1)
    return _concatenated([mark.expand(-1, width) for mark, width in zip(marks, blocks.widths, strict=True)])


def _folded(
    blocks: Blocks, state: Float[Tensor, "batch d"], observed: Bool[Tensor, "batch spaces"] | None
) -> Float[Tensor, "batch d"]:
    """The state with norms and weights divided in, so that its dot product with unit rows is the cosine score."""
    if observed is None:
        total = sum(blocks.weights)
        norms: list[float | Tensor] = [weight / total for weight in blocks.weights]
    else:
        weights = observed * torch.tensor(blocks.weights, dtype=torch.float64, device=state.device)
        norms = list(torch.split(weights / weights.sum(-1, keepdim=True), 1, dim=-1))
    parts = zip(norms, blocks.slices, _kernels(blocks), strict=True)
    return _carrying(blocks, _concatenated([_scaled_to(norm, state[:, part], kernel) for norm, part, kernel in parts]))


def _kernels(blocks: Blocks) -> tuple[Kernel | None, ...]:
    return blocks.kernels or (None,) * len(blocks.widths)


def _carrying(blocks: Blocks, state: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
    """WᵀWx on each block under a kernel: what a stored row is multiplied with, since ⟨Wξ, Wx⟩ = ⟨ξ, WᵀWx⟩."""
    if not blocks.kernels:
        return state
    parts = [state[:, part] for part in blocks.slices]
    carried = [
        part if kernel is None else _image(part, kernel) @ kernel.weight.to(part.dtype)
        for part, kernel in zip(parts, blocks.kernels, strict=True)
    ]
    return _concatenated(carried)


def _image(x: Float[Tensor, "*rows d"], kernel: Kernel) -> Float[Tensor, "*rows r"]:
    """Wx."""
    return x @ kernel.weight.to(x.dtype).T


def _shares(blocks: Blocks, like: Tensor) -> Float[Tensor, " d"]:
    """w_b / Σ w at every value of block b."""
    return _shares_of(blocks.weights, blocks.widths, like.dtype, like.device)


@lru_cache(maxsize=256)
def _shares_of(
    weights: tuple[float, ...], widths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " d"]:
    total = sum(weights)
    pairs = zip(weights, widths, strict=True)
    return torch.cat([torch.full((width,), weight / total, dtype=dtype, device=device) for weight, width in pairs])


def _observed_share(blocks: Blocks, observed: Bool[Tensor, "batch spaces"]) -> Float[Tensor, " batch"]:
    weights = torch.tensor(blocks.weights, dtype=torch.float64, device=observed.device)
    return (observed * weights).sum(-1) / weights.sum()


def _scaled_to(norm: float | Tensor, x: Float[Tensor, "*rows d"], kernel: Kernel | None = None) -> Tensor:
    # In float64 the squares of float32 values neither overflow (1e30) nor vanish (1e-30). A zero row divides by
    # `tiny` and stays zero.
    own: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    scaled: Tensor = x / (own.clamp_min(torch.finfo(torch.float64).tiny) / (norm if kernel is None else 1.0))
    unit = scaled.to(torch.promote_types(x.dtype, torch.float32))
    if kernel is None:
        return unit
    # Unit first, so that Wx is as accurate for a row of any size. A row that W all but annihilates is noise of its
    # rounding: it has no direction left.
    length = torch.linalg.vector_norm(_image(unit, kernel), dim=-1, keepdim=True, dtype=torch.float64)
    null = length <= KERNEL_NULL * torch.linalg.matrix_norm(kernel.weight).double()
    rescaled: Tensor = unit * torch.where(null, 0.0, norm / length).to(unit.dtype)
    return rescaled


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _squared_distances(
    stored: Float[Tensor, "rows d"] | Float[Tensor, "batch rows d"], state: Float[Tensor, "batch d"]
) -> Float[Tensor, "batch rows"]:
    dtype = torch.promote_types(stored.dtype, torch.float32)
    stored, state = stored.to(dtype), state.to(dtype)
    if stored.ndim == 3:
        return (stored - state.unsqueeze(1)).square().sum(-1)
    # cdist holds no (batch, rows, d) difference in memory, which a shared matrix of many rows could not afford.
    return torch.cdist(state, stored, compute_mode="donot_use_mm_for_euclid_dist").square()
