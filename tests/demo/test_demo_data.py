"""The demo's pictures: real files, named once, captioned, strangers apart."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from engram.demo import data
from engram.demo.cues import DECLARED, FEW_WORDS, LEFT_HALF, WINDOW, memories, shown
from service.encoders.picture import read_picture
from service.errors import NotFound


def test_every_photograph_is_readable_and_like_no_other() -> None:
    pictures = [read_picture(photo.read()).pixels for photo in data.PHOTOGRAPHS]
    assert len(pictures) == 25
    assert len({picture.tobytes() for picture in pictures}) == 25
    assert all(min(picture.shape[:2]) >= 100 and picture.std() > 3 for picture in pictures)


def test_names_and_words_are_each_used_once() -> None:
    names = [photo.name for photo in data.PHOTOGRAPHS]
    assert names == sorted(set(names))
    words = [photo.caption for photo in data.PHOTOGRAPHS] + [photo.paraphrase for photo in data.PHOTOGRAPHS]
    assert len(set(words)) == 50


def test_strangers_are_every_fifth_and_never_stored() -> None:
    assert [photo.name for photo in data.STRANGERS] == ["camera", "coffee", "hubble", "motorcycle", "text"]
    stored = {memory["id"] for memory in memories("photos")}
    assert stored == {photo.name for photo in data.PHOTOGRAPHS} - {photo.name for photo in data.STRANGERS}


def test_digits_faces_and_backgrounds() -> None:
    digits = data.digits()
    assert len(digits) == 1797
    assert {label for _, _, label in digits} == set(range(10))
    assert np.array_equal(np.unique(read_picture(digits[0][1]).pixels[0, :, 0]), [0, 16, 80, 143, 207])
    assert len(data.faces()) == 100
    assert len(data.backgrounds()) == 100
    assert read_picture(data.faces()[0][1]).pixels.shape == (25, 25, 3)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"scikit-image.*engram-memory\[demo\]"):
        data.faces()


def test_shown_cues_are_parts_of_what_is_declared() -> None:
    groups = shown()
    assert sum(len(group) for group in groups.values()) == 14
    assert all(corruption in DECLARED["photos"] for corruption in (LEFT_HALF, WINDOW, FEW_WORDS))
    captions = {photo.caption for photo in data.PHOTOGRAPHS}
    for cue in (cue for group in groups.values() for cue in group):
        assert cue.text not in captions
        if cue.mask is not None:
            assert cue.image is not None
            hidden = read_picture(cue.mask).pixels[:, :, 0] > 0
            assert 0.3 < hidden.mean() < 0.8
            assert not read_picture(cue.image).pixels[hidden].any()
