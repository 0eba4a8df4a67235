"""The nonparametric family's tables (Hu et al., "Nonparametric Modern Hopfield Models", 2024, appendix E): retrieval
against memory size and noise, time and operations against length, multiple-instance learning.

Strategy: every model is one `Association` of the product's own layers; the tables run down the same list of them.

Rules:
- Rows outside a support have logit -∞. The paper's published code gives them 0 and stretches all scores to ±1; its
  curves are those of other models and are not reproduced.
- β is the paper's, or tuned on other images than the table's: both are printed.
- Scores by dot product favour bright images, so cosine stands beside it; what is read out are the raw patterns.
- What a table shows is also said in words, and the words are made from its figures.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.papers.data import Images, MissingData, cifar10, fashion, mnist_small
from benchmarks.papers.nonparametric_mil import multiple_instances
from benchmarks.papers.report import Cell, Report, Size
from engram.layers import Association, Hopfield, RandomFeatures, RandomRows, TopK, Window
from service.core.features import draw
from service.core.heads import Memory
from service.core.names import Similarity

# As many as pixels: one rotation's worth.
FEATURES = 784

MODELS = {
    "dense": Association(),
    "sparse": Association("sparsemax"),
    "top 20%": Association(support=TopK(share=0.2)),
    "top 50%": Association(support=TopK(share=0.5)),
    "top 80%": Association(support=TopK(share=0.8)),
    "random 50%": Association(support=RandomRows(share=0.5)),
    "window": Association(support=Window()),
    "linear": Association(features="linear"),
    "random features": Association(features=RandomFeatures(FEATURES)),
}

# A recall succeeds when ‖x' - ξ‖² is at most this share of ‖ξ‖² (the paper's 20%).
ERROR_MAX = 0.2

# The paper's β, for "better visualizations", by its two data sets.
PAPER_BETA, PAPER_BETA_CIFAR = 0.01, 0.1
BETAS = tuple(10 ** (exponent / 2) for exponent in range(-4, 7))  # .01 to 1,000
TUNING_SIZE = 100
TUNING_SEED = 10_000

# The paper's layer: 4 sequences of patterns of 16 values.
TIMED_BATCH, TIMED_WIDTH, TIMED_FEATURES = 4, 16, 64


@dataclass(frozen=True)
class Plan:
    """What a size of run measures."""

    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    variances: tuple[float, ...]
    lengths: tuple[int, ...]
    repeats: int


PLANS: dict[Size, Plan] = {
    "quick": Plan((0, 1, 2), (10, 50, 200), (0.1, 0.6, 1.4), (128, 256, 512, 1024), 3),
    "full": Plan(
        tuple(range(10)),
        (10, 25, 50, 75, 100, 150, 200),
        (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4),
        (128, 256, 512, 1024, 2048),
        5,
    ),
}


def run(size: Size, out: Path) -> None:
    """Writes `nonparametric.md` and its figures. Raises MissingData where MNIST's digits are not at hand."""
    plan = PLANS[size]
    report = Report("Nonparametric modern Hopfield models", out, "nonparametric", size, plan.seeds)
    report.text(
        "Models of Hu et al., *Nonparametric Modern Hopfield Models* (2024), as this project's layers build them: "
        "`dense` is softmax over all rows, `sparse` sparsemax, `top`, `random` and `window` keep a part of the rows "
        f"and give the others logit -∞, `linear` has the features elu + 1, `random features` {FEATURES} positive ones "
        "(FAVOR+). The curves of the paper's published code are not reproduced: outside a support it has logit 0, and "
        "scores stretched to ±1."
    )
    digits = mnist_small()
    sets = [digits, fashion()]
    try:
        sets.append(_grey(cifar10()))
    except MissingData as missing:
        report.text(f"CIFAR-10 is left out here: {missing}.")
    for images in sets:
        retrieval(report, images, plan)
    efficiency(report, plan)
    multiple_instances(report, digits, {name: MODELS[name] for name in MODELS if name != "window"}, size)
    report.write()


