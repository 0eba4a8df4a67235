"""Multiple-instance learning on bags of digits (Hu et al. 2024, appendix E.2; Ilse, Tomczak, Welling, "Attention-based
Deep Multiple Instance Learning", 2018): does a bag hold the target digit?

Strategy: one model for all, an embedding of every image, a pooling, a classifier; only the pooling differs. Bags of
training and test are made of different images.

Rules:
- A positive bag holds the target once, so the larger the bag, the rarer the signal; half of the bags are positive.
- Nothing is chosen by the test bags: the figures are those after the last epoch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.papers.data import Images
from benchmarks.papers.report import Cell, Report, Size
from engram.layers import Association, HopfieldPooling, RandomFeatures

TARGET = 9

# Half the paper's head dimension, and images of 14×14: with 28×28 and 64 the table takes five times as long.
HEADS, HEAD_WIDTH = 4, 32
WIDTH = HEADS * HEAD_WIDTH
QUANTITY = 2
FEATURES = 64
BATCH = 50
RATE = 1e-3
PAPER_SCALING = 0.1


@dataclass(frozen=True)
class Plan:
    """What a size of run trains."""

    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    scalings: tuple[float, ...]
    scaled_size: int  # the bag size at which the scalings are compared and the curves drawn
    training_bags: int
    epochs: int


PLANS: dict[Size, Plan] = {
    "quick": Plan((0,), (5, 20), (1.0,), 5, 600, 8),
    "full": Plan((0, 1, 2), (5, 10, 20), (1.0,), 10, 1000, 15),
}
TEST_BAGS = 500


@dataclass(frozen=True)
class Bags:
    """images: (bags, size, values); labels: (bags,), 1 where the bag holds the target."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Course:
    """What training came to: accuracy on the test bags and mean training loss after each epoch, and the seconds."""

    accuracy: list[float]
    loss: list[float]
    seconds: float


def bags(images: Images, count: int, size: int, generator: np.random.Generator) -> Bags:
    """`count` bags of `size` images each, half with the target once and half without it."""
    assert images.labels is not None
    targets, others = (np.flatnonzero((images.labels == TARGET) == wanted) for wanted in (True, False))
    held = others[generator.integers(len(others), size=(count, size))]
    labels = np.arange(count) % 2
    positive = np.flatnonzero(labels)
    place = generator.integers(size, size=len(positive))
    held[positive, place] = targets[generator.integers(len(targets), size=len(positive))]
    return Bags(torch.from_numpy(_small(images)[held]), torch.from_numpy(labels).float())


