"""U-Hop's memory retrieval (Wu et al., "Uniform Memory Retrieval with Larger Capacity for Modern Hopfield Models",
2024, section 4.1, appendices F.2, F.3, G.1): error against memory size, noise, kernel iterations and separation loss.

Strategy: for every data set, memory size and seed, patterns are drawn once, their kernels trained once, and every
method asked the same cues. A method is a similarity, a separation and a β.

Rules:
- β is 1, as the paper has it, or tuned: then on other patterns than the table's, with kernels of their own. The images
  are halved for that; no image is in both halves.
- What a table shows is also said in words, and the words are made from its figures.
- Kernels are trained on the stored patterns, as the paper has it, and never see a table's cues.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.papers import uhop_tables
from benchmarks.papers.data import Images, cifar10, fashion, mnist_small
from benchmarks.papers.report import Report, Size
from benchmarks.papers.uhop_cues import (
    NOISE_LEVELS,
    Corruption,
    masked,
    masked_doubled,
    noisy,
    noisy_folded,
    right_half_missing,
)
from benchmarks.papers.uhop_findings import HARD_CUES, PAPER_CUES, Findings, Fits, Run
from benchmarks.papers.uhop_kernels import Schedule, Start, descend, trained_for_cues
from benchmarks.papers.uhop_methods import (
    METHODS,
    SCALED,
    SETTLED,
    TUNED,
    Answers,
    Memory,
    Method,
    as_printed,
    recall,
    similarities,
    tuned,
    under_kernel,
)
from service.core.kernel import separation_loss_plus, whitening

# A table's mean is over at least so many cues a seed; below that, patterns are cued several times.
CUES_MIN = 100

# Seeds of draws that are not a table's.
TUNING_SEED = 10_000
SCATTER_SEED = 20_000
CUE_SEED = 30_000  # added to a draw's own

# The memory size of noise, iterations and separation loss (the published code's default).
MIDDLE = 100

# Whitening's ridges, as shares of the mean eigenvalue.
RIDGES = (0.1, 1.0)


@dataclass(frozen=True)
class Plan:
    """What a size of run measures. `cue_steps`, `cue_batch`: the training on cues."""

    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    noise_levels: tuple[float, ...]
    iterations: tuple[int, ...]
    scatter_runs: int
    cue_steps: int
    cue_batch: int


PLANS: dict[Size, Plan] = {
    "quick": Plan(
        seeds=(0, 1),
        sizes=(10, 100, 500),
        noise_levels=(0.1, 0.5, 1.0),
        iterations=(0, 1, 10, 100),
        scatter_runs=30,
        cue_steps=100,
        cue_batch=128,
    ),
    "full": Plan(
        seeds=(0, 1, 2, 3, 4),
        sizes=(10, 20, 30, 50, 100, 200, 500),
        noise_levels=NOISE_LEVELS,
        iterations=(0, 1, 10, 20, 50, 100, 200, 500, 1000),
        scatter_runs=200,
        cue_steps=200,
        cue_batch=128,
    ),
}


@dataclass(frozen=True, eq=False)
class Draw:
    """Stored patterns with everything that compares them, and the seed that their cues are drawn from."""

    patterns: Tensor
    memories: dict[str, Memory]
    seed: int

    def cues(self, corruption: Corruption) -> Tensor:
        """Every pattern damaged, several times over where they are few. The same for the same corruption."""
        repeats = math.ceil(CUES_MIN / len(self.patterns))
        return corruption(self.patterns.repeat(repeats, 1), torch.Generator().manual_seed(CUE_SEED + self.seed))


def run(size: Size, out: Path) -> None:
    """Writes out/uhop.md and its figures. Raises MissingData where images are missing."""
    plan = PLANS[size]
    report = Report("U-Hop: memory retrieval", out, "uhop", size, plan.seeds)
    findings = [measured(images, plan, report) for images in _images()]
    uhop_tables.write(report, findings, MIDDLE)
    report.write()


def _images() -> list[Images]:
    published = [cifar10()] if os.environ.get("CIFAR10") else []
    return [mnist_small(), fashion(), *published]


def measured(images: Images, plan: Plan, report: Report) -> Findings:
    """Everything about one data set."""
    side = images.pixels.shape[1]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    rows = torch.from_numpy(images.rows())
    tuning, held = order[: len(order) // 2], order[len(order) // 2 :]
    cue_kinds = {PAPER_CUES: masked, HARD_CUES: right_half_missing(side)}
    found = Findings(images.name, images.source)
    for count in plan.sizes:
        report.progress(f"{images.name}: {count} memories")
        tuner = _drawn(rows, tuning, count, TUNING_SEED, side, plan)
        draws = [_drawn(rows, held, count, seed, side, plan) for seed in plan.seeds]
        for kind, corruption in cue_kinds.items():
            found.by_size.setdefault(kind, {})[count] = _asked(METHODS, corruption, tuner, draws)
            found.settled.setdefault(kind, {})[count] = _asked(SETTLED, corruption, tuner, draws, steps_max=3)
        found.doubled[count] = _asked(SCALED, masked_doubled, tuner, draws)
        if count == MIDDLE:
            report.progress(f"{images.name}: noise")
            for sigma in plan.noise_levels:
                found.by_noise["folded", sigma] = _asked(METHODS, noisy_folded(sigma), tuner, draws)
                found.by_noise["plain", sigma] = _asked(TUNED, noisy(sigma), tuner, draws)
            report.progress(f"{images.name}: kernel iterations")
            found.by_iteration.update(_iterations(draws, side, plan.iterations))
    report.progress(f"{images.name}: separation loss")
    found.runs.extend(_runs(_drawn_patterns(rows, held, MIDDLE, SCATTER_SEED), side, plan.scatter_runs))
    return found


def _drawn_patterns(rows: Tensor, pool: Tensor, count: int, seed: int) -> Tensor:
    chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]
    return rows[pool[chosen]]


def _drawn(rows: Tensor, pool: Tensor, count: int, seed: int, side: int, plan: Plan) -> Draw:
    patterns = _drawn_patterns(rows, pool, count, seed)
    uhop = descend(patterns)
    (plain,) = uhop.values()
    (plus,) = descend(patterns, separation_loss_plus).values()
    declared = (masked, right_half_missing(side), noisy_folded(0.5))
    # In double precision: in single, LAPACK does not settle on the many zero eigenvalues of a few patterns.
    kernels = {f"whitening {ridge:g}": whitening(patterns.double(), ridge).float() for ridge in RIDGES} | {
        "U-Hop": plain.weight,
        "U-Hop+": plus.weight,
        "cue-trained": trained_for_cues(patterns, declared, steps_max=plan.cue_steps, batch=plan.cue_batch, seed=seed),
    }
    memories = similarities(patterns, kernels) | {"U-Hop as printed": as_printed(patterns, plain.weight)}
    return Draw(patterns, memories, seed)


def _asked(
    methods: Sequence[Method], corruption: Corruption, tuner: Draw, draws: list[Draw], steps_max: int = 0
) -> Answers:
    """Every method's answer to the same cues, a figure for each draw."""
    asked = tuner.cues(corruption)
    answers: Answers = {}
    cues = [draw.cues(corruption) for draw in draws]
    scored: dict[str, list[Tensor]] = {}
    for method in methods:
        name = method.similarity
        if name not in scored:
            scored[name] = [draw.memories[name].score(cue) for draw, cue in zip(draws, cues, strict=True)]
        best = tuned(tuner.memories[name], asked, method.separation) if method.beta == "tuned" else 1.0
        answers[method] = [
            recall(
                draw.memories[name],
                cue,
                scores,
                beta=draw.memories[name].magnitude if method.beta == "magnitude" else best,
                separation=method.separation,
                steps_max=steps_max,
            )
            for draw, cue, scores in zip(draws, cues, scored[name], strict=True)
        ]
    return answers


