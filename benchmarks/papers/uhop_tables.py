"""U-Hop's findings as tables, figures and sentences. Every sentence with a figure in it is made from the findings.

Rules:
- A cell is the error, mean ± standard deviation over the seeds, and the identity share in brackets.
- "Averaged over sizes" is the mean over memory sizes of the seeds' mean error.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from benchmarks.papers import uhop_figures
from benchmarks.papers.report import Cell, Report
from benchmarks.papers.uhop_findings import PAPER_CUES, Findings, error, own, rank_correlation
from benchmarks.papers.uhop_methods import (
    BESIDE,
    MAGNITUDE,
    MEANT,
    PRINTED,
    PUBLISHED,
    SCALED,
    SETTLED,
    TUNED,
    UNIT,
    Answers,
    Method,
    Recalled,
)

# The share by which U-Hop says it improves on every baseline.
CLAIMED = 0.30

BETA_WORDS = {"one": "1", "magnitude": "1·mean‖ξ‖²", "tuned": "tuned"}


def write(report: Report, findings: list[Findings], middle: int) -> None:
    """The whole report, figures included; `middle` is the memory size of noise and iterations."""
    _introduction(report, findings)
    for found in findings:
        report.text(f"## {found.name}\n\n{found.source}.")
        _claims(report, found)
        _size_table(report, found, found.by_size[PAPER_CUES], "The paper's β = 1, half of the pixels masked", _AT_ONE)
    report.figure("size", uhop_figures.sizes(findings), "Error against memory size, half of the pixels masked")
    for found in findings:
        report.text(f"## {found.name}: β tuned")
        for cues in found.by_size:
            _size_table(report, found, found.by_size[cues], f"β tuned; cues: {cues}", TUNED)
            report.text(_tuned_words(found, cues))
        _size_table(
            report, found, found.doubled, "As the published code masks: the values that stay are doubled", SCALED
        )
        _settled_table(report, found)
    report.figure("tuned", uhop_figures.tuned(findings), "Error and identity share, right half missing, β tuned")
    report.text("## Noise")
    for found in findings:
        for kind, words in NOISES.items():
            _noise_table(report, found, kind, f"{found.name}, {middle} memories, {words}")
    report.figure("noise", uhop_figures.noise(findings), f"Error against noise, {middle} memories")
    report.text("## Kernel iterations")
    for found in findings:
        _iteration_table(report, found, middle)
        report.text(_iteration_words(found))
    report.figure("iterations", uhop_figures.iterations(findings), f"Error against iterations, {middle} memories")
    report.text("## Separation loss and error")
    _correlations(report, findings)
    report.figure("loss", uhop_figures.losses(findings), "Separation loss against error, one dot a training")


_AT_ONE = (*PUBLISHED, *MEANT, *PRINTED, *UNIT, *MAGNITUDE, *BESIDE)

NOISES = {
    "folded": "cues |ξ + σ·N(0, 1)|, cut off at 1 (the published code's)",
    "plain": "cues ξ + σ·N(0, 1)",
}


def _introduction(report: Report, findings: list[Findings]) -> None:
    grey = ", ".join(found.name for found in findings)
    report.text(
        f"""
Wu et al., "Uniform Memory Retrieval with Larger Capacity for Modern Hopfield Models" (2024), section 4.1. Data: {grey}
(CIFAR-10 too where the environment's CIFAR10 names a folder with it). Cells: **error (identity share)**.

- *Error*: the sum over an image's pixels, in [0, 1], of squared differences between what came back and the original,
  averaged over the cues; mean ± standard deviation over the seeds. *Identity share*: the cues whose heaviest memory is
  their own.
- One step, as in the paper: the weights at the cue, read out over the stored images. All scores, weights and steps are
  the engine's own (`service.core`); the scores of ±L2, ±Manhattan and *as printed* alone are made here.
- *U-Hop*: Algorithm 1, Stage I: 100 iterations of gradient descent of step 1 from the identity on the separation loss
  (t = 2) of all stored patterns. *as printed*: compared by ⟨Wξ, Wx⟩ with W's rows made unit. Else by
  ⟨Wξ, Wx⟩/(‖Wξ‖‖Wx‖): with scores of at most 1, β = 1 is the mean of many images, so the paper's β = 1, whose features
  keep the patterns' magnitude, is also read as β = mean‖ξ‖² on unit features.
- *+L2*, *+Manhattan*: as the published code has them, with +distance: they fetch the farthest memory. *-L2*,
  *-Manhattan*: with the sign meant.
- *cue-trained*: the engine's kernel, trained on the stored patterns and on cues of three kinds drawn afresh (half
  masked, right half missing, folded noise of σ = .5); from the identity. It never sees a table's cues.
