"""Kernel memory networks (Iatropoulos, Brea, Gerstner 2022), which HEN compares with.

    x' = Ξᵀ K† k(Ξ, x),   k(ξ, x) = exp(-(‖ξ - x‖ / r)^p),   K = k(Ξ, Ξ)

the regression of least norm that gives every memory back at that memory, one for each value of the state, with the
exponential kernel (0 < p ≤ 2; p = 2 is the Gaussian).

Strategy: K + εI is factored once, and K†Ξ kept; a step is then two products. ε is so small that the memories come back
to within rounding; as it falls to 0 the inverse becomes K† where equal memories make K singular.

Rules:
- In float64: K's smallest eigenvalues are far under what float32 resolves.
- r and p are chosen on other cues than the tables', by 1 - SSIM of what they bring back, as the paper's sweep; so are
  the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# K of 15,000 memories has 1.8 GB, its factor as much again, and takes a minute; of 60,000 it has 29 GB.
ROWS_MAX = 15_000

RIDGE = 1e-9

# r in units of the median distance between two memories.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
POWERS = (0.5, 1.0, 2.0)
STEPS = (1, 3, 10)

# Memories that the choice is made on, and how many pairs the median distance is taken over.
TUNING_ROWS = 2_000
_PAIRS = 1_000


@dataclass(frozen=True)
class Shape:
    """The kernel's r (in median distances) and p, and how many steps are taken."""

    scale: float
    power: float
    steps: int

    @property
    def words(self) -> str:
        return f"r = {self.scale:g} median distances, p = {self.power:g}, {self.steps} step(s)"


class SingularKernel(Exception):
    """K + εI could not be factored: the kernel is so wide that its columns are alike up to rounding."""


class KernelMemory:
    """Memories (n, d) under one kernel. Raises SingularKernel, and ValueError over `ROWS_MAX` rows."""

    def __init__(self, patterns: Tensor, scale: float, power: float) -> None:
        if len(patterns) > ROWS_MAX:
            raise ValueError(f"{len(patterns)} memories ask for a matrix over {ROWS_MAX}²")
        self._patterns, self._power = patterns.double(), power
        sample = self._patterns[:_PAIRS]
        self._radius = scale * float(torch.pdist(sample).median())
        kernel = self._kernel(_squared_distances(self._patterns))
        kernel.diagonal().add_(RIDGE)
        factor, failed = torch.linalg.cholesky_ex(kernel)
        if failed:
            raise SingularKernel(f"{len(patterns)} memories, r = {scale:g} median distances, p = {power:g}")
        del kernel
        self._dual = torch.cholesky_solve(self._patterns, factor)

    def recall(self, cues: Tensor, steps: int) -> Tensor:
        """(b, d) → (b, d) after so many steps, float64."""
        state = cues.double()
        for _ in range(steps):
            # From differences, not expanded: near a memory the kernel turns on the smallest of them.
            apart = torch.cdist(state, self._patterns, compute_mode="donot_use_mm_for_euclid_dist")
            state = self._kernel(apart.square_()) @ self._dual
        return state

    def _kernel(self, squares: Tensor) -> Tensor:
        """k of squared distances, in their place."""
        return squares.div_(self._radius**2).pow_(self._power / 2).neg_().exp_()


def _squared_distances(patterns: Tensor) -> Tensor:
    """(n, n) of all pairs; what is under the rounding of the expansion is 0, as of equal memories."""
    squares = patterns.square().sum(-1)
    apart = torch.addmm(squares.expand(len(patterns), -1), patterns, patterns.T, alpha=-2).add_(squares[:, None])
    torch.nn.functional.threshold(apart, 1e-12 * float(squares.max()), 0.0, inplace=True)
    apart.fill_diagonal_(0)
    return apart


def chosen(patterns: Tensor, cues: Tensor, judge: Callable[[Tensor], float]) -> Shape:
    """The shape whose recalls of the cues `judge` finds least wrong. A shape that does not factor is passed over."""
    best: tuple[float, Shape] | None = None
    for power in POWERS:
        for scale in SCALES:
            try:
                memory = KernelMemory(patterns, scale, power)
            except SingularKernel:
                continue
            for steps in STEPS:
                found = judge(memory.recall(cues, steps))
                if best is None or found < best[0]:
                    best = (found, Shape(scale, power, steps))
    if best is None:
        raise ValueError("no kernel of the sweep could be factored")
    return best[1]
