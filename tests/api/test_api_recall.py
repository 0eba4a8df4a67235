"""Recall over a real server: every kind of cue, every option, every refusal."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

RNG = np.random.default_rng(7)
DIMENSION = 24
STORED = RNG.standard_normal((120, DIMENSION)).astype(np.float32)
STORED[119] = STORED[118] + 0.05 * RNG.standard_normal(DIMENSION)  # near-twins, between which no cue can choose


def png(pixels: np.ndarray[Any, Any]) -> dict[str, str]:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return {"base64": base64.b64encode(buffer.getvalue()).decode()}


def picture(seed: int, size: int = 32) -> np.ndarray[Any, Any]:
    """Smooth blobs, unlike for every seed, as photographs are at thumbnail size."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def vectors(server: Any) -> str:
    address = "/v1/collections/recall-vectors"
    server.http.put(address, json={"spaces": {"v": {"dimension": DIMENSION}}}).raise_for_status()
    memories = [{"id": f"m{i}", "vectors": {"v": row.tolist()}, "payload": {"i": i}} for i, row in enumerate(STORED)]
    server.http.post(f"{address}/store", json={"memories": memories}).raise_for_status()
    server.wait_calibrated("recall-vectors")
    return address


@pytest.fixture(scope="module")
def pictures(server: Any) -> str:
    address = "/v1/collections/recall-pictures"
    spaces = {"image": {"encoder": "pixels", "options": {"size": 16}}, "v": {"dimension": 3}}
    half = [{"kind": "missing_side", "share": 0.5}, {"kind": "noise"}, {"kind": "vector_noise"}]
    server.http.put(address, json={"spaces": spaces, "corruptions": half}).raise_for_status()
    memories = [{"id": f"p{i}", "image": png(picture(i)), "vectors": {"v": [float(i), 1.0, 0.5]}} for i in range(1, 31)]
    server.http.post(f"{address}/store", json={"memories": memories}).raise_for_status()
    server.wait_calibrated("recall-pictures")
    return address


def ask(http: httpx.Client, address: str, cue: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    response = http.post(f"{address}/recall", json={**({"cue": cue} if cue is not None else {}), **options})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def one(http: httpx.Client, address: str, cue: dict[str, Any], **options: Any) -> dict[str, Any]:
    body = ask(http, address, cue, **options)
    assert set(body["timings_ms"]) == {"encode", "search", "gate", "dynamics", "decode", "total"}
    (result,) = body["results"]
    return dict(result)


def refused(http: httpx.Client, address: str, body: dict[str, Any], code: str, status: int = 422) -> None:
    response = http.post(f"{address}/recall", json=body)
    assert (response.status_code, response.json()["code"]) == (status, code), response.text


def noisy(i: int, sigma: float = 0.1) -> dict[str, Any]:
    noise = np.random.default_rng(i).standard_normal(DIMENSION)
    return {"vectors": {"v": (STORED[i] + sigma * noise).tolist()}}


def test_a_noisy_cue_is_known_and_settles_on_its_memory(http: httpx.Client, vectors: str) -> None:
    result = one(http, vectors, noisy(5), limit=3)
    assert result["verdict"] == "known"
    assert result["matches"][0]["id"] == "m5"
    assert result["matches"][0]["payload"] == {"i": 5}
    assert result["matches"][0]["weight"] > 0.9
    assert len(result["matches"]) == 3
    weights = [match["weight"] for match in result["matches"]]
    assert weights == sorted(weights, reverse=True)
    recall = result["recall"]
    assert recall["converged"]
    assert recall["outcome"] == "converged"
    assert len(recall["energy"]) == recall["steps"] + 1
    whole = recall["energy"][1:]
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(whole))
    assert result["gate"]["score"] > result["gate"]["threshold"]
    assert result["gate"]["modality"] == "v"
    assert result["gate"]["rejected_at"] is None


def test_a_stranger_is_unknown_and_still_lists_what_is_nearest(http: httpx.Client, vectors: str) -> None:
    stranger = np.random.default_rng(99).standard_normal(DIMENSION).tolist()
    result = one(http, vectors, {"vectors": {"v": stranger}})
    assert result["verdict"] == "unknown"
    assert result["gate"]["rejected_at"] == 0
    assert len(result["matches"]) == 5