- *tuned*: the β of least error among two to a factor of ten, on other images, with kernels of their own. Images are
  split in halves for that.
"""
    )


def _claims(report: Report, found: Findings) -> None:
    """The paper's claim, reading by reading, against its baselines as published and as meant."""
    published = min(PUBLISHED, key=lambda method: found.average(PAPER_CUES, method))
    either = min((*PUBLISHED, *MEANT), key=lambda method: found.average(PAPER_CUES, method))
    rows: list[list[Cell]] = []
    for words, methods in (
        ("as printed, β = 1", PRINTED),
        ("unit features, β = 1", UNIT),
        ("unit features, β = mean‖ξ‖²", MAGNITUDE),
    ):
        for method in methods:
            mine = found.average(PAPER_CUES, method)
            shares = [mine / found.average(PAPER_CUES, other) for other in (published, either)]
            verdicts = [f"{share:.2f}: {'yes' if share <= 1 - CLAIMED else 'no'}" for share in shares]
            rows.append([f"U-Hop {words}, {method.separation}", _figure(mine), *verdicts])
    report.table(
        [
            "reading",
            "error averaged over sizes",
            f"share of the best as published ({published.label}: {_figure(found.average(PAPER_CUES, published))})",
            f"share of the best, signs as meant ({either.label}: {_figure(found.average(PAPER_CUES, either))})",
        ],
        rows,
        f"Is U-Hop at least {CLAIMED:.0%} under the paper's own baselines at β = 1? {found.name}, half masked",
    )
    cosine = next(method for method in BESIDE if method.similarity == "cosine")
    plain, trained = found.average(PAPER_CUES, MAGNITUDE[0]), found.average(PAPER_CUES, cosine)
    report.text(
        f"Cosine, which learns nothing, at the same β = mean‖ξ‖²: {_figure(trained)} averaged over sizes, against "
        f"U-Hop's {_figure(plain)}. " + _compared_words("cosine", trained, "U-Hop", plain)
    )


def _size_table(
    report: Report, found: Findings, by_size: dict[int, Answers], caption: str, methods: Sequence[Method]
) -> None:
    rows = [
        [method.label, BETA_WORDS[method.beta], *(_cell(answers[method]) for answers in by_size.values())]
        for method in methods
    ]
    report.table(["method", "β", *map(str, by_size)], rows, f"{found.name}. {caption}; columns: memories")


def _tuned_words(found: Findings, cues: str) -> str:
    """Where cosine is under U-Hop, and whether the cue-trained kernel is."""
    cosine, plain, trained = (
        next(method for method in TUNED if (method.similarity, method.separation) == (name, "softmax"))
        for name in ("cosine", "U-Hop", "cue-trained")
    )
    sentences = []
    for name, method in (("Cosine at a tuned β", cosine), ("The cue-trained kernel", trained)):
        by_size = found.by_size[cues].items()
        pairs = {n: (round(error(answers[method]), 3), round(error(answers[plain]), 3)) for n, answers in by_size}
        under = [size for size, (mine, uhop) in pairs.items() if mine < uhop]
        over = [size for size, (mine, uhop) in pairs.items() if mine > uhop]
        sentences.append(
            f"{name} is under U-Hop {_listed(under)} and over it {_listed(over)}; averaged over sizes "
            f"{_figure(found.average(cues, method))} against {_figure(found.average(cues, plain))}."
        )
    return " ".join(sentences)


