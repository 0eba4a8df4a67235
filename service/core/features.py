"""Recall through features: the association weights are products φ(x)·φ(ξ_μ), and the rows are summed once for all cues.

    T(x) = Σ_μ ⟨φ(x), φ(ξ_μ)⟩ ξ_μ / Σ_μ ⟨φ(x), φ(ξ_μ)⟩ = φ(x) S / φ(x)·z,   S = Σ_μ φ(ξ_μ) ξ_μᵀ,   z = Σ_μ φ(ξ_μ)

    linear              φ(x) = elu(x) + 1                           (Hu et al., "Nonparametric Modern Hopfield Models",
                                                                    2024, Proposition C.1; Katharopoulos et al. 2020)
    positive random     φ(x) = exp(ωᵀu - ‖u‖²/2) / √m, u = √β x     (Proposition C.3; FAVOR+, Choromanski et al.,
                                                                    "Rethinking Attention with Performers", 2021)

Strategy: S and z cost O(N) once, and a step then costs the same whatever N is. Features are kept as logarithms and each
one is scaled by its largest value over the rows, so the sums neither overflow nor vanish: at every cue the denominator
is at least 1 before φ(x) is scaled.

Rules:
- Keys are scaled by √β, values are not.
- Weights are positive and sum to 1, but belong to no energy: a step may raise any.
- The mean of ⟨φ(x), φ(ξ)⟩ over random features is exp(β⟨x, ξ⟩), its relative variance (exp(β‖x + ξ‖²) - 1)/m: above
  β ≈ 1 at unit norm hardly any m is enough, and the recall resembles the dense one by nothing but its formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from service.core.retrieve import BETA_MAX
from service.core.similarity import MAGNITUDE_MAX
from service.errors import InvalidRequest

LogFeatures = Callable[[Tensor], Tensor]  # (n, d) → (n, m), log φ

# 65,536 features of 784 values are 200 MB of S in float32, more than the rows that they stand for.
FEATURES_MAX = 65_536

# Rows whose features are held at once: 32 MB in float32 at 1,024 features.
_CHUNK_ROWS = 8_192


def linear(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """log φ of φ = elu + 1, which is 1 + x for x ≥ 0 and exp(x) under it: as many features as values."""
    return torch.where(x > 0, x.clamp_min(0.0).log1p(), x)


@dataclass(frozen=True, eq=False)
class PositiveRandom:
    """log φ of positive random features: ω the rows of `projection`, x scaled by √β."""

    projection: Float[Tensor, "m d"]
    beta: float

    def __post_init__(self) -> None:
        if not 0 < self.beta <= BETA_MAX:
            raise InvalidRequest(f"beta is positive, at most {BETA_MAX:g}, not {self.beta}")

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        scaled = x * math.sqrt(self.beta)
        lowered = scaled.square().sum(-1, keepdim=True) / 2.0 + math.log(self.projection.shape[0]) / 2.0
        return scaled @ self.projection.T.to(scaled.dtype) - lowered


def draw(
    features: int,
    dimension: int,
    generator: torch.Generator,
    *,
    orthogonal: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "m d"]:
    """Directions ω ~ N(0, I) for random features.

    orthogonal: every `dimension` of them are at right angles, with the lengths of independent draws: each alone is
    still N(0, I), and the estimate varies less (Choromanski et al. 2021, Theorem 2). Otherwise all are independent.
    Raises InvalidRequest for counts out of range.
    """
    if not 1 <= features <= FEATURES_MAX or dimension < 1:
        raise InvalidRequest(
            f"features number from 1 to {FEATURES_MAX}, of one value or more; asked for are {features} of {dimension}"
        )

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=generator.device)

    independent = gaussian(features, dimension)
    if not orthogonal:
        return independent.to(dtype)
    turned, triangle = torch.linalg.qr(gaussian(math.ceil(features / dimension), dimension, dimension))
    # Q is uniform over rotations once R has a positive diagonal (Mezzadri, "How to Generate Random Matrices", 2007).
    turned = turned * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    length: Tensor = torch.linalg.vector_norm(independent, dim=-1, keepdim=True)
    directions: Tensor = turned.flatten(0, 1)[:features] * length
    return directions.to(dtype)


@dataclass(frozen=True, eq=False)
class FeatureMemory:
    """What all rows come to. With c = log_scale, the largest log φ of each feature over the rows:
    values: Σ_μ φ(ξ_μ) e^-c ξ_μᵀ; mass: Σ_μ φ(ξ_μ) e^-c, from 1 to N.
    """

    log_features: LogFeatures
    log_scale: Float[Tensor, " m"]
    values: Float[Tensor, "m d"]
    mass: Float[Tensor, " m"]

    def step(self, state: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """T(x) of each state, a mean of the rows; O(m d) whatever their number. Raises InvalidRequest for values that
        are not numbers or over MAGNITUDE_MAX.
        """
        _check_values(state)
        share = torch.softmax(self.log_features(state) + self.log_scale, dim=-1)
        return (share @ self.values) / (share @ self.mass).unsqueeze(-1)


def memorise(stored: Float[Tensor, "rows d"], log_features: LogFeatures) -> FeatureMemory:
    """Sum the rows by their features. Raises InvalidRequest for no rows and for values that are not numbers or over
    MAGNITUDE_MAX.
    """
    if stored.shape[0] == 0:
        raise InvalidRequest("a memory of features is made of at least one pattern")
    _check_values(stored)
    stored = stored.to(torch.promote_types(stored.dtype, torch.float32))
    memory: FeatureMemory | None = None
    for rows in torch.split(stored, _CHUNK_ROWS):
        keys = log_features(rows)
        scale = keys.amax(0) if memory is None else torch.maximum(keys.amax(0), memory.log_scale)
        share = torch.exp(keys - scale)
        values, mass = share.T @ rows, share.sum(0)
        if memory is not None:
            kept = torch.exp(memory.log_scale - scale)
            values, mass = values + memory.values * kept.unsqueeze(-1), mass + memory.mass * kept
        memory = FeatureMemory(log_features, scale, values, mass)
    assert memory is not None
    return memory


def feature_weights(
    stored: Float[Tensor, "rows d"], state: Float[Tensor, "batch d"], log_features: LogFeatures
) -> Float[Tensor, "batch rows"]:
    """The association weights that `FeatureMemory.step` never forms: ⟨φ(x), φ(ξ_μ)⟩ over their sum. O(N m)."""
    keys = log_features(stored)
    scale = keys.amax(0)
    products = torch.softmax(log_features(state) + scale, dim=-1) @ torch.exp(keys - scale).T
    return products / products.sum(-1, keepdim=True)


def _check_values(x: Tensor) -> None:
    if x.numel() and not x.abs().amax() <= MAGNITUDE_MAX:
        raise InvalidRequest(f"values are at most {MAGNITUDE_MAX:g} in size: their features would not be finite")
