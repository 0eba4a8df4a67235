"""What is measured for HEN's report, and what its tables, figures and sentences ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.hen_cues import HOWS, Hidden, How
from benchmarks.papers.hen_encoders import Missing
from benchmarks.papers.hen_kernel_memory import Shape
from service.core.names import Similarity

SIMILARITY_WORDS: dict[Similarity, str] = {"dot": "dot", "neg_l2": "L2", "cosine": "cosine"}


@dataclass(frozen=True)
class Answer:
    """dissimilarity, error: 1 - SSIM and mean squared error of decode(recalled) against decode(stored), means over the
    cues that are drawn. own, nearest: shares of all cues whose own memory has the largest weight, or lies nearest to
    what was settled on. weight: that largest weight, mean.
    """

    dissimilarity: float
    error: float
    own: float
    nearest: float
    weight: float

    @property
    def exact(self) -> bool:
        """HEN's claim, to the digits it is printed with."""
        return round(self.dissimilarity, 3) == 0 and round(self.own, 2) == 1


class Method(NamedTuple):
    """An encoder by its name, and what compares its codes."""

    encoder: str
    similarity: Similarity

    @property
    def label(self) -> str:
        return f"{self.encoder}, {SIMILARITY_WORDS[self.similarity]}"


class Asked(NamedTuple):
    """Which cues, of how many memories."""

    hidden: Hidden
    how: How
    rows: int


Answers = dict[float, Answer]
"""β → answer, β ascending."""


@dataclass(frozen=True, eq=False)
class Hetero:
    """Text to image. rows: memories; text: what is made of the caption; answers: by method."""

    rows: int
    text: str
    answers: dict[Method, Answers]


@dataclass(frozen=True, eq=False)
class KernelMemories:
    """A kernel memory network's recalls with one encoder. shape: as chosen; by_rows: (how, rows) → answer; kept: rows →
    the largest difference of a value when asked for a memory by that memory.
    """

    encoder: str
    shape: Shape
    by_rows: dict[tuple[How, int], Answer]
    kept: dict[int, float]


@dataclass(frozen=True, eq=False)
class Overlap:
    """Cosines of cues with their own memory (cues,) and with others (more,)."""

    own: NDArray[np.float32]
    others: NDArray[np.float32]

    @property
    def confused(self) -> float:
        """The share of pairs, a cue's own and any other, in which the other is no less similar."""
        order = np.sort(self.own)
        return float(np.searchsorted(order, self.others, side="right").mean() / len(order))


@dataclass(frozen=True, eq=False)
class Sheet:
    """Pictures to look at: rows of (h, w, 3) uint8, a title for each column, a label for each row."""

    columns: tuple[str, ...]
    rows: list[list[NDArray[np.uint8]]]
    labels: list[str]


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything measured on one set.

    copies: how many pictures have an exact copy in the set; shared: Asked → the share of cues whose visible part is
    exactly another memory's too. encoders: names and words; dimensions: values of a code. found: method → asked → β →
    answer; first: the share whose own memory scores highest at the cue. ranks: encoder → β → relative rank at the cue
    and after each step. overlaps: encoder → (hidden, how) → cosines.
    """

    name: str
    source: str
    count: int
    copies: int
    cues: int
    pictures: int
    encoders: dict[str, str] = field(default_factory=dict)
    dimensions: dict[str, int] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    shared: dict[Asked, float] = field(default_factory=dict)
    found: dict[Method, dict[Asked, Answers]] = field(default_factory=dict)
    first: dict[Method, dict[Asked, float]] = field(default_factory=dict)
    ranks: dict[str, dict[float, list[float]]] = field(default_factory=dict)
    overlaps: dict[str, dict[tuple[Hidden, How], Overlap]] = field(default_factory=dict)
    kernels: list[KernelMemories] = field(default_factory=list)
    hetero: list[Hetero] = field(default_factory=list)
    sheets: dict[str, Sheet] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Numbers of memories, ascending."""
        return sorted({asked.rows for by in self.found.values() for asked in by})


def best(answers: Answers) -> tuple[float, Answer]:
    """β of the least 1 - SSIM (the smallest of equals), and its answer."""
    beta = min(answers, key=lambda each: (round(answers[each].dissimilarity, 4), -answers[each].own, each))
    return beta, answers[beta]


def exact_from(answers: Answers) -> float | None:
    """The least β from which on every answer is exact."""
    reached = None
    for beta in sorted(answers, reverse=True):
        if not answers[beta].exact:
            break
        reached = beta
    return reached


def claim_words(findings: Findings, rows: Sequence[int]) -> str:
    """Who reaches HEN's claim with half of the picture hidden, and who does not."""
    sentences = []
    for how, told in (("masked", "told what is hidden"), ("zeroed", "not told")):
        for size in rows:
            asked = Asked("half", how, size)  # type: ignore[arg-type]
            here = {method: by[asked] for method, by in findings.found.items() if asked in by}
            reached = {method: beta for method, answers in here.items() if (beta := exact_from(answers)) is not None}
            short = [method for method in here if method not in reached]
            sentence = f"{size:,} memories, the encoder {told}: "
            sentence += (
                "1 - SSIM 0.000 and identity 1.00 "
                + "; ".join(f"from β = {beta:g} with {method.label}" for method, beta in reached.items())
                if reached
                else "nobody reaches 1 - SSIM 0.000 with identity 1.00"
            )
            if short:
                closest = min(short, key=lambda method: best(here[method])[1].dissimilarity)
                beta, answer = best(here[closest])
                sentence += (
                    f". Of the rest {closest.label} comes nearest: {answer.dissimilarity:.3f}, identity "
                    f"{answer.own:.2f} at β = {beta:g}"
                )
            raw = here.get(Method("raw pixels", "dot"))
            if raw:
                beta, answer = best(raw)
                sentence += (
                    f". Raw pixels by dot, HEN's baseline: {answer.dissimilarity:.3f}, identity {answer.own:.2f} at "
                    f"its best β = {beta:g}"
                )
            if shared := findings.shared.get(asked):
                sentence += f". Of these cues {shared:.1%} fit another memory exactly as well as their own"
            sentences.append(f"- {sentence}.")
    return "\n".join(sentences)


def norm_words(findings: Findings, rows: int) -> str:
    """Whether it is learning that makes masked recall exact, and what zeroing does; empty without both encoders."""
    learned, plain = Method("codec", "dot"), Method("raw pixels, equal cells", "dot")
    if not {learned, plain} <= set(findings.found):
        return ""

    def own(method: Method, how: How) -> float:
        return best(findings.found[method][Asked("half", how, rows)])[1].own

    told, untold = ([own(method, how) for method in (learned, plain)] for how in HOWS[::-1])
    verdict = "Nothing is learned in the second, so the norm does it. " if told[1] >= round(told[0], 2) - 0.005 else ""
    return (
        "\n- What the codec and the pixels with equal cells have in common is one norm of all cells, and zeros for "
        f"what is hidden: identity {told[0]:.2f} and {told[1]:.2f} at {rows:,} memories, "
        f"{findings.dimensions['codec']:,} values a memory against "
        f"{findings.dimensions['raw pixels, equal cells']:,}. {verdict}Where the hidden part is black instead, they "
        f"keep {untold[0]:.2f} and {untold[1]:.2f}: black is a claim, and other memories are black there."
    )
