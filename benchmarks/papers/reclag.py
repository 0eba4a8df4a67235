"""RecLag's tables: telling images unlike the stored from the stored, by features of a small classifier.

("Rectified Lagrangian for Out-of-Distribution Detection in Modern Hopfield Networks", Tables 1 and 2, Figures 3 and 5;
CIFAR-10 and its nine sets there, Fashion-MNIST and eleven sets here.)

Rules:
- Every figure comes from `reclag_experiment.experiment`, one per seed; nothing is chosen here.
- Shares are printed in percent, mean ± standard deviation over seeds; a set's column shows the mean alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.papers.reclag_detectors import auroc
from benchmarks.papers.reclag_experiment import (
    BETAS,
    STEPS,
    Outcome,
    Preset,
    experiment,
    mean_auroc,
    mean_fpr,
)
from benchmarks.papers.report import Report, Size, formatted

PRESETS: dict[Size, Preset] = {
    "quick": Preset(
        seeds=(0,), trained_on=20_000, validation=2_000, tested=3_000, width=16, epochs=3, stranger_width=16,
        stranger_epochs=2, stored=6_000, memories=128, rounds=15, others=600,
    ),
    "full": Preset(
        seeds=(0, 1, 2), trained_on=57_000, validation=3_000, tested=10_000, width=24, epochs=4, stranger_width=16,
        stranger_epochs=2, stored=20_000, memories=256, rounds=40, others=1_000,
    ),
}  # fmt: skip

# The paper's mean FPR95 of RecLag over SHE's (5.85 / 7.41, ResNet-18).
AIM = 0.79

_SPACES = ("as they are", "centred", "whitened")


def run(size: Size, out: Path) -> None:
    """Writes `out/reclag.md` and its figures."""
    preset = PRESETS[size]
    report = Report("RecLag: out-of-distribution detection", out, "reclag", size, preset.seeds)
    outcomes = [experiment(preset, seed, report.progress) for seed in preset.seeds]
    _setting(report, preset, outcomes)
    _detection(report, outcomes)
    _strangers(report, outcomes)
    _spaces(report, outcomes)
    _over_steps(report, outcomes)
    report.write()


def _setting(report: Report, preset: Preset, outcomes: Sequence[Outcome]) -> None:
    report.text(
        f"A residual network of {4 * preset.width} penultimate features is trained on {preset.trained_on:,} images"
        f" of Fashion-MNIST for {preset.epochs} epochs; test accuracy "
        f"{formatted([100 * each.accuracy for each in outcomes], 1)}%. Every detector sees the same features. "
        f"Known: {preset.tested:,} test images. Unlike: up to {preset.others:,} images of each of the sets below "
        "(MNIST's digits, silhouettes of animals, 8×8 digits, pieces of photographs, of textures and of pages, "
        "three generated kinds, and known images inverted and turned). FPR95: the share of them that passes where"
        f" 95% of the known do. kNN and RecLag's bank hold {preset.stored:,} training features; RecLag's "
        f"prototypes and learned matrices {preset.memories} memories."
    )
    report.text(
        "RecLag scores log S(v) = log Σ exp(β ξ·v) of the feature scaled to norm 10, without any step. *As in the "
        "paper*: features as they are, β = 5, ξ learned by the exact likelihood. *Published code*: the same, with a "
        "matrix for each class, of which the predicted class's is asked, and no λ. *Bank*, *prototypes*, *learned*: "
        "ξ is the stored features, their k-means centres, or learned; β and the space are tuned. *Path*: the least "
        f"log S over {STEPS} steps."
    )
    report.text(
        "Tuned, for each seed, are kNN's k and RecLag's β and feature space, by the mean FPR95 on held-out "
        "training images against outliers made for it (blurred noise, flat images, known images with their tiles "
        "shuffled, known images averaged in pairs). None of these is a kind that is tested. The others use their "
        "papers' values (ReAct: 90th percentile; MHE: β = 0.01)."
    )


def _detection(report: Report, outcomes: Sequence[Outcome]) -> None:
    methods, sets = list(outcomes[0].measures), list(outcomes[0].measures["SHE"])
    fpr = {method: [100 * mean_fpr(each.measures[method]) for each in outcomes] for method in methods}
    report.table(
        ["", *sets, "mean FPR95", "mean AUROC"],
        [
            [
                method,
                *(fmean(100 * each.measures[method][name][0] for each in outcomes) for name in sets),
                fpr[method],
                [100 * mean_auroc(each.measures[method]) for each in outcomes],
            ]
            for method in methods
        ],
        "FPR95 in percent (lower is better), by set; the two last columns are means over the sets",
        digits=1,
    )
    report.text(_verdict(fpr))
    chosen = list(outcomes[0].chosen)
    seeds = [f"seed {seed}" for seed in report.seeds]
    report.table(
        ["", *seeds], [[name, *(each.chosen[name] for each in outcomes)] for name in chosen], "What was tuned, or fixed"
    )
    figure = Figure(figsize=(8, 0.36 * len(methods) + 1.2))
    axes = figure.subplots()
    for place, method in enumerate(reversed(methods)):
        each = [fmean(100 * outcome.measures[method][name][0] for outcome in outcomes) for name in sets]
        colour = "tab:blue" if method.startswith("RecLag") else "tab:gray"
        axes.plot(each, [place] * len(each), "o", color=colour, alpha=0.35, markersize=5)
        axes.plot(fmean(fpr[method]), place, "|", color=colour, markersize=18, markeredgewidth=3)
    axes.set_yticks(range(len(methods)), list(reversed(methods)))
    axes.set_xlabel("FPR95 in percent: a dot for each set, a bar for their mean")
    axes.set_xlim(-2, 102)
    axes.grid(axis="x", alpha=0.3)
    report.figure("fpr95", figure, "FPR95 of every detector on every set")


def _verdict(fpr: dict[str, list[float]]) -> str:
    """What the table says about the aim: RecLag tuned, learned matrix, against SHE and kNN."""
    mean = {method: fmean(values) for method, values in fpr.items()}
    tuned = min(("RecLag, bank", "RecLag, prototypes", "RecLag, learned"), key=mean.__getitem__)
    learned, paper = mean["RecLag, learned"], mean["RecLag as in the paper"]

    def against(value: float) -> str:
        she, knn = value / mean["SHE"], value / mean["kNN"]
        return (
            f"{she:.2f} of SHE's mean FPR95 ({'within' if she <= AIM else 'over'} the paper's {AIM}) and {knn:.2f}"
            f" of kNN's ({'not over it' if knn <= 1 else 'over it'})"
        )

    others = [name for name in mean if not name.startswith("RecLag")]
    best = min(others, key=mean.__getitem__)
    return (
        f"With the learned matrix, tuned, RecLag has {against(learned)}. As in the paper (features as they are, "
        f"norm 10, β = 5) it has {against(paper)}. The best of the others is {best} ({mean[best]:.1f}%), the best "
        f"of RecLag's three matrices {tuned.removeprefix('RecLag, ')} ({mean[tuned]:.1f}%)."
    )


def _strangers(report: Report, outcomes: Sequence[Outcome]) -> None:
    names = np.array(
        ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    )
    left_out = "; ".join(" and ".join(names[list(each.left_out)]) for each in outcomes)
    report.text(
        "## Strangers of the same kind\n\nTwo classes, drawn by the seed, are left out of training, storing and "
        f"tuning; their test images are the strangers ({left_out}). The smaller classifier of the other eight has "
        f"a test accuracy of {formatted([100 * each.accuracy_of_kept for each in outcomes], 1)}%. These are apart "
        "from the table above: such a stranger is much nearer to the stored than anything there."
    )
    report.table(
        ["", "FPR95", "AUROC"],
        [
            [method, *([100 * each.stranger_measures[method][index] for each in outcomes] for index in (0, 1))]
            for method in outcomes[0].stranger_measures
        ],
        "Strangers of the same kind, in percent",
        digits=1,
    )
    area = {
        method: fmean(100 * each.stranger_measures[method][1] for each in outcomes)
        for method in outcomes[0].stranger_measures
    }
    best = max(area, key=area.__getitem__)
    report.text(
        f"By AUROC {best} is the best here ({area[best]:.1f}%). RecLag's β and space, tuned for far outliers, have "
        f"{area['RecLag, prototypes']:.1f}% with prototypes and {area['RecLag, bank']:.1f}% with the bank: what tells "
        "far things apart need not tell near ones apart."
    )


def _spaces(report: Report, outcomes: Sequence[Outcome]) -> None:
    report.text(
        "## What RecLag's strength rests on\n\nThe same score over the same number of prototypes, by feature "
        "space and β (norm 10 throughout). Looked at after the choice above, which was made on other outliers. A "
        "large β asks how near the nearest memory is, as kNN does. As β falls, log S tends to log N + β m·v + ½β²"
        " vᵀCv (m and C the memories' mean and covariance): how much of v lies in the directions along which the "
        "memories spread. Whitened within the classes, these are the directions in which the classes differ, and "
        "what is unlike all of them points elsewhere. At a smaller β still the memories' mean alone counts."
    )
    report.table(
        ["β", *_SPACES],
        [
            [f"{beta:g}", *([100 * each.by_space[name, beta] for each in outcomes] for name in _SPACES)]
            for beta in BETAS
        ],
        "Mean FPR95 over the unlike sets, in percent, of log S over prototypes",
        digits=1,
    )
    report.table(
        ["", "mean FPR95"],
        [[name, [100 * each.whitened[name] for each in outcomes]] for name in outcomes[0].whitened],
        "Other scores in the whitened space, in percent",
        digits=1,
    )


def _over_steps(report: Report, outcomes: Sequence[Outcome]) -> None:
    report.text(
        "## Over time\n\nThe detector needs no step (t = 0). When the dynamics runs, v ← Ξᵀ softmax(β Ξ v) takes "
        "unlike images to memories as well, and log S tells them apart less and less; with the gate what is under "
        "log λ falls to the origin and stays there. A known image that comes to a state under log λ on its way "
        "falls as well, so a verdict after steps needs a threshold set on the path. λ is set here on held-out "
        "training images' log S at t = 0, to accept 95% of the known (split conformal). The others here are equal "
        "numbers of every unlike set."
    )
    rows: list[list[str | float | Sequence[float] | None]] = []
    for name in outcomes[0].steps:
        each = [outcome.steps[name] for outcome in outcomes]
        rows.append([name, "no", *([100 * auroc(*_at(one.plain, t)) for one in each] for t in range(STEPS + 1))])
        gated = [one.gated for one in each if one.gated is not None]
        rows.append([name, "yes", *([100 * auroc(*_at(one, t)) for one in gated] for t in range(STEPS + 1))])
    report.table(
        ["", "gate", *(f"t = {t}" for t in range(STEPS + 1))], rows, "AUROC of log S at each step, in percent", digits=1
    )
    rows = []
    for name in outcomes[0].steps:
        shares = [one.rejected for outcome in outcomes if (one := outcome.steps[name]).rejected is not None]
        for whose, index in (("known", 0), ("unlike", 1)):
            at = [[100 * share[index][when] for share in shares if share is not None] for when in (0, 1)]
            rows.append([name, whose, at[0], at[1], [100 - first - later for first, later in zip(*at, strict=True)]])
    report.table(
        ["", "", "rejected at step 0", "fell to the origin later", "kept"],
        rows,
        "What becomes of a cue, in percent",
        digits=1,
    )
    falling = {
        name: fmean(100 * one.rejected[0][1] for outcome in outcomes if (one := outcome.steps[name]).rejected)
        for name in outcomes[0].steps
        if any(outcome.steps[name].rejected for outcome in outcomes)
    }
    after = ", ".join(f"{share:.1f}% ({name})" for name, share in falling.items())
    report.text(
        f"Of the known, fallen after step 0: {after}. A β that is best for the gate may be too low for recall, which "
        "then averages many memories: the gate judges the cue, at its own β, and recall runs at another."
    )
    for name in outcomes[0].steps:
        for seed, outcome in zip(report.seeds, outcomes, strict=True):
            if isinstance(why := outcome.steps[name].log_lambda, str):
                report.text(f"{name}, seed {seed}: no threshold was set. {why.capitalize()}.")
    report.figure(
        "steps", _drawn_steps(outcomes[0]), "log S over time: median and the middle 80%, seed " + str(report.seeds[0])
    )


def _drawn_steps(outcome: Outcome) -> Figure:
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(len(outcome.steps), 2, sharex=True, squeeze=False)
    for row, (name, steps) in zip(panels, outcome.steps.items(), strict=True):
        for axes, masses, title in zip(row, (steps.plain, steps.gated), ("without the gate", "with it"), strict=True):
            axes.set_title(f"{name}, {title}", fontsize=10)
            if masses is None:
                axes.text(0.5, 0.5, "no threshold", ha="center", transform=axes.transAxes)
                continue
            for of, label, colour in zip(masses, ("known", "unlike"), ("tab:blue", "tab:orange"), strict=True):
                low, middle, high = of.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=of.dtype), dim=0)
                axes.fill_between(range(STEPS + 1), low, high, color=colour, alpha=0.25, linewidth=0)
                axes.plot(middle, "o-", color=colour, label=label, markersize=4)
            if isinstance(steps.log_lambda, float):
                axes.axhline(steps.log_lambda, color="black", linestyle="--", linewidth=1, label="log λ")
        row[0].set_ylabel("log S")
    for axes in panels[-1]:
        axes.set_xlabel("time step")
    panels[0, 0].legend(fontsize=9)
    return figure


def _at(masses: tuple[torch.Tensor, torch.Tensor], t: int) -> tuple[torch.Tensor, torch.Tensor]:
    return masses[0][:, t], masses[1][:, t]