def _grey(images: Images) -> Images:
    """The mean of the colours: as many values as the others have, about."""
    return replace(images, name=f"{images.name}, grey", pixels=images.pixels.mean(-1).round().astype(np.uint8))


# ---- retrieval ----

Cues = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Way:
    """A model at a β; `placed`: whether cue i is told to ask at row i, which only a window can notice."""

    association: Association
    beta: float
    placed: bool = False


def retrieval(report: Report, images: Images, plan: Plan) -> None:
    """Success against memory size, from half-masked cues, and against noise."""
    name = images.name
    rows = torch.from_numpy(images.rows())
    half = len(rows) // 2
    tuning, tables = rows[::2][:half], rows[1::2]
    paper = PAPER_BETA_CIFAR if name.startswith("CIFAR") else PAPER_BETA
    settings: dict[str, tuple[Similarity, float | None]] = {
        f"dot, the paper's β = {paper:g}": ("dot", paper),
        "dot, tuned β": ("dot", None),
        "cosine, tuned β": ("cosine", None),
    }
    found: dict[str, dict[str, list[list[float]]]] = {}
    noise: dict[str, dict[str, list[list[float]]]] = {}
    betas: dict[str, dict[str, tuple[float, float]]] = {}
    for setting, (similarity, fixed) in settings.items():
        report.progress(f"{name}: {setting}")
        found[setting], noise[setting], betas[setting] = {}, {}, {}
        for label, model, placed in _ways():
            model = replace(model, similarity=similarity)
            masked, noisy = (
                (fixed, fixed)
                if fixed
                else (_tuned(tuning, model, placed, cues) for cues in (half_masked, _noise(0.5)))
            )
            betas[setting][label] = (masked, noisy)
            found[setting][label] = [
                [success(tables, Way(model, masked, placed), size, seed, half_masked) for seed in plan.seeds]
                for size in plan.sizes
            ]
            noise[setting][label] = [
                [success(tables, Way(model, noisy, placed), TUNING_SIZE, seed, _noise(variance)) for seed in plan.seeds]
                for variance in plan.variances
            ]
    report.text(f"## Retrieval: {name}")
    report.text(
        "One step from a cue; success is ‖x' - ξ‖² ≤ .2 ‖ξ‖². Pixels are 0 to 1. The cue is the memory with its lower "
        f"half black, or, with {TUNING_SIZE} memories, with Gaussian noise of the variance named. A tuned β is the "
        f"best of {len(BETAS)} from {BETAS[0]:g} to {BETAS[-1]:g} with {TUNING_SIZE} other images, for each model and "
        "kind of cue (noise of variance .5). `window` is asked at random places and `window, in place` cue i at row "
        f"i, as in a sequence aligned with its memory. {len(plan.seeds)} draws of memories each."
    )
    for setting in settings:
        headers = ["model", "β", *(f"{size} memories" for size in plan.sizes)]
        table: list[list[Cell]] = [
            [label, f"{betas[setting][label][0]:.3g}", *cells] for label, cells in found[setting].items()
        ]
        report.table(headers, table, f"{name}, lower half black: success, {setting}", 2)
    for setting in settings:
        headers = ["model", "β", *(f"variance {variance:g}" for variance in plan.variances)]
        table = [[label, f"{betas[setting][label][1]:.3g}", *cells] for label, cells in noise[setting].items()]
        report.table(headers, table, f"{name}, noise: success among {TUNING_SIZE}, {setting}", 2)
    report.figure(f"retrieval-{_slug(name)}", _curves(plan, found, noise), f"{name}: success of one step")
    report.text(_findings(found, noise))


def _ways() -> list[tuple[str, Association, bool]]:
    ways = [(name, model, False) for name, model in MODELS.items()]
    return [*ways, ("window, in place", MODELS["window"], True)]


