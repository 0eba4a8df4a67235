"""Requests made from the OpenAPI document, and from damaged ones: no 5xx, every answer as documented."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

FULL = os.environ.get("TEST_PROFILE") == "full"
FUZZ_CASES = 10_000 if FULL else 300
KEYED_CASES = 2_000 if FULL else 100


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def fuzz(server: Any, folder: Path, cases: int, *options: str) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    operations = sum(len(methods) for methods in paths.values())
    # schemathesis counts examples per operation.
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
            "--max-examples", str(-(-cases // operations)), "--seed", "1", "--workers", "1",
            "--phases", "fuzzing", "--checks", CHECKS,
            "--generation-database", "none", "--no-color", *options,
            # Their bodies are of formats that schemathesis cannot write.
            "--exclude-operation-id", "import_rows", "--exclude-operation-id", "put_snapshot_content",
        ],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_the_document_holds_under_fuzzing(server: Any, tmp_path: Path) -> None:
    server.http.put("/v1/collections/fuzz", json={"spaces": {"v": {"dimension": 2}}}).raise_for_status()
    # A first key that is an admin's would close the server to the tests that share it.
    fuzz(server, tmp_path, FUZZ_CASES, "--exclude-operation-id", "create_key")


def test_a_read_key_changes_nothing_under_fuzzing(
    serve: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    with serve(tmp_path / "data", ENGRAM_API_KEY="root") as server:
        server.http.headers["authorization"] = "Bearer root"
        server.http.put("/v1/collections/fuzz", json={"spaces": {"v": {"dimension": 2}}}).raise_for_status()
        made = server.http.post("/v1/keys", json={"name": "reader", "scopes": {"*": "read"}}).json()
        before = [server.http.get(path).json() for path in ("/v1/collections", "/v1/operations")]
        fuzz(server, tmp_path, KEYED_CASES, "--header", f"Authorization: Bearer {made['key']}")
        assert [server.http.get(path).json() for path in ("/v1/collections", "/v1/operations")] == before
        assert [key["id"] for key in server.http.get("/v1/keys").json()["keys"]] == [made["id"]]
