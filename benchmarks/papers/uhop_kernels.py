"""The kernels of U-Hop's tables: the paper's own descent, and the engine's training on cues.

Strategy: the paper's Stage I is gradient descent on all stored patterns at once. Started from the identity it changes W
in their span alone: the gradient with respect to W is a sum of (a vector of the span) ⊗ (a pattern). So
W = I + Q (V - I) Qᵀ with Q an orthonormal basis of the span, and V descends, on the patterns' coordinates, just as W
would. For M patterns of d values an iteration then costs M³ and not M d².

Rules:
- Features are normalised (φ = Wξ / ‖Wξ‖) while training, as in the published code; see `uhop_methods` for the query.
- The step is constant. The published schedule divides it by √(i+1) *again* at every iteration i, so that after ten
  iterations it is 1/√(10!), a two-thousandth: it is here to be compared with.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.papers.uhop_cues import Corruption
from service.core.kernel import Training, features, separation_loss, train

Loss = Callable[[Tensor], Tensor]
Start = Literal["identity", "normal"]
Schedule = Literal["constant", "published"]

# The paper's appendix F.2: step 1 and, on MNIST, 100 iterations.
STEP = 1.0
ITERATIONS = 100


@dataclass(frozen=True, eq=False)
class Fitted:
    """W (d, d) after some iterations, and the loss of the stored patterns' features under it."""

    weight: Tensor
    loss: float


def descend(
    patterns: Tensor,
    loss: Loss = separation_loss,
    *,
    marks: Sequence[int] = (ITERATIONS,),
    step: float = STEP,
    start: Start = "identity",
    schedule: Schedule = "constant",
    seed: int = 0,
) -> dict[int, Fitted]:
    """W after each number of iterations in `marks`, one descent for all (U-Hop, Algorithm 1, Stage I).

    start: the identity, or every value from N(0, 1) as in the published code.
    """
    dimension = patterns.shape[1]
    if start == "identity":
        basis = torch.linalg.qr(patterns.T).Q
        x, weight = patterns @ basis, torch.eye(basis.shape[1], dtype=patterns.dtype)
    else:
        draw = torch.Generator().manual_seed(seed)
        basis, x = None, patterns
        weight = torch.randn(dimension, dimension, dtype=patterns.dtype, generator=draw)

    reached = {}
    for iteration in range(max(marks) + 1):
        weight.requires_grad_(True)
        value = loss(features(weight, x))
        if iteration in marks:
            whole = weight.detach()
            if basis is not None:
                inner = whole - torch.eye(len(whole), dtype=whole.dtype)
                whole = torch.eye(dimension, dtype=patterns.dtype) + basis @ inner @ basis.T
            reached[iteration] = Fitted(whole.clone(), float(value.detach()))
        (gradient,) = torch.autograd.grad(value, weight)
        if schedule == "published":
            step /= math.sqrt(iteration + 1) if iteration else 1.0
        weight = weight.detach() - step * gradient
    return reached


def trained_for_cues(
    patterns: Tensor, corruptions: Sequence[Corruption], *, steps_max: int, batch: int, seed: int
) -> Tensor:
    """W of the engine's own training: each cue is damaged by one of the corruptions, drawn for it alone.

    It sees the stored patterns and the kinds of damage, never the cues of a table. As for U-Hop, W starts as the
    identity.
    """

    def draw(rows: Tensor, generator: torch.Generator) -> Tensor:
        own = patterns[rows]
        kind = torch.randint(len(corruptions), (len(rows),), generator=generator)
        cues = own.clone()
        for number, corrupt in enumerate(corruptions):
            chosen = kind == number
            cues[chosen] = corrupt(own[chosen], generator)
        return cues

    training = Training(objective="cues", start="identity", steps_max=steps_max, batch=batch, seed=seed)
    last = deque(train(patterns, training, draw), maxlen=1)
    return last[0].weight
