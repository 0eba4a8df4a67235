"""Collections, memories and the system's own routes over a real server."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from PIL import Image

VECTORS = {"v": {"dimension": 4}}


def png(colour: tuple[int, int, int] = (200, 30, 30), size: int = 16) -> bytes:
    pixels = np.full((size, size, 3), colour, dtype=np.uint8)
    pixels[: size // 2] //= 2
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}


def unit(index: int) -> list[float]:
    return [float(i == index) for i in range(4)]


def problem(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert "Traceback" not in response.text
    return str(body["detail"])


def test_life_of_a_collection(http: httpx.Client) -> None:
    address = "/v1/collections/life"
    created = http.put(address, json={"spaces": VECTORS})
    assert created.status_code == 201
    assert created.json()["spaces"]["v"] == {
        "encoder": None,
        "fingerprint": None,
        "source": None,
        "dimension": 4,
        "similarity": "cosine",
        "weight": 1.0,
        "decodable": False,
        "problem": None,
    }
    problem(http.put(address, json={"spaces": VECTORS}), 409, "collection_exists")
    assert "life" in [c["name"] for c in http.get("/v1/collections").json()["collections"]]
    assert http.post(f"{address}/store", json={"memories": [{"vectors": {"v": unit(0)}}]}).status_code == 200
    version = http.get(address).json()["version"]
    assert http.delete(address).status_code == 204
    problem(http.get(address), 404, "collection_not_found")
    problem(http.delete(address), 404, "collection_not_found")
    again = http.put(address, json={"spaces": VECTORS}).json()
    assert again["count"] == 0
    assert again["version"] > version, "a name that is created again continues its sequence of versions"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"spaces": {"a": {"encoder": "nobody"}}}, "unknown_encoder"),
        ({"spaces": {"a": {"encoder": "pixels", "options": {"sise": 8}}}}, "invalid_request"),
        ({"spaces": {"a": {"encoder": "pixels", "source": "text"}}}, "invalid_request"),
        ({"spaces": {"a": {}}}, "invalid_request"),
        ({"spaces": {"a": {"encoder": "pixels", "dimension": 4}}}, "invalid_request"),
        ({"spaces": {"a": {"dimension": 4, "similarity": "dot"}, "b": {"dimension": 4}}}, "invalid_request"),
        ({"spaces": {}}, "invalid_request"),
        ({"spaces": VECTORS, "corruptions": [{"kind": "noize"}]}, "invalid_request"),
        ({"spaces": VECTORS, "recall": {"beta": 0}}, "invalid_request"),
        ({"spaces": VECTORS, "recall": {"separation": {"entmax": 0.7}}}, "invalid_request"),
        ({"spaces": {"v": {"dimension": 4, "similarity": "neg_l2"}}, "gate": {"interaction": {"prototypes": 4}}},
         "invalid_request"),
    ],
)  # fmt: skip
def test_a_collection_that_cannot_be(http: httpx.Client, config: dict[str, object], code: str) -> None:
    problem(http.put("/v1/collections/never", json=config), 422, code)
    problem(http.get("/v1/collections/never"), 404, "collection_not_found")


def test_names_are_bounded(http: httpx.Client) -> None:
    problem(http.put("/v1/collections/-x", json={"spaces": VECTORS}), 422, "invalid_request")
    problem(http.put(f"/v1/collections/{'x' * 129}", json={"spaces": VECTORS}), 422, "invalid_request")


def test_memories(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces={"image": {"encoder": "pixels"}, "v": {"dimension": 4}})
    data = png()
    reply = http.post(
        f"{address}/store",
        json={
            "memories": [
                {"id": "a/b c.png", "image": encoded(data), "text": "a red square", "payload": {"n": 1}},
                {"vectors": {"v": unit(1)}},
            ]
        },
    )
    assert reply.status_code == 200, reply.text
    stored = reply.json()
    assert [item["status"] for item in stored["results"]] == ["stored", "stored"]
    memory = http.get(f"{address}/memories/a/b%20c.png").json()
    assert memory["text"] == "a red square"
    assert memory["payload"] == {"n": 1}
    assert memory["spaces"] == ["image"]
    assert memory["media_type"] == "image/png"
    content = http.get(f"{address}/memories/a/b%20c.png/content")
    assert content.content == data, "the original comes back byte for byte"
    assert content.headers["content-type"] == "image/png"
    other = stored["results"][1]["id"]
    problem(http.get(f"{address}/memories/{other}/content"), 404, "content_not_found")
    problem(http.get(f"{address}/memories/nobody"), 404, "memory_not_found")
    assert http.post(f"{address}/memories/count").json() == {"version": stored["version"], "count": 2}

    again = http.post(f"{address}/store", json={"memories": [{"id": "a/b c.png", "vectors": {"v": unit(2)}}]}).json()
    assert again["results"][0]["status"] == "updated"
    assert http.get(f"{address}/memories/a/b%20c.png").json()["spaces"] == ["v"], "storing an id again replaces it"

    gone = http.post(f"{address}/memories/delete", json={"ids": [other, "nobody"]}).json()
    assert gone["deleted"] == [other]
    assert http.delete(f"{address}/memories/a/b%20c.png").json()["deleted"] == ["a/b c.png"]
    for never in ("%20x", "%07", "x/content", "%F0%9F%90%88"):
        assert http.delete(f"{address}/memories/{never}").json()["deleted"] == []
    assert http.post(f"{address}/memories/count").json()["count"] == 0


def test_a_form_stores_one_file_or_several(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces={"image": {"encoder": "pixels"}})
    one = http.post(f"{address}/store", files={"image": png()}, data={"id": "7", "text": "12", "payload": '{"k": [1]}'})
    assert one.status_code == 200, one.text
    memory = http.get(f"{address}/memories/7").json()
    assert (memory["text"], memory["payload"]) == ("12", {"k": [1]})
    several = http.post(
        f"{address}/store",
        files={"first": png((0, 200, 0)), "second": png((0, 0, 200))},
        data={"memories": '[{"id": "g", "image": {"part": "first"}}, {"id": "b", "image": {"part": "second"}}, '
                          '{"id": "x", "image": {"part": "third"}}]'},
    ).json()  # fmt: skip
    assert [item["status"] for item in several["results"]] == ["stored", "stored", "error"]
    assert http.get(f"{address}/memories/b/content").content == png((0, 0, 200))
    for wrong in ('[{"image": {"part": []}}]', '[{"image": {"part": {"a": 1}}}]', "17", "[[]]"):
        answer = http.post(f"{address}/store", files={"first": png()}, data={"memories": wrong})
        assert answer.status_code in (200, 422), wrong
        assert "stored" not in answer.text


def test_bad_items_are_reported_and_the_rest_is_stored(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces={"image": {"encoder": "pixels"}, "v": {"dimension": 4}})
    memories: list[object] = [
        {"id": "good", "vectors": {"v": unit(0)}},
        {"vectors": {"v": [1, 2]}},
        {"vectors": {"v": [0, 0, 0, 0]}},
        {"vectors": {"w": unit(0)}},
        {"vectors": {"image": unit(0)}},
        {"image": encoded(b"GIF89a is not enough")},
        {"image": encoded(png()[:60])},
        {"image": {"base64": "@@@"}},
        {"text": "   "},
        {"text": "no space takes a text here"},
        {"id": "x/content", "vectors": {"v": unit(0)}},
        {"payload": {"only": "this"}},
        {"vectors": {"v": unit(0)}, "surprise": 1},
        {"vectors": {"v": unit(0)}, "payload": {"big": "x" * 70_000}},
        17,
        {"id": "also good", "image": encoded(png())},
    ]
    reply = http.post(f"{address}/store", json={"memories": memories})
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    codes = [item["error"]["code"] if item["error"] else item["status"] for item in results]
    assert codes == [
        "stored", "wrong_dimension", "invalid_vector", "unknown_space", "invalid_request", codes[5], "truncated_image",
        "invalid_request", "empty_text", "invalid_request", "invalid_request", "invalid_request", "invalid_request",
        "invalid_request", "invalid_request", "stored",
    ]  # fmt: skip
    assert codes[5] in ("invalid_image", "truncated_image")
    assert http.post(f"{address}/memories/count").json()["count"] == 2


def test_nan_is_refused_by_its_own_name(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces=VECTORS)
    body = '{"memories": [{"vectors": {"v": [NaN, 0, 0, 0]}}, {"vectors": {"v": [1e300, 0, 0, 0]}}]}'
    reply = http.post(f"{address}/store", content=body, headers={"content-type": "application/json"})
    assert [item["error"]["code"] for item in reply.json()["results"]] == ["invalid_vector", "invalid_vector"]


def test_without_waiting_the_work_is_an_operation(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces={"image": {"encoder": "pixels"}})
    memories = [{"id": str(i), "image": encoded(png((i, 2 * i, 3 * i)))} for i in range(1, 60)]
    reply = http.post(f"{address}/store", json={"memories": memories, "wait": False})
    assert reply.status_code == 202
    body = reply.json()
    assert {item["status"] for item in body["results"]} == {"queued"}
    operation = f"/v1/operations/{body['operation_id']}"
    while (state := http.get(operation).json())["status"] in ("queued", "running"):
        assert 0 <= state["progress"] <= 1
    assert state["status"] == "done"
    assert state["progress"] == 1
    assert len(state["result"]["results"]) == 59
    assert body["operation_id"] in [o["id"] for o in http.get("/v1/operations").json()["operations"]]
    assert http.post(f"{address}/memories/count").json()["count"] == 59
    problem(http.get("/v1/operations/nobody"), 404, "operation_not_found")
    problem(http.delete(operation), 409, "conflict")


def test_an_operation_can_be_cancelled(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces={"image": {"encoder": "pixels"}})
    memories = [{"id": str(i), "image": encoded(png((i % 256, i // 4, 3), size=96))} for i in range(1, 900)]
    operation = http.post(f"{address}/store", json={"memories": memories, "wait": False}).json()["operation_id"]
    cancelled = http.delete(f"/v1/operations/{operation}")
    assert cancelled.status_code == 200
    assert cancelled.json()["status"] == "cancelled"
    count = http.post(f"{address}/memories/count").json()["count"]
    assert count < 899
    assert http.delete(f"/v1/operations/{operation}").json()["status"] == "cancelled"


def test_the_server_tells_how_it_is(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces=VECTORS)
    http.post(f"{address}/store", json={"memories": [{"vectors": {"v": unit(0)}}]})
    http.post(f"{address}/recall", json={"cue": {"vectors": {"v": unit(0)}}})
    name = address.rsplit("/", 1)[1]
    assert http.get("/livez").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready"}
    assert "swagger" in http.get("/docs").text.lower()
    metrics = http.get("/metrics").text
    assert f'engram_memories{{collection="{name}"}} 1.0' in metrics
    assert f'engram_recalls_total{{collection="{name}",verdict="uncalibrated"}} 1.0' in metrics
    assert 'engram_http_requests_total{method="POST",status="200"}' in metrics


def test_bodies_that_are_not_requests(http: httpx.Client, make: Callable[..., str]) -> None:
    address = make(spaces=VECTORS)
    for path in ("store", "recall"):
        problem(http.post(f"{address}/{path}", content=b"{"), 400, "malformed_body")
        problem(http.post(f"{address}/{path}", content=b""), 400, "malformed_body")
        problem(http.post(f"{address}/{path}", json=[]), 422, "invalid_request")
        problem(http.post(f"{address}/{path}", json={"nonsense": 1}), 422, "invalid_request")
    problem(http.put("/v1/collections/x", content=b"{"), 400, "malformed_body")
    problem(http.post(f"{address}/store", json={"memories": []}), 422, "invalid_request")
    problem(http.post(f"{address}/store", json={"memories": [{}] * 1001}), 422, "invalid_request")
    problem(http.get("/v1/nowhere"), 404, "not_found")
    refused = http.patch(address)
    assert (refused.status_code, refused.json()["status"], refused.json()["code"]) == (405, 405, "method_not_allowed")
    problem(http.delete(address, headers={"origin": "https://elsewhere.example"}), 403, "cross_site")
    own = {"origin": str(http.base_url).rstrip("/")}
    assert http.delete(address, headers=own).status_code == 204