def half_masked(patterns: Tensor, generator: torch.Generator) -> Tensor:
    """The lower half of the picture black; nothing is drawn."""
    cues = patterns.clone()
    cues[:, patterns.shape[1] // 2 :] = 0.0
    return cues


def _noise(variance: float) -> Cues:
    def noisy(patterns: Tensor, generator: torch.Generator) -> Tensor:
        return patterns + math.sqrt(variance) * torch.randn(patterns.shape, generator=generator)

    return noisy


def success(rows: Tensor, way: Way, size: int, seed: int, cues: Cues) -> float:
    """The share of `size` memories drawn by `seed` that one step from their cues reaches."""
    generator = torch.Generator().manual_seed(seed)
    patterns = rows[torch.randperm(len(rows), generator=generator)[:size]]
    order = torch.arange(size) if way.placed else torch.randperm(size, generator=generator)
    own = patterns[order]
    torch.manual_seed(seed)  # for random rows
    reached = step(way, patterns, cues(own, generator), seed)
    error = (reached - own).square().sum(-1)
    return float((error <= ERROR_MAX * own.square().sum(-1)).double().mean())


def step(way: Way, patterns: Tensor, cues: Tensor, seed: int) -> Tensor:
    """Σ p_μ ξ_μ at each cue; random features are drawn by `seed`."""
    features = way.association.features
    projections = (
        _projections(features.count, patterns.shape[1], seed) if isinstance(features, RandomFeatures) else None
    )
    stored = patterns[None, None]
    memory = Memory(way.association, stored, len(cues), beta=way.beta, projections=projections)
    cue = memory.settle(cues[None, None], 0, 0.0)
    return memory.readout(cue, stored)[0, 0]


@lru_cache(maxsize=32)
def _projections(count: int, width: int, seed: int) -> Tensor:
    """Drawn once for all sizes, noises and β: orthogonalising takes longer than the recalls."""
    return draw(count, width, torch.Generator().manual_seed(seed))


def _tuned(rows: Tensor, model: Association, placed: bool, cues: Cues) -> float:
    """The β of most success among other images; of several the middle one."""
    scores = [
        statistics.fmean(
            success(rows, Way(model, beta, placed), TUNING_SIZE, TUNING_SEED + draw, cues) for draw in range(3)
        )
        for beta in BETAS
    ]
    best = [beta for beta, score in zip(BETAS, scores, strict=True) if score == max(scores)]
    return best[len(best) // 2]


def _curves(
    plan: Plan, found: dict[str, dict[str, list[list[float]]]], noise: dict[str, dict[str, list[list[float]]]]
) -> Figure:
    figure = Figure(figsize=(4.2 * len(found), 6.4))
    axes = figure.subplots(2, len(found), sharey=True)
    for column, setting in enumerate(found):
        rows = ((found, plan.sizes, "memories"), (noise, plan.variances, "variance of the noise"))
        for row, (measured, ends, label) in enumerate(rows):
            drawn: Axes = axes[row][column]
            for index, (name, cells) in enumerate(measured[setting].items()):
                drawn.plot(ends, [statistics.fmean(cell) for cell in cells], label=name, **_style(index))
            drawn.set_xlabel(label)
            drawn.set_ylim(-0.03, 1.03)
            drawn.grid(alpha=0.3)
            drawn.set_title(setting if row == 0 else "")
        axes[0][0].set_ylabel("success, lower half black")
        axes[1][0].set_ylabel(f"success, {TUNING_SIZE} memories, noise")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def _style(index: int) -> dict[str, Any]:
    """Dense, sparse and the tops often coincide: thinner lies on thicker, so that all are seen."""
    return {"color": f"C{index}", "linewidth": max(9.0 - 2.0 * index, 1.5)}


def _findings(found: dict[str, dict[str, list[list[float]]]], noise: dict[str, dict[str, list[list[float]]]]) -> str:
    """The table in words."""

    def mean(measured: dict[str, list[list[float]]], name: str) -> float:
        return statistics.fmean(statistics.fmean(cell) for cell in measured[name])

    lines = []
    for kind, measured in (("half-masked cues", found), ("noise", noise)):
        for setting, table in measured.items():
            dense = mean(table, "dense")
            best = max(table, key=lambda name: mean(table, name))
            same = [name for name in table if name != "dense" and abs(mean(table, name) - dense) <= 0.02]
            lost = [name for name in table if mean(table, name) < dense - 0.1]
            lines.append(
                f"- {kind}, {setting}: dense {dense:.2f} on average, best {best} {mean(table, best):.2f}; "
                f"within .02 of dense: {', '.join(same) or 'none'}; more than .1 below: {', '.join(lost) or 'none'}."
            )
    return "\n".join(lines)


# ---- time and operations ----


def efficiency(report: Report, plan: Plan) -> None:
    """A forward pass of a `Hopfield` layer over sequences of growing length."""
    seconds: dict[str, list[float]] = {}
    operations: dict[str, list[float]] = {}
    for name, model in MODELS.items():
        if model.features is not None and model.features != "linear":
            model = replace(model, features=RandomFeatures(TIMED_FEATURES))
        report.progress(f"time: {name}")
        layer = Hopfield(TIMED_WIDTH, association=model).eval()
        seconds[name], operations[name] = [], []
        for length in plan.lengths:
            x = torch.randn(TIMED_BATCH, length, TIMED_WIDTH, generator=torch.Generator().manual_seed(length))
            with torch.no_grad():
                with FlopCounterMode(display=False) as counter:
                    layer(x)  # also the warm-up
                seconds[name].append(min(_timed(layer, x) for _ in range(plan.repeats)))
            operations[name].append(counter.get_total_flops())
    report.text("## Time and operations")
    report.text(
        f"One forward pass of a `Hopfield` layer over {TIMED_BATCH} sequences of {TIMED_WIDTH} values, sequences "
        f"being their own memories; random features: {TIMED_FEATURES}. Milliseconds are the least of {plan.repeats} "
        "passes. Operations are those of matrix products (two each multiply-add), as torch counts them: exponentials, "
        "sorting and drawing are not among them."
    )
    headers = ["model", *(f"length {length}" for length in plan.lengths)]
    milliseconds: list[list[Cell]] = [[name, *(1e3 * value for value in values)] for name, values in seconds.items()]
    report.table(headers, milliseconds, "Milliseconds", 1)
    report.table(
        headers, [[n, *(v / 1e6 for v in values)] for n, values in operations.items()], "Million operations", 1
    )
    report.figure(
        "efficiency", _growth(plan.lengths, seconds, operations), "A forward pass against the length of the sequence"
    )
    report.text("Slope of the last doubling (1 is linear, 2 quadratic): " + _slopes(plan.lengths, seconds, operations))


def _growth(lengths: Sequence[int], seconds: dict[str, list[float]], operations: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(9.6, 4.0))
    for axis, (title, measured, unit) in zip(
        figure.subplots(1, 2),
        (("time", seconds, "seconds"), ("operations of matrix products", operations, "operations")),
        strict=True,
    ):
        for index, (name, values) in enumerate(measured.items()):
            axis.plot(lengths, values, label=name, **_style(index))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xlabel("length")
        axis.set_ylabel(unit)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _slopes(lengths: Sequence[int], *measured: dict[str, list[float]]) -> str:
    doublings = math.log(lengths[-1] / lengths[-2])

    def slope(values: list[float]) -> str:
        return f"{math.log(values[-1] / values[-2]) / doublings:.1f}"

    seconds, operations = measured
    return (
        "; ".join(f"{name} {slope(seconds[name])} in time, {slope(operations[name])} in operations" for name in seconds)
        + "."
    )


def _timed(layer: Hopfield, x: Tensor) -> float:
    started = time.perf_counter()
    layer(x)
    return time.perf_counter() - started


def _slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())
