"""The client, one body of tests over HTTP and in process, called and awaited."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engram import Client, Collection, EngramError
from engram.demo.data import digits, png
from service.errors import (
    CollectionExists,
    CollectionNotFound,
    ContentNotFound,
    EmptyText,
    InvalidImage,
    InvalidRequest,
    InvalidVector,
    MemoryNotFound,
    NotFound,
    NothingObserved,
    OperationNotFound,
    UnknownEncoder,
    UnknownSpace,
    WrongDimension,
)

NewName = Callable[[], str]
PIXELS = {"image": {"encoder": "pixels", "options": {"size": 16}}}


@pytest.fixture
def client(client_of_any_way: Client) -> Client:
    return client_of_any_way


def picture(seed: int, side: int = 24) -> NDArray[np.uint8]:
    """A picture unlike that of any other seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC))


def with_pictures(client: Client, name: str, count: int = 6) -> Collection:
    collection = client.create_collection(name, PIXELS)
    reply = collection.store({"id": f"p{seed}", "image": picture(seed)} for seed in range(count))
    assert [result.status for result in reply.results] == ["stored"] * count
    return collection


def test_a_collection_from_its_making_to_its_end(client: Client, new_name: NewName) -> None:
    name = new_name()
    collection = with_pictures(client, name)
    assert name in [info.name for info in client.collections()]
    info = collection.info()
    assert (info.name, info.count, info.spaces["image"]["encoder"]) == (name, 6, "pixels")
    assert collection.count() == 6
    assert collection.delete(["p0", "never stored"]) == ["p0"]
    assert collection.delete("p1") == ["p1"]
    assert collection.count() == 4
    client.delete_collection(name)
    assert name not in [info.name for info in client.collections()]
    with pytest.raises(CollectionNotFound):
        collection.count()


def test_an_image_may_be_a_path_bytes_a_pillow_image_or_an_array(
    client: Client, new_name: NewName, tmp_path: Path
) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    data = png(picture(1))
    file = tmp_path / "one.png"
    file.write_bytes(data)
    same: dict[str, object] = {
        "path": file,
        "text path": str(file),
        "bytes": data,
        "array": picture(1),
        "pillow": Image.fromarray(picture(1)),
    }
    reply = collection.store({"id": memory_id, "image": image} for memory_id, image in same.items())
    assert not reply.errors
    for memory_id in same:
        stored = np.asarray(Image.open(io.BytesIO(collection.content(memory_id))))
        assert np.array_equal(stored, picture(1))
    assert collection.content("path") == data


MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)


def test_a_pillow_image_of_any_mode_is_read(client: Client, new_name: NewName) -> None:
    """Each is mid-grey but for what its mode adds: recall by the same picture in RGB finds it."""
    grey = Image.fromarray(picture(1)).convert("L")
    drawn = {mode: in_mode(grey, mode) for mode in MODES}
    collection = client.create_collection(new_name(), PIXELS)
    reply = collection.store({"id": mode, "image": image} for mode, image in drawn.items())
    assert [(result.id, result.error) for result in reply.results] == [(mode, None) for mode in MODES]
    answer = collection.recall(image=grey, limit=len(MODES))
    similarity = {match.id: match.similarity for match in answer.matches}
    assert all(similarity[mode] > (0.5 if mode == "1" else 0.98) for mode in MODES), similarity


def in_mode(grey: Image.Image, mode: str) -> Image.Image:
    if mode in ("I", "F"):
        return grey.convert("F").point(lambda value: value * (1 / 255)) if mode == "F" else grey.convert("I")
    if mode == "I;16":
        return Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    by_way_of = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB", "HSV": "RGB", "PA": "P"}
    start = grey.convert(by_way_of[mode]) if mode in by_way_of else grey
    return start.convert(mode)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((0, 5), np.uint8), "uint8 and shape (0, 5)"),
        (np.zeros((5, 0, 3), bool), "bool and shape (5, 0, 3)"),
        (np.zeros(4, np.uint8), "shape (4,)"),
        (np.zeros((), np.uint8), "shape ()"),
        (np.zeros((4, 4, 0), np.uint8), "shape (4, 4, 0)"),
        (np.zeros((4, 4, 5), np.uint8), "shape (4, 4, 5)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape (1, 4, 4, 3)"),
        (np.zeros((4, 4), np.float32), "float32"),
        (np.zeros((4, 4), np.int64), "int64"),
        (Image.new("RGB", (0, 3)), "RGB of 0x3"),
        (Image.open(io.BytesIO(png(picture(1))[:200])), "truncated"),
        (3, "not int"),
    ],
)
def test_what_is_no_picture_is_said_to_be_none(client: Client, new_name: NewName, image: Any, told: str) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    with pytest.raises(InvalidImage) as raised:
        collection.recall(image=image)
    assert told in raised.value.detail
    assert [r.error and r.error.code for r in collection.store([{"image": image}]).results] == [InvalidImage.code]


