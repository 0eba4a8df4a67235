"""RecLag's experiment for one seed: a classifier, detectors fitted on its features, tuned, and measured.

Strategy: everything that is chosen (β, the feature space, kNN's k) is chosen by the mean FPR95 on *validation*: known
images held out from training against outliers made for the purpose (`validation_outliers`). The test sets are other
ones, looked at once, after.

Rules:
- The stored patterns are features of training images; known test images are Fashion-MNIST's test split.
- A detector sees features alone, the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.papers import data
from benchmarks.papers.reclag_classifier import Classifier, Features, features, trained
from benchmarks.papers.reclag_detectors import (
    PAPER_BETA,
    Detector,
    Space,
    auroc,
    by_class,
    energy,
    fpr_at,
    labels_of,
    mahalanobis,
    mhe,
    msp,
    nearest,
    nearest_at,
    per_class,
    react,
    reclag,
    reclag_at,
    reclag_path,
    she,
    spaces,
)
from benchmarks.papers.reclag_sets import of_classes, unlike_sets, validation_outliers
from service.core.gate import Path, calibrate, follow, prototypes
from service.core.interaction import learn_interaction
from service.errors import CalibrationRefused

# At norm 10, β ξ·v is 100 β times the cosine; the paper's 5 is the largest.
BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
NEIGHBOURS = (1, 5, 20, 50, 200)
TPR = 0.95

# Steps of the dynamics that are followed (the paper shows four).
STEPS = 5

# Stored rows that β is tuned on: log S changes with their number by little more than a constant.
_TUNED_ON = 4_000

Told = Callable[[str], None]
Measures = Mapping[str, tuple[float, float]]
"""By set: FPR95 and AUROC."""


@dataclass(frozen=True)
class Preset:
    """Sizes of one run. stored: training features in the bank; memories: of prototypes and learned matrices; rounds: of
    learning; others: images of each unlike set at most.
    """

    seeds: tuple[int, ...]
    trained_on: int
    validation: int
    tested: int
    width: int
    epochs: int
    stranger_width: int
    stranger_epochs: int
    stored: int
    memories: int
    rounds: int
    others: int


@dataclass(frozen=True, eq=False)
class Setting:
    """A way to use RecLag: an interaction matrix in a space, at a β."""

    matrix: Float[Tensor, "memories r"]
    space: Space
    space_name: str
    beta: float

    def detector(self) -> Detector:
        return reclag(self.matrix, self.space, self.beta)


@dataclass(frozen=True, eq=False)
class Detectors:
    """Fitted and tuned on one classifier's features. `settings`: the RecLag ones among `by_name`; `neighbours`: the k
    chosen; `space`: every space by name; `prototypes`: k-means centres in each.
    """

    by_name: dict[str, Detector]
    settings: dict[str, Setting]
    neighbours: int
    space: dict[str, Space]
    prototypes: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Steps:
    """The score over time steps. plain, gated: (log S of the known, of the others) at t = 0 … STEPS, without and with
    the gate; log_lambda: its threshold, or why there is none; rejected: the shares (at step 0, later) of the known and
    of the others that fall to the origin.
    """

    plain: tuple[Tensor, Tensor]
    gated: tuple[Tensor, Tensor] | None
    log_lambda: float | str
    rejected: tuple[tuple[float, float], tuple[float, float]] | None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one seed gives.

    chosen: what was tuned, in words; by_space: the mean FPR95 of prototypes by space and β; whitened: that of other
    scores in the whitened space; left_out: the classes of the strangers, accuracy_of_kept and stranger_measures: of the
    classifier that never saw them.
    """

    accuracy: float
    measures: dict[str, dict[str, tuple[float, float]]]
    chosen: dict[str, str]
    by_space: dict[tuple[str, float], float]
    whitened: dict[str, float]
    steps: dict[str, Steps]
    left_out: tuple[int, ...]
    accuracy_of_kept: float
    stranger_measures: dict[str, tuple[float, float]]


