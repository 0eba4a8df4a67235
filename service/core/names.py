"""What separations, similarities and trainings of a kernel are called, and their bounds: the part of the mathematics
that a request names. No torch here, so that a client of a server does without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import TypeIs

from service.errors import InvalidRequest

Similarity = Literal["cosine", "dot", "neg_l2"]
Objective = Literal["cues", "separation", "separation_plus"]
Start = Literal["whitening", "identity"]

# A row at the threshold gains weight from 0 to ε^(1/(α-1)) within one rounding ε of its logit: in float64 that is 1e-8
# at α = 3, 0.006 at 8. Beyond this bound the weights say more of rounding than of scores, and `max` is the honest name.
ALPHA_MAX = 8.0

# A score's relative error, 1e-6 or so in float32, is multiplied by the degree: a weight is off by a thousandth here.
DEGREE_MAX = 1_000


@dataclass(frozen=True)
class Entmax:
    """α-entmax, 1 < α ≤ ALPHA_MAX. Raises InvalidRequest for another α."""

    alpha: float

    def __post_init__(self) -> None:
        if not 1.0 < self.alpha <= ALPHA_MAX:
            raise InvalidRequest(f"the α of entmax lies over 1 and is at most {ALPHA_MAX:g}, not {self.alpha}")


@dataclass(frozen=True)
class Polynomial:
    """p ∝ max(z, 0)^(degree-1): the dense associative memory of energy -Σ max(z, 0)^degree. β cancels out of it.

    Raises InvalidRequest unless 2 ≤ degree ≤ DEGREE_MAX.
    """

    degree: int

    def __post_init__(self) -> None:
        if not 2 <= self.degree <= DEGREE_MAX:
            raise InvalidRequest(f"the degree of a polynomial is from 2 to {DEGREE_MAX}, not {self.degree}")


@dataclass(frozen=True)
class KSubsets:
    """The nearest point of the polytope of k-subsets (0 ≤ y ≤ 1, Σ y = k), divided by k. Raises InvalidRequest for
    k < 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InvalidRequest(f"a subset holds at least one row, not {self.k}")


_RegularisedName = Literal["softmax", "sparsemax", "max", "normmax"]
Regularised = _RegularisedName | Entmax | KSubsets
Abstaining = Literal["lsr"] | Polynomial
Separation = Regularised | Abstaining

NAMES: tuple[str, ...] = (*get_args(_RegularisedName), "lsr")


def entmax(alpha: float) -> Separation:
    """α-entmax for 1 ≤ α ≤ ALPHA_MAX, by the name it has at 1 and 2. Raises InvalidRequest for another α."""
    if alpha == 1.0:
        return "softmax"
    return "sparsemax" if alpha == 2.0 else Entmax(alpha)


def named(kind: Separation) -> str:
    """The separation in words: `softmax`, `entmax 1.5`, `polynomial 3`, `2-subsets`."""
    match kind:
        case Entmax(alpha):
            return f"entmax {alpha:g}"
        case Polynomial(degree):
            return f"polynomial {degree}"
        case KSubsets(k):
            return f"{k}-subsets"
        case _:
            return kind


def is_separation(kind: object) -> bool:
    """Whether `kind` is one; for callers whose types nobody checks."""
    return isinstance(kind, (Entmax, Polynomial, KSubsets)) or kind in NAMES


def abstains(kind: Separation) -> TypeIs[Abstaining]:
    """Whether the separation can leave every row of a cue without weight."""
    return kind == "lsr" or isinstance(kind, Polynomial)