def test_between_two_memories_the_verdict_is_ambiguous(http: httpx.Client, vectors: str) -> None:
    a, b = (row / np.linalg.norm(row) for row in STORED[118:])
    result = one(http, vectors, {"vectors": {"v": (a + b).tolist()}})
    assert result["verdict"] == "ambiguous"
    assert {match["id"] for match in result["matches"][:2]} == {"m118", "m119"}
    assert result["recall"]["margin"] < 0.001


@pytest.mark.parametrize(
    "separation",
    ["softmax", "sparsemax", "max", *({"entmax": alpha} for alpha in (1, 1.2, 1.5, 2, 3, 8))],
)
@pytest.mark.parametrize("support", [1, 8, 64, "dense"])
def test_every_separation_over_every_support(http: httpx.Client, vectors: str, separation: Any, support: Any) -> None:
    result = one(http, vectors, noisy(9), separation=separation, support=support, limit=4, certify=True)
    assert result["matches"][0]["id"] == "m9"
    assert len(result["matches"]) == 4
    assert result["recall"]["support"] == (120 if support == "dense" else max(support, 4))
    assert result["recall"]["certified"] is True
    assert result["recall"]["error_bound"] < 0.05


def test_options_do_what_they_say(http: httpx.Client, vectors: str) -> None:
    cold, hot = (one(http, vectors, noisy(3), beta=beta, update_steps_max=1) for beta in (1000, 0.5))
    assert cold["recall"]["beta"] == 1000
    assert cold["matches"][0]["weight"] > 0.99 > 0.2 > hot["matches"][0]["weight"]
    search = one(http, vectors, noisy(3), update_steps_max=0)
    assert (search["recall"]["steps"], search["recall"]["outcome"]) == (0, "no_steps")
    assert search["matches"][0]["id"] == "m3"
    half = one(http, vectors, noisy(3), step_size=0.5, update_steps_max=1)
    assert half["recall"]["outcome"] == "steps_exhausted"
    ungated = one(http, vectors, noisy(3), gate=False)
    assert (ungated["verdict"], ungated["gate"]) == ("uncalibrated", None)
    bare = one(http, vectors, noisy(3), with_payload=False, with_vectors=True)
    assert bare["matches"][0]["payload"] is None
    assert np.allclose(bare["matches"][0]["vectors"]["v"], STORED[3], atol=1e-5), (
        "vectors come back as they were stored"
    )
    exact = one(http, vectors, noisy(3), exact=True)
    assert exact["matches"][0]["id"] == "m3"
    one_step = one(http, vectors, noisy(3), exact=True, update_steps_max=1)
    assert one_step["recall"]["certified"]


def test_clamping_keeps_the_cue(http: httpx.Client, vectors: str) -> None:
    """All blocks of this cue are observed, so clamped it cannot move: the weights are those of the search's scores."""
    clamped = one(http, vectors, noisy(4, 1.0), clamp_observed=True, beta=20)
    assert (clamped["recall"]["steps"], clamped["recall"]["converged"]) == (0, True)
    free = one(http, vectors, noisy(4, 1.0), beta=20)
    assert free["recall"]["steps"] >= 1
    assert clamped["matches"][0]["weight"] < free["matches"][0]["weight"]


def test_a_batch_answers_in_order_and_reports_bad_cues(http: httpx.Client, vectors: str) -> None:
    cues: list[dict[str, Any]] = [noisy(i) for i in range(40)]
    cues[7] = {"vectors": {"v": [1.0]}}
    cues[8] = {}
    body = ask(http, vectors, cues=cues, limit=1)
    results = body["results"]
    assert [r["error"]["code"] for r in results if r["error"]] == ["wrong_dimension", "nothing_observed"]
    assert results[7]["verdict"] is None
    good = [i for i in range(40) if i not in (7, 8)]
    assert [results[i]["matches"][0]["id"] for i in good] == [f"m{i}" for i in good]
    single = one(http, vectors, noisy(20), limit=1)
    assert single["matches"][0]["id"] == results[20]["matches"][0]["id"]
    assert single["recall"]["energy"] == pytest.approx(results[20]["recall"]["energy"], abs=1e-5)


