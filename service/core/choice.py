"""A calibrated choice among similarities, cue by cue: none of them finds the memory behind every kind of cue.

Each similarity searches; what its two nearest memories look like is evidence of whether the nearer one is the cue's
own. A logistic model per similarity, fitted on cues whose memory is known, turns the evidence of all of them into the
probability that this one is right; the largest wins.

The evidence of a similarity is log d₁ and log(d₂ - d₁), d₁ ≤ d₂ the distances of its first and second memory (their
ratio is Lowe's test: "Distinctive Image Features from Scale-Invariant Keypoints", 2004, section 7.1), and whether each
other similarity names the same memory.

Rules:
- Everything is float64, and a fit has one answer: the loss is strictly convex.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.errors import InvalidRequest

# The least distance told from zero: float32 rounding of a cosine over a thousand values. log of it is the largest
# evidence there is, of an exact copy.
DISTANCE_MIN = 1e-6

# The weight of the squared coefficients: with a few hundred cues, enough to keep the model of a similarity that is
# always right finite, too little to move the others.
RIDGE = 1e-2

NEWTON_STEPS_MAX = 100  # some ten are needed; a loss that is convex and smooth leaves no other way to go wrong


@dataclass(frozen=True)
class Choice:
    """A fitted choice among k similarities: per similarity the unit of its distances, per feature mean and scale, per
    similarity the coefficients (the last one is the intercept). Plain numbers, so that it can be written down.
    """

    units: tuple[float, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]

    def probabilities(
        self, nearest: Int[Tensor, "n k"], first: Float[Tensor, "n k"], second: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n k"]:
        """P(similarity j's first memory is the cue's own), for the arguments of `fit`."""
        k, units = nearest.shape[1], _tensor(self.units)
        first, second = first / units, second / units
        found = [
            (_with_one(self._standardised(_evidence(nearest, first, second, j))) @ _tensor(self.coefficients[j]))
            for j in range(k)
        ]
        return torch.sigmoid(torch.stack(found, dim=1))

    def _standardised(self, evidence: Tensor) -> Tensor:
        return (evidence - _tensor(self.mean)) / _tensor(self.scale)


def fit(
    nearest: Int[Tensor, "n k"],
    first: Float[Tensor, "n k"],
    second: Float[Tensor, "n k"],
    own: Int[Tensor, " n"],
) -> Choice:
    """Fit the choice among k similarities on n cues with their own memories.

    nearest: the first memory by each similarity; first, second: the distances of its first and second memory (1 - K
    for cosine, -K for -‖·‖²), second may be +∞ where there is no other; own: the memory each cue was made from.
    Raises InvalidRequest for no cues or a NaN.
    """
    n, k = nearest.shape
    if n == 0 or first.isnan().any() or second.isnan().any():
        raise InvalidRequest("a choice is fitted on one cue at least, and on numbers")
    # Distances of raw values may be of any size; cosine's are about 1.
    finite = second.double().masked_fill(~second.isfinite(), torch.nan)
    units = finite.nanmedian(dim=0).values.nan_to_num(1.0).clamp_min(torch.finfo(torch.float32).tiny)
    first, second = first / units, second / units
    # Agreement comes after the distances, so its mean and scale are those of a 0 or 1: it is left as it is.
    distances = _distances(first, second)
    mean = torch.cat([distances.mean(0), distances.new_zeros(k)])
    scale = torch.cat([distances.std(0, correction=0).clamp_min(1e-6), distances.new_ones(k)])
    coefficients = []
    for j in range(k):
        features = _with_one((_evidence(nearest, first, second, j) - mean) / scale)
        coefficients.append(tuple(_logistic(features, (nearest[:, j] == own).double()).tolist()))
    return Choice(tuple(units.tolist()), tuple(mean.tolist()), tuple(scale.tolist()), tuple(coefficients))


def _evidence(nearest: Tensor, first: Tensor, second: Tensor, j: int) -> Float[Tensor, "n features"]:
    agree = (nearest == nearest[:, j : j + 1]).double()
    agree[:, j] = 0.0  # every similarity agrees with itself
    return torch.cat([_distances(first, second), agree], dim=1)


def _distances(first: Tensor, second: Tensor) -> Float[Tensor, "n features"]:
    near = first.double().clamp_min(DISTANCE_MIN)
    # A memory alone is as far from its rival as the scale of distances goes.
    gap = (second.double() - first.double()).clamp(DISTANCE_MIN, 1.0 / DISTANCE_MIN)
    return torch.cat([near.log(), gap.log()], dim=1)


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(features.shape[0], 1)], dim=1)


def _logistic(features: Float[Tensor, "n f"], label: Float[Tensor, " n"]) -> Float[Tensor, " f"]:
    """argmin_w mean log(1 + exp(-±⟨w, x⟩)) + RIDGE/2 · ‖w‖² / n, by Newton's method with halved steps."""
    n, count = features.shape
    ridge = RIDGE * torch.eye(count, dtype=features.dtype)

    def loss(w: Tensor) -> Tensor:
        z = features @ w
        return torch.nn.functional.softplus(z).sum() - label @ z + 0.5 * w @ ridge @ w

    weights = features.new_zeros(count)
    value = loss(weights)
    for _ in range(NEWTON_STEPS_MAX):
        p = torch.sigmoid(features @ weights)
        gradient = features.T @ (p - label) + ridge @ weights
        hessian = features.T @ (features * (p * (1 - p)).unsqueeze(1)) + ridge
        step = torch.linalg.solve(hessian, gradient)
        length = 1.0
        while loss(weights - length * step) > value and length > 1e-8:
            length /= 2
        weights = weights - length * step
        reached = loss(weights)
        if value - reached <= 1e-10 * n:
            break
        value = reached
    return weights


def _tensor(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
