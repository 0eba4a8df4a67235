"""The pixels latent: its map, its inverse, and that what is hidden has no influence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from service.encoders.cells import PIXELS_AT_ONCE
from service.encoders.pixels import LUMA, MEAN_OFFSET, MEAN_WEIGHT, Pixels, PixelsOptions
from service.encoders.protocol import Decoder, Encoder, Picture
from service.errors import InvalidRequest, NothingObserved, WrongDimension

SIZE = 8


def encoder(size: int = SIZE, *, colour: bool = True, centre: bool = True) -> Pixels:
    return Pixels(PixelsOptions(size=size, colour=colour, centre=centre))


def latent(of: Pixels, pixels: NDArray[np.uint8], observed: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    return of.encode_images([Picture(pixels, observed)]).vectors[0]


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))
pictures = shapes.flatmap(lambda shape: arrays.arrays(np.uint8, shape))
exact = arrays.arrays(np.uint8, (SIZE, SIZE, 3))


def test_it_is_an_encoder_and_a_decoder() -> None:
    assert isinstance(encoder(), Encoder)
    assert isinstance(encoder(), Decoder)
    assert encoder(16).dimension == 16 * 16 * 3
    assert encoder(16, colour=False).dimension == 256
    prints = {encoder(s, colour=c, centre=m).fingerprint for s in (8, 9) for c in (True, False) for m in (True, False)}
    assert len(prints) == 8


@given(pixels=exact, centre=st.booleans())
def test_decode_inverts_encode_at_the_latents_own_size(pixels: NDArray[np.uint8], centre: bool) -> None:
    pixel_encoder = encoder(centre=centre)
    vectors = pixel_encoder.encode_images([Picture(pixels)]).vectors
    np.testing.assert_array_equal(pixel_encoder.decode(vectors)[0], pixels)
    stored = vectors.astype(np.float16).astype(np.float32)
    assert np.abs(pixel_encoder.decode(stored)[0].astype(int) - pixels).max() <= 1


@given(pixels=pictures, colour=st.booleans())
def test_cells_are_area_means(pixels: NDArray[np.uint8], colour: bool) -> None:
    height, width = pixels.shape[:2]
    # Each pixel becomes size x size equal parts, each cell the mean of height x width of them: exact, by definition.
    parts = np.kron(pixels.transpose(2, 0, 1), np.ones((SIZE, SIZE))).reshape(3, SIZE, height, SIZE, width)
    expected = parts.mean(axis=(2, 4)).transpose(1, 2, 0) / 255
    if not colour:
        expected = expected @ LUMA[:, None]
    found = latent(encoder(colour=colour, centre=False), pixels).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@given(pixels=pictures)
def test_the_centred_latent_is_as_documented(pixels: NDArray[np.uint8]) -> None:
    raw = latent(encoder(centre=False), pixels)
    expected = raw - raw.mean() + MEAN_WEIGHT * (raw.mean() + MEAN_OFFSET)
    np.testing.assert_allclose(latent(encoder(), pixels), expected, atol=1e-5)


@given(a=exact, b=exact, share=st.floats(0, 1))
def test_a_mixture_of_latents_draws_the_mixture_of_pictures(
    a: NDArray[np.uint8], b: NDArray[np.uint8], share: float
) -> None:
    mixture = np.float32(share) * latent(encoder(), a) + np.float32(1 - share) * latent(encoder(), b)
    expected = share * a.astype(np.float64) + (1 - share) * b
    assert np.abs(encoder().decode(mixture[None])[0] - expected).max() <= 0.51


@given(seed=st.integers(0, 2**32 - 1), spread=st.integers(90, 155), shift=st.integers(1, 100))
def test_cosine_hardly_sees_a_change_of_brightness(seed: int, spread: int, shift: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, spread, (SIZE, SIZE, 3), dtype=np.uint8, endpoint=True)
    assert cosine(latent(encoder(), pixels), latent(encoder(), pixels + np.uint8(shift))) > 0.97


@given(value=st.integers(0, 255))
def test_a_uniform_picture_is_not_the_zero_vector(value: int) -> None:
    pixels = np.full((5, 9, 3), value, dtype=np.uint8)
    vector = latent(encoder(), pixels)
    np.testing.assert_allclose(vector, MEAN_WEIGHT * (value / 255 + MEAN_OFFSET), atol=1e-6)
    assert (encoder().decode(vector[None])[0] == value).all()


def test_a_black_picture_uncentred_is_the_zero_vector() -> None:
    assert not latent(encoder(centre=False), np.zeros((4, 4, 3), dtype=np.uint8)).any()


@given(pixels=pictures, data=st.data(), centre=st.booleans(), colour=st.booleans())
def test_hidden_pixels_have_no_influence(
    pixels: NDArray[np.uint8], data: st.DataObject, centre: bool, colour: bool
) -> None:
    observed = data.draw(arrays.arrays(np.bool_, pixels.shape[:2]))
    observed[: (len(observed) + 1) // 2] = True  # half at least is seen, so some cell counts
    other = data.draw(arrays.arrays(np.uint8, pixels.shape))
    changed = np.where(observed[..., None], pixels, other)
    pixel_encoder = encoder(centre=centre, colour=colour)
    np.testing.assert_array_equal(latent(pixel_encoder, pixels, observed), latent(pixel_encoder, changed, observed))


@given(pixels=pictures)
def test_a_mask_that_hides_nothing_changes_nothing(pixels: NDArray[np.uint8]) -> None:
    everything = np.ones(pixels.shape[:2], dtype=np.bool_)
    np.testing.assert_allclose(latent(encoder(), pixels, everything), latent(encoder(), pixels), atol=1e-5)


def test_hidden_cells_are_zero_and_the_mean_is_over_the_rest() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE * 4, SIZE * 4, 3), dtype=np.uint8)
    observed = np.ones(pixels.shape[:2], dtype=np.bool_)
    observed[:, SIZE * 2 + 1 :] = False  # the fifth column of cells is a quarter observed: it is hidden
    shaped = latent(encoder(), pixels, observed).reshape(SIZE, SIZE, 3)
    assert not shaped[:, 4:].any()
    left = pixels[:, : SIZE * 2].reshape(SIZE, 4, 4, 4, 3).mean(axis=(1, 3)) / 255
    expected = left - left.mean() + MEAN_WEIGHT * (left.mean() + MEAN_OFFSET)
    np.testing.assert_allclose(shaped[:, :4], expected, atol=1e-5)


def test_a_masked_half_is_nearest_to_its_own_picture() -> None:
    rng = np.random.default_rng(1)
    stored = [Picture(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(50)]
    observed = np.zeros((32, 32), dtype=np.bool_)
    observed[:, :16] = True
    vectors = encoder().encode_images(stored).vectors
    cues = encoder().encode_images([Picture(picture.pixels, observed) for picture in stored]).vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_array_equal((cues @ unit.T).argmax(axis=1), np.arange(50))


def test_too_little_observed_is_nothing_observed() -> None:
    observed = np.zeros((64, 64), dtype=np.bool_)
    observed[0, 0] = True
    with pytest.raises(NothingObserved, match="half observed"):
        latent(encoder(), np.zeros((64, 64, 3), dtype=np.uint8), observed)


def test_a_batch_of_mixed_shapes_equals_its_pictures_one_by_one() -> None:
    rng = np.random.default_rng(2)
    batch = []
    for height, width in ((8, 8), (5, 31), (8, 8), (64, 48), (5, 31), (1, 1)):
        observed = rng.random((height, width)) < 0.9 if height == 5 else None
        batch.append(Picture(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), observed))
    together = encoder().encode_images(batch)
    for i, picture in enumerate(batch):
        np.testing.assert_allclose(together.vectors[i], encoder().encode_images([picture]).vectors[0], atol=1e-6)
    assert [len(warnings) for warnings in together.warnings] == [0, 1, 0, 0, 1, 1]


def test_a_picture_larger_than_one_band_is_averaged_whole() -> None:
    width = 2048
    height = 3 * PIXELS_AT_ONCE // width + 7
    pixels = np.broadcast_to(np.linspace(0, 255, height).astype(np.uint8)[:, None, None], (height, width, 3))
    raw = latent(encoder(4, centre=False), np.ascontiguousarray(pixels)).reshape(4, 4, 3)
    np.testing.assert_allclose(raw[:, 0, 0], [0.125, 0.375, 0.625, 0.875], atol=0.003)


def test_no_pictures_give_no_rows() -> None:
    assert encoder().encode_images([]).vectors.shape == (0, encoder().dimension)
    assert encoder().decode(np.empty((0, encoder().dimension), dtype=np.float32)) == []


def test_grey_is_drawn_in_all_channels() -> None:
    grey = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    pixels = np.repeat(grey[..., None], 3, axis=2)
    one_channel = encoder(colour=False)
    np.testing.assert_array_equal(one_channel.decode(one_channel.encode_images([Picture(pixels)]).vectors)[0], pixels)


def test_texts_and_latents_of_another_size_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="images only"):
        encoder().encode_texts(["a cat"])
    with pytest.raises(WrongDimension):
        encoder().decode(np.zeros((1, 7), dtype=np.float32))