def test_a_channel_may_be_one_or_two(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    grey = picture(1)[:, :, :1]
    opaque = np.concatenate([grey, np.full_like(grey, 255)], axis=2)
    arrays = {"flat": grey[:, :, 0], "one": grey, "two": opaque, "mask": grey > 128}
    assert not collection.store({"id": name, "image": array} for name, array in arrays.items()).errors
    similarity = {match.id: match.similarity for match in collection.recall(image=grey).matches}
    assert [similarity[name] > 0.999 for name in ("flat", "one", "two")] == [True] * 3


def test_recall_of_a_whole_picture_from_its_left_half(client: Client, new_name: NewName) -> None:
    collection = with_pictures(client, new_name())
    hidden = np.zeros((24, 24), dtype=bool)
    hidden[:, 12:] = True
    cue = np.where(hidden[:, :, None], np.uint8(0), picture(3))
    answer = collection.recall(image=cue, mask=hidden, limit=2, reconstruct=True, gate=False, trace=True)
    assert answer.matches[0].id == "p3"
    assert len(answer.matches) == 2
    assert answer.recall is not None
    assert len(answer.recall.energy) >= 2
    assert answer.timings_ms["total"] > 0
    recalled = answer.image()
    assert recalled is not None
    assert answer.trace is not None
    expected = np.asarray(Image.fromarray(picture(3)).resize(recalled.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(recalled.convert("RGB"), dtype=float) - expected).mean() < 8


def test_recall_by_vectors(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), {"v": {"dimension": 8, "similarity": "cosine"}})
    rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    memories = [{"id": str(i), "vectors": {"v": row}, "payload": {"row": i}} for i, row in enumerate(rows)]
    assert collection.store(memories).version is not None
    answer = collection.recall(vectors={"v": rows[2] + 0.01}, with_vectors=True)
    assert answer.matches[0].id == "2"
    assert answer.matches[0].payload == {"row": 2}
    assert answer.matches[0].vectors is not None
    np.testing.assert_allclose(answer.matches[0].vectors["v"], rows[2], rtol=1e-5)
    with pytest.raises(WrongDimension):
        collection.recall(vectors={"v": [1.0, 2.0]})
    with pytest.raises(InvalidVector):
        collection.recall(vectors={"v": np.zeros(8, dtype=np.float32)})
    assert collection.get("2").media_type is None
    with pytest.raises(ContentNotFound):
        collection.content("2")


def test_a_recall_brings_the_caption_the_picture_and_the_way_to_the_original(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), {**PIXELS, "v": {"dimension": 3}})
    memories: list[dict[str, Any]] = [
        {"id": f"p/{i}.png", "image": picture(i), "text": f"caption {i}", "vectors": {"v": row}}
        for i, row in enumerate(np.eye(3))
    ]
    collection.store([*memories, {"id": "bare", "vectors": {"v": -np.ones(3)}}])
    answer = collection.recall(
        vectors={"v": [0, 1, 0.1]}, reconstruct={"format": "webp"}, with_vectors=True, trace=True, beta=100
    )
    assert (answer.matches[0].id, answer.matches[0].text, answer.text) == ("p/1.png", "caption 1", "caption 1")
    assert answer.completed == pytest.approx({"image": 1.0}, abs=1e-4)
    assert answer.original == f"/v1/collections/{collection.name}/memories/p%2F1.png/content"
    assert answer.reconstruction is not None
    assert answer.reconstruction.media_type == "image/webp"
    assert answer.reconstruction.image().size == (16, 16)
    assert answer.state is not None
    np.testing.assert_allclose(answer.state["v"], [0, 1, 0], atol=1e-3)
    assert answer.candidates == ()
    between = collection.recall(vectors={"v": [1, 1, 0]})
    assert set(between.candidates) == {"p/0.png", "p/1.png"}
    bare = collection.recall(vectors={"v": -np.ones(3)}, reconstruct=True, trace=True, beta=1000)
    assert (bare.matches[0].id, bare.text, bare.original) == ("bare", None, None)
    assert (bare.image(), set(bare.trace or ())) == (None, {None})