def fitted(
    preset: Preset, train: Features, validation: Features, outliers: list[Features], head: torch.nn.Linear,
    seed: int, told: Told,
) -> Detectors:  # fmt: skip
    """Every detector, fitted on `train` (kNN's and RecLag's memories on the first of it), tuned on validation."""
    stored = train.take(slice(preset.stored))

    def error(known: Tensor, others: list[Tensor]) -> float:
        return float(np.mean([fpr_at(known, each, TPR) for each in others]))

    space = spaces(train)
    centres = {name: prototypes(each(stored.hidden), preset.memories, seed) for name, each in space.items()}
    plain = space["as they are"]
    told("tuning kNN's k, and RecLag's β and space")
    known, *others = (nearest_at(stored.hidden, plain, NEIGHBOURS, each) for each in (validation, *outliers))
    errors_by_k = [error(known[:, index], [each[:, index] for each in others]) for index in range(len(NEIGHBOURS))]
    neighbours = NEIGHBOURS[int(np.argmin(errors_by_k))]

    def best(matrices: dict[str, Tensor]) -> tuple[str, float]:
        errors = {}
        for name, matrix in matrices.items():
            known, *others = (reclag_at(matrix, space[name], BETAS, each) for each in (validation, *outliers))
            for index, beta in enumerate(BETAS):
                errors[name, beta] = error(known[:, index], [each[:, index] for each in others])
        return min(errors, key=errors.__getitem__)

    bank_space, bank_beta = best({name: each(stored.hidden[:_TUNED_ON]) for name, each in space.items()})
    centre_space, centre_beta = best(centres)
    told("learning the interaction matrices")
    tuned = space[centre_space]

    def learned_from(rows: Tensor, memories: int, beta: float) -> Tensor:
        return learn_interaction(rows, memories, beta, rounds_max=preset.rounds, seed=seed).matrix

    as_paper = learned_from(plain(stored.hidden), preset.memories, PAPER_BETA)
    learned = learned_from(tuned(stored.hidden), preset.memories, centre_beta)
    of_class = [learned_from(rows, preset.memories // len(head.weight), PAPER_BETA) for rows in by_class(stored, plain)]
    settings = {
        "RecLag as in the paper": Setting(as_paper, plain, "as they are", PAPER_BETA),
        "RecLag, bank": Setting(space[bank_space](stored.hidden), space[bank_space], bank_space, bank_beta),
        "RecLag, prototypes": Setting(centres[centre_space], tuned, centre_space, centre_beta),
        "RecLag, learned": Setting(learned, tuned, centre_space, centre_beta),
    }
    by_name = {
        "MSP": msp,
        "energy": energy,
        "ReAct": react(train, head),
        "MHE": mhe(train),
        "SHE": she(train),
        "Mahalanobis": mahalanobis(train),
        "kNN": nearest(stored.hidden, plain, neighbours),
        "RecLag, published code": per_class(of_class, plain, PAPER_BETA),
        **{name: setting.detector() for name, setting in settings.items()},
        "RecLag, learned, path": reclag_path(learned, tuned, centre_beta, STEPS),
    }
    return Detectors(by_name, settings, neighbours, space, centres)


def measured(detector: Detector, known: Features, sets: Mapping[str, Features]) -> dict[str, tuple[float, float]]:
    """FPR95 and AUROC against each set."""
    scores = detector(known)
    others = {name: detector(each) for name, each in sets.items()}
    return {name: (fpr_at(scores, each, TPR), auroc(scores, each)) for name, each in others.items()}


def over_steps(setting: Setting, validation: Features, known: Features, others: Features) -> Steps:
    """log S at each state of the dynamics, without the gate and with it at the conformal threshold."""

    def path(of: Features) -> Path:
        return follow(setting.matrix, setting.space(of.hidden), setting.beta, steps_max=STEPS, eps=0.0)

    paths = path(known), path(others)
    plain = paths[0].log_masses, paths[1].log_masses
    rows = setting.matrix.shape[0]
    try:
        threshold = calibrate(setting.detector()(validation), TPR, rows)
    except CalibrationRefused as refusal:
        return Steps(plain, None, str(refusal), None)
    gated, rejected = [], []
    for each in paths:
        at = each.rejected_at(threshold.log_lambda).unsqueeze(-1)
        fallen = (at >= 0) & (torch.arange(each.log_masses.shape[1]) > at)
        # At the origin every product is 0: S = N.
        gated.append(each.log_masses.masked_fill(fallen, float(np.log(rows))))
        rejected.append((float((at == 0).double().mean()), float((at > 0).double().mean())))
    return Steps(plain, (gated[0], gated[1]), threshold.log_lambda, (rejected[0], rejected[1]))


@dataclass(frozen=True, eq=False)
class Ground:
    """A classifier of some of the classes and the detectors on its features."""

    classes: tuple[int, ...]
    network: Classifier
    train: Features
    detectors: Detectors

    def features(self, images: data.Images) -> Features:
        """Of the images of its classes, labelled by their place among them."""
        return features(self.network, *of_classes(images, self.classes))


def ground(
    preset: Preset, classes: tuple[int, ...], width: int, epochs: int, train: data.Images, validation: data.Images,
    seed: int, told: Told,
) -> Ground:  # fmt: skip
    """Train, take features, fit and tune."""
    pixels, labels = of_classes(train, classes)
    network = trained(pixels, labels, width, epochs, seed, told)
    told("features")
    of_train = features(network, pixels, labels)
    held_out, own = of_classes(validation, classes)
    made = validation_outliers(held_out, min(1000, len(held_out)), seed)
    detectors = fitted(
        preset, of_train, features(network, held_out, own), [features(network, each) for each in made.values()],
        network.head, seed, told,
    )  # fmt: skip
    return Ground(classes, network, of_train, detectors)


def experiment(preset: Preset, seed: int, told: Told) -> Outcome:
    """One seed: the ten classes against the unlike sets, then eight of them against the two left out."""
    train, test = data.fashion("train"), data.fashion("test").take(slice(preset.tested))
    order = np.random.default_rng(seed).permutation(len(train))
    validation = train.take(order[: preset.validation])
    train = train.take(order[preset.validation :][: preset.trained_on])

    told(f"seed {seed}: training on {len(train):,} images of ten classes")
    all_ = ground(preset, tuple(range(10)), preset.width, preset.epochs, train, validation, seed, told)
    told("features of the unlike sets, and scores")
    known, detectors = all_.features(test), all_.detectors
    sets = {name: features(all_.network, each) for name, each in unlike_sets(test, preset.others, seed).items()}
    measures = {}
    for name, detector in detectors.by_name.items():
        measures[name] = measured(detector, known, sets)
        told(f"{name}: mean FPR95 {100 * mean_fpr(measures[name]):.1f}%")

    left_out = tuple(sorted(np.random.default_rng(seed).choice(10, 2, replace=False).tolist()))
    told(f"seed {seed}: training without classes {left_out}")
    kept = tuple(label for label in range(10) if label not in left_out)
    eight = ground(preset, kept, preset.stranger_width, preset.stranger_epochs, train, validation, seed, told)
    of_kept = eight.features(test)
    strangers = {"strangers": features(eight.network, of_classes(test, left_out)[0])}
    return Outcome(
        accuracy=_accuracy(known),
        measures=measures,
        chosen={
            "kNN": f"k = {detectors.neighbours}",
            **{name: f"{each.space_name}, β = {each.beta:g}" for name, each in detectors.settings.items()},
        },
        by_space=_by_space(detectors, known, sets),
        whitened=_others_whitened(preset, all_, known, sets),
        steps={
            name: over_steps(detectors.settings[name], all_.features(validation), known, _pooled(sets))
            for name in ("RecLag as in the paper", "RecLag, learned")
        },
        left_out=left_out,
        accuracy_of_kept=_accuracy(of_kept),
        stranger_measures={
            name: measured(detector, of_kept, strangers)["strangers"]
            for name, detector in eight.detectors.by_name.items()
        },
    )


def _by_space(detectors: Detectors, known: Features, sets: Mapping[str, Features]) -> dict[tuple[str, float], float]:
    """The mean FPR95 of the prototypes in every space at every β."""
    means = {}
    for name, space in detectors.space.items():
        scores, *others = (
            reclag_at(detectors.prototypes[name], space, BETAS, each) for each in (known, *sets.values())
        )
        for index, beta in enumerate(BETAS):
            errors = [fpr_at(scores[:, index], each[:, index], TPR) for each in others]
            means[name, beta] = float(np.mean(errors))
    return means


def _others_whitened(preset: Preset, of: Ground, known: Features, sets: Mapping[str, Features]) -> dict[str, float]:
    """The mean FPR95 of other scores in the whitened space: how much of it is the space's."""
    whitened, stored = of.detectors.space["whitened"], of.train.take(slice(preset.stored))
    class_means = torch.stack([rows.mean(0) for rows in by_class(of.train, whitened)])
    detectors = {
        "kNN": nearest(stored.hidden, whitened, of.detectors.neighbours),
        "log S over the ten class means, β = 5": reclag(class_means, whitened, PAPER_BETA),
        "log S over the predicted class's rows of the bank alone, at the bank's β": per_class(
            by_class(stored, whitened), whitened, of.detectors.settings["RecLag, bank"].beta
        ),
    }
    return {name: mean_fpr(measured(each, known, sets)) for name, each in detectors.items()}


def _pooled(sets: Mapping[str, Features]) -> Features:
    """As many of each."""
    count = min(len(each) for each in sets.values())
    parts = [each.take(slice(count)) for each in sets.values()]
    return Features(torch.cat([each.hidden for each in parts]), torch.cat([each.logits for each in parts]))


def mean_fpr(measures: Measures) -> float:
    """Over the sets."""
    return float(np.mean([fpr for fpr, _ in measures.values()]))


def mean_auroc(measures: Measures) -> float:
    """Over the sets."""
    return float(np.mean([area for _, area in measures.values()]))


def _accuracy(of: Features) -> float:
    return float((of.predicted == labels_of(of)).double().mean())
