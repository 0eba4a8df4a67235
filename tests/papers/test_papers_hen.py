"""HEN's tables: shared recall against the engine's, comparisons, encoders, kernel memories, and a small whole run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity as scikit_similarity

from benchmarks.papers import hen, hen_kernel_memory
from benchmarks.papers.data import MissingData
from benchmarks.papers.hen_cues import HIDDEN, copies, cued, observed, whole
from benchmarks.papers.hen_encoders import Coded, at_hand, coded, equal_cells
from benchmarks.papers.hen_findings import Answer, Findings, Overlap, best, exact_from
from benchmarks.papers.hen_hetero import Associated
from benchmarks.papers.hen_judge import judged, squared_error, structural_similarity
from benchmarks.papers.hen_kernel_memory import KernelMemory, chosen
from benchmarks.papers.hen_measure import RANK_BETAS, Measured
from benchmarks.papers.hen_recall import Bank, first_scores, settle
from benchmarks.papers.hen_sets import Pictures
from service.core.names import Similarity
from service.core.retrieve import retrieve
from service.core.similarity import Blocks, normalise_rows
from service.encoders.registry import make


def _bank(count: int, width: int, seed: int = 0) -> Bank:
    return Bank.of(torch.rand(count, width, generator=torch.Generator().manual_seed(seed)))


def _pictures(count: int, side: int = 28, seed: int = 0, coarse: int = 1) -> NDArray[np.uint8]:
    """Squares of `coarse` pixels along a side, each of its own grey."""
    squares = np.random.default_rng(seed).integers(0, 256, (count, side // coarse, side // coarse)).astype(np.uint8)
    return squares.repeat(coarse, axis=1).repeat(coarse, axis=2)


def _raw() -> Coded:
    encoder = make("pixels", {"size": 28, "colour": False, "centre": False})
    return coded(encoder, "raw pixels", "")


# ---- recall ----


@pytest.mark.parametrize("similarity", ["dot", "neg_l2", "cosine"])
def test_shared_recall_is_the_engines(similarity: Similarity) -> None:
    bank = _bank(300, 30)
    cues = bank.patterns[:40].clone()
    cues[:, 15:] = 0
    # From the mean of all rows to one row alone: all three supports are used.
    betas = (0.1, 3.0, 20.0, 300.0, 5_000.0)
    found = settle(
        bank, first_scores(bank, bank.products(cues), cues, similarity), cues, betas, similarity, pictures=25
    )
    blocks = Blocks((30,), (1.0,), similarity)
    stored = normalise_rows(bank.patterns, blocks)
    for number, beta in enumerate(betas):
        alone = retrieve(blocks, stored, cues, beta=beta, update_steps_max=10, trace=True)
        torch.testing.assert_close(found.weight[number], alone.weights.amax(-1), atol=2e-3, rtol=0)
        top = alone.weights.topk(2, dim=-1).values
        clear = top[:, 0] > 1.001 * top[:, 1]
        assert torch.equal(found.heaviest[number][clear], alone.weights.argmax(-1)[clear])
        read_out = alone.weights @ bank.patterns
        torch.testing.assert_close(found.recalled[number], read_out[:25], atol=2e-3, rtol=0)
        distances = torch.cdist(alone.state, stored)
        apart = distances.topk(2, dim=-1, largest=False).values
        clear = apart[:, 1] > 1.01 * apart[:, 0] + 1e-3
        assert torch.equal(found.nearest[number][clear], distances.argmin(-1)[clear])
    assert clear.all()


def test_a_trail_begins_with_the_first_step_and_ends_with_what_is_recalled() -> None:
    bank = _bank(50, 10)
    cues = bank.patterns[:8] * 0.5
    scored = first_scores(bank, bank.products(cues), cues, "cosine")
    found = settle(bank, scored, cues, (5.0, 50.0), "cosine", pictures=8, trail=True)
    assert found.trail is not None
    first = torch.softmax(50 * scored, dim=-1) @ bank.patterns
    torch.testing.assert_close(found.trail[0, 1], first, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.trail[-1], found.recalled)


# ---- cues and comparisons ----


def test_what_is_hidden_is_black_or_marked() -> None:
    pictures = whole(_pictures(3, side=12) | 1)
    for hidden, share in zip(HIDDEN, (1 / 4, 1 / 2, 3 / 4), strict=True):
        seen = observed(hidden, 12)
        assert 1 - seen.mean() == pytest.approx(share)
        (zeroed, *_), (masked, *_) = (cued(pictures, hidden, how) for how in ("zeroed", "masked"))
        assert np.array_equal(zeroed.pixels.any(axis=2), seen)
        assert zeroed.observed is None
        assert masked.observed is not None
        assert np.array_equal(masked.observed, seen)
        assert np.array_equal(masked.pixels, pictures[0].pixels)


def test_copies_are_counted_whole_and_where_seen() -> None:
    pixels = _pictures(4, side=4)
    pixels[3, :, :2] = pixels[1, :, :2]
    assert not copies(pixels).any()
    assert copies(pixels, observed("half", 4)).tolist() == [False, True, False, True]
    colour = np.repeat(pixels[..., None], 3, axis=-1)
    assert copies(colour, observed("half", 4)).tolist() == [False, True, False, True]
    pixels[0] = pixels[2]
    assert copies(pixels).tolist() == [True, False, True, False]


def test_similarity_is_scikit_images() -> None:
    draw = np.random.default_rng(0)
    a = draw.integers(0, 256, (3, 20, 16, 3)).astype(np.uint8)
    b = np.clip(a + draw.normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    b[2] = a[2]
    wanted = [scikit_similarity(x, y, channel_axis=2) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(structural_similarity(a, b), wanted, atol=1e-9)
    assert structural_similarity(a, b)[2] == pytest.approx(1.0)
    assert squared_error(np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 51, np.uint8))[0] == pytest.approx(
        0.04
    )


def test_recalling_what_is_stored_is_exact_and_recalling_another_is_not() -> None:
    raw = _raw()
    codes = raw.encode(whole(_pictures(6)))
    bank = Bank.of(torch.from_numpy(codes))
    own = np.array([4, 1, 2])
    for asked, share in ((own, 1.0), (np.array([4, 0, 3]), 1 / 3)):
        cues = bank.patterns[asked]
        scored = first_scores(bank, bank.products(cues), cues, "neg_l2")
        settled = settle(bank, scored, cues, (0.0001, 100.0), "neg_l2", pictures=3)
        answers = judged(raw, bank.patterns, settled, own, (0.0001, 100.0))
        assert answers[100.0].own == answers[100.0].nearest == pytest.approx(share)
        assert (answers[100.0].error == 0) == (share == 1)
        assert (answers[100.0].dissimilarity < 1e-9) == (share == 1)
        # The mean of six pictures is none of them.
        assert answers[0.0001].dissimilarity > 0.3
        assert answers[0.0001].weight == pytest.approx(1 / 6, abs=0.01)


def test_the_least_beta_is_that_from_which_on_all_are_exact() -> None:
    exact, wrong = Answer(0.0004, 0, 0.996, 1, 1), Answer(0.3, 0.1, 0.7, 1, 1)
    assert exact_from({20: exact, 40: wrong, 60: exact, 80: exact}) == 60
    assert exact_from({20: exact, 40: wrong}) is None
    assert best({20: wrong, 40: exact, 60: exact}) == (40, exact)
    assert Overlap(np.array([0.5, 0.9]), np.array([0.6, 0.1])).confused == pytest.approx(1 / 4)


# ---- encoders ----


def test_equal_cells_are_lossless_and_let_nothing_outscore_the_memory() -> None:
    pixels = _pictures(40)
    pixels[7, :, :14] //= 4  # a dim picture, which brighter ones outscore as it is
    pictures = whole(pixels)
    encoder = make("pixels", {"size": 28, "colour": False, "centre": False})
    cells = equal_cells(encoder, 28, "cells", "", pictures)
    codes = cells.encode(pictures)
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 28, rtol=1e-5)
    assert np.array_equal(cells.decode(codes)[..., 0], pixels)
    bank, plain = Bank.of(torch.from_numpy(codes)), Bank.of(torch.from_numpy(encoder.encode_images(pictures).vectors))
    cue = cued(pictures[7:8], "half", "masked")
    assert int(bank.products(torch.from_numpy(cells.encode(cue))).argmax()) == 7
    assert int(plain.products(torch.from_numpy(encoder.encode_images(cue).vectors)).argmax()) != 7


def test_an_encoder_that_is_not_here_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEN_VQ", raising=False)
    monkeypatch.setenv("HEN_DVAE", str(tmp_path / "nowhere"))
    found, missing = at_hand(whole(_pictures(2)), colour=False)
    assert [each.name for each in found][:3] == ["raw pixels", "centred pixels", "raw pixels, equal cells"]
    why = {each.name: each.why for each in missing}
    assert "HEN_VQ" in why["VQ"]
    assert "dVAE" in why


# ---- kernel memories ----


def test_a_kernel_memory_gives_its_memories_back() -> None:
    patterns = torch.rand(30, 8, generator=torch.Generator().manual_seed(0))
    patterns[5] = patterns[4]  # the pseudo-inverse, where K is singular
    for power in (0.5, 1.0, 2.0):
        memory = KernelMemory(patterns, 1.0, power)
        torch.testing.assert_close(memory.recall(patterns, 1).float(), patterns, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="15000"):
        KernelMemory(torch.zeros(15_001, 2), 1.0, 1.0)


def test_the_kernel_chosen_is_the_least_wrong() -> None:
    patterns = torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    cues = patterns + 0.05

    def wrong(recalled: torch.Tensor) -> float:
        return float((recalled - patterns).square().mean())

    shape = chosen(patterns, cues, wrong)
    at_best = wrong(KernelMemory(patterns, shape.scale, shape.power).recall(cues, shape.steps))
    for scale in (0.25, 1.0, 4.0):
        assert at_best <= wrong(KernelMemory(patterns, scale, 1.0).recall(cues, 1))


# ---- captions ----


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_caption_brings_its_picture_and_a_shared_one_a_mixture(similarity: Similarity) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(20, 64, generator=draw), dim=-1)
    said = torch.nn.functional.normalize(torch.randn(20, 16, generator=draw), dim=-1)
    found = Associated(codes, said, similarity).recall(said, (200.0,), pictures=20)
    torch.testing.assert_close(found.recalled[0], codes, atol=1e-3, rtol=0)
    said[3] = said[8]
    one_step = Associated(codes, said, similarity).recall(said[3:4], (200.0,), pictures=1, steps_max=0)
    torch.testing.assert_close(one_step.recalled[0, 0], (codes[3] + codes[8]) / 2, atol=1e-3, rtol=0)


# ---- the whole ----


def test_the_rank_of_a_collapsed_bank_is_one_memorys() -> None:
    pixels = _pictures(30)
    pixels[29] = 255  # by dot, all fall on the brightest
    raw, stored = _raw(), whole(pixels)
    found = Findings("", "", 30, 0, 10, 10)
    measure = Measured(found, raw, Bank.of(torch.from_numpy(raw.encode(stored))), np.arange(10), stored)
    measure.ranked(30)
    for beta in RANK_BETAS:
        trail = found.ranks["raw pixels"][beta]
        assert trail[0] == 1.0
        assert trail[-1] == pytest.approx(0.1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HEN_DVAE", "HEN_VQ", "HEN_KL", "HEN_TINY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hen_kernel_memory, "SCALES", (1.0,))
    drawings = np.repeat(_pictures(12, side=16, seed=1, coarse=4)[..., None], 3, axis=-1)
    captions = tuple(f"picture {number // 2 if number < 4 else number}" for number in range(12))
    monkeypatch.setattr(hen, "grey", lambda: Pictures("squares", _pictures(40, coarse=7), None, "drawn"))
    monkeypatch.setattr(hen, "colour", lambda seed, most: Pictures("drawings", drawings, captions, "drawn"))
    plan = hen.Plan(
        sizes=(20, 40), colour=(99,), cues=10, pictures=4, paper_betas=(20.0, 500.0), betas=(20.0, 500.0),
        few_betas=(500.0,), kernel=(20,),
        hetero=(99,),
    )  # fmt: skip
    monkeypatch.setitem(hen.PLANS, "quick", plan)


@pytest.mark.usefixtures("small")
def test_a_small_run_writes_the_report(tmp_path: Path) -> None:
    hen.run("quick", tmp_path)
    written = (tmp_path / "hen.md").read_text()
    for words in (
        "raw pixels, equal cells, dot | **exact from β = 20**",
        "VQ (no weights named: let HEN_VQ name their folder)",
        "(HEN, table 1)",
        "| raw pixels | masked |",
        "| 10 | sentence (MiniLM) | raw pixels, cosine |",  # 12 pictures, of which two pairs share a caption
    ):
        assert words in written
    assert "nan" not in written.replace("nan emoji", "")
    names = ("beta-drawings", "beta-squares", "cosine-drawings", "cosine-squares", "examples", "rank-drawings")
    assert {f"hen-{name}.png" for name in (*names, "rank-squares", "shared")} == {
        p.name for p in tmp_path.glob("*.png")
    }


def test_a_run_without_drawings_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(seed: int, most: int | None) -> Pictures:
        raise MissingData("openclipart: not here")

    monkeypatch.setattr(hen, "grey", lambda: Pictures("squares", _pictures(4), None, "drawn"))
    monkeypatch.setattr(hen, "colour", none)
    monkeypatch.setattr(hen, "measured", lambda *_, **__: Findings("squares", "drawn", 4, 0, 4, 4))
    monkeypatch.setattr(hen.hen_tables, "write", hen.hen_tables._introduction)  # the tables need findings
    hen.run("quick", tmp_path)
    assert "No drawings: openclipart: not here." in (tmp_path / "hen.md").read_text()