def test_a_memory_that_lacks_a_space_is_recalled_by_the_others(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), {"u": {"dimension": 16}, "v": {"dimension": 16}})
    rows = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    whole = [{"id": str(i), "vectors": {"u": rows[0, i], "v": rows[1, i]}} for i in range(1, 6)]
    collection.store([{"id": "0", "vectors": {"u": rows[0, 0]}}, *whole])
    for beta in (50, "auto"):
        answers = collection.recall_batch(({"vectors": {"u": rows[0, i]}} for i in range(6)), beta=beta)
        assert [answer.matches[0].id for answer in answers] == ["0", "1", "2", "3", "4", "5"]


def test_a_batch_of_cues_answers_each_or_says_what_is_wrong_with_it(client: Client, new_name: NewName) -> None:
    collection = with_pictures(client, new_name())
    everything = np.ones((24, 24), dtype=bool)
    cues: list[dict[str, Any]] = [
        {"image": picture(4)},
        {"image": picture(2), "mask": everything},
        {"image": picture(5)},
    ]
    answers = collection.recall_batch(cues, limit=1)
    assert [answer.matches[0].id for answer in answers if answer.error is None] == ["p4", "p5"]
    assert answers[1].error is not None
    assert answers[1].error.code == NothingObserved.code


def test_a_bad_item_is_reported_and_the_rest_are_stored(client: Client, new_name: NewName, tmp_path: Path) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    memories = [
        {"id": "a", "image": picture(1)},
        {"id": "gone", "image": tmp_path / "gone.png"},
        {"id": "broken", "image": b"not a picture"},
        {"id": "floats", "image": np.zeros((4, 4, 7))},
        {"id": "odd", "image": picture(2), "colour": "red"},
        {"id": "b", "image": picture(3)},
    ]
    reply = collection.store(memories)
    assert [result.id for result in reply.results] == [memory["id"] for memory in memories]
    assert [result.status for result in reply.results] == ["stored", "error", "error", "error", "error", "stored"]
    codes = [result.error.code for result in reply.errors if result.error]
    assert codes == [NotFound.code, InvalidImage.code, InvalidImage.code, InvalidRequest.code]
    assert collection.count() == 2


def test_a_collection_may_refuse_what_it_holds_already(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), PIXELS, duplicates={"refuse": ["image"]})
    assert collection.info().duplicates == {"refuse": ["image"]}
    reply = collection.store([{"id": "a", "image": picture(1)}, {"id": "b", "image": picture(1)}])
    assert [(result.id, result.error.code) for result in reply.errors if result.error] == [("b", "duplicate")]
    assert collection.count() == 1


def test_how_a_picture_was_fitted_is_said_when_it_is_stored_and_when_it_is_a_cue(
    client: Client, new_name: NewName
) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    odd = {"dot": picture(1)[:1, :1], "strip": picture(2, 60)[:5]}
    stored = collection.store([{"id": name, "image": image} for name, image in odd.items()])
    for name, words, result in zip(odd, ("one pixel", "60x5"), stored.results, strict=True):
        assert any(words in warning for warning in result.warnings), result
        assert any(words in warning for warning in collection.recall(image=odd[name]).warnings)


def test_many_memories_go_in_batches_and_an_id_stored_again_is_replaced(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    seen: list[int] = []
    memories = ({"id": str(i % 20), "image": picture(i)} for i in range(25))
    reply = collection.store(memories, batch=10, progress=seen.append)
    assert seen == [10, 10, 5]
    assert [result.status for result in reply.results] == ["stored"] * 20 + ["updated"] * 5
    assert collection.count() == 20
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(collection.content("3")))), picture(23))


