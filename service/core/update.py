"""One step of recall.

    x' = Ξᵀ p        (Ramsauer et al. 2021, eq. 3)

A step_size under 1 goes part of the way there, and lowers the energy all the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def association(
    stored: Float[Tensor, "rows d"] | Float[Tensor, "batch rows d"], weights: Float[Tensor, "batch rows"]
) -> Float[Tensor, "batch d"]:
    """Ξᵀ p: the stored patterns averaged by their weights."""
    p = weights.to(stored.dtype)
    mean = p @ stored if stored.ndim == 2 else torch.bmm(p.unsqueeze(1), stored).squeeze(1)
    return mean.to(weights.dtype)


def update(
    stored: Float[Tensor, "rows d"] | Float[Tensor, "batch rows d"],
    state: Float[Tensor, "batch d"],
    weights: Float[Tensor, "batch rows"],
    clamped: Bool[Tensor, "batch d"] | None = None,
) -> Float[Tensor, "batch d"]:
    """The state after one whole step; values marked in `clamped` keep what they are."""
    target = association(stored, weights)
    return target if clamped is None else torch.where(clamped, state, target)
