"""The figures of HEN's report. An encoder has the same colour in all of them, a similarity the same dash."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.papers.hen_cues import HOWS, Hidden, How
from benchmarks.papers.hen_findings import Answers, Asked, Findings, Method, Sheet
from service.core.names import Similarity

_COLOURS = ("tab:gray", "tab:blue", "tab:cyan", "tab:red", "tab:orange", "tab:green", "tab:purple", "tab:brown")
FRAME = 190

_DASHES: dict[Similarity, str] = {"dot": "-", "neg_l2": ":", "cosine": "--"}

# What the histograms show.
_SHOWN: tuple[tuple[Hidden, How], ...] = (
    ("half", "zeroed"),
    ("a quarter", "masked"),
    ("half", "masked"),
    ("three quarters", "masked"),
)


def betas(found: Findings, sizes: Iterable[int]) -> Figure:
    """1 - SSIM, and below it the identity share, against β; half hidden; a column for each size and kind of cue."""
    columns = [(how, rows) for rows in sizes for how in HOWS]
    figure = Figure(figsize=(3.4 * len(columns) + 1.5, 6.0))
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True, sharey="row")
    for column, (how, rows) in enumerate(columns):
        asked = Asked("half", how, rows)
        for method, by in found.found.items():
            if asked in by:
                _line(axes[0][column], by[asked], "dissimilarity", method, found)
                _line(axes[1][column], by[asked], "own", method, found)
        axes[0][column].set_title(f"{rows:,} memories, half {how}", fontsize=10)
        axes[1][column].set_xlabel("β")
    axes[0][0].set_ylabel("1 - SSIM")
    axes[1][0].set_ylabel("identity share")
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
        axis.set_ylim(-0.03, 1.03)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()
    return figure


def ranks(found: Findings) -> Figure:
    """Relative rank against steps, a panel for each encoder, a line for each β."""
    figure = Figure(figsize=(2.9 * len(found.ranks), 2.9))
    axes = figure.subplots(1, len(found.ranks), squeeze=False, sharey=True)[0]
    for axis, (name, by) in zip(axes, found.ranks.items(), strict=True):
        for number, (beta, trail) in enumerate(by.items()):
            axis.plot(trail, marker=".", label=f"β = {beta:g}", color=f"C{number}", alpha=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("steps")
        axis.set_xticks(range(0, len(trail), 2))
        axis.grid(alpha=0.3)
        axis.set_ylim(-0.03, 1.08)
    axes[0].set_ylabel("rank(recalled) / rank(memories)")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    return figure


def overlaps(found: Findings) -> Figure:
    """Histograms of cosines of cues with their own memory and with others; a row for each encoder."""
    names = list(found.overlaps)
    figure = Figure(figsize=(3.0 * len(_SHOWN), 1.9 * len(names)))
    axes = figure.subplots(len(names), len(_SHOWN), squeeze=False, sharex=True)
    for row, name in enumerate(names):
        for column, (hidden, how) in enumerate(_SHOWN):
            axis: Axes = axes[row][column]
            held = found.overlaps[name][hidden, how]
            bins = np.linspace(-0.5, 1.0, 61).tolist()
            axis.hist(
                held.own,
                bins=bins,
                density=True,
                histtype="stepfilled",
                color="tab:blue",
                alpha=0.6,
                label="own memory",
            )
            axis.hist(
                held.others,
                bins=bins,
                density=True,
                histtype="stepfilled",
                color="tab:red",
                alpha=0.6,
                label="other memories",
            )
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"{hidden} hidden, {how}", fontsize=9)
            if column == 0:
                axis.set_ylabel(name.replace(", ", ",\n"), fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("cosine with the cue")
    axes[0][0].legend(fontsize=7)
    figure.subplots_adjust(wspace=0.08, hspace=0.12)
    return figure


def sheet(pictures: Sheet) -> Figure:
    """Pictures in rows, each row with its label at the left; small ones enlarged to the size of the largest."""
    side = max(len(drawn) for row in pictures.rows for drawn in row)
    step = side + max(4, side // 12)
    canvas = np.full((step * len(pictures.rows), step * len(pictures.columns), 3), 255, np.uint8)
    for row, drawn in enumerate(pictures.rows):
        for column, pixels in enumerate(drawn):
            enlarged = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            top, left = 1 + row * step, 1 + column * step
            canvas[top - 1 : top + side + 1, left - 1 : left + side + 1] = FRAME  # a white picture is seen to be one
            canvas[top : top + side, left : left + side] = np.asarray(enlarged)
    figure = Figure(figsize=(1.05 * len(pictures.columns) + 2.4, 1.1 * len(pictures.rows) + 0.3))
    axis = figure.subplots()
    axis.imshow(canvas, interpolation="nearest")
    axis.set_xticks([side / 2 + step * column for column in range(len(pictures.columns))], pictures.columns, fontsize=8)
    axis.set_yticks(
        [side / 2 + step * row for row in range(len(pictures.rows))],
        [label.replace(": ", ":\n") for label in pictures.labels],
        fontsize=8,
    )
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def _line(axis: Axes, answers: Answers, what: str, method: Method, found: Findings) -> None:
    colour = _COLOURS[list(found.encoders).index(method.encoder) % len(_COLOURS)]
    values = [getattr(answer, what) for answer in answers.values()]
    axis.plot(list(answers), values, _DASHES[method.similarity], color=colour, label=method.label, alpha=0.8)
