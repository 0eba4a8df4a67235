"""HEN's tables (Kashyap et al., "Modern Hopfield Networks meet Encoded Neural Representations", 2024): does recall
bring back what was stored, by encoder, similarity, β and number of memories; pictures from captions; what happens when
two memories share a caption.

Strategy: a set of pictures is encoded once by every encoder at hand. Smaller banks are the first rows of the largest,
and the cues are of the same memories in all of them, so one product of cues and memories serves every bank, similarity
and β (hen_recall.py).

Rules:
- What came back is compared as drawn, decode(recalled) with decode(stored), never with the original: the measure is of
  the memory, not of the codec.
- All rows of a bank take part. Cues are a fixed sample of the smallest bank; the first of them are drawn and compared.
- The cues are of memories without an exact copy: HEN assumes unique memories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.papers import hen_hetero, hen_tables
from benchmarks.papers.data import MissingData
from benchmarks.papers.hen_cues import HIDDEN, HOWS, copies, observed, whole
from benchmarks.papers.hen_encoders import at_hand
from benchmarks.papers.hen_findings import Asked, Findings
from benchmarks.papers.hen_measure import HALF, Measured
from benchmarks.papers.hen_recall import Bank
from benchmarks.papers.hen_sets import Pictures, colour, grey
from benchmarks.papers.report import Report, Size

SEED = 0

# The paper's β, and four beyond them: cosines differ by hundredths where distances differ by tens.
PAPER_BETAS = tuple(float(beta) for beta in range(20, 501, 20))
BEYOND = (1_000.0, 2_000.0, 5_000.0, 10_000.0)
BETAS = (20.0, 40.0, 60.0, 80.0, 100.0, 120.0, 200.0, 300.0, 500.0, *BEYOND)


@dataclass(frozen=True)
class Plan:
    """sizes: banks of Fashion-MNIST; colour: of drawings (the last is as many as there are, at most). cues: memories
    asked for, a bank; pictures: of these, drawn and compared. paper_betas: asked of the smallest bank of
    Fashion-MNIST; betas: of the others, with half hidden; few_betas: with other parts hidden, of the two largest.
    kernel: banks of the kernel memory network; hetero: of drawings with captions.
    """

    sizes: tuple[int, ...]
    colour: tuple[int, ...]
    cues: int
    pictures: int
    paper_betas: tuple[float, ...]
    betas: tuple[float, ...]
    few_betas: tuple[float, ...]
    kernel: tuple[int, ...]
    hetero: tuple[int, ...]


PLANS: dict[Size, Plan] = {
    "quick": Plan(
        sizes=(500, 1_000),
        colour=(200,),
        cues=40,
        pictures=10,
        paper_betas=(20.0, 100.0, 500.0, 2_000.0),
        betas=(20.0, 100.0, 500.0, 10_000.0),
        few_betas=(100.0, 2_000.0),
        kernel=(500,),
        hetero=(150,),
    ),
    "full": Plan(
        sizes=(6_000, 8_000, 10_000, 15_000, 60_000),
        colour=(3_000, 100_000),
        cues=200,
        pictures=100,
        paper_betas=(*PAPER_BETAS, *BEYOND),
        betas=BETAS,
        few_betas=(100.0, 500.0, 2_000.0, 10_000.0),
        kernel=(6_000, 10_000, 15_000),
        hetero=(2_000, 6_000),
    ),
}


def run(size: Size, out: Path) -> None:
    """Writes out/hen.md and its figures. Raises MissingData where Fashion-MNIST is missing; without drawings their
    tables are left out and the report says why.
    """
    torch.manual_seed(SEED)
    plan = PLANS[size]
    report = Report("HEN: recall of encoded pictures", out, "hen", size, SEED)
    findings = [measured(grey(), plan.sizes, plan, report, plan.kernel)]
    lacking = None
    try:
        drawings = colour(SEED, max(plan.colour) if size == "quick" else None)
    except MissingData as error:
        lacking = str(error)
    else:
        findings.append(measured(drawings, plan.colour, plan, report))
        hen_hetero.measure(
            findings[-1], drawings.captioned(), plan.hetero, plan.betas, plan.cues, plan.pictures, report
        )
    hen_tables.write(report, findings, lacking)
    report.write()


def measured(
    pictures: Pictures, sizes: Sequence[int], plan: Plan, report: Report, kernel: Sequence[int] = ()
) -> Findings:
    """Everything about one set but its captions. `sizes` are cut to the pictures there are. The set that kernel memory
    networks are tried on is also asked the paper's β, and is drawn.
    """
    sizes = sorted({min(rows, len(pictures)) for rows in sizes})
    pictures = pictures.take(slice(sizes[-1]))
    alike = copies(pictures.pixels)
    unique = np.flatnonzero(~alike[: sizes[0]])
    own = np.random.default_rng(SEED).permutation(unique)[: plan.cues]
    stored = whole(pictures.pixels)
    encoders, missing = at_hand(stored, pictures.colour)
    found = Findings(
        pictures.name, pictures.source, len(pictures), int(alike.sum()), len(own), min(plan.pictures, len(own))
    )
    found.missing.extend(missing)
    for hidden in HIDDEN:
        seen = observed(hidden, pictures.pixels.shape[1])
        for rows in sizes:
            shared = float(copies(pictures.pixels[:rows], seen)[own].mean())
            found.shared.update({Asked(hidden, how, rows): shared for how in HOWS})
    for coded in encoders:
        report.progress(f"{pictures.name}: {coded.name}")
        measure = Measured(found, coded, Bank.of(torch.from_numpy(coded.encode(stored))), own, stored)
        found.encoders[coded.name], found.dimensions[coded.name] = coded.words, coded.width
        for hidden in HIDDEN:
            if hidden == HALF:
                betas_of = {rows: plan.paper_betas if rows == sizes[0] and kernel else plan.betas for rows in sizes}
            else:
                betas_of = dict.fromkeys(sizes[-2:], plan.few_betas)
            measure.asked(hidden, betas_of, plan.pictures)
        measure.ranked(sizes[0])
        if kernel and coded.name in ("raw pixels", "codec"):
            report.progress(f"{pictures.name}: kernel memory networks on {coded.name}")
            measure.kernel_memories(kernel, plan.pictures)
        if kernel:
            measure.drawn_examples(sizes[-2:][0])
    return found