def _small(images: Images) -> NDArray[np.float32]:
    """Means of 2×2 pixels, 0 to 1, as rows."""
    count, height, width = images.pixels.shape
    means: NDArray[np.float32] = images.pixels.reshape(count, height // 2, 2, width // 2, 2).mean((2, 4), np.float32)
    return means.reshape(count, -1) / np.float32(255)


class MeanPooling(nn.Module):
    """The mean of a bag: no attention at all."""

    width = WIDTH

    def forward(self, x: Tensor) -> Tensor:
        """(bags, size, values) → (bags, values)."""
        return x.mean(1)


class AttentionPooling(nn.Module):
    """Σ a_k h_k, a = softmax(wᵀ(tanh(V h_k) ⊙ sigm(U h_k))) (Ilse et al. 2018, eq. 9)."""

    width = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.content, self.gate, self.weight = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(bags, size, values) → (bags, values)."""
        weights = torch.softmax(self.weight(torch.tanh(self.content(x)) * torch.sigmoid(self.gate(x))), dim=1)
        return (weights * x).sum(1)


class _Pooled(HopfieldPooling):
    width = WIDTH * QUANTITY


Pooling = MeanPooling | AttentionPooling | _Pooled


class Classifier(nn.Module):
    """Embedding, layer norm, pooling, layer norm, a linear classifier (the paper's, with half of its widths)."""

    def __init__(self, values: int, pooling: Pooling) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(values, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU())
        self.pooling = pooling
        self.head = nn.Sequential(nn.LayerNorm(pooling.width), nn.Linear(pooling.width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The log-odds that each bag holds the target."""
        logits: Tensor = self.head(self.pooling(self.embedding(x)))
        return logits.squeeze(-1)


def hopfield(association: Association, scaling: float) -> _Pooled:
    """The paper's pooling: 4 heads, 2 state patterns."""
    if isinstance(association.features, RandomFeatures):
        association = replace(association, features=RandomFeatures(FEATURES))
    return _Pooled(
        WIDTH, quantity=QUANTITY, num_heads=HEADS, hidden_size=HEAD_WIDTH, scaling=scaling, association=association
    )


def trained(pooling: Callable[[], Pooling], training: Bags, test: Bags, epochs: int, seed: int) -> Course:
    """Train by AdamW with a cosine schedule, the paper's."""
    torch.manual_seed(seed)
    model = Classifier(training.images.shape[-1], pooling())
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    count = len(training.labels)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * -(-count // BATCH))
    accuracy, losses = [], []
    started = time.perf_counter()
    for _ in range(epochs):
        model.train()
        total = 0.0
        for chosen in torch.split(torch.randperm(count), BATCH):
            logits = model(training.images[chosen])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, training.labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        losses.append(total / count)
        model.eval()
        with torch.no_grad():
            right = (model(test.images) > 0) == (test.labels > 0)
        accuracy.append(float(right.double().mean()))
    return Course(accuracy, losses, time.perf_counter() - started)


def multiple_instances(report: Report, digits: Images, models: dict[str, Association], size: Size) -> None:
    """The tables and the figure of multiple-instance learning."""
    plan = PLANS[size]
    poolings: dict[str, Callable[[], Pooling]] = {"mean": MeanPooling, "gated attention": AttentionPooling}
    poolings |= {name: partial(hopfield, model, PAPER_SCALING) for name, model in models.items()}
    kernel = Association(similarity="cosine", kernel_size=HEAD_WIDTH)
    courses = {
        (name, bag): _courses(report, name, pooling, digits, bag, plan)
        for bag in plan.sizes
        for name, pooling in poolings.items()
    }
    scaled: dict[tuple[str, float], list[Course]] = {}
    for name, model in {**models, "dense, kernel": kernel}.items():
        for scaling in plan.scalings:
            pooling = partial(hopfield, model, scaling)
            scaled[name, scaling] = _courses(
                report, f"{name}, β = {scaling:g}", pooling, digits, plan.scaled_size, plan
            )
    report.text("## Multiple-instance learning")
    report.text(
        f"Does a bag hold the digit {TARGET}? Positive bags hold it once. {plan.training_bags} training and "
        f"{TEST_BAGS} test bags, made of {_trained_on(digits):,} and {len(digits) - _trained_on(digits):,} different "
        f"digits ({digits.source}) of 14×14; embedding to {WIDTH}, pooling with {HEADS} heads and {QUANTITY} states, "
        f"AdamW for {plan.epochs} epochs, the last one's accuracy. `mean` and `gated attention` (Ilse et al. 2018) in "
        f"place of a Hopfield pooling. β is {PAPER_SCALING:g}, the paper's, unless said; random features: {FEATURES}. "
        "Windows are left out, as in the paper: two states have no places in a bag. Top 20% of a bag of 5 is one row. "
        f"Seeds: {', '.join(map(str, plan.seeds))}."
    )
    headers = ["pooling", *(f"bags of {bag}" for bag in plan.sizes), f"seconds, bags of {plan.sizes[-1]}"]
    rows: list[list[Cell]] = [
        [
            name,
            *([course.accuracy[-1] for course in courses[name, bag]] for bag in plan.sizes),
            statistics.fmean(course.seconds for course in courses[name, plan.sizes[-1]]),
        ]
        for name in poolings
    ]
    report.table(headers, rows, f"Accuracy, β = {PAPER_SCALING:g}")
    names = list(dict.fromkeys(name for name, _ in scaled))
    known = {name: [c.accuracy[-1] for c in courses[name, plan.scaled_size]] for name in models}
    compared: list[list[Cell]] = [
        [name, known.get(name), *([c.accuracy[-1] for c in scaled[name, b]] for b in plan.scalings)] for name in names
    ]
    report.table(
        ["pooling", f"β = {PAPER_SCALING:g}", *(f"β = {scaling:g}" for scaling in plan.scalings)],
        compared,
        f"Accuracy, bags of {plan.scaled_size}, by β (`dense, kernel`: U-Hop's, learned with the rest)",
    )
    shown = {name: courses[name, plan.scaled_size] for name in poolings}
    report.figure("mil", _curves(shown), f"Bags of {plan.scaled_size}: training loss and test accuracy by epoch")
    report.text(_findings(plan, {key: _mean(held) for key, held in courses.items()}, list(models)))


def _courses(
    report: Report,
    name: str,
    pooling: Callable[[], Pooling],
    digits: Images,
    size: int,
    plan: Plan,
) -> list[Course]:
    held = []
    for seed in plan.seeds:
        generator = np.random.default_rng([seed, size])
        order = generator.permutation(len(digits))
        cut = _trained_on(digits)
        training = bags(digits.take(order[:cut]), plan.training_bags, size, generator)
        test = bags(digits.take(order[cut:]), TEST_BAGS, size, generator)
        held.append(trained(pooling, training, test, plan.epochs, seed))
    report.progress(f"bags of {size}: {name} {_mean(held):.3f}, {held[0].seconds:.1f} s a run")
    return held


def _trained_on(digits: Images) -> int:
    """Images that training bags are made of; the others are for the test's."""
    return len(digits) * 4 // 5


def _mean(courses: list[Course]) -> float:
    return statistics.fmean(course.accuracy[-1] for course in courses)


def _curves(shown: dict[str, list[Course]]) -> Figure:
    figure = Figure(figsize=(9.6, 4.2))
    left, right = figure.subplots(1, 2)
    for index, (name, courses) in enumerate(shown.items()):
        epochs = range(1, len(courses[0].loss) + 1)
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--", "linewidth": 1.3}
        left.plot(epochs, [statistics.fmean(v) for v in zip(*(c.loss for c in courses), strict=True)], **style)
        means = [statistics.fmean(v) for v in zip(*(c.accuracy for c in courses), strict=True)]
        right.plot(epochs, means, label=name, **style)
    for axis, label in ((left, "training loss"), (right, "test accuracy")):
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="lower center", ncol=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return figure


def _findings(plan: Plan, means: dict[tuple[str, int], float], models: list[str]) -> str:
    """The first table in words."""
    lines = []
    for bag in plan.sizes:
        ranked = sorted(models, key=lambda name: -means[name, bag])
        lines.append(
            f"- bags of {bag}: best Hopfield pooling {ranked[0]} {means[ranked[0], bag]:.3f}, last {ranked[-1]} "
            f"{means[ranked[-1], bag]:.3f}; dense {means['dense', bag]:.3f}; mean pooling {means['mean', bag]:.3f}; "
            f"gated attention {means['gated attention', bag]:.3f}."
        )
    return "\n".join(lines)
