"""RecLag's tables: measures and detectors against independent definitions, and one small run of everything."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.papers import data, reclag
from benchmarks.papers.reclag_classifier import Classifier, Features, features, trained
from benchmarks.papers.reclag_detectors import (
    NORM,
    Space,
    auroc,
    by_class,
    energy,
    fpr_at,
    mahalanobis,
    mhe,
    msp,
    nearest,
    per_class,
    react,
    reclag_path,
    she,
    spaces,
)
from benchmarks.papers.reclag_detectors import reclag as scored
from benchmarks.papers.reclag_experiment import STEPS, Preset, Setting, over_steps
from benchmarks.papers.reclag_sets import of_classes, unlike_sets, validation_outliers

CLASSES, D = 3, 6
scores = st.lists(st.integers(-4, 4), min_size=1, max_size=40).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)


def drawn(seed: int, count: int) -> Features:
    """Features about a middle of their class, some of them put into another class by the logits."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    middles = 3 * torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(7)).abs()
    hidden = (middles[labels] + torch.randn(count, D, generator=g)).relu()
    logits = 2 * torch.nn.functional.one_hot(labels, CLASSES) + torch.randn(count, CLASSES, generator=g)
    return Features(hidden, logits, labels)


TRAIN, CUES = drawn(0, 200), drawn(1, 30)


@given(known=scores, others=scores, tpr=st.sampled_from([0.5, 0.9, 0.95]))
def test_the_threshold_accepts_the_share_it_promises_and_no_higher_one_does(
    known: Tensor, others: Tensor, tpr: float
) -> None:
    passing = [float(t) for t in known.unique() if (known >= t).sum() >= tpr * len(known) - 1e-9]
    assert fpr_at(known, others, tpr) == pytest.approx(float((others >= max(passing)).double().mean()))


@given(known=scores, others=scores)
def test_auroc_agrees_with_scikit_learn_under_ties(known: Tensor, others: Tensor) -> None:
    truth = [1] * len(known) + [0] * len(others)
    assert auroc(known, others) == pytest.approx(roc_auc_score(truth, torch.cat([known, others]).numpy()))


def one_by_one(of: Features, score) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.tensor(
        [score(hidden, logits) for hidden, logits in zip(of.hidden, of.logits, strict=True)], dtype=torch.float64
    )


def test_baselines_equal_their_definitions() -> None:
    torch.manual_seed(3)
    head = nn.Linear(D, CLASSES).requires_grad_(False)
    right = TRAIN.logits.argmax(-1) == TRAIN.labels
    stored = [TRAIN.hidden[right & (TRAIN.labels == c)] for c in range(CLASSES)]
    assert not right.all()
    means = torch.stack([TRAIN.hidden[TRAIN.labels == c].mean(0) for c in range(CLASSES)])
    residuals = TRAIN.hidden - means[TRAIN.labels]
    precision = torch.linalg.inv(residuals.T @ residuals / len(residuals))
    cut = float(np.sort(TRAIN.hidden.flatten().numpy())[int(0.9 * TRAIN.hidden.numel()) - 1])

    def class_mass(h: Tensor, z: Tensor) -> float:
        masses = [math.exp(0.01 * float(row @ h)) for row in stored[int(z.argmax())]]
        return math.log(sum(masses) / len(masses))

    def nearest_mean(h: Tensor, z: Tensor) -> float:
        return -min(float((h - mean) @ precision @ (h - mean)) for mean in means)

    for given_, definition in (
        (msp(CUES), lambda h, z: float((z.exp() / z.exp().sum()).max())),
        (energy(CUES), lambda h, z: math.log(float(z.exp().sum()))),
        (react(TRAIN, head)(CUES), lambda h, z: math.log(float(head(h.clamp(max=cut)).exp().sum()))),
        (she(TRAIN)(CUES), lambda h, z: float(stored[int(z.argmax())].mean(0) @ h)),
        (mhe(TRAIN)(CUES), class_mass),
    ):
        assert torch.allclose(given_.double(), one_by_one(CUES, definition), rtol=1e-4, atol=1e-6)
    # Up to the whitening's scale, and its ridge of 1e-4.
    ratio = mahalanobis(TRAIN)(CUES).double() / one_by_one(CUES, nearest_mean)
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-2)


def test_knn_is_the_cosine_with_the_kth_nearest() -> None:
    plain = spaces(TRAIN)["as they are"]
    cosines = torch.nn.functional.cosine_similarity(CUES.hidden.unsqueeze(1), TRAIN.hidden.unsqueeze(0), dim=-1)
    assert torch.allclose(nearest(TRAIN.hidden, plain, 5)(CUES), cosines.sort(descending=True).values[:, 4], atol=1e-5)


@pytest.mark.parametrize("name", ["as they are", "centred", "whitened"])
def test_reclag_scores_log_s_of_a_state_of_norm_ten(name: str) -> None:
    space = spaces(TRAIN)[name]
    states, matrix = space(CUES.hidden), space(TRAIN.hidden[:40])
    assert torch.allclose(torch.linalg.vector_norm(states, dim=-1), torch.tensor(NORM))
    expected = torch.logsumexp(0.3 * states.double() @ matrix.double().T, -1)
    assert torch.allclose(scored(matrix, space, 0.3)(CUES), expected, rtol=1e-5)
    rows = by_class(TRAIN, space)
    for score, v, label in zip(per_class(rows, space, 0.3)(CUES), states, CUES.predicted, strict=True):
        assert float(score) == pytest.approx(float(torch.logsumexp(0.3 * rows[int(label)] @ v, 0)), rel=1e-5)
    assert bool((reclag_path(matrix, space, 0.3, 4)(CUES) <= scored(matrix, space, 0.3)(CUES) + 1e-9).all())


