"""A recall completes what its cue does not bring (picture, caption, vectors), and says between whom it is in doubt."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.app.engine import Engine
from service.app.schemas import CollectionConfig, RecallRequest, StoreRequest
from service.errors import InvalidRequest
from service.settings import Settings
from workers.loop import running

SIDE = 16
IMAGE = {"encoder": "pixels", "options": {"size": SIDE}}
TEXT = {"encoder": "bridge", "source": "text"}
NOUNS = (
    "dog", "harbour", "violin", "bakery", "glacier", "tractor", "lighthouse", "desert", "penguin", "library",
    "cathedral", "waterfall", "bicycle", "orchard", "volcano", "submarine", "circus", "windmill", "telescope",
    "vineyard", "carnival", "anchor",
)  # fmt: skip
CAPTIONS = [f"a photograph of a {noun}" for noun in NOUNS]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(Settings(data=tmp_path_factory.mktemp("completion"))) as opened, running(opened):
        yield opened


def picture(seed: int) -> NDArray[np.uint8]:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def png(pixels: NDArray[np.uint8]) -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"base64": buffer.getvalue()}


def vector(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(100 + seed).standard_normal(24).astype(np.float32)


def ask(engine: Engine, name: str, cue: dict[str, Any], **options: Any) -> dict[str, Any]:
    return dict(engine.recall(name, RecallRequest.model_validate({"cue": cue, **options}))["results"][0])


def calibrated(engine: Engine, name: str) -> None:
    deadline = time.monotonic() + 60
    while engine.collection(name).calibration.state != "current":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def drawn(drawing: dict[str, str]) -> NDArray[np.float64]:
    with Image.open(io.BytesIO(base64.b64decode(drawing["base64"]))) as image:
        assert f"image/{str(image.format).lower()}" == drawing["media_type"]
        return np.asarray(image.convert("RGB"), dtype=np.float64)


@pytest.fixture(scope="module")
def album(engine: Engine) -> str:
    """Pictures with captions and vectors; the last two share a caption, `bare` has a vector alone."""
    spaces = {"v": {"dimension": 24}, "image": IMAGE, "text": TEXT}
    engine.create_collection("album", CollectionConfig.model_validate({"spaces": spaces}))
    memories: list[dict[str, Any]] = [
        {"id": noun, "image": png(picture(i)), "text": caption, "vectors": {"v": vector(i)}, "payload": {"i": i}}
        for i, (noun, caption) in enumerate(zip(NOUNS, CAPTIONS, strict=True))
    ]
    shared = "our holiday by the sea"
    memories += [
        {"id": f"sea{i}", "image": png(picture(50 + i)), "text": shared, "vectors": {"v": vector(50 + i)}}
        for i in range(2)
    ]
    memories.append({"id": "bare", "vectors": {"v": vector(99)}})
    reply = engine.store("album", StoreRequest(memories=memories))
    assert {item.status for item in reply.results} == {"stored"}
    calibrated(engine, "album")
    return "album"


CUES: dict[str, dict[str, Any]] = {
    "text": {"text": CAPTIONS[3]},
    "image": {"image": png(picture(3))},
    "v": {"vectors": {"v": vector(3)}},
}


@pytest.mark.parametrize("given", CUES)
def test_any_one_part_brings_back_the_others(engine: Engine, album: str, given: str) -> None:
    result = ask(engine, album, CUES[given], reconstruct=True, with_vectors=True, limit=2)
    assert (result["matches"][0]["id"], result["verdict"], result["candidates"]) == (NOUNS[3], "known", [])
    assert (result["text"], result["matches"][0]["text"]) == (CAPTIONS[3], CAPTIONS[3])
    assert result["matches"][0]["payload"] == {"i": 3}
    assert set(result["completed"]) == {"v", "image", "text"} - {given}
    assert all(share > 0.99 for share in result["completed"].values())
    assert np.abs(drawn(result["reconstruction"]) - picture(3)).mean() < 3
    assert np.allclose(result["state"]["v"], vector(3), atol=0.02)
    assert result["original"] == f"/v1/collections/album/memories/{NOUNS[3]}/content"
    stored = result["matches"][0]["vectors"]
    assert all(np.allclose(result["state"][space], stored[space], atol=0.02) for space in stored)


def test_a_masked_half_brings_back_the_whole_and_its_caption(engine: Engine, album: str) -> None:
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[:, SIDE // 2 :] = 255
    result = ask(engine, album, {"image": png(picture(7)), "mask": png(mask)}, reconstruct=True, gate=False)
    assert result["text"] == CAPTIONS[7]
    assert np.abs(drawn(result["reconstruction"]) - picture(7)).mean() < 3


def test_a_memory_completes_only_what_it_has(engine: Engine, album: str) -> None:
    result = ask(engine, album, {"vectors": {"v": vector(99)}}, reconstruct=True, with_vectors=True, beta=1000)
    assert (result["matches"][0]["id"], result["text"], result["original"]) == ("bare", None, None)
    assert result["completed"] == pytest.approx({"image": 0, "text": 0}, abs=1e-6)
    assert np.abs(result["state"]["text"]).max() < 1e-3


def test_an_unknown_cue_completes_nothing(engine: Engine, album: str) -> None:
    result = ask(engine, album, {"vectors": {"v": vector(7777)}}, reconstruct=True, with_vectors=True, trace=True)
    assert result["verdict"] == "unknown"
    assert [result[key] for key in ("text", "original", "reconstruction", "state")] == [None] * 4
    assert (result["completed"], result["candidates"]) == ({}, [])
    assert result["matches"][0]["text"] is not None, "what is nearest is still listed, by its caption"
    assert all(step is not None for step in result["trace"]), "and what the dynamics did is shown"


def test_what_was_recalled_is_said_whatever_part_of_the_matches_is_listed(engine: Engine, album: str) -> None:
    result = ask(engine, album, CUES["v"], limit=2, offset=3)
    assert NOUNS[3] not in [match["id"] for match in result["matches"]]
    assert (result["text"], result["original"]) == (CAPTIONS[3], f"/v1/collections/album/memories/{NOUNS[3]}/content")


def test_captions_can_be_left_out(engine: Engine, album: str) -> None:
    result = ask(engine, album, CUES["v"], with_text=False)
    assert (result["text"], result["original"], result["matches"][0]["text"]) == (None, None, None)


def test_a_caption_on_which_most_of_the_weight_lies_is_what_comes_back(engine: Engine, album: str) -> None:
    """One memory weighs most, but the two of the other caption weigh more together."""
    result = ask(engine, album, {"text": "our holiday by the sea"}, beta=3, update_steps_max=1, limit=25)
    weights: dict[str, float] = {}
    for match in result["matches"]:
        weights[str(match["text"])] = weights.get(str(match["text"]), 0.0) + match["weight"]
    assert result["text"] == max(weights, key=weights.__getitem__) == "our holiday by the sea"


@pytest.mark.parametrize("beta", ["auto", 8000])
def test_a_caption_of_two_pictures_is_ambiguous_and_drawn_as_their_mean(
    engine: Engine, album: str, beta: float | str
) -> None:
    """HEN's broken uniqueness, whatever β: rounding must not let one of the two win."""
    options: dict[str, Any] = {"reconstruct": True, "beta": beta, "update_steps_max": 20}
    result = ask(engine, album, {"text": "our holiday by the sea"}, **options)
    assert result["verdict"] == "ambiguous"
    assert sorted(result["candidates"]) == ["sea0", "sea1"]
    assert f"/{result['matches'][0]['id']}/" in result["original"]
    assert [match["weight"] for match in result["matches"][:2]] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert result["text"] == "our holiday by the sea"
    mean = (picture(50).astype(float) + picture(51)) / 2
    assert np.abs(drawn(result["reconstruction"]) - mean).mean() < 2
    assert np.abs(mean - picture(50)).mean() > 15, "which is neither of them"