def test_a_picture_comes_back_from_half_of_it(http: httpx.Client, pictures: str) -> None:
    whole = picture(12)
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:, 16:] = 255
    garbage = whole.copy()
    garbage[:, 16:] = 77
    result = one(http, pictures, {"image": png(garbage), "mask": png(mask)}, reconstruct=True, trace=True)
    assert result["matches"][0]["id"] == "p12"
    assert result["gate"]["modality"] == "image:masked", "a masked cue has a threshold of its own"
    assert result["verdict"] != "unknown"
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(result["reconstruction"]["base64"]))))
    expected = np.asarray(Image.fromarray(whole).resize((16, 16), Image.Resampling.BOX))
    assert np.abs(drawn.astype(int) - expected).mean() < 12, (
        "what comes back is the whole picture, hidden half included"
    )
    assert len(result["trace"]) == result["recall"]["steps"] + 1
    again = one(http, pictures, {"image": png(whole), "mask": png(mask)}, reconstruct=True)
    assert again["matches"] == result["matches"], "hidden pixels have no influence"


def test_a_form_recalls_by_files(http: httpx.Client, pictures: str) -> None:
    data = base64.b64decode(png(picture(4))["base64"])
    response = http.post(f"{pictures}/recall", files={"image": data}, data={"limit": "2", "reconstruct": "true"})
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    assert result["matches"][0]["id"] == "p4"
    assert len(result["matches"]) == 2
    assert result["reconstruction"]["media_type"] == "image/png"


def test_a_form_asks_for_a_format_and_the_original_is_where_the_reply_says(http: httpx.Client, pictures: str) -> None:
    data = base64.b64decode(png(picture(4))["base64"])
    response = http.post(f"{pictures}/recall", files={"image": data}, data={"reconstruct": '{"format": "webp"}'})
    (result,) = response.json()["results"]
    assert result["reconstruction"]["media_type"] == "image/webp"
    assert http.get(result["original"]).content == data


@pytest.mark.parametrize("wrong", ["webp", {"format": "gif"}, {"size": 3}, 2])
def test_a_format_that_is_not_written_is_told_what_is(http: httpx.Client, pictures: str, wrong: Any) -> None:
    for option in ("reconstruct", "trace"):
        response = http.post(f"{pictures}/recall", json={"cue": {"image": png(picture(1))}, option: wrong})
        assert response.status_code == 422
        assert response.json()["detail"] == f'{option}: is true, false or {{"format": png or webp}}, not {wrong!r}'


def test_several_spaces_at_once_and_one_chosen(http: httpx.Client, pictures: str) -> None:
    cue = {"image": png(picture(8)), "vectors": {"v": [20.0, 1.0, 0.5]}}
    both = one(http, pictures, cue)
    assert both["recall"]["support"] == 30
    only = one(http, pictures, cue, spaces={"image": 1.0})
    assert only["matches"][0]["id"] == "p8"
    assert (only["verdict"], only["gate"]) == ("uncalibrated", None), (
        "a threshold holds for the collection's own weights"
    )
    refused(http, pictures, {"cue": cue, "spaces": {"nowhere": 1}}, "unknown_space")
    refused(http, pictures, {"cue": {"vectors": {"v": [1, 2, 3]}}, "spaces": {"image": 1}}, "nothing_observed")


