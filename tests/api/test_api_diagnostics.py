"""Diagnostics over HTTP: the same through the client, as the command prints them, and off the event loop's path."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import httpx
import numpy as np

from engram import Client

Make = Callable[..., str]


def stored(http: httpx.Client, make: Make) -> str:
    """The name of a collection of 40 memories, two of them equal, with a β of its own."""
    address = make(spaces={"v": {"dimension": 8}}, recall={"beta": 40.0})
    vectors = np.random.default_rng(5).standard_normal((40, 8)).astype(np.float32)
    vectors[9] = vectors[2]
    memories = [{"id": f"m{i}", "vectors": {"v": row.tolist()}} for i, row in enumerate(vectors)]
    assert http.post(f"{address}/store", json={"memories": memories}).status_code == 200
    return address.rsplit("/", 1)[1]


def test_the_route_and_the_client_say_the_same(http: httpx.Client, make: Make) -> None:
    name = stored(http, make)
    response = http.get(f"/v1/collections/{name}/diagnostics")
    assert response.status_code == 200
    body = response.json()
    with Client(str(http.base_url)) as client:
        through = json.loads(json.dumps(asdict(client.collection(name).diagnostics())))
    for changing in ("seconds", "calibration", "drift", "betas"):  # a calibration may come between the two
        del body[changing], through[changing]
    assert through == body
    found = body["spaces"]["v"]["near_duplicates"]
    assert (found["memories"], [pair["ids"] for pair in found["pairs"]]) == (2, [["m2", "m9"]])


def test_an_unknown_collection_is_not_found(http: httpx.Client) -> None:
    response = http.get("/v1/collections/nowhere/diagnostics")
    assert (response.status_code, response.json()["code"]) == (404, "collection_not_found")


def test_the_command_prints_tables_or_json(http: httpx.Client, make: Make) -> None:
    name = stored(http, make)
    command = [sys.executable, "-m", "engram", "diagnose", "--url", str(http.base_url), "--collection", name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "160", "PATH": ""})
    assert "40 memories, all of them compared" in printed.stdout
    assert "m2" in printed.stdout
    assert "the configured beta" in printed.stdout
    assert "scan of 40" in printed.stdout
    asked = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    body = json.loads(asked.stdout)
    assert (body["memories"], body["spaces"]["v"]["memories"]) == (40, 40)


def test_an_empty_collection_is_told_in_a_line(http: httpx.Client, make: Make) -> None:
    name = make(spaces={"v": {"dimension": 8}}).rsplit("/", 1)[1]
    command = [sys.executable, "-m", "engram", "diagnose", "--url", str(http.base_url), "--collection", name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Nothing is stored yet." in printed.stdout
