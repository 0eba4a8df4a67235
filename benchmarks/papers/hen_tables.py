"""HEN's findings as tables, figures and sentences. Every sentence with a figure in it is made from the findings.

Rules:
- A cell is 1 - SSIM, the mean squared error in brackets after it where there is room, and the identity share.
- *At its best* is at the β of least 1 - SSIM of those asked for; the β is printed.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.papers import hen_figures
from benchmarks.papers.hen_cues import HIDDEN, HIDDEN_WORDS, HOWS
from benchmarks.papers.hen_findings import (
    Answer,
    Answers,
    Asked,
    Findings,
    best,
    claim_words,
    exact_from,
    norm_words,
)
from benchmarks.papers.hen_kernel_memory import ROWS_MAX
from benchmarks.papers.report import Cell, Report

CELLS = "1 - SSIM, MSE (identity share)"


def write(report: Report, findings: Sequence[Findings], lacking: str | None) -> None:
    """The whole report, figures included; `lacking` says why there are no drawings."""
    _introduction(report, findings, lacking)
    report.text("## Findings\n\n" + "\n\n".join(_summary(found) for found in findings))
    for found in findings:
        report.text(
            f"## {found.name}\n\n{found.count:,} pictures: {found.source}. {found.copies:,} of them have an exact copy "
            f"in the set. {found.cues} cues, {found.pictures} of them drawn and compared."
        )
        _claim_table(report, found)
        _sizes_table(report, found)
        _hidden_table(report, found)
        if found.kernels:
            _kernel_table(report, found)
        smallest, largest = found.sizes[0], found.sizes[-1]
        shown = sorted({max((rows for rows in found.sizes if rows <= 15_000), default=smallest), largest})
        report.figure(
            f"beta-{_slug(found)}", hen_figures.betas(found, shown), f"{found.name}: 1 - SSIM and identity against β"
        )
        _rank_words(report, found)
        report.figure(
            f"rank-{_slug(found)}",
            hen_figures.ranks(found),
            f"{found.name}, {smallest:,} memories, half masked, dot: rank of what is recalled over its memories'",
        )
        _overlap_table(report, found)
        report.figure(
            f"cosine-{_slug(found)}",
            hen_figures.overlaps(found),
            f"{found.name}, {smallest:,} memories: cosines of cues with their own memory, and with others",
        )
        if "examples" in found.sheets:
            report.figure("examples", hen_figures.sheet(found.sheets["examples"]), "Half masked, β = 500")
        if found.hetero:
            _hetero_table(report, found)
        if "shared" in found.sheets:
            report.text(
                "Uniqueness broken (HEN, figure 6): two memories with one caption. One step gives their mixture. After "
                "more steps rounding may let one of them win, which means nothing: both fit the cue alike; by dot, "
                "another may that scores higher with the mixture (of raw pixels the whitest, a blank). The service "
                "takes scores within rounding of the best as one, so that its mixture stays one, and judges the cue "
                "`ambiguous` by the odds at the cue, before any step."
            )
            report.figure("shared", hen_figures.sheet(found.sheets["shared"]), "Two memories that share a caption")
    report.text("## The paper's tables of β")
    for found in findings[:1]:
        for how in HOWS:
            _beta_table(report, found, Asked("half", how, found.sizes[0]))


def _slug(found: Findings) -> str:
    return found.name.lower().replace(" ", "-")


def _introduction(report: Report, findings: Sequence[Findings], lacking: str | None) -> None:
    first = findings[0]
    encoders = "\n".join(
        f"- *{name}*: {words}; {', '.join(f'{f.dimensions[name]:,}' for f in findings)} values."
        for name, words in first.encoders.items()
    )
    missing = {each.name: each.why for found in findings for each in found.missing}
    absent = "; ".join(f"{name} ({why})" for name, why in missing.items()) or "none"
    report.text(
        f"""
Kashyap, D'Souza, Shi, Wong, Wang, Syeda-Mahmood, "Modern Hopfield Networks meet Encoded Neural Representations" (2024),
tables 1 to 5, figures 2, 3, 6 and 7. The paper's pictures are COCO's, which no package carries:
{" and ".join(found.name for found in findings)} stand in.{f" No drawings: {lacking}." if lacking else ""} Cells:
**{CELLS}**.