def test_where_a_picture_tells_them_apart_a_shared_caption_is_no_doubt(engine: Engine, album: str) -> None:
    result = ask(engine, album, {"text": "our holiday by the sea", "image": png(picture(51))})
    assert (result["verdict"], result["matches"][0]["id"], result["candidates"]) == ("known", "sea1", [])


def test_a_doubtful_cue_of_an_uncalibrated_collection_names_its_candidates(engine: Engine) -> None:
    spaces = {"image": IMAGE, "text": TEXT}
    engine.create_collection("pair", CollectionConfig.model_validate({"spaces": spaces}))
    memories = [{"id": str(i), "image": png(picture(i)), "text": "twice the same"} for i in range(2)]
    engine.store("pair", StoreRequest(memories=memories))
    result = ask(engine, "pair", {"text": "twice the same"}, limit=1)
    assert (result["verdict"], sorted(result["candidates"])) == ("uncalibrated", ["0", "1"])


def test_in_a_joint_space_pictures_do_not_decide_between_equal_captions(engine: Engine) -> None:
    """The default spaces: the text fills the pictures' joint space too, where any two pictures differ."""
    few_words = [{"kind": "word_drop"}]  # calibrating cues of pictures would take most of the test
    engine.create_collection("default", CollectionConfig.model_validate({"corruptions": few_words}))
    memories = [
        {"id": noun, "image": png(picture(i)), "text": caption}
        for i, (noun, caption) in enumerate(zip(NOUNS, CAPTIONS, strict=True))
    ]
    memories += [{"id": f"sea{i}", "image": png(picture(50 + i)), "text": "our holiday by the sea"} for i in range(2)]
    engine.store("default", StoreRequest(memories=memories))
    calibrated(engine, "default")
    for text in ("our holiday by the sea", "holiday by the sea"):
        result = ask(engine, "default", {"text": text}, limit=1, reconstruct={"format": "webp"})
        assert (result["verdict"], sorted(result["candidates"])) == ("ambiguous", ["sea0", "sea1"]), text
        assert result["reconstruction"]["media_type"] == "image/webp"
    result = ask(engine, "default", {"text": CAPTIONS[4]})
    assert (result["verdict"], result["matches"][0]["id"], result["candidates"]) == ("known", NOUNS[4], [])


