"""How the bridge's weights are made and judged: a tiny instance of each."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.papers.data import MissingData
from benchmarks.weights import bridge, bridge_judge, captioned
from service.encoders.bridge import CLASSES, FEATURES, Parts, imagenet_classes
from service.encoders.minilm import DIMENSION


def unit(rows: np.typing.NDArray[np.float32]) -> np.typing.NDArray[np.float32]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_every_class_word_is_of_a_class_and_nearly_every_class_has_one() -> None:
    words, kinds = bridge.class_words()
    assert len(words) == len(set(words))
    assert set(kinds[:, 1]) == set(range(len(words)))
    assert 0 <= kinds[:, 0].min() <= kinds[:, 0].max() < CLASSES
    assert len(set(kinds[:, 0])) > 980
    for name, said in (("toy poodle", {"dog", "poodle"}), ("sorrel", {"horse"})):
        assert said <= {words[k] for k in kinds[kinds[:, 0] == imagenet_classes().index(name), 1]}


def test_the_projection_learns_pairs_and_classes_together_and_the_same_every_time() -> None:
    draw = np.random.default_rng(0)
    hidden = draw.standard_normal((FEATURES, DIMENSION)).astype(np.float32)
    features = np.abs(draw.standard_normal((200, FEATURES))).astype(np.float32)
    said = unit((features - features.mean(axis=0)) @ hidden)
    directions = draw.standard_normal((CLASSES, FEATURES)).astype(np.float32)
    classes = unit(directions @ hidden)
    meanings = np.stack([said, said], axis=1)
    arguments = (features, np.arange(200), meanings, directions, classes)
    weight, bias = bridge.trained(*arguments, steps=20, at_once=100)
    assert (weight.shape, bias.shape) == ((DIMENSION, FEATURES), (DIMENSION,))
    found = unit(features @ weight.T + bias) @ said.T
    assert (found.argmax(axis=1) == np.arange(200)).mean() > 0.9  # by chance 1 in 200
    known = unit(directions @ weight.T) @ classes.T
    assert (known.argmax(axis=1) == np.arange(CLASSES)).mean() > 0.9
    np.testing.assert_array_equal(bridge.trained(*arguments, steps=20, at_once=100)[0], weight)


def test_pictures_of_one_title_are_no_wrong_answers_to_it() -> None:
    meanings = torch.eye(3, DIMENSION)
    pictures = torch.stack([meanings[0], meanings[0], meanings[2]])
    meanings[1] = meanings[0]
    apart = bridge.info_nce(pictures, meanings, torch.tensor([0, 1, 2]))
    together = bridge.info_nce(pictures, meanings, torch.tensor([0, 0, 2]))
    assert together < 1e-3 < apart


def test_written_parts_come_back_but_for_rounding() -> None:
    draw = np.random.default_rng(0)
    shapes = {
        "projection": (DIMENSION, FEATURES),
        "bias": (DIMENSION,),
        "classes": (CLASSES, DIMENSION),
        "words": (5, DIMENSION),
        "reduction": (CLASSES, DIMENSION),
    }
    rows = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    parts = Parts(kinds=np.array([[0, 4], [999, 0]]), **rows)
    data = bridge.written(parts)
    assert len(data) < 3_500_000
    back = Parts.of(data)
    np.testing.assert_array_equal(back.kinds, parts.kinds)
    for name, value in rows.items():
        assert getattr(back, name).dtype == np.float32
        np.testing.assert_allclose(getattr(back, name), value, rtol=1e-3, atol=1e-6)


def test_a_caption_is_found_by_any_picture_that_has_it() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.9, 0.8, 0.1]], dtype=np.float32)
    assert bridge_judge.hits(scores, ["a", "a", "b"]) == (pytest.approx(2 / 3), 1.0, 1.0)
    assert bridge_judge.hits(scores, ["a", "c", "b"]) == (pytest.approx(1 / 3), 1.0, 1.0)


def stamp(
    folder: Path, name: str, colour: tuple[int, int, int], caption: str | None = "A thing.\nes=Una cosa."
) -> None:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (8, 8), (*colour, 255)).save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def test_stamps_that_are_photographs_are_taken_once(tmp_path: Path) -> None:
    stamp(tmp_path, "animals/cow", (200, 0, 0))
    stamp(tmp_path, "animals/cow_again", (201, 0, 0))
    stamp(tmp_path, "animals/cow_mirror", (0, 200, 0))
    stamp(tmp_path, "animals/cartoon/cow", (0, 0, 200))
    stamp(tmp_path, "clothes/hats/tophat", (90, 90, 90))
    stamp(tmp_path, "animals/untold", (9, 9, 9), caption=None)
    found = captioned.stamps(folder=tmp_path)
    assert [(each.name, each.caption) for each in found] == [("animals/cow", "A thing.")]
    assert len(captioned.stamps(drawn=True, folder=tmp_path)) == 3
    with pytest.raises(MissingData, match="apt install tuxpaint-stamps-default"):
        captioned.stamps(folder=tmp_path / "nothing")


def resources(path: str, file: bytes, packed: bool) -> bytes:
    """One file in Qt's binary resources, as `rcc --binary` lays it: header, contents, names, tree."""
    contents = struct.pack(">I", len(file)) + zlib.compress(file) if packed else file
    data = struct.pack(">I", len(contents)) + contents
    names, offsets = b"", []
    for part in path.split("/"):
        offsets.append(len(names))
        names += struct.pack(">HI", len(part), 0) + part.encode("utf-16-be")
    tree = struct.pack(">IHII", 0, 2, 1, 1)
    for depth, offset in enumerate(offsets):
        last = depth == len(offsets) - 1
        tree += (
            struct.pack(">IHHHI", offset, packed, 0, 0, 0) if last else struct.pack(">IHII", offset, 2, 1, depth + 2)
        )
    start = 20
    return (
        b"qres" + struct.pack(">4I", 1, start + len(data) + len(names), start, start + len(data)) + data + names + tree
    )


@pytest.mark.parametrize("packed", [False, True])
def test_photographs_in_qts_resources_are_read(tmp_path: Path, packed: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(buffer, "WEBP", lossless=True)
    inside = "gcompris/src/activities/erase/resource/long_nosedMonkey2.webp"
    (tmp_path / "erase.rcc").write_bytes(resources(inside, buffer.getvalue(), packed))
    (tmp_path / "menu.rcc").write_bytes(resources("gcompris/src/activities/menu/x.webp", b"not read", packed))
    (found,) = captioned.gcompris(tmp_path)
    assert found.caption == "long nosed monkey"
    assert found.pixels[0, 0].tolist() == [255, 0, 0]