# Trainings of the table over iterations; the random starts take the dearer way, so they end sooner.
TRAININGS: tuple[tuple[str, Start, Schedule], ...] = (
    ("from the identity, step 1", "identity", "constant"),
    ("from N(0, 1), step 1", "normal", "constant"),
    ("from N(0, 1), the published schedule", "normal", "published"),
)
RANDOM_ITERATIONS_MAX = 200


def _iterations(draws: list[Draw], side: int, marks: tuple[int, ...]) -> dict[str, Fits]:
    """Each training's kernels after each number of iterations, asked the two hard kinds of cue."""
    found: dict[str, Fits] = {}
    for label, start, schedule in TRAININGS:
        reached = [mark for mark in marks if start == "identity" or mark <= RANDOM_ITERATIONS_MAX]
        fits: Fits = {mark: [] for mark in reached}
        for draw in draws:
            fitted = descend(draw.patterns, marks=reached, start=start, schedule=schedule, seed=draw.seed)
            for mark, kernel in fitted.items():
                fits[mark].append(_judged(draw, kernel.weight, kernel.loss, side))
        found[label] = fits
    return found


def _judged(draw: Draw, weight: Tensor, loss: float, side: int) -> Run:
    """A kernel's error on masked cues as the paper's Algorithm 1 has it, and on unit features on both kinds of cue."""
    printed, unit = as_printed(draw.patterns, weight), under_kernel(draw.patterns, weight)
    masks, halves = draw.cues(masked), draw.cues(right_half_missing(side))
    unit_on = {
        kind: recall(unit, cues, unit.score(cues), beta=unit.magnitude, separation="softmax")
        for kind, cues in (("masks", masks), ("halves", halves))
    }
    return Run(
        loss=loss,
        printed_masked=recall(printed, masks, printed.score(masks), beta=1.0, separation="softmax").error,
        unit_masked=unit_on["masks"].error,
        unit_half=unit_on["halves"].error,
        own_half=unit_on["halves"].own,
    )


def _runs(patterns: Tensor, side: int, runs: int) -> list[Run]:
    """The untrained kernel, then trainings of random step and length (the paper's appendix G.1: steps from N(0, 1), so
    that half of them climb; 1 to 200 iterations), all on the same patterns and cues.
    """
    draw = Draw(patterns, {}, SCATTER_SEED)
    random = torch.Generator().manual_seed(SCATTER_SEED)
    steps = torch.randn(runs, generator=random).tolist()
    lengths = torch.randint(1, 201, (runs,), generator=random).tolist()
    found = []
    for step, length in [(0.0, 0), *zip(steps, lengths, strict=True)]:
        (kernel,) = descend(patterns, marks=(length,), step=step).values()
        found.append(_judged(draw, kernel.weight, kernel.loss, side))
    return found
