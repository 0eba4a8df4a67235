"""What is measured for U-Hop's report, and the averages that its tables and figures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from benchmarks.papers.uhop_methods import Answers, Method, Recalled

# The cues of the paper, and harder ones.
PAPER_CUES = "masked"
HARD_CUES = "right half missing"


@dataclass(frozen=True)
class Run:
    """A trained kernel.

    loss: of its stored patterns. printed_masked: error on masked cues as Algorithm 1 has it, β = 1. unit_masked,
    unit_half, own_half: errors and identity share on unit features, β = mean ‖ξ‖².
    """

    loss: float
    printed_masked: float
    unit_masked: float
    unit_half: float
    own_half: float


Fits = dict[int, list[Run]]
"""Iterations → a run for each draw."""


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything measured on one data set. by_size, settled: kind of cue → memory size → answers;
    doubled: memory size → answers to masked cues whose values are doubled; by_noise: (kind of
    noise, σ) → answers; by_iteration: training → fits; runs: the untrained kernel, then those
    of random step and length.
    """

    name: str
    source: str
    by_size: dict[str, dict[int, Answers]] = field(default_factory=dict)
    doubled: dict[int, Answers] = field(default_factory=dict)
    settled: dict[str, dict[int, Answers]] = field(default_factory=dict)
    by_noise: dict[tuple[str, float], Answers] = field(default_factory=dict)
    by_iteration: dict[str, Fits] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def average(self, cues: str, method: Method) -> float:
        """The error averaged over sizes."""
        return fmean(error(answers[method]) for answers in self.by_size[cues].values())


def error(answers: Sequence[Recalled]) -> float:
    """Mean over the draws."""
    return fmean(answer.error for answer in answers)


def own(answers: Sequence[Recalled]) -> float:
    """Mean identity share over the draws."""
    return fmean(answer.own for answer in answers)


def rank_correlation(x: Iterable[float], y: Iterable[float]) -> float:
    """Spearman's ρ; equal values share their mean rank."""
    ranks = torch.stack([_ranks(torch.tensor(list(values), dtype=torch.float64)) for values in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


def series(by: Mapping[int, Answers] | Mapping[float, Answers], method: Method) -> list[float]:
    """Mean errors of a method along sizes or levels."""
    return [error(answers[method]) for answers in by.values()]


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """1 for the smallest; equal values share their mean rank."""
    under = (values < values[:, None]).sum(1)
    alike = (values == values[:, None]).sum(1)
    return under + (alike + 1) / 2