def _settled_table(report: Report, found: Findings) -> None:
    size = max(next(iter(found.settled.values())))
    rows = [
        [
            method.label,
            *(_cell(by[size][method]) for kind in found.by_size for by in (found.by_size[kind], found.settled[kind])),
        ]
        for method in SETTLED
    ]
    headers = [f"{kind}: {when}" for kind in found.by_size for when in ("one step", "settled")]
    report.table(
        ["method", *headers],
        rows,
        f"{found.name}, {size} memories. One step, and up to three more until it rests; β tuned for one step",
    )


def _noise_table(report: Report, found: Findings, kind: str, caption: str) -> None:
    levels = [sigma for name, sigma in found.by_noise if name == kind]
    methods = (*_AT_ONE, *TUNED) if kind == "folded" else TUNED
    rows = [
        [method.label, BETA_WORDS[method.beta], *(_cell(found.by_noise[kind, sigma][method]) for sigma in levels)]
        for method in methods
    ]
    report.table(["method", "β", *(f"{sigma:g}" for sigma in levels)], rows, f"{caption}; columns: σ")


def _iteration_table(report: Report, found: Findings, middle: int) -> None:
    marks = sorted({mark for fits in found.by_iteration.values() for mark in fits})
    quantities = {
        "separation loss": "loss",
        "error, masked, as printed, β = 1": "printed_masked",
        "error, masked, unit features": "unit_masked",
        "error, right half missing, unit features": "unit_half",
        "identity share, right half missing, unit features": "own_half",
    }
    rows = [
        [
            training,
            words,
            *(_spread([getattr(run, name) for run in fits[mark]]) if mark in fits else "–" for mark in marks),
        ]
        for training, fits in found.by_iteration.items()
        for words, name in quantities.items()
    ]
    caption = f"{found.name}, {middle} memories, unit features at β = mean‖ξ‖²; columns: iterations"
    report.table(["training", "what", *map(str, marks)], rows, caption)


def _iteration_words(found: Findings) -> str:
    """What the longest training from the identity changed."""
    fits = found.by_iteration["from the identity, step 1"]
    first, last = min(fits), max(fits)
    changes = [
        f"{words} from {_figure(fmean(getattr(run, name) for run in fits[first]))} to "
        f"{_figure(fmean(getattr(run, name) for run in fits[last]))}"
        for words, name in (
            ("the error on masked cues, as printed,", "printed_masked"),
            ("on unit features", "unit_masked"),
            ("and where the right half is missing", "unit_half"),
        )
    ]
    return f"From {first} to {last} iterations from the identity: {', '.join(changes)}."


def _correlations(report: Report, findings: list[Findings]) -> None:
    rows: list[list[Cell]] = []
    for found in findings:
        untrained, *trained = found.runs
        lowered = [run for run in trained if run.loss < untrained.loss]
        for words, runs in (("all trainings", trained), ("those that lowered the loss", lowered)):
            losses = [run.loss for run in runs]
            correlations = [
                rank_correlation(losses, [getattr(run, name) for run in runs]) if len(runs) > 2 else None
                for name in ("printed_masked", "unit_half")
            ]
            rows.append([found.name, words, len(runs), *correlations])
    report.table(
        ["data", "which", "trainings", "error, masked, as printed, β = 1", "error, right half missing, unit features"],
        rows,
        "Spearman's rank correlation of separation loss with error; steps from N(0, 1), 1 to 200 iterations",
        digits=2,
    )


def _compared_words(name: str, mine: float, other: str, theirs: float) -> str:
    if round(mine, 2) == round(theirs, 2):
        return f"To two decimals {name} and {other} are equal: training gains nothing here."
    if mine < theirs:
        return f"So {name} beats {other} here: what unit features gain comes of normalising, not of training."
    return f"So {other} beats {name} here."


def _cell(answers: Sequence[Recalled]) -> str:
    return f"{_spread([answer.error for answer in answers])} ({own(answers):.2f})"


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    mean = fmean(values)
    return f"{_figure(mean)} ± {_figure(stdev(values), like=mean)}"


def _figure(value: float, like: float | None = None) -> str:
    """An error: a tenth matters over 1, a thousandth under it. `like`: the value whose digits to print."""
    return f"{value:.1f}" if (value if like is None else like) >= 1 else f"{value:.3f}"


def _listed(sizes: Sequence[int]) -> str:
    return f"at {', '.join(map(str, sizes))} memories" if sizes else "nowhere"
