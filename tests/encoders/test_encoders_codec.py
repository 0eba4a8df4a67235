"""The shipped codec: what it draws of what it saw, its cells of unit length, and what a mask hides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from service.encoders import codec as codec_module
from service.encoders import registry
from service.encoders.codec import CELL, CHANNELS, SIZE, WEIGHTS, CodecOptions
from service.encoders.grid import GridEncoder
from service.encoders.picture import read_picture
from service.encoders.protocol import Decoder, Encoder, Picture
from service.errors import InvalidRequest, NothingObserved, WeightsRefused, WrongDimension

GRID = SIZE // CELL
SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
PHOTOGRAPHS = [
    SKIMAGE / "astronaut.png", SKIMAGE / "chelsea.png", SKIMAGE / "coffee.png", SKLEARN / "china.jpg",
    SKLEARN / "flower.jpg",
]  # fmt: skip
Pixels = NDArray[np.uint8]
UNIT = CodecOptions(centre=False)


@pytest.fixture(scope="module")
def codec() -> GridEncoder:
    """With cells of unit length."""
    return codec_module.make(UNIT, device="cpu")


@pytest.fixture(scope="module")
def centred() -> GridEncoder:
    return codec_module.make(CodecOptions(), device="cpu")


@pytest.fixture(scope="module")
def photographs() -> list[Pixels]:
    """Five that the weights never saw, 64 x 64."""
    return [shrunk(read_picture(path.read_bytes()).pixels) for path in PHOTOGRAPHS]


def shrunk(pixels: Pixels, side: int = SIZE) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def cells(encoder: GridEncoder, *pictures: Picture) -> NDArray[np.float32]:
    return encoder.encode_images(pictures).vectors.reshape(-1, GRID, GRID, CHANNELS)


def decibels(of: Pixels, drawn: Pixels) -> float:
    error = np.mean((of.astype(np.float64) - drawn) ** 2)
    return float(10 * np.log10(255**2 / error))


def test_it_is_an_encoder_and_a_decoder(codec: GridEncoder) -> None:
    assert isinstance(codec, Encoder)
    assert isinstance(codec, Decoder)
    assert (codec.name, codec.takes) == ("codec", {"image"})
    assert codec.dimension == GRID * GRID * CHANNELS
    assert registry.make("codec", {"centre": False}).fingerprint == codec.fingerprint
    assert registry.make("codec", {}).fingerprint != codec.fingerprint
    with pytest.raises(InvalidRequest, match="images only"):
        codec.encode_texts(["a cat"])
    with pytest.raises(WrongDimension):
        codec.decode(np.zeros((1, codec.dimension + 1), np.float32))


def test_a_photograph_is_drawn_nearer_than_a_thumbnail_of_as_many_bytes(
    codec: GridEncoder, photographs: list[Pixels]
) -> None:
    bytes_stored = 2 * codec.dimension  # fp16
    drawn = codec.decode(codec.encode_images([Picture(pixels) for pixels in photographs]).vectors)
    for pixels, picture in zip(photographs, drawn, strict=True):
        assert picture.shape == (SIZE, SIZE, 3)
        thumbnail = shrunk(pixels, int((bytes_stored / 3) ** 0.5))  # in whole bytes: twice as many values
        assert decibels(pixels, picture) > decibels(pixels, shrunk(thumbnail))


def test_half_precision_draws_the_same_picture(codec: GridEncoder, photographs: list[Pixels]) -> None:
    vectors = codec.encode_images([Picture(pixels) for pixels in photographs]).vectors
    drawn = codec.decode(vectors)
    for one, other in zip(drawn, codec.decode(vectors.astype(np.float16).astype(np.float32)), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 2


@given(
    pixels=st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)).flatmap(
        lambda shape: arrays.arrays(np.uint8, shape)
    )
)
def test_every_cell_of_any_picture_has_unit_length(pixels: Pixels) -> None:
    made = registry.make("codec", {"centre": False})
    lengths = np.linalg.norm(made.encode_images([Picture(pixels)]).vectors.reshape(-1, CHANNELS), axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-5)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_uniform_picture_is_drawn_uniform(codec: GridEncoder, level: int) -> None:
    pixels = np.full((30, 50, 3), level, np.uint8)
    drawn = codec.decode(codec.encode_images([Picture(pixels)]).vectors)[0]
    assert np.abs(drawn.astype(int) - level).max() <= 8


def test_any_size_comes_in_and_says_how_it_was_fitted(codec: GridEncoder) -> None:
    draw = np.random.default_rng(0)
    pictures = [Picture(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((1, 1), (1000, 3), (64, 64))]
    encoded = codec.encode_images(pictures)
    assert encoded.vectors.shape == (3, codec.dimension)
    assert "one pixel" in encoded.warnings[0][0]
    assert "stretched" in encoded.warnings[1][0]
    assert encoded.warnings[2] == ()


def test_what_is_hidden_has_no_influence(codec: GridEncoder, photographs: list[Pixels]) -> None:
    draw = np.random.default_rng(0)
    observed = np.ones((SIZE, SIZE), np.bool_)
    observed[:, SIZE // 2 + 1 :] = False
    noisy = np.where(observed[..., None], photographs[0], draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    one, other = cells(codec, Picture(photographs[0], observed), Picture(noisy, observed))
    np.testing.assert_array_equal(one, other)
    assert (one[:, GRID // 2 :] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(one[:, : GRID // 2], axis=2), 1.0, atol=1e-5)


def test_a_cell_sees_one_cell_around_it(codec: GridEncoder, photographs: list[Pixels]) -> None:
    observed = np.ones((SIZE, SIZE), np.bool_)
    observed[:, SIZE // 2 :] = False
    whole, seen = cells(codec, Picture(photographs[1]), Picture(photographs[1], observed))
    inside, border = np.s_[:, : GRID // 2 - 1], np.s_[:, GRID // 2 - 1]
    np.testing.assert_allclose(seen[inside], whole[inside], atol=1e-5)
    assert np.abs(seen[border] - whole[border]).max() > 1e-3


def test_a_cue_brings_its_own_memory_first_by_inner_product(codec: GridEncoder, photographs: list[Pixels]) -> None:
    draw = np.random.default_rng(0)
    others = [Picture(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(200)]
    bank = codec.encode_images([*map(Picture, photographs), *others]).vectors
    for side in (np.s_[:, SIZE // 4 :], np.s_[SIZE // 2 :], np.s_[:, : 3 * SIZE // 4]):
        observed = np.ones((SIZE, SIZE), np.bool_)
        observed[side] = False
        cues = codec.encode_images([Picture(pixels, observed) for pixels in photographs]).vectors
        assert (cues @ bank.T).argmax(axis=1).tolist() == list(range(len(photographs)))


def test_centred_latents_are_drawn_as_the_others_are(
    codec: GridEncoder, centred: GridEncoder, photographs: list[Pixels]
) -> None:
    """Whole pictures, a mixture of them, and after rounding to half precision."""
    pictures = [Picture(pixels) for pixels in photographs]
    own, others = centred.encode_images(pictures).vectors, codec.encode_images(pictures).vectors
    drawn = centred.decode(np.concatenate([own, own.mean(axis=0, keepdims=True)]))
    expected = codec.decode(np.concatenate([others, others.mean(axis=0, keepdims=True)]))
    rounded = centred.decode(own.astype(np.float16).astype(np.float32))
    for picture, same in zip([*drawn, *rounded], [*expected, *expected[:-1]], strict=True):
        assert np.abs(picture.astype(int) - same).max() <= 2
    with pytest.raises(WrongDimension):
        centred.decode(own[:, 1:])


def test_centred_pictures_have_little_in_common(
    codec: GridEncoder, centred: GridEncoder, photographs: list[Pixels]
) -> None:
    def mean_cosine(encoder: GridEncoder) -> float:
        vectors = encoder.encode_images([Picture(pixels) for pixels in photographs]).vectors
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return float((unit @ unit.T)[~np.eye(len(unit), dtype=bool)].mean())

    assert abs(mean_cosine(centred)) < 0.15 < mean_cosine(codec)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_uniform_picture_is_no_zero_vector_when_centred(centred: GridEncoder, level: int) -> None:
    vector = centred.encode_images([Picture(np.full((30, 50, 3), level, np.uint8))]).vectors
    assert np.linalg.norm(vector) > 0.1
    assert np.abs(centred.decode(vector)[0].astype(int) - level).max() <= 8


def test_hidden_cells_stay_zero_when_centred(centred: GridEncoder, photographs: list[Pixels]) -> None:
    observed = np.ones((SIZE, SIZE), np.bool_)
    observed[:, SIZE // 2 :] = False
    seen = cells(centred, Picture(photographs[1], observed))[0]
    assert (seen[:, GRID // 2 :] == 0).all()
    assert seen[:, : GRID // 2].any(axis=2).all()


def test_nothing_observed_is_refused(codec: GridEncoder, photographs: list[Pixels]) -> None:
    with pytest.raises(NothingObserved):
        codec.encode_images([Picture(photographs[0], np.zeros((SIZE, SIZE), np.bool_))])
    few = np.zeros((SIZE, SIZE), np.bool_)
    few[:2, :3] = True  # 6 of a cell's 16 pixels
    with pytest.raises(NothingObserved, match="16x16"):
        codec.encode_images([Picture(photographs[0], few)])


def test_a_mixture_of_two_is_drawn_between_them(codec: GridEncoder, photographs: list[Pixels]) -> None:
    """Nearer to the mean of the two than to either, and than either is to it."""
    one, other = photographs[0], photographs[1]
    vectors = codec.encode_images([Picture(one), Picture(other)]).vectors
    drawn = codec.decode(vectors.mean(axis=0, keepdims=True))[0]
    mean = np.rint((one.astype(float) + other) / 2).astype(np.uint8)
    assert decibels(mean, drawn) > 3 + max(decibels(one, drawn), decibels(other, drawn), decibels(mean, one))


def test_a_picture_has_one_vector_whatever_comes_with_it(codec: GridEncoder, photographs: list[Pixels]) -> None:
    pictures = [Picture(pixels) for pixels in photographs]
    together = codec.encode_images(pictures).vectors
    alone = np.concatenate([codec.encode_images([picture]).vectors for picture in pictures])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    many = codec.encode_images(pictures * 30).vectors  # more than one run of the network
    np.testing.assert_allclose(
        many.reshape(30, *together.shape), np.broadcast_to(together, (30, *together.shape)), atol=1e-5
    )


def test_weights_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(WEIGHTS.read())
    data[-1] ^= 1
    (tmp_path / "other_service" / "encoders" / "shipped").mkdir(parents=True)
    (tmp_path / "other_service" / "__init__.py").touch()
    (tmp_path / "other_service" / WEIGHTS.path).write_bytes(bytes(data))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsRefused, match="sha256"):
        codec_module.make(UNIT, device="cpu", weights=dataclasses.replace(WEIGHTS, module="other_service"))
