"""Import and export over plain HTTP: what curl sends and sees, bounds, bodies that end early, a server that dies."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.app import lines
from service.app.transfer_schemas import Refusal
from service.errors import TooBusy

Serve = Callable[..., AbstractContextManager[Any]]
Make = Callable[..., str]

NDJSON = {"Content-Type": "application/x-ndjson"}
PARQUET = {"Content-Type": "application/vnd.apache.parquet"}
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
SPACES = {"v": {"dimension": 2}}


def row(number: int) -> bytes:
    return json.dumps({"id": f"r{number}", "vectors": {"v": [1, number]}}).encode() + b"\n"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def count(http: httpx.Client, address: str) -> int:
    return int(http.post(f"{address}/memories/count").json()["count"])


def test_the_answer_is_lines_and_the_last_has_the_totals(http: httpx.Client, make: Make) -> None:
    address = make(spaces=SPACES)
    body = row(1) + b"\n" + b"{not JSON}\n" + row(3) + b'{"id": "r4", "vectors": {"v": "AACAPwAAAEA="}}'
    first, refused, done = events(http.post(f"{address}/import", content=body, headers=NDJSON))
    assert first == {"event": "started", "collection": address.rpartition("/")[2], "format": "ndjson", "encoded": []}
    assert (refused["event"], refused["row"], refused["code"]) == ("refused", 2, "malformed_body")
    del done["seconds"]
    assert done == {
        "event": "done", "rows": 4, "stored": 3, "updated": 0, "refused": 1, "durable_row": 4, "version": 1,
        "refusals": [refused],
    }  # fmt: skip
    lines = http.get(f"{address}/export").text.splitlines()
    assert json.loads(lines[0])["engram"]["version"] == 1
    assert [json.loads(line)["vectors"]["v"] for line in lines[1:]] == [[1, 1], [1, 3], [1, 2]]


def test_from_row_goes_on_and_rows_without_ids_need_a_prefix_for_it(http: httpx.Client, make: Make) -> None:
    address = make(spaces=SPACES)
    body = b"".join(row(i) for i in range(1, 6)) + b'{"vectors": {"v": [1, 9]}}\n'
    *_, refused, done = events(http.post(f"{address}/import?from_row=4&offset=10", content=body, headers=NDJSON))
    assert (done["rows"], done["stored"], done["durable_row"]) == (3, 2, 16)
    assert (refused["row"], refused["code"]) == (16, "invalid_request")
    params = {"from_row": 6, "offset": 10, "prefix": "of-my-file-"}
    *_, done = events(http.post(f"{address}/import", params=params, content=body, headers=NDJSON))
    assert done["stored"] == 1
    assert http.get(f"{address}/memories/of-my-file-16").status_code == 200


def parquet(count: int) -> bytes:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * count, dtype=np.float32)), 2)
    file = io.BytesIO()
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(1, count + 1)], "vectors.v": vectors}), file)
    return file.getvalue()


def stream(count: int, batch: int) -> bytes:
    table = pq.read_table(io.BytesIO(parquet(count)))
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return file.getvalue()


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        (PARQUET, parquet(3)[:-5], 400, "malformed_body"),
        (PARQUET, b"", 400, "malformed_body"),
        (ARROW, stream(3, 3)[:40], 400, "malformed_body"),
        (NDJSON, b"<html>", 400, "malformed_body"),
        (NDJSON, b'{"engram": {"format": 2}}\n', 422, "invalid_request"),
        (PARQUET, parquet(3).replace(b"vectors.v", b"vectors.x"), 422, "unknown_space"),
        ({"Content-Type": "text/csv"}, b"id\n1\n", 415, "unsupported_media_type"),
        ({}, row(1), 415, "unsupported_media_type"),
    ],
)  # fmt: skip
def test_a_body_that_is_not_read_is_a_problem(
    headers: dict[str, str], body: bytes, status: int, code: str, http: httpx.Client, make: Make
) -> None:
    response = http.post(f"{make(spaces=SPACES)}/import", content=body, headers=headers)
    assert (response.status_code, response.json()["code"]) == (status, code), response.text


def test_options_that_are_none_are_refused(http: httpx.Client, make: Make) -> None:
    address = make(spaces=SPACES)
    for query in ("from_row=0", "from_row=x", "colour=red", "prefix=%20a", "offset=-1"):
        assert http.post(f"{address}/import?{query}", content=row(1), headers=NDJSON).status_code == 422, query
    for query in ("format=csv", "filter=%7B%22must%22%3A3%7D", "vectors=perhaps"):
        assert http.get(f"{address}/export?{query}").status_code == 422, query
    assert http.get(f"{address}/export?filter=no").status_code == 400
    assert http.get("/v1/collections/not-there/export").status_code == 404
    assert http.post("/v1/collections/not-there/import", content=row(1), headers=NDJSON).status_code == 404


def test_an_import_that_breaks_says_how_far_it_was(http: httpx.Client, make: Make) -> None:
    address = make(spaces=SPACES)
    *_, last = events(http.post(f"{address}/import", content=stream(3_000, 1_000)[:-900], headers=ARROW))
    assert (last["event"], last["status"], last["code"], last["durable_row"]) == (
        "failed",
        400,
        "malformed_body",
        2_000,
    )
    assert count(http, address) == 2_000


def test_a_body_has_no_bound_and_its_rows_have(serve: Serve, tmp_path: Path) -> None:
    """A body of 240 kB where a request may have 64 kB; a line and a batch that are longer than that are refused."""
    with serve(tmp_path / "data", ENGRAM_BODY_BYTES_MAX="65536", ENGRAM_IMPORT_SPOOL_BYTES_MAX="1048576") as server:
        http, address = server.http, "/v1/collections/c"
        http.put(address, json={"spaces": SPACES}).raise_for_status()
        long = b'{"id": "long", "text": "' + b"x" * 100_000 + b'"}\n'
        body = b"".join(row(i) for i in range(1, 6_001)) + long + row(6_002)
        *_, refused, done = events(http.post(f"{address}/import", content=body, headers=NDJSON))
        assert (refused["row"], refused["code"]) == (6_001, "body_too_large")
        assert (done["stored"], done["refused"], done["durable_row"]) == (6_001, 1, 6_002)
        assert http.post(f"{address}/store", content=body).status_code == 413
        *_, failed = events(http.post(f"{address}/import", content=stream(6_000, 6_000), headers=ARROW))
        assert (failed["event"], failed["status"], failed["code"]) == ("failed", 413, "body_too_large")
        refused_ = http.post(f"{address}/import", content=b"x" * 2**21, headers=PARQUET)
        assert (refused_.status_code, refused_.json()["code"]) == (413, "body_too_large")
        assert [each.name for each in (tmp_path / "data").iterdir() if "tmp" in each.name] == []


def test_lines_come_while_the_body_is_sent_and_a_sender_that_goes_leaves_whole_rows(
    http: httpx.Client, make: Make, server: Any
) -> None:
    address = make(spaces=SPACES)
    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    rows = b"".join(row(i) for i in range(1, 3_001))
    head = f"POST {address}/import HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/x-ndjson\r\n"
    with socket.create_connection((host, port or 80), timeout=60) as sender:
        sender.sendall(f"{head}Content-Length: {10 * len(rows)}\r\n\r\n".encode() + rows + row(3_001)[:-9])
        answer = b""
        while b"\r\n\r\n" not in answer or b"started" not in answer:
            answer += sender.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 30
    while (stored := count(http, address)) < 2_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    assert count(http, address) in (stored, 3_000)
    assert http.get(f"{address}/memories/r3001").status_code == 404


def test_one_who_reads_nothing_before_the_end_is_answered(http: httpx.Client, make: Make) -> None:
    """As most clients do: thousands of refusals wait for them."""
    address = make(spaces=SPACES)
    body = b"".join(row(0) if i == 0 else b'{"id": "bad", "vectors": {"v": [0, 0]}}\n' for i in range(9_000))
    answered = events(http.post(f"{address}/import", content=body, headers=NDJSON))
    assert sum(event["event"] == "refused" for event in answered) == 8_999
    assert len(answered[-1]["refusals"]) == 100


def test_an_export_is_of_one_moment(http: httpx.Client, make: Make) -> None:
    """Rows stored while it is read are not in it, nor are those gone that were deleted meanwhile."""
    address = make(spaces=SPACES)
    http.post(f"{address}/import", content=parquet(3_000), headers=PARQUET)
    with http.stream("GET", f"{address}/export?format=arrow") as response:
        chunks: Iterator[bytes] = response.iter_raw(1_000)
        read = next(chunks)
        http.post(f"{address}/memories/delete", json={"ids": ["r1", "r3000"]}).raise_for_status()
        http.post(f"{address}/import", content=row(4_000), headers=NDJSON)
        read += b"".join(chunks)
    table = pa.ipc.open_stream(read).read_all()
    assert table["id"].to_pylist() == [f"r{i}" for i in range(1, 3_001)]


def test_a_server_that_is_killed_has_whole_rows_and_goes_on(serve: Serve, tmp_path: Path) -> None:
    address, data = "/v1/collections/c", tmp_path / "data"
    body = b"".join(row(i) for i in range(1, 20_001))
    with serve(data) as server:
        server.http.put(address, json={"spaces": SPACES}).raise_for_status()

        def sent() -> Iterator[bytes]:
            yield body[:-50_000]
            while count(server.http, address) <= 3_000:
                time.sleep(0.01)
            server.kill()

        with pytest.raises(httpx.HTTPError), httpx.Client(base_url=server.url) as sender:
            sender.post(f"{address}/import", content=sent(), headers=NDJSON)
    with serve(data) as server:
        before = count(server.http, address)
        assert 3_000 < before < 20_000
        answer = events(server.http.post(f"{address}/import?from_row=2001", content=body, headers=NDJSON))
        assert answer[-1]["updated"] == before - 2_000
        assert answer[-1]["stored"] == 20_000 - before
        assert count(server.http, address) == 20_000


def test_the_end_of_an_import_that_nobody_reads_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread would stay, and its place among those under way with it."""
    monkeypatch.setattr(lines, "LINES_WAITING_MAX", 2)
    monkeypatch.setattr(lines, "UNREAD_S", 0.01)

    async def unread() -> list[Any]:
        said = lines.Lines(asyncio.get_running_loop())
        refusal = Refusal(row=1, id=None, code="malformed_body", detail="")

        def work() -> None:
            try:
                while True:
                    said.put(refusal)
            except TooBusy as error:
                said.fail(error)
            said.end()

        await asyncio.wait_for(asyncio.to_thread(work), 10)
        return [await said.next() for _ in range(4)]

    first, second, error, end = asyncio.run(unread())
    assert first == second
    assert isinstance(error, TooBusy)
    assert end is None