def test_latents_can_be_a_cue_too(http: httpx.Client, pictures: str) -> None:
    found = one(http, pictures, {"image": png(picture(9))}, with_vectors=True, limit=1)["matches"][0]
    result = one(http, pictures, {"vectors": {"image": found["vectors"]["image"]}}, reconstruct=True)
    assert result["matches"][0]["id"] == "p9"
    assert result["reconstruction"] is not None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_request"),
        ({"cue": {}}, "nothing_observed"),
        ({"cue": {"vectors": {}}}, "nothing_observed"),
        ({"cue": {"vectors": {"v": [1.0]}}}, "wrong_dimension"),
        ({"cue": {"vectors": {"v": []}}}, "invalid_request"),
        ({"cue": {"vectors": {"v": ["a"] * DIMENSION}}}, "invalid_request"),
        ({"cue": {"vectors": {"v": [0.0] * DIMENSION}}}, "invalid_vector"),
        ({"cue": {"vectors": {"w": [0.0] * DIMENSION}}}, "unknown_space"),
        ({"cue": {"text": "  "}}, "empty_text"),
        ({"cue": {"text": "no space takes it"}}, "nothing_observed"),
        ({"cue": {"mask": {"base64": ""}}}, "invalid_request"),
        ({"cue": {"image": {"base64": "bm90IGFuIGltYWdl"}}}, "invalid_image"),
        ({"cue": noisy(0), "cues": [noisy(1)]}, "invalid_request"),
        ({"cues": []}, "invalid_request"),
        *[
            ({"cue": noisy(0), **wrong}, "invalid_request")
            for wrong in (
                {"limit": 0}, {"limit": 1001}, {"beta": 0}, {"beta": -1}, {"beta": "hot"}, {"separation": "softmaks"},
                {"separation": {"entmax": 9}}, {"support": 0}, {"support": "sparse"}, {"update_steps_max": -1},
                {"update_steps_max": 101}, {"step_size": 0}, {"step_size": 1.5}, {"spaces": {"v": 0}}, {"limits": 3},
            )
        ],
        ({"cue": noisy(0), "reconstruct": True}, "not_decodable"),
    ],
)  # fmt: skip
def test_recalls_that_cannot_be(http: httpx.Client, vectors: str, body: dict[str, Any], code: str) -> None:
    refused(http, vectors, body, code)


@pytest.mark.parametrize("wrong", ["softmaks", {"entmax": 0.5}, {"entmax": 8.01}, {"entmaks": 1.5}, {}, 3])
def test_a_separation_that_is_not_served_is_told_what_is(http: httpx.Client, vectors: str, wrong: Any) -> None:
    """In one sentence: not what was wrong with each member of a union."""
    served = 'served are softmax, sparsemax, max, and {"entmax": α} with α from 1 (softmax) over 2 (sparsemax) to 8'
    recall = http.post(f"{vectors}/recall", json={"cue": noisy(0), "separation": wrong})
    collection = http.put("/v1/collections/never", json={"recall": {"separation": wrong}})
    assert (recall.status_code, collection.status_code) == (422, 422)
    assert recall.json()["detail"] == f"separation: {served}, not {wrong!r}"
    assert collection.json()["detail"] == f"recall.separation: {served}, not {wrong!r}"


def test_a_mask_that_hides_all_leaves_nothing(http: httpx.Client, pictures: str) -> None:
    mask = png(np.full((8, 8), 255))
    refused(http, pictures, {"cue": {"image": png(picture(1)), "mask": mask}}, "nothing_observed")


def test_an_unknown_collection_and_an_empty_one(http: httpx.Client, make: Callable[..., str]) -> None:
    refused(http, "/v1/collections/nobody", {"cue": noisy(0)}, "collection_not_found", 404)
    empty = make(spaces={"v": {"dimension": DIMENSION}})
    result = one(http, empty, noisy(0))
    assert (result["verdict"], result["matches"], result["gate"]) == ("uncalibrated", [], None)


def test_one_memory_and_duplicates_are_answered(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces={"v": {"dimension": DIMENSION}})
    row = STORED[0].tolist()
    http.post(f"{address}/store", json={"memories": [{"id": "only", "vectors": {"v": row}}]}).raise_for_status()
    alone = one(http, address, noisy(0))
    assert [match["weight"] for match in alone["matches"]] == [1.0]
    assert alone["recall"]["margin"] is None
    http.post(f"{address}/store", json={"memories": [{"id": "twin", "vectors": {"v": row}}]}).raise_for_status()
    twins = one(http, address, noisy(0))
    assert {match["id"] for match in twins["matches"]} == {"only", "twin"}
    assert [match["weight"] for match in twins["matches"]] == pytest.approx([0.5, 0.5], abs=1e-3)


@pytest.mark.parametrize("similarity", ["dot", "neg_l2"])
def test_raw_similarities(http: httpx.Client, make: Callable[..., str], similarity: str) -> None:
    address = make(spaces={"v": {"dimension": DIMENSION, "similarity": similarity}})
    memories = [{"id": f"m{i}", "vectors": {"v": row.tolist()}} for i, row in enumerate(STORED)]
    http.post(f"{address}/store", json={"memories": memories}).raise_for_status()
    result = one(http, address, noisy(6), limit=1)
    scores = STORED @ np.asarray(noisy(6)["vectors"]["v"], dtype=np.float32)
    if similarity == "neg_l2":
        scores = -np.square(STORED - np.asarray(noisy(6)["vectors"]["v"])).sum(axis=1)
    assert result["recall"]["outcome"] in ("converged", "steps_exhausted")
    first = one(http, address, noisy(6), limit=1, update_steps_max=0)["matches"][0]
    assert first["id"] == f"m{int(scores.argmax())}"
    assert first["similarity"] == pytest.approx(float(scores.max()), rel=1e-3)


