"""Corruptions: as declared, repeatable from their generator, and bounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from service.encoders.corruption import (
    CELLS,
    DEFAULT_CORRUPTIONS,
    Blur,
    Brightness,
    Corruption,
    Crop,
    Jpeg,
    Mask,
    MissingSide,
    Noise,
    VectorNoise,
    Window,
    WordDrop,
    corrupt_picture,
    corrupt_text,
    corrupt_vectors,
)
from service.encoders.pixels import Pixels, PixelsOptions
from service.encoders.protocol import Picture
from service.errors import InvalidRequest

ADAPTER: TypeAdapter[Any] = TypeAdapter(Corruption)
OF_PICTURES = [Noise(), Blur(), Brightness(), Jpeg(), Crop(), Mask(), MissingSide(), Window()]
OF_TEXTS = [WordDrop()]
OF_VECTORS = [VectorNoise(), Mask()]
shares = st.floats(0.01, 0.99)


def photograph(height: int = 64, width: int = 96) -> Picture:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows // 3 + columns // 3) % 2 * 255], axis=2)
    return Picture(pixels.astype(np.uint8), warnings=("kept",))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("corruption", OF_PICTURES, ids=lambda c: c.kind)
def test_the_generator_decides_the_picture(corruption: Corruption) -> None:
    a, b = (corrupt_picture(photograph(), corruption, generator()) for _ in range(2))
    np.testing.assert_array_equal(a.pixels, b.pixels)
    assert a.warnings == ("kept",)
    assert (a.observed is not None) == corruption.hides
    if a.observed is not None and b.observed is not None:
        np.testing.assert_array_equal(a.observed, b.observed)
    assert a.observed is not None or not np.array_equal(a.pixels, photograph().pixels)


@pytest.mark.parametrize("corruption", [Noise(), Crop(), Mask(), Window()], ids=lambda c: c.kind)
def test_another_generator_draws_another_picture(corruption: Corruption) -> None:
    a, b = (corrupt_picture(photograph(), corruption, generator(seed)) for seed in (0, 1))
    same_pixels = np.array_equal(a.pixels, b.pixels)
    same_mask = a.observed is None or b.observed is None or np.array_equal(a.observed, b.observed)
    assert not (same_pixels and same_mask)


@given(share=shares, height=st.integers(CELLS, 80), width=st.integers(CELLS, 80), seed=st.integers(0, 99))
def test_a_mask_hides_whole_cells_of_its_share(share: float, height: int, width: int, seed: int) -> None:
    hidden = corrupt_picture(photograph(height, width), Mask(share=share), generator(seed)).observed
    assert hidden is not None
    rows, columns = np.arange(height) * CELLS // height, np.arange(width) * CELLS // width
    cells = np.zeros((CELLS, CELLS))
    np.add.at(cells, (rows[:, None], columns[None]), hidden)
    full = np.outer(np.bincount(rows), np.bincount(columns))
    assert ((cells == 0) | (cells == full)).all()
    assert (cells == 0).sum() == min(max(round(share * CELLS**2), 1), CELLS**2 - 1)


def test_a_mask_is_visible_in_a_latent() -> None:
    cue = corrupt_picture(photograph(), Mask(share=0.25), generator())
    vector = Pixels(PixelsOptions(size=32)).encode_images([cue]).vectors[0]
    assert (vector == 0).mean() == pytest.approx(0.25, abs=0.01)


@given(share=shares, side=st.sampled_from(["left", "right", "top", "bottom"]))
def test_a_missing_side_is_one_edge_of_its_share(share: float, side: str) -> None:
    observed = corrupt_picture(
        photograph(), MissingSide.model_validate({"side": side, "share": share}), generator()
    ).observed
    assert observed is not None
    along, first = (observed.T, side == "left") if side in ("left", "right") else (observed, side == "top")
    lines = along if first else along[::-1]
    count = min(max(round(share * len(lines)), 1), len(lines) - 1)
    assert not lines[:count].any()
    assert lines[count:].all()


def test_a_random_side_is_every_side() -> None:
    corners = set()
    for seed in range(40):
        observed = corrupt_picture(photograph(), MissingSide(share=0.25), generator(seed)).observed
        assert observed is not None
        corners.add((observed[0, 48], observed[-1, 48], observed[32, 0], observed[32, -1]))
    assert len(corners) == 4


@given(share=shares, seed=st.integers(0, 99))
def test_a_window_is_a_rectangle_of_its_share_in_the_pictures_proportions(share: float, seed: int) -> None:
    observed = corrupt_picture(photograph(), Window(share=share), generator(seed)).observed
    assert observed is not None
    rows, columns = np.flatnonzero(observed.any(axis=1)), np.flatnonzero(observed.any(axis=0))
    assert observed.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert observed.mean() == pytest.approx(share, abs=0.03)


@given(share=shares, seed=st.integers(0, 99))
def test_a_crop_is_a_part_of_the_picture_and_masks_nothing(share: float, seed: int) -> None:
    whole = photograph()
    cue = corrupt_picture(whole, Crop(share=share), generator(seed))
    assert cue.observed is None
    height, width = cue.pixels.shape[:2]
    assert height * width == pytest.approx(share * 64 * 96, rel=0.15, abs=64)
    found = [
        (top, left)
        for top in range(64 - height + 1)
        for left in range(96 - width + 1)
        if np.array_equal(whole.pixels[top, left], cue.pixels[0, 0])
        and np.array_equal(whole.pixels[top : top + height, left : left + width], cue.pixels)
    ]
    assert found


def test_noise_has_its_sigma() -> None:
    grey = Picture(np.full((200, 200, 3), 128, dtype=np.uint8))
    noisy = corrupt_picture(grey, Noise(sigma=0.1), generator()).pixels.astype(float)
    assert noisy.std() == pytest.approx(25.5, rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=0.5)


def test_brightness_multiplies_and_clips() -> None:
    pixels = photograph().pixels
    for factor in (0.5, 2.0):
        found = corrupt_picture(photograph(), Brightness(factor=factor), generator()).pixels
        np.testing.assert_array_equal(found, np.rint(np.minimum(pixels * factor, 255)))


def test_blur_smooths_and_jpeg_loses_by_quality() -> None:
    edge = np.zeros((100, 100, 3), dtype=np.uint8)
    edge[:, 50:] = 255
    blurred = corrupt_picture(Picture(edge), Blur(sigma=0.05), generator()).pixels[50, :, 0].astype(int)
    # A Gaussian of 5 pixels: at one sigma from the edge, 16% and 84% (Pillow's is three box blurs).
    assert blurred[[44, 55]] == pytest.approx([0.16 * 255, 0.84 * 255], abs=12)
    losses = [
        np.abs(
            corrupt_picture(photograph(), Jpeg(quality=q), generator()).pixels.astype(int) - photograph().pixels
        ).mean()
        for q in (5, 50, 95)
    ]
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize("corruption", OF_PICTURES, ids=lambda c: c.kind)
def test_what_was_hidden_stays_hidden_and_something_stays_seen(corruption: Corruption) -> None:
    observed = np.zeros((64, 96), dtype=np.bool_)
    observed[:, 40:70] = True
    before = Picture(photograph().pixels, observed)
    for seed in range(20):
        after = corrupt_picture(before, corruption, generator(seed))
        assert after.observed is not None
        assert after.observed.any()
        if after.observed.shape == observed.shape:
            assert not (after.observed & ~observed).any()
        else:
            assert after.observed.shape == after.pixels.shape[:2]


@pytest.mark.parametrize("corruption", OF_PICTURES, ids=lambda c: c.kind)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2)])
def test_the_smallest_pictures_keep_something(corruption: Corruption, shape: tuple[int, int]) -> None:
    for seed in range(5):
        cue = corrupt_picture(Picture(np.full((*shape, 3), 99, dtype=np.uint8)), corruption, generator(seed))
        assert cue.pixels.size
        assert cue.observed is None or cue.observed.any()


@given(words=st.lists(st.text("abc", min_size=1), min_size=1, max_size=30), share=shares, seed=st.integers(0, 99))
def test_dropped_words_leave_the_rest_in_order(words: list[str], share: float, seed: int) -> None:
    left = corrupt_text(" ".join(words), WordDrop(share=share), generator(seed)).split()
    assert left
    remaining = iter(words)
    assert all(word in remaining for word in left)
    assert left == corrupt_text("  ".join(words), WordDrop(share=share), generator(seed)).split()


def test_words_are_dropped_by_their_share() -> None:
    text = " ".join(["word"] * 10_000)
    assert len(corrupt_text(text, WordDrop(share=0.3), generator()).split()) == pytest.approx(7000, abs=200)


@given(share=shares, seed=st.integers(0, 99), dimension=st.integers(2, 60))
def test_a_mask_zeroes_its_share_of_each_vector(share: float, seed: int, dimension: int) -> None:
    vectors = np.ones((7, dimension), dtype=np.float32)
    found = corrupt_vectors(vectors, Mask(share=share), generator(seed))
    count = min(max(round(share * dimension), 1), dimension - 1)
    np.testing.assert_array_equal((found == 0).sum(axis=1), count)
    assert (vectors == 1).all()
    np.testing.assert_array_equal(found, corrupt_vectors(vectors, Mask(share=share), generator(seed)))


def test_vector_noise_is_relative_to_each_vectors_size() -> None:
    vectors = np.array([[1.0], [1000.0]], dtype=np.float32).repeat(5000, axis=1)
    found = corrupt_vectors(vectors, VectorNoise(sigma=0.2), generator())
    assert found.dtype == np.float32
    np.testing.assert_allclose((found - vectors).std(axis=1), [0.2, 200], rtol=0.05)


def test_a_corruption_of_something_else_is_refused() -> None:
    for corruption in (*OF_TEXTS, VectorNoise()):
        with pytest.raises(InvalidRequest, match="does not apply to images"):
            corrupt_picture(photograph(), corruption, generator())
    for corruption in (*OF_PICTURES, VectorNoise()):
        with pytest.raises(InvalidRequest, match="does not apply to texts"):
            corrupt_text("a b", corruption, generator())
    for corruption in (Noise(), WordDrop()):
        with pytest.raises(InvalidRequest, match="does not apply to vectors"):
            corrupt_vectors(np.ones((1, 2), dtype=np.float32), corruption, generator())


@pytest.mark.parametrize("corruption", [*OF_PICTURES, *OF_TEXTS, VectorNoise()], ids=lambda c: c.kind)
def test_a_corruption_survives_json(corruption: Corruption) -> None:
    assert ADAPTER.validate_json(ADAPTER.dump_json(corruption)) == corruption


@pytest.mark.parametrize(
    "declared",
    [
        {"kind": "mask", "share": 1.0},
        {"kind": "mask", "share": 0},
        {"kind": "noise", "sigma": 1.5},
        {"kind": "noise", "sigma": float("nan")},
        {"kind": "jpeg", "quality": 0},
        {"kind": "brightness", "factor": 0},
        {"kind": "missing_side", "side": "middle"},
        {"kind": "blur", "radius": 2},
        {"kind": "unheard of"},
        {},
    ],
)
def test_what_is_out_of_bounds_is_refused(declared: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(declared)


def test_the_defaults_reach_every_source_and_are_printed() -> None:
    for target in ("image", "text", "vector"):
        assert any(target in corruption.applies_to for corruption in DEFAULT_CORRUPTIONS)
    lines = [corruption.describe() for corruption in DEFAULT_CORRUPTIONS]
    assert lines[:3] == ["noise (sigma 0.1)", "blur (sigma 0.02)", "brightness (factor 0.8)"]
    assert "missing_side (side random, share 0.25)" in lines


def test_noise_of_a_grey_picture_is_grey() -> None:
    grey = np.full((40, 50, 3), 128, dtype=np.uint8)
    pixels = corrupt_picture(Picture(grey), Noise(sigma=0.1), np.random.default_rng(0)).pixels
    assert (pixels == pixels[..., :1]).all()
    assert 0.09 < (pixels / 255.0).std() < 0.11
    colour = grey.copy()
    colour[0, 0, 0] = 0
    pixels = corrupt_picture(Picture(colour), Noise(sigma=0.1), np.random.default_rng(0)).pixels
    assert (pixels != pixels[..., :1]).any()
