"""Requests made from the OpenAPI document, and from damaged ones: no 5xx, every answer as documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FUZZ_CASES = 10_000 if os.environ.get("TEST_PROFILE") == "full" else 300


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_the_document_holds_under_fuzzing(server: Any, tmp_path: Path) -> None:
    server.http.put("/v1/collections/fuzz", json={"spaces": {"v": {"dimension": 2}}}).raise_for_status()
    paths = server.http.get("/openapi.json").json()["paths"]
    operations = sum(len(methods) for methods in paths.values())
    # schemathesis counts examples per operation.
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
            "--max-examples", str(-(-FUZZ_CASES // operations)), "--seed", "1", "--workers", "1",
            "--phases", "fuzzing", "--checks", CHECKS,
            "--generation-database", "none", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