def test_pictures_are_drawn_without_loss_in_both_formats(engine: Engine, album: str) -> None:
    kinds = [True, {"format": "png"}, {"format": "webp"}]
    results = [ask(engine, album, CUES["image"], reconstruct=kind, trace=kind) for kind in kinds]
    media = [(r["reconstruction"]["media_type"], r["trace"][0]["media_type"]) for r in results]
    assert media == [("image/png",) * 2, ("image/png",) * 2, ("image/webp",) * 2]
    first = drawn(results[0]["reconstruction"])
    assert all(np.array_equal(drawn(r["reconstruction"]), first) for r in results)
    assert all(len(r["trace"]) == r["recall"]["steps"] + 1 for r in results)
    assert all(np.array_equal(drawn(r["trace"][-1]), first) for r in results), "the last state is the one returned"


def test_more_pictures_than_an_answer_holds_are_refused(engine: Engine) -> None:
    engine.create_collection(
        "large", CollectionConfig.model_validate({"spaces": {"image": {**IMAGE, "options": {"size": 128}}}})
    )
    engine.store("large", StoreRequest(memories=[{"id": "a", "image": png(picture(1))}]))
    cues = [{"image": png(picture(1))}] * 40
    request = {"cues": cues, "trace": True, "update_steps_max": 100}
    with pytest.raises(InvalidRequest, match=r"4,040 pictures, and at most 1,365"):
        engine.recall("large", RecallRequest.model_validate(request))
    reply = engine.recall("large", RecallRequest.model_validate({**request, "update_steps_max": 5}))
    assert [len(result["trace"]) for result in reply["results"]] == [1] * 40


WIDTHS = {"a": 5, "b": 7, "c": 4}


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    filled=st.sets(st.sampled_from(sorted(WIDTHS)), min_size=1),
    chosen=st.none() | st.dictionaries(st.sampled_from(sorted(WIDTHS)), st.floats(0.1, 10), min_size=1),
    support=st.sampled_from([64, "dense"]),
)
def test_scores_candidates_and_completion_are_their_definitions(
    engine: Engine, seed: int, filled: set[str],
    chosen: dict[str, float] | None, support: int | str,
) -> None:  # fmt: skip
    """math.md, section 3: Σ w cos ÷ Σ w over the observed blocks; a block that a memory lacks adds 0; a memory with
    none of them is no candidate. The state is the settled weights over the raw patterns.
    """
    rng = np.random.default_rng(seed)
    weights = {name: float(w) for name, w in zip(WIDTHS, rng.uniform(0.2, 3, 3), strict=True)}
    name = "definitions"
    spaces = {space: {"dimension": d, "weight": weights[space]} for space, d in WIDTHS.items()}
    engine.create_collection(name, CollectionConfig.model_validate({"spaces": spaces}))
    stored: dict[str, dict[str, NDArray[np.float32]]] = {}
    for i in range(8):
        has = [space for space in WIDTHS if rng.random() < 0.7] or ["a"]
        stored[f"m{i}"] = {space: rng.standard_normal(WIDTHS[space]).astype(np.float32) for space in has}
    engine.store(name, StoreRequest(memories=[{"id": key, "vectors": has} for key, has in stored.items()]))
    cue = {space: rng.standard_normal(WIDTHS[space]).astype(np.float32) for space in filled}
    observed = filled & set(chosen or WIDTHS)
    if not observed:
        engine.delete_collection(name)
        return
    used = {**weights, **(chosen or {})}
    options: dict[str, Any] = {"limit": 8, "support": support, "with_vectors": True, "gate": False, "beta": 4.0}
    result = ask(engine, name, {"vectors": cue}, spaces=chosen, **options)

    def cos(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
        return float(x.astype(float) @ y / np.linalg.norm(x.astype(float)) / np.linalg.norm(y.astype(float)))

    expected = {
        key: sum(used[s] * cos(has[s], cue[s]) for s in observed & set(has)) / sum(used[s] for s in observed)
        for key, has in stored.items()
        if observed & set(has)
    }
    similarity = {match["id"]: match["similarity"] for match in result["matches"]}
    assert similarity == pytest.approx(expected, abs=1e-5)
    settled = {match["id"]: match["weight"] for match in result["matches"]}
    for space in WIDTHS:
        share = sum(weight for key, weight in settled.items() if space in stored[key])
        mean = sum(
            (weight * stored[key][space] for key, weight in settled.items() if space in stored[key]),
            np.zeros(WIDTHS[space]),
        )
        assert np.allclose(result["state"][space], mean, atol=1e-4)
        if space not in observed:
            assert result["completed"][space] == pytest.approx(share, abs=1e-5)
    assert set(result["completed"]) == set(WIDTHS) - observed
    engine.delete_collection(name)
