"""The similarities of U-Hop's tables over one set of stored patterns, and the recall they all share.

Strategy: a similarity is built once per set of stored patterns and scores a batch of cues once; every β and every
separation is then tried on those scores by the engine's own `retrieve`.

Rules:
- One step, as the paper has it: weights at the cue, read out over the raw patterns, Σ p_μ ξ_μ. With steps, x goes on
  by the rule of the similarity (under a kernel x' = Σ p_μ ξ_μ / ‖Wξ_μ‖) and is read out once at the end.
- The error is the sum of squared differences of an image's values, in [0, 1] (the paper's section 4.1), averaged over
  the cues. The identity share is of the cues whose largest weight is their own memory's.
- Scores of unit features are at most 1, where β = 1 separates nothing. The paper's features keep the patterns'
  magnitude (Algorithm 1, line 4), so its β = 1 is β = mean ‖ξ‖² on unit features: `magnitude`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from service.core.names import Polynomial, Separation, Similarity, entmax, named
from service.core.retrieve import retrieve
from service.core.separation import separate
from service.core.similarity import Blocks, Kernel, normalise_rows, scores

# β is tuned on this grid, two to a factor of ten: from the mean image (10^-3 on squared distances) to the best row
# alone (10^5 on unit features whose scores differ by 10^-4).
BETAS = tuple(float(f"{10 ** (half / 2):.3g}") for half in range(-6, 11))

# So many cues tell two neighbours on the grid apart.
TUNING_CUES = 200


@dataclass(frozen=True)
class Method:
    """A row of a table. similarity: a name of `similarities`; beta: 1, the paper's 1 on unit features, or tuned."""

    similarity: str
    separation: Separation
    beta: Literal["one", "magnitude", "tuned"]

    @property
    def label(self) -> str:
        """Similarity and separation, as tables print them."""
        return f"{self.similarity}, {named(self.separation)}"


ENTMAX = entmax(1.5)

# The five that the paper compares with, as its code has them: two of them have the wrong sign.
PUBLISHED = (
    Method("dot", "softmax", "one"),
    Method("dot", "sparsemax", "one"),
    Method("dot", Polynomial(10), "one"),
    Method("+L2", "softmax", "one"),
    Method("+Manhattan", "softmax", "one"),
)
MEANT = (
    Method("-L2", "softmax", "one"),
    Method("-Manhattan", "softmax", "one"),
    Method("dot", ENTMAX, "one"),
)
# U-Hop at the paper's β = 1, in its three readings.
PRINTED = tuple(Method("U-Hop as printed", kind, "one") for kind in ("softmax", "sparsemax"))
UNIT = tuple(Method("U-Hop", kind, "one") for kind in ("softmax", "sparsemax"))
MAGNITUDE = tuple(Method("U-Hop", kind, "magnitude") for kind in ("softmax", "sparsemax"))
BESIDE = tuple(Method(name, "softmax", "magnitude") for name in ("U-Hop+", "cosine", "cue-trained"))

TUNED = (
    *(
        Method(name, "softmax", "tuned")
        for name in (
            *("dot", "-L2²", "-Manhattan", "cosine", "whitening 0.1", "whitening 1"),
            *("U-Hop as printed", "U-Hop", "U-Hop+", "cue-trained"),
        )
    ),
    *(
        Method(name, kind, "tuned")
        for kind in ("sparsemax", ENTMAX)
        for name in ("dot", "cosine", "U-Hop", "cue-trained")
    ),
)
METHODS = (*PUBLISHED, *MEANT, *PRINTED, *UNIT, *MAGNITUDE, *BESIDE, *TUNED)

# Those whose dynamics goes on after the one step.
SETTLED = tuple(
    m for m in TUNED if m.separation == "softmax" and m.similarity not in ("-Manhattan", "U-Hop as printed")
)

# Those that a cue's scale makes a difference to.
SCALED = tuple(m for m in METHODS if m.similarity in ("dot", "U-Hop as printed") or m.similarity[0] in "+-")


@dataclass(frozen=True, eq=False)
class Memory:
    """A similarity over stored patterns.

    patterns: (n, d), raw: what is read out. stored: what the dynamics holds. blocks: how it compares. score: K(ξ, x)
    of every cue (b, d) with every pattern, (b, n). magnitude: the scale of the paper's β = 1. iterates: whether the
    dynamics goes on by this similarity (else one step is all there is).
    """

    patterns: Tensor
    stored: Tensor
    blocks: Blocks
    score: Callable[[Tensor], Tensor]
    magnitude: float = 1.0
    iterates: bool = True


