"""A text as the picture of its hash."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.encoders import registry
from service.encoders.pixel_text import CELL, draw_hash
from service.encoders.protocol import Decoder, Encoder, Picture
from service.errors import EmptyText, InvalidRequest, UnknownEncoder

PIXELS = {"encoder": "pixels", "options": {"size": 64, "centre": False}}


def test_it_takes_texts_through_an_image_encoder() -> None:
    encoder = registry.make("pixel_text", PIXELS)
    images = registry.make("pixels", {"size": 64, "centre": False})
    assert isinstance(encoder, Encoder)
    assert not isinstance(encoder, Decoder)
    assert encoder.takes == frozenset({"text"})
    assert encoder.dimension == images.dimension
    encoded = encoder.encode_texts(["a cat", "a dog"])
    assert encoded.warnings == ((), ())
    expected = images.encode_images([Picture(draw_hash("a cat")), Picture(draw_hash("a dog"))]).vectors
    np.testing.assert_array_equal(encoded.vectors, expected)
    assert images.fingerprint in encoder.fingerprint
    assert encoder.fingerprint != images.fingerprint


@given(text=st.text(min_size=1))
def test_the_picture_holds_the_digits_of_the_hash_in_order(text: str) -> None:
    picture = draw_hash(text)
    assert picture.shape == (64, 64, 3)
    assert set(np.unique(picture)) == {0, 255}
    cells = picture[..., 0].reshape(8, CELL, 8, CELL).transpose(0, 2, 1, 3).reshape(64, -1)
    digits = hashlib.sha256(text.encode()).hexdigest()
    drawn: dict[str, bytes] = {}
    for digit, cell in zip(digits, cells, strict=True):
        assert drawn.setdefault(digit, cell.tobytes()) == cell.tobytes()
    assert len(set(drawn.values())) == len(drawn)  # no two digits look alike


def test_the_picture_never_changes() -> None:
    """A change here changes the vectors that users have stored: it needs another fingerprint."""
    assert hashlib.sha256(draw_hash("a cat").tobytes()).hexdigest() == EXPECTED


EXPECTED = "2a44e2cab5bb1eff074d44d6ca1b37d77081adb5f6c7d6e496737251afc5b941"


def test_a_text_is_found_by_itself_alone() -> None:
    encoder = registry.make("pixel_text", {"encoder": "pixels", "options": {"size": 32}})
    texts = [f"caption {i}" for i in range(200)]
    vectors = encoder.encode_texts(texts).vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_array_equal((unit @ unit.T).argmax(axis=1), np.arange(200))
    nearest = encoder.encode_texts(["Caption 7", "caption 7 "]).vectors
    assert ((nearest / np.linalg.norm(nearest, axis=1, keepdims=True)) @ unit[7]).max() < 0.99


def test_what_cannot_be_drawn_or_encoded_is_refused() -> None:
    encoder = registry.make("pixel_text", PIXELS)
    with pytest.raises(EmptyText):
        encoder.encode_texts(["a cat", " "])
    with pytest.raises(InvalidRequest, match="texts only"):
        encoder.encode_images([Picture(np.zeros((2, 2, 3), dtype=np.uint8))])
    with pytest.raises(InvalidRequest, match="'sentence' takes no images"):
        registry.make("pixel_text", {"encoder": "sentence"})
    with pytest.raises(InvalidRequest, match="'pixel_text' takes no images"):
        registry.make("pixel_text", {"encoder": "pixel_text", "options": PIXELS})
    with pytest.raises(UnknownEncoder):
        registry.make("pixel_text", {"encoder": "nothing"})
    with pytest.raises(InvalidRequest, match="'pixels': size"):
        registry.make("pixel_text", {"encoder": "pixels", "options": {"size": 1}})
