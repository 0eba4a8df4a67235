"""The kernel trained for cues, and the choice for each cue: what the four papers lack.

Share of cues whose own image comes first (identity share), by every comparison alone, by the calibrated choice, and by
an oracle that takes whichever was right.

Two settings. In the first a cue is a vector and nobody says what of it is missing: one kernel and one choice serve all
kinds (core alone). In the second pictures are stored in a collection and recalled through the product, where a mask
says what is missing (kernel_product.py).

Rules:
- A kernel is trained on cues of the declared kinds, the choice is fitted on cues drawn apart, and the table is made of
  cues drawn apart from both. What a fixed comparison is tuned by is the fitting cues.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.papers import data
from benchmarks.papers.kernel_cues import DECLARED, UNDECLARED, corrupt
from benchmarks.papers.kernel_product import through_the_product
from benchmarks.papers.report import Cell, Report, Size
from service.core.choice import fit
from service.core.kernel import Training, features, train, whitening

SEED = 0
RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
SIZES = {"quick": (1_000, 300, 100), "full": (10_000, 2_000, 3_000)}  # patterns, cues of a kind, steps at most


def run(size: Size, out: Path) -> None:
    torch.manual_seed(SEED)
    report = Report("A kernel for cues, and a choice for each cue", out, "kernel", size, SEED)
    patterns, cues, steps = SIZES[size]
    images = data.fashion().take(slice(patterns))
    _as_vectors(report, torch.from_numpy(images.rows()), cues, steps)
    through_the_product(report, images, cues, size)
    report.write()


def _as_vectors(report: Report, stored: Tensor, cues: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randperm(len(stored), generator=generator)
    judged, fitting = rows[:cues], rows[-min(cues, 400) :]
    fit_cues = {kind: corrupt(kind, stored[fitting], generator) for kind in DECLARED}
    ways, ridges = _fixed(stored), {}
    for kind, some in fit_cues.items():
        shares = {ridge: _found(_whitened(stored, ridge), some, fitting) for ridge in RIDGES}
        ridges[kind] = max(shares, key=lambda ridge: shares[ridge])
    # A kernel is needed for what no comparison of the fixed ones finds, so it is trained on that most.
    missed = [
        1.0 - torch.stack([way(some).argmin(1) == fitting for way in ways.values()]).any(0).double().mean()
        for some in fit_cues.values()
    ]
    need = torch.tensor([float(share) for share in missed]) + 0.1
    began = time.perf_counter()

    def draw(wanted: Tensor, drawn_by: torch.Generator) -> Tensor:
        kinds = torch.multinomial(need, len(wanted), replacement=True, generator=drawn_by)
        made = torch.empty(len(wanted), stored.shape[1])
        for position, kind in enumerate(DECLARED):
            if (these := kinds == position).any():
                made[these] = corrupt(kind, stored[wanted[these]], drawn_by)
        return made

    for progress in train(stored, Training(steps_max=steps, seed=SEED), draw):
        if progress.step % 200 == 0:
            report.progress(f"kernel: step {progress.step}, held-out loss {progress.held_out:.3f}")
    seconds = time.perf_counter() - began
    ways["kernel"] = _cosine(features(progress.weight, stored), progress.weight)
    evidence = {kind: _evidence(ways, some) for kind, some in fit_cues.items()}
    nearest, first, second = (torch.cat([found[i] for found in evidence.values()]) for i in range(3))
    choice = fit(nearest, first, second, fitting.repeat(len(DECLARED)))
    table: list[list[Cell]] = []
    for kind in (*DECLARED, *UNDECLARED):
        report.progress(f"vectors: {kind}")
        some = corrupt(kind, stored[judged], generator)
        nearest, first, second = _evidence(ways, some)
        right = nearest == judged[:, None]
        picked = choice.probabilities(nearest, first, second).argmax(1, keepdim=True)
        ridge = ridges.get(kind)
        white = (
            max(_found(_whitened(stored, tried), some, judged) for tried in RIDGES)
            if ridge is None
            else _found(_whitened(stored, ridge), some, judged)
        )
        alone = [float(share) for share in right.double().mean(0)]
        best = max(*alone[:2], white)
        chosen = float(right.gather(1, picked).double().mean())
        table.append([kind, *alone[:2], white, best, *alone[2:], chosen, float(right.any(1).double().mean())])
    report.text(
        f"## Vectors, with nothing said of what is missing\n\n{len(stored):,} Fashion-MNIST images as 784 values, "
        f"{cues:,} cues of each kind. The kernel (784 by 784) was trained for {progress.step:,} steps in {seconds:.0f} "
        f"s on cues of the first {len(DECLARED)} kinds; the choice was fitted on {len(fitting)} cues of each of these. "
        f"The other kinds were not declared. Whitening has the ridge that serves each kind best (of "
        f"{', '.join(map(str, RIDGES))} times the mean eigenvalue); cosine and −L2 have nothing to tune where only the "
        "first place counts. *Observed −L2* is the distance over the values of the cue that are not 0."
    )
    report.table(
        ["cue", "cosine", "−L2", "whitening", "best fixed", "observed −L2", "kernel alone", "`kernel: auto`", "oracle"],
        table, "Identity share, vectors",
    )  # fmt: skip


Way = Callable[[Tensor], Tensor]
"""(n, d) cues → (n, patterns) distances."""


def _fixed(stored: Tensor) -> dict[str, Way]:
    squares = stored.square()

    def distance(cue: Tensor, shown: Tensor) -> Tensor:
        return (cue.square().sum(1, keepdim=True) + shown @ squares.T - 2 * cue @ stored.T).clamp_min(0)

    return {
        "cosine": _cosine(torch.nn.functional.normalize(stored, dim=1), None),
        "−L2": lambda cue: distance(cue, torch.ones_like(cue)),
        "observed −L2": lambda cue: distance(cue, (cue != 0).float()),
    }


def _cosine(unit: Tensor, weight: Tensor | None) -> Way:
    def distance(cue: Tensor) -> Tensor:
        image = torch.nn.functional.normalize(cue, dim=1) if weight is None else features(weight, cue)
        return 1 - image @ unit.T

    return distance


_whitenings: dict[tuple[int, float], Way] = {}


def _whitened(stored: Tensor, ridge: float) -> Way:
    if (id(stored), ridge) not in _whitenings:
        weight = whitening(stored, ridge)
        _whitenings[id(stored), ridge] = _cosine(features(weight, stored), weight)
    return _whitenings[id(stored), ridge]


def _found(way: Way, cues: Tensor, own: Tensor) -> float:
    return float((way(cues).argmin(1) == own).double().mean())


def _evidence(ways: dict[str, Way], cues: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    near = [way(cues).topk(2, dim=1, largest=False) for way in ways.values()]
    distances = torch.stack([found.values for found in near], dim=1)
    return torch.stack([found.indices[:, 0] for found in near], dim=1), distances[..., 0], distances[..., 1]