@dataclass(frozen=True)
class Recalled:
    """error: mean sum of squared differences; own: the identity share."""

    error: float
    own: float


Answers = dict[Method, list[Recalled]]
"""A figure for each draw."""


def recall(
    memory: Memory, cues: Tensor, scored: Tensor, *, beta: float, separation: Separation, steps_max: int = 0
) -> Recalled:
    """Cues (k·n, d) are the n patterns in their order, damaged, k times over; `scored` is memory.score(cues)."""
    if steps_max and not memory.iterates:
        raise ValueError("this similarity is compared by one step alone")
    settled = retrieve(
        memory.blocks,
        memory.stored,
        cues,
        beta=beta,
        separation=separation,
        first_scores=scored,
        update_steps_max=steps_max,
    )
    return _read_out(memory, settled.weights)


def tuned(memory: Memory, cues: Tensor, separation: Separation) -> float:
    """The β of `BETAS` of least error; to be asked of other patterns than those of the table."""
    scored = memory.score(cues[:TUNING_CUES])
    return min(BETAS, key=lambda beta: _read_out(memory, separate(separation, beta * scored)).error)


def _read_out(memory: Memory, weights: Tensor) -> Recalled:
    """Σ p_μ ξ_μ against the originals; cue i is of pattern i, modulo their number."""
    own = torch.arange(len(weights)) % len(memory.patterns)
    error = (weights @ memory.patterns - memory.patterns[own]).square().sum(-1).mean()
    return Recalled(float(error), float((weights.argmax(-1) == own).double().mean()))


# ---- similarities ----


def compared(patterns: Tensor, similarity: Similarity) -> Memory:
    """One of the engine's own: dot, cosine, -‖ξ - x‖²."""
    blocks = Blocks((patterns.shape[1],), (1.0,), similarity)
    stored = normalise_rows(patterns, blocks)
    magnitude = magnitude_of(patterns) if similarity == "cosine" else 1.0
    return Memory(patterns, stored, blocks, lambda cues: scores(blocks, stored, cues), magnitude)


def under_kernel(patterns: Tensor, weight: Tensor) -> Memory:
    """⟨Wξ, Wx⟩ / (‖Wξ‖ ‖Wx‖), as the engine has it."""
    blocks = Blocks((patterns.shape[1],), (1.0,), kernels=(Kernel(weight),))
    stored = normalise_rows(patterns, blocks)
    return Memory(patterns, stored, blocks, lambda cues: scores(blocks, stored, cues), magnitude_of(patterns))


def as_printed(patterns: Tensor, weight: Tensor) -> Memory:
    """⟨Wξ, Wx⟩ with W's rows made unit and nothing else (U-Hop, Algorithm 1, line 4, and equation 2.4)."""
    rows = torch.nn.functional.normalize(weight, dim=-1)
    stored = patterns @ rows.T
    return _scored(patterns, lambda cues: (cues @ rows.T) @ stored.T)


def distance(patterns: Tensor, power: float, sign: float) -> Memory:
    """sign · ‖ξ - x‖_power, not squared. Published baselines have sign +1, and so fetch the farthest pattern."""
    return _scored(patterns, lambda cues: sign * torch.cdist(cues, patterns, p=power))


def _scored(patterns: Tensor, score: Callable[[Tensor], Tensor]) -> Memory:
    """A similarity that the engine does not have: it is handed the scores of the one step."""
    return Memory(patterns, patterns, Blocks((patterns.shape[1],), (1.0,), "dot"), score, iterates=False)


def magnitude_of(patterns: Tensor) -> float:
    """mean ‖ξ‖²."""
    return float(patterns.square().sum(-1).mean())


def similarities(patterns: Tensor, kernels: Mapping[str, Tensor]) -> dict[str, Memory]:
    """Every similarity of the tables by its name; each kernel by its own."""
    fixed = {
        "dot": compared(patterns, "dot"),
        "+L2": distance(patterns, 2, +1),
        "+Manhattan": distance(patterns, 1, +1),
        "-L2": distance(patterns, 2, -1),
        "-L2²": compared(patterns, "neg_l2"),
        "-Manhattan": distance(patterns, 1, -1),
        "cosine": compared(patterns, "cosine"),
    }
    return fixed | {name: under_kernel(patterns, weight) for name, weight in kernels.items()}