- *1 - SSIM*, *MSE*: decode(recalled) against decode(stored), values from 0 to 1, never against the original picture.
  *Identity share*: the cues whose own memory has the largest weight where the dynamics settled.
- Cues: {HIDDEN_WORDS}.
  *zeroed*: the hidden part is black and the encoder is not told, as the paper's occlusion is read here. *masked*: the
  encoder is told (the service's way), and says nothing of what is hidden.
- *dot* and *L2* (-‖ξ - x‖²) on the codes as they are, as the paper; *cosine* is the service's. Softmax, all rows, until
  it rests or ten steps. β: the paper's 20 to 500, and 1,000 to
  10,000; none under 20 was asked for.
- *Equal cells*: every cell of the code's grid at one norm, hidden cells zero, which the paper's one-hot codes have of
  themselves (`hen_encoders.py`). Dot, L2 and cosine then rank alike and differ in the scale of β: by dot alone.

Encoders at hand, and the values of a code ({", ".join(found.name for found in findings)}):

{encoders}

Not at hand: {absent}.
"""
    )


def _summary(found: Findings) -> str:
    """What the tables of a set show."""
    sizes = [rows for rows in found.sizes if rows in (15_000, found.sizes[-1])]
    text = f"**{found.name}, half hidden.**\n\n{claim_words(found, sizes)}{norm_words(found, sizes[-1])}"
    for memories in found.kernels:
        at = {rows: answer for (how, rows), answer in memories.by_rows.items() if how == "masked"}
        text += (
            f"\n- Kernel memory network on {memories.encoder}, masked ({memories.shape.words}): "
            + ", ".join(f"{answer.dissimilarity:.3f} at {rows:,}" for rows, answer in at.items())
            + f" memories, at most {max(memories.kept.values()):.0e} off when asked for a memory by itself."
        )
    if found.hetero:
        text += "\n" + _hetero_words(found)
    return text


def _hetero_words(found: Findings) -> str:
    lines = []
    rows = max(each.rows for each in found.hetero)
    for each in found.hetero:
        if each.rows != rows:
            continue
        reached = [f"{m.label} (β ≥ {beta:g})" for m, a in each.answers.items() if (beta := exact_from(a)) is not None]
        short = {m: best(a)[1] for m, a in each.answers.items() if exact_from(a) is None}
        failing = ", ".join(f"{m.label} {a.dissimilarity:.3f}" for m, a in short.items())
        lines.append((each.text, reached, failing))
    texts = dict.fromkeys(text for text, _, _ in lines)
    words = []
    for text in texts:
        those = "; ".join(", ".join(reached) for said, reached, _ in lines if said == text and reached)
        others = "; ".join(failing for said, _, failing in lines if said == text and failing)
        words.append(
            f"- Captions by {text}, {rows:,} memories: exact with {those or 'nothing'}"
            + (f"; not with {others} (1 - SSIM at best)." if others else ".")
        )
    return "\n".join(words)


def _cell(answer: Answer) -> str:
    return f"{answer.dissimilarity:.3f}, {answer.error:.3f} ({answer.own:.2f})"


def _short(answer: Answer, first: float) -> str:
    return f"{answer.dissimilarity:.3f} ({answer.own:.2f}), first {first:.2f}"


def _at_best(answers: Answers) -> str:
    beta, answer = best(answers)
    return f"{_cell(answer)} at {beta:g}"


def _claim_table(report: Report, found: Findings) -> None:
    """From which β on recall is exact, or how far from it."""
    asked = [Asked("half", how, rows) for how in ("masked", "zeroed") for rows in found.sizes if rows >= 15_000]
    asked = asked or [Asked("half", how, found.sizes[-1]) for how in ("masked", "zeroed")]
    rows: list[list[Cell]] = []
    for method, by in found.found.items():
        shown: list[Cell] = []
        for each in asked:
            beta = exact_from(by[each])
            shown.append(f"**exact from β = {beta:g}**" if beta is not None else _at_best(by[each]))
        rows.append([method.label, *shown])
    report.table(
        ["method", *(f"{each.rows:,}, {each.how}" for each in asked)],
        rows,
        f"{found.name}, half hidden. Exact: 1 - SSIM 0.000 and identity 1.00 there and at every larger β; "
        f"else {CELLS} at the best β",
    )


def _sizes_table(report: Report, found: Findings) -> None:
    """HEN's table 1."""
    for how in HOWS:
        rows: list[list[Cell]] = [
            [method.label, *(_at_best(by[Asked("half", how, size)]) for size in found.sizes)]
            for method, by in found.found.items()
        ]
        report.table(
            ["method", *(f"{size:,}" for size in found.sizes)],
            rows,
            f"{found.name}, half {how} (HEN, table 1). {CELLS} at the best β; columns: memories",
        )


def _hidden_table(report: Report, found: Findings) -> None:
    for size in found.sizes[-2:]:
        asked = [Asked(hidden, how, size) for hidden in HIDDEN for how in HOWS]
        rows: list[list[Cell]] = [
            [
                method.label,
                *(_short(best(by[each])[1], found.first[method][each]) for each in asked),
            ]
            for method, by in found.found.items()
        ]
        alike: list[Cell] = [f"{found.shared[each]:.3f}" for each in asked]
        rows.append(["*cues that fit another memory just as well*", *alike])
        report.table(
            ["method", *(f"{each.hidden}, {each.how}" for each in asked)],
            rows,
            f"{found.name}, {size:,} memories. 1 - SSIM (identity share) at the best β; *first*: the share whose own "
            "memory scores highest at the cue, before any step",
        )


def _kernel_table(report: Report, found: Findings) -> None:
    rows: list[list[Cell]] = []
    for memories in found.kernels:
        for how in HOWS:
            cells = [_cell(memories.by_rows[how, size]) for size in memories.kept]
            rows.append([memories.encoder, how, memories.shape.words, *cells])
        rows.append(
            [memories.encoder, "by itself: largest error", "one step", *(f"{e:.0e}" for e in memories.kept.values())]
        )
    sizes = list(found.kernels[0].kept)
    report.table(
        ["codes", "cue", "kernel", *(f"{size:,}" for size in sizes)],
        rows,
        f"{found.name}: kernel memory networks (exponential kernel, K + 10⁻⁹ I solved in float64), half hidden; "
        f"columns: memories. Not over {ROWS_MAX:,}: K of 60,000 has 29 GB. Identity: the own memory is nearest",
    )


def _beta_table(report: Report, found: Findings, asked: Asked) -> None:
    """HEN's tables 3 and 4 in one."""
    methods = [method for method, by in found.found.items() if asked in by]
    answers = {method: found.found[method][asked] for method in methods}
    rows: list[list[Cell]] = [
        [f"{beta:g}", *(_cell(answers[method][beta]) for method in methods)] for beta in answers[methods[0]]
    ]
    report.table(
        ["β", *(method.label for method in methods)],
        rows,
        f"{found.name}, {asked.rows:,} memories, half {asked.how} (HEN, tables 3 and 4). {CELLS}",
    )


def _rank_words(report: Report, found: Findings) -> None:
    rows: list[list[Cell]] = [
        [name, *(f"{trail[0]:.2f}, {trail[1]:.2f}, {trail[-1]:.2f}" for trail in by.values())]
        for name, by in found.ranks.items()
    ]
    betas = next(iter(found.ranks.values()))
    report.table(
        ["encoder", *(f"β = {beta:g}" for beta in betas)],
        rows,
        f"{found.name}, {found.sizes[0]:,} memories, half masked, dot: relative rank of the cues, after one step, at "
        "the end",
    )


def _overlap_table(report: Report, found: Findings) -> None:
    kinds = [(hidden, how) for hidden in HIDDEN for how in HOWS]
    rows: list[list[Cell]] = [[name, *(by[kind].confused for kind in kinds)] for name, by in found.overlaps.items()]
    report.table(
        ["encoder", *(f"{hidden}, {how}" for hidden, how in kinds)],
        rows,
        f"{found.name}, {found.sizes[0]:,} memories. Share of pairs, a cue's own memory and another's, in which the "
        "other has no lesser cosine (0: apart)",
        digits=4,
    )


def _hetero_table(report: Report, found: Findings) -> None:
    rows: list[list[Cell]] = []
    for each in found.hetero:
        for method, answers in each.answers.items():
            beta = exact_from(answers)
            shown = f"**exact from β = {beta:g}**" if beta is not None else _at_best(answers)
            rows.append([f"{each.rows:,}", each.text, method.label, shown])
    report.table(
        ["memories", "caption by", "method", "picture from its caption"],
        rows,
        f"{found.name}: the caption alone is the cue (HEN, table 2). Exact as above; else {CELLS} at the best β",
    )