def test_the_gate_over_prototypes(http: httpx.Client, server: Any, make: Callable[..., str]) -> None:
    address = make(spaces={"v": {"dimension": DIMENSION}}, gate={"interaction": {"prototypes": 40}, "target_tpr": 0.9})
    centres = np.random.default_rng(3).standard_normal((40, DIMENSION))
    rows = np.repeat(centres, 5, axis=0) + 0.05 * np.random.default_rng(4).standard_normal((200, DIMENSION))
    memories = [{"id": f"m{i}", "vectors": {"v": row.tolist()}} for i, row in enumerate(rows)]
    http.post(f"{address}/store", json={"memories": memories}).raise_for_status()
    (record,) = server.wait_calibrated(address.rsplit("/", 1)[1])["modalities"]
    assert record["refused"] is None
    known = one(http, address, {"vectors": {"v": rows[11].tolist()}})
    assert known["verdict"] != "unknown"
    strangers = [{"vectors": {"v": row.tolist()}} for row in np.random.default_rng(5).standard_normal((50, DIMENSION))]
    verdicts = [result["verdict"] for result in ask(http, address, cues=strangers)["results"]]
    assert verdicts.count("unknown") > 40


def test_too_few_to_calibrate_says_what_is_missing(http: httpx.Client, server: Any, make: Callable[..., str]) -> None:
    address = make(spaces={"v": {"dimension": DIMENSION}}, corruptions=[{"kind": "vector_noise", "sigma": 0.1}])
    memories = [{"vectors": {"v": row.tolist()}} for row in STORED[:7]]
    http.post(f"{address}/store", json={"memories": memories}).raise_for_status()
    (record,) = server.wait_calibrated(address.rsplit("/", 1)[1])["modalities"]
    assert "19" in record["refused"]
    assert "7" in record["refused"]
    assert record["log_lambda"] is None
    result = one(http, address, noisy(0))
    assert (result["verdict"], result["gate"]) == ("uncalibrated", None)


def test_training_the_gate_is_an_operation(http: httpx.Client, vectors: str) -> None:
    operation = http.post(f"{vectors}/train", json={"what": "gate"})
    assert operation.status_code == 202
    address = f"/v1/operations/{operation.json()['id']}"
    while (state := http.get(address).json())["status"] in ("queued", "running"):
        pass
    assert state["status"] == "done"
    assert state["result"]["modalities"][0]["modality"] == "v"


def test_calibration_keeps_its_promise(http: httpx.Client, server: Any, make: Callable[..., str]) -> None:
    """New cues of the declared kind are accepted at the target rate, within its binomial interval."""
    address = make(
        spaces={"v": {"dimension": DIMENSION}}, corruptions=[{"kind": "vector_noise", "sigma": 0.8}],
        gate={"target_tpr": 0.8},
    )  # fmt: skip
    rows = np.random.default_rng(11).standard_normal((400, DIMENSION))
    memories = [{"id": f"m{i}", "vectors": {"v": row.tolist()}} for i, row in enumerate(rows)]
    http.post(f"{address}/store", json={"memories": memories}).raise_for_status()
    server.wait_calibrated(address.rsplit("/", 1)[1])
    draws = np.random.default_rng(12).standard_normal(rows.shape)
    scale = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
    cues = [{"vectors": {"v": row.tolist()}} for row in rows + 0.8 * scale * draws]
    verdicts = [result["verdict"] for result in ask(http, address, cues=cues, limit=1)["results"]]
    accepted = sum(verdict != "unknown" for verdict in verdicts) / len(verdicts)
    # Calibration and trial are 400 draws each: ±4 standard deviations of their difference.
    assert abs(accepted - 0.8) < 4 * np.sqrt(2 * 0.8 * 0.2 / 400)
