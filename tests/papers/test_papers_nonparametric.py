"""The nonparametric tables: cues, success, bags, and a whole small run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.papers import nonparametric, nonparametric_mil
from benchmarks.papers.data import Images, MissingData, digits
from benchmarks.papers.nonparametric import MODELS, Way, half_masked, step, success
from benchmarks.papers.nonparametric_mil import TARGET, bags, hopfield, trained
from engram.layers import Association
from service.core.retrieve import retrieve
from service.core.similarity import Blocks, normalise_rows


def _patterns(count: int, dimension: int) -> torch.Tensor:
    return torch.rand(count, dimension, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("separation", ["softmax", "sparsemax"])
def test_a_step_is_that_of_recall(separation: str) -> None:
    patterns = _patterns(20, 16)
    cues = half_masked(patterns, torch.Generator())
    assert torch.equal(cues[:, :8], patterns[:, :8])
    assert (cues[:, 8:] == 0).all()
    blocks = Blocks((16,), (1.0,))
    own = retrieve(blocks, normalise_rows(patterns, blocks), cues, beta=7.0, separation=separation, update_steps_max=0)
    got = step(Way(Association(separation, similarity="cosine"), 7.0), patterns, cues, seed=0)
    torch.testing.assert_close(got, own.weights @ patterns)


def test_success_needs_a_beta_that_separates_and_a_window_that_is_in_place() -> None:
    rows = torch.eye(64)

    def whole(patterns: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return patterns

    dense, window = (dataclasses.replace(MODELS[name], similarity="cosine") for name in ("dense", "window"))
    assert success(rows, Way(dense, 50.0), 49, 0, whole) == 1.0
    assert success(rows, Way(dense, 0.1), 49, 0, whole) == 0.0
    assert success(rows, Way(window, 50.0, placed=True), 49, 0, whole) == 1.0
    assert success(rows, Way(window, 50.0), 49, 0, whole) < 0.5


def test_half_of_the_bags_hold_the_target_once() -> None:
    labels = np.arange(40) % 10
    pixels = np.broadcast_to((labels * 20).astype(np.uint8)[:, None, None], (40, 4, 4))
    made = bags(Images("levels", pixels, labels, "generated"), 100, 7, np.random.default_rng(0))
    assert made.images.shape == (100, 7, 4)
    held = (made.images[..., 0] * 255 / 20).round() == TARGET
    assert torch.equal(held.sum(1), made.labels.long())
    assert made.labels.sum() == 50
    assert len(set(held.nonzero()[:, 1].tolist())) > 1


def test_a_pooling_learns_to_find_the_target() -> None:
    images = digits()
    generator = np.random.default_rng(0)
    training, test = bags(images, 200, 3, generator), bags(images, 100, 3, generator)
    course = trained(lambda: hopfield(Association(), 0.5), training, test, 10, 0)
    assert len(course.accuracy) == len(course.loss) == 10
    assert course.loss[-1] < 0.5 * course.loss[0]
    assert course.accuracy[-1] > 0.75


def test_a_whole_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Images:
        raise MissingData("no colours here")

    small = digits().take(np.arange(600))
    monkeypatch.setattr(nonparametric, "mnist_small", lambda: small)
    monkeypatch.setattr(nonparametric, "fashion", lambda: dataclasses.replace(small, name="also digits"))
    monkeypatch.setattr(nonparametric, "cifar10", absent)
    monkeypatch.setattr(nonparametric, "BETAS", (0.1, 100.0))
    monkeypatch.setitem(nonparametric.PLANS, "quick", nonparametric.Plan((0, 1), (10, 20), (0.1,), (8, 16), 1))
    monkeypatch.setitem(nonparametric_mil.PLANS, "quick", nonparametric_mil.Plan((0, 1), (3,), (1.0,), 3, 50, 1))
    monkeypatch.setattr(nonparametric_mil, "TEST_BAGS", 20)
    nonparametric.run("quick", tmp_path)
    text = (tmp_path / "nonparametric.md").read_text()
    assert "CIFAR-10 is left out here: no colours here" in text
    assert text.count("| dense ") == 2 * 6 + 2 + 2  # retrieval of two sets, time and operations, accuracies
    assert "–" not in text.split("## Multiple-instance")[0]  # no cell without a number
    held = {path.name for path in tmp_path.iterdir()}
    assert held == {
        "nonparametric.md",
        "nonparametric-retrieval-digits-8-8.png",
        "nonparametric-retrieval-also-digits.png",
        "nonparametric-efficiency.png",
        "nonparametric-mil.png",
    }