def test_whitened_features_have_equal_spread_within_classes() -> None:
    space = spaces(TRAIN)["whitened"]
    means = torch.stack([TRAIN.hidden[TRAIN.labels == c].mean(0) for c in range(CLASSES)])
    residuals = (TRAIN.hidden - means[TRAIN.labels]) @ space.weight.T
    covariance = residuals.T @ residuals / len(residuals)
    assert torch.allclose(covariance / covariance.diagonal().mean(), torch.eye(D), atol=1e-2)


def test_with_the_gate_what_falls_stays_at_the_origin() -> None:
    space = Space(torch.zeros(D), torch.eye(D))
    setting = Setting(space(TRAIN.hidden), space, "as they are", 0.5)
    strange = Features(torch.randn(50, D, generator=torch.Generator().manual_seed(5)), torch.zeros(50, CLASSES))
    steps = over_steps(setting, TRAIN, CUES, strange)
    assert steps.gated is not None
    assert steps.rejected is not None
    assert isinstance(steps.log_lambda, float)
    assert steps.rejected[1][0] > 0.5 > steps.rejected[0][0]
    for plain, gated, (at_once, later) in zip(steps.plain, steps.gated, steps.rejected, strict=True):
        assert plain.shape == gated.shape == (len(plain), STEPS + 1)
        assert torch.equal(plain[:, 0], gated[:, 0])
        fallen = gated[:, -1] == math.log(200)
        under = (plain[:, :-1] <= steps.log_lambda).any(-1)
        assert torch.equal(fallen, under)
        assert float((plain[:, 0] <= steps.log_lambda).double().mean()) == pytest.approx(at_once)
        assert at_once + later == pytest.approx(float((plain <= steps.log_lambda).any(-1).double().mean()))


def test_a_threshold_that_cannot_be_set_says_why() -> None:
    space = Space(torch.zeros(D), torch.eye(D))
    setting = Setting(space(TRAIN.hidden), space, "as they are", 0.5)
    steps = over_steps(setting, TRAIN.take(slice(5)), CUES, CUES)
    assert steps.gated is None
    assert "needs n >= 19" in str(steps.log_lambda)


def test_classes_are_relabelled_by_their_place() -> None:
    images = data.Images("", np.zeros((4, 28, 28), np.uint8), np.array([5, 2, 9, 5]), "")
    pixels, labels = of_classes(images, (9, 5))
    assert len(pixels) == 3
    assert labels.tolist() == [1, 0, 1]


def test_no_kind_that_is_tuned_on_is_tested() -> None:
    try:
        known = data.fashion("test").take(slice(20))
        tested = unlike_sets(known, 10, 0)
    except data.MissingData as missing:
        pytest.skip(str(missing))
    made = validation_outliers(known.pixels, 10, 0)
    assert len(tested) >= 6
    assert not set(tested) & set(made)
    for pixels in (*tested.values(), *made.values()):
        assert pixels.shape == (10, 28, 28)
        assert pixels.dtype == np.uint8
    # The same tiles in another order.
    assert sorted(made["tiles shuffled"][0].flatten()) in [sorted(each.flatten()) for each in known.pixels]
    assert not any(np.array_equal(made["tiles shuffled"][0], each) for each in known.pixels)


def test_a_classifier_learns_and_repeats() -> None:
    dark, bright = (np.random.default_rng(0).integers(low, low + 60, (128, 28, 28), np.uint8) for low in (0, 180))
    pixels, labels = np.concatenate([dark, bright]), np.repeat([0, 1], 128)
    networks: list[Classifier] = [trained(pixels, labels, 4, 4, 1, lambda _: None) for _ in range(2)]
    first, second = (features(network, pixels, labels) for network in networks)
    assert torch.equal(first.hidden, second.hidden)
    assert first.hidden.shape == (256, 16)
    assert bool((first.hidden >= 0).all())
    assert float((first.predicted == torch.from_numpy(labels)).double().mean()) > 0.95


def test_a_small_run_writes_every_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = Preset(
        seeds=(0,), trained_on=800, validation=120, tested=150, width=4, epochs=1, stranger_width=4,
        stranger_epochs=1, stored=260, memories=20, rounds=2, others=20,
    )  # fmt: skip
    monkeypatch.setitem(reclag.PRESETS, "quick", smallest)
    try:
        reclag.run("quick", tmp_path)
    except data.MissingData as missing:
        pytest.skip(str(missing))
    written = (tmp_path / "reclag.md").read_text()
    for method in ("MSP", "energy", "ReAct", "MHE", "SHE", "Mahalanobis", "kNN", "RecLag as in the paper"):
        assert written.count(f"| {method} |") >= 2, method  # unlike sets, and strangers
    for figure in ("reclag-fpr95.png", "reclag-steps.png"):
        assert f"]({figure})" in written
        assert (tmp_path / figure).stat().st_size > 5_000
    assert "of SHE's mean FPR95" in written
    assert "nan" not in written
