"""Cues for U-Hop's tables: stored images, damaged. Each takes patterns (n, d) in [0, 1] and draws from a generator.

Rules:
- Randomness comes from the generator alone: the same state gives the same cues.
- What the paper's text and its published code do differently are two cues, not one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Corruption = Callable[[Tensor, torch.Generator], Tensor]

# The paper's Table 4.
NOISE_LEVELS = (0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 1.0, 1.2, 1.4, 2.0)


def masked(patterns: Tensor, draw: torch.Generator) -> Tensor:
    """Half of the values, drawn for each image alone, set to 0 (U-Hop, appendix F.2)."""
    return patterns * (torch.rand(patterns.shape, generator=draw) < 0.5)


def masked_doubled(patterns: Tensor, draw: torch.Generator) -> Tensor:
    """As `masked`, the values that stay doubled: the published code masks by dropout, which keeps the mean."""
    return 2 * masked(patterns, draw)


def right_half_missing(side: int) -> Corruption:
    """The right half of images of `side` columns set to 0. Values run row by row, a pixel's colours together."""

    def corrupt(patterns: Tensor, draw: torch.Generator) -> Tensor:
        del draw  # nothing is drawn: every image loses the same half
        count, values = patterns.shape
        damaged = patterns.reshape(count, side, side, values // side**2).clone()
        damaged[:, :, side // 2 :] = 0
        return damaged.reshape(count, values)

    return corrupt


def noisy(sigma: float) -> Corruption:
    """σ·N(0, 1) added to every value."""

    def corrupt(patterns: Tensor, draw: torch.Generator) -> Tensor:
        return patterns + sigma * torch.randn(patterns.shape, generator=draw)

    return corrupt


def noisy_folded(sigma: float) -> Corruption:
    """|ξ + σ·N(0, 1)| cut off at 1: the published code's noise. (The paper's text varies "the mean", its appendix "the
    norm" of the noise.)
    """

    def corrupt(patterns: Tensor, draw: torch.Generator) -> Tensor:
        return noisy(sigma)(patterns, draw).abs().clamp_max(1.0)

    return corrupt
