"""The figures of U-Hop's report: a column for each data set.

Rules:
- Errors are drawn on an axis that is linear up to 1 and logarithmic beyond, since the good methods reach 0.
- The same method has the same colour in every figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.uhop_findings import HARD_CUES, PAPER_CUES, Findings, own, series
from benchmarks.papers.uhop_methods import BESIDE, MAGNITUDE, MEANT, PRINTED, PUBLISHED, TUNED, Answers, Method

COLOURS = {
    "dot": "tab:gray",
    "+L2": "tab:pink",
    "+Manhattan": "tab:olive",
    "-L2": "tab:purple",
    "-L2²": "tab:purple",
    "-Manhattan": "tab:brown",
    "cosine": "tab:blue",
    "whitening 0.1": "tab:cyan",
    "U-Hop as printed": "tab:orange",
    "U-Hop": "tab:red",
    "U-Hop+": "tab:green",
    "cue-trained": "black",
}
DASHES = {"softmax": "-", "sparsemax": "--"}

AT_ONE = (*PUBLISHED[:2], *PUBLISHED[3:], *MEANT[:2], *PRINTED[:1], *MAGNITUDE[:1], *BESIDE)
AT_BEST = tuple(m for m in TUNED if m.separation == "softmax" and m.similarity in COLOURS)


def sizes(findings: Sequence[Findings]) -> Figure:
    """Error against memory size at the paper's β = 1."""
    figure, axes = _panels(1, len(findings))
    for axis, found in zip(axes[0], findings, strict=True):
        by_size = found.by_size[PAPER_CUES]
        for method in AT_ONE:
            _line(axis, list(by_size), series(by_size, method), method)
        _label(axis, found.name, "memories", "error at the paper's β = 1")
    return _with_legend(figure, axes)


def tuned(findings: Sequence[Findings]) -> Figure:
    """Error, and below it identity share, against memory size at tuned β."""
    figure, axes = _panels(2, len(findings))
    for column, found in enumerate(findings):
        by_size = found.by_size[HARD_CUES]
        for method in AT_BEST:
            _line(axes[0][column], list(by_size), series(by_size, method), method)
            shares = [own(answers[method]) for answers in by_size.values()]
            _line(axes[1][column], list(by_size), shares, method)
        _label(axes[0][column], found.name, "memories", "error, β tuned")
        _label(axes[1][column], "", "memories", "identity share", errors=False)
    return _with_legend(figure, axes)


def noise(findings: Sequence[Findings]) -> Figure:
    """Error against σ: at the paper's β = 1, and at tuned β, folded noise and plain."""
    rows: list[tuple[str, Sequence[Method], str]] = [
        ("folded", AT_ONE, "folded noise, the paper's β = 1"),
        ("folded", AT_BEST, "folded noise, β tuned"),
        ("plain", AT_BEST, "plain noise, β tuned"),
    ]
    figure, axes = _panels(len(rows), len(findings))
    for row, (kind, methods, words) in enumerate(rows):
        for axis, found in zip(axes[row], findings, strict=True):
            by_level: dict[float, Answers] = {
                sigma: answers for (name, sigma), answers in found.by_noise.items() if name == kind
            }
            for method in methods:
                _line(axis, list(by_level), series(by_level, method), method)
            _label(axis, found.name if row == 0 else "", "σ", words, logarithmic=False)
    return _with_legend(figure, axes)


def iterations(findings: Sequence[Findings]) -> Figure:
    """Errors and separation loss against iterations, each training a line."""
    quantities = {"printed_masked": "error, masked, as printed", "unit_half": "error, right half, unit features"}
    figure, axes = _panels(3, len(findings))
    for column, found in enumerate(findings):
        for training, fits in found.by_iteration.items():
            for row, (name, words) in enumerate((*quantities.items(), ("loss", "separation loss"))):
                values = [fmean(getattr(run, name) for run in runs) for runs in fits.values()]
                axes[row][column].plot(list(fits), values, marker=".", label=training)
                _label(axes[row][column], found.name if row == 0 else "", "iterations", words, errors=False)
                axes[row][column].set_xscale("symlog", linthresh=1)
    return _with_legend(figure, axes)


def losses(findings: Sequence[Findings]) -> Figure:
    """Separation loss against error, a dot for each training."""
    figure, axes = _panels(2, len(findings))
    for column, found in enumerate(findings):
        x = [run.loss for run in found.runs]
        rows = (("printed_masked", "error, masked, as printed"), ("unit_half", "error, right half, unit features"))
        for row, (name, words) in enumerate(rows):
            axes[row][column].scatter(x, [getattr(run, name) for run in found.runs], s=8, color="tab:red")
            title = found.name if row == 0 else ""
            _label(axes[row][column], title, "separation loss", words, logarithmic=False, errors=False)
    figure.tight_layout()
    return figure


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(4.6 * columns + 2.2, 3.1 * rows))
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _line(axis: Axes, x: Sequence[float], y: Sequence[float], method: Method) -> None:
    style = DASHES.get(str(method.separation), ":")
    axis.plot(x, y, style, marker=".", color=COLOURS[method.similarity], label=method.label)


def _label(axis: Axes, title: str, x: str, y: str, *, logarithmic: bool = True, errors: bool = True) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    if logarithmic:
        axis.set_xscale("log")
    if errors:
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=0)


def _with_legend(figure: Figure, axes: list[list[Axes]]) -> Figure:
    lines = {}
    for row in axes:
        for axis in row:
            lines.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    figure.legend(lines.values(), lines.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()
    return figure