def test_a_picture_of_megabytes_comes_back_byte_for_byte(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    data = png(noise)
    assert len(data) > 2**21
    memory = {"id": "big", "image": data, "text": "null", "payload": {"deep": [1, "ä"]}}
    assert collection.store([memory, {"image": picture(1)}]).errors == ()
    assert collection.content("big") == data
    assert (collection.get("big").text, collection.get("big").payload) == ("null", {"deep": [1, "ä"]})
    hidden = np.zeros((900, 900), dtype=bool)
    hidden[:300] = True
    answer = collection.recall(image=data, mask=hidden, limit=1, separation="sparsemax", reconstruct=True)
    assert answer.matches[0].id == "big"


@pytest.mark.parametrize("memory_id", ["a/b.png", "ünïcode 日本", "50%", "?q=1#x", "a//b", "..", "."])
def test_an_id_is_kept_to_the_letter(client: Client, new_name: NewName, memory_id: str) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    assert collection.store([{"id": memory_id, "image": picture(1)}]).results[0].id == memory_id
    assert collection.get(memory_id).id == memory_id
    assert collection.content(memory_id)
    assert collection.recall(image=picture(1)).matches[0].id == memory_id
    assert collection.delete(memory_id) == [memory_id]


def test_a_store_that_does_not_wait_names_its_operation(client: Client, new_name: NewName) -> None:
    collection = client.create_collection(new_name(), PIXELS)
    reply = collection.store([{"id": "a", "image": picture(1)}], wait=False)
    assert len(reply.operations) == 1
    while (operation := client.operation(reply.operations[0])).status in ("queued", "running"):
        time.sleep(0.02)
    assert (operation.status, operation.collection, operation.progress) == ("done", collection.name, 1.0)
    assert collection.count() == 1


def test_calibration_accepts_noisy_digits_and_refuses_what_is_no_digit(client: Client, new_name: NewName) -> None:
    spaces = {"image": {"encoder": "pixels", "options": {"size": 8, "colour": False}}}
    noise = {"kind": "noise", "sigma": 0.1}
    collection = client.create_collection(new_name(), spaces, corruptions=[noise])
    stored = digits()[:200]
    assert collection.recall(image=stored[0][1]).verdict == "uncalibrated"
    collection.store({"id": name, "image": image} for name, image, _ in stored)
    info = collection.wait_until_calibrated()
    assert info.calibration.state == "current"
    [record] = info.calibration.modalities
    assert (record.modality, record.rows, record.refused) == ("image", 200, None)
    answers = collection.recall_batch({"image": image} for _, image, _ in stored)
    assert [answer.matches[0].id for answer in answers] == [name for name, _, _ in stored]
    assert sum(answer.verdict in ("known", "ambiguous") for answer in answers) >= 190
    static = np.random.default_rng(5).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    assert [answer.verdict for answer in collection.recall_batch({"image": s} for s in static)] == ["unknown"] * 20


REFUSALS: dict[str, tuple[type[EngramError], Callable[[Client, Collection], object]]] = {
    "a second collection of one name": (CollectionExists, lambda cl, c: cl.create_collection(c.name)),
    "a name with a space": (InvalidRequest, lambda cl, c: cl.create_collection("a name")),
    "an unknown encoder": (UnknownEncoder, lambda cl, c: cl.create_collection("x", {"s": {"encoder": "oracle"}})),
    "an unknown setting": (InvalidRequest, lambda cl, c: cl.create_collection("x", shards=3)),
    "no such collection": (CollectionNotFound, lambda cl, c: cl.collection("none").recall(image=picture(1))),
    "no such collection to delete": (CollectionNotFound, lambda cl, c: cl.delete_collection("none")),
    "no such memory": (MemoryNotFound, lambda cl, c: c.get("none")),
    "no such content": (MemoryNotFound, lambda cl, c: c.content("none")),
    "no such operation": (OperationNotFound, lambda cl, c: cl.operation("none")),
    "an empty cue": (NothingObserved, lambda cl, c: c.recall()),
    "an empty text": (EmptyText, lambda cl, c: c.recall(text=" ")),
    "a cue that is no picture": (InvalidImage, lambda cl, c: c.recall(image=b"no picture")),
    "a mask without a picture": (InvalidRequest, lambda cl, c: c.recall(mask=picture(1))),
    "a limit of 0": (InvalidRequest, lambda cl, c: c.recall(image=picture(1), limit=0)),
    "a limit of 1001": (InvalidRequest, lambda cl, c: c.recall(image=picture(1), limit=1001)),
    "a β of 0": (InvalidRequest, lambda cl, c: c.recall(image=picture(1), beta=0)),
    "a misspelt option": (InvalidRequest, lambda cl, c: c.recall(image=picture(1), limits=3)),
    "a space that is not there": (UnknownSpace, lambda cl, c: c.recall(image=picture(1), spaces={"text": 1})),
    "a batch of nothing": (InvalidRequest, lambda cl, c: c.store([{"id": "a"}], batch=0)),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_is_the_same_error_every_way(what: str, every_client: dict[str, Client], new_name: NewName) -> None:
    expected, call = REFUSALS[what]
    told = {}
    for way, client in every_client.items():
        collection = client.create_collection(new_name(), PIXELS)
        with pytest.raises(EngramError) as raised:
            call(client, collection)
        assert type(raised.value) is expected
        told[way] = raised.value.detail.replace(collection.name, "its name")
    # HTTP names the part of the address, in process there is none.
    assert len(set(told.values())) == (2 if what == "a name with a space" else 1), told


def test_the_end_of_an_engine_in_process_frees_its_folder(tmp_path: Path) -> None:
    with Client(path=tmp_path / "m") as client:
        with_pictures(client, "kept", 2)
    with Client(path=tmp_path / "m") as client:
        collection = client.collection("kept")
        assert collection.count() == 2
        assert collection.recall(image=picture(1)).matches[0].id == "p1"
    with pytest.raises(NotFound):
        Client(path=tmp_path / "n").collection("kept").count()
