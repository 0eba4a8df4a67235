"""Changing a space's encoder over HTTP and in process alike, and from the command line."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from engram import Client
from engram.reencode import _option
from service.errors import EncoderMismatch, InvalidRequest, UnknownSpace

SPACES = {"image": {"encoder": "pixels", "options": {"size": 4}}, "v": {"dimension": 2}}
PICTURES = [np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8) for seed in range(12)]
MEMORIES: list[dict[str, Any]] = [{"id": str(i), "image": picture} for i, picture in enumerate(PICTURES)]


def test_a_space_changes_its_encoder(client: Client, new_name: Callable[[], str]) -> None:
    target = client.create_collection(new_name(), SPACES)
    target.store(MEMORIES)
    done = target.reencode("image", "pixels", {"size": 8})
    assert (done.kind, done.status, done.progress) == ("reencode", "done", 1)
    assert done.result is not None
    assert (done.result["memories"], done.result["dimension"]) == (12, 192)
    assert target.info().spaces["image"]["dimension"] == 192
    assert target.recall(image=PICTURES[5], gate=False).matches[0].id == "5"
    started = target.reencode("image", options={"size": 16}, wait=False)
    assert started.status in ("queued", "running", "done")
    with pytest.raises(UnknownSpace, match="no space sound; it has image, v"):
        target.reencode("sound")
    with pytest.raises(InvalidRequest, match="callers' own vectors"):
        target.reencode("v")
    with pytest.raises(InvalidRequest, match="sise"):
        target.reencode("image", "pixels", {"sise": 8})


def test_the_command_shows_what_came_of_it(
    run_engram: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    data = tmp_path / "memories"
    with Client(path=data) as client:
        client.create_collection("mine", SPACES).store(MEMORIES)
    done = run_engram("reencode", "mine", "image", "--option", "size=8", "--option", "colour=false", "--data", data)
    assert done.returncode == 0, done.stderr
    assert "12 memories are now encoded by pixels (64 values each)" in done.stdout
    assert "size=4,colour=true" in done.stdout
    assert "size=8,colour=false" in done.stdout
    for original in (data / "blobs").glob("??/*"):
        original.unlink()
    refused = run_engram("reencode", "mine", "image", "--option", "size=4", "--data", data)
    assert refused.returncode == 1
    assert "12 memories of space image of mine cannot be encoded again" in refused.stderr
    assert "originals_missing" in refused.stderr


def test_a_space_without_its_encoder_is_not_waited_for(
    run_engram: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Nothing is calibrated until it is encoded again; a second such space does not hold up the first."""
    data = tmp_path / "memories"
    spaces = {name: {"encoder": "pixels", "options": {"size": 4}} for name in ("a", "b")}
    with Client(path=data) as client:
        client.create_collection("mine", spaces).store(MEMORIES)
    with sqlite3.connect(data / "engram.db") as connection:
        ((config,),) = connection.execute("SELECT config FROM collections")
        config = orjson.loads(config) | {"fingerprints": {"a": "former", "b": "former"}}
        connection.execute("UPDATE collections SET config = ?", (orjson.dumps(config),))
    connection.close()
    with Client(path=data) as client:
        mine = client.collection("mine")
        for call in (lambda: mine.recall(image=PICTURES[0]), mine.wait_until_calibrated):
            with pytest.raises(EncoderMismatch, match="engram reencode mine a"):
                call()
        assert mine.info().calibration.why == "not calibrated before the encoders of all spaces can be used"
    first = run_engram("reencode", "mine", "a", "--data", data)
    assert first.returncode == 0, first.stderr
    with Client(path=data) as client:
        with pytest.raises(EncoderMismatch, match="engram reencode mine b"):
            client.collection("mine").recall(image=PICTURES[0])
        client.collection("mine").reencode("b")
        assert client.collection("mine").recall(image=PICTURES[5], gate=False).matches[0].id == "5"


def test_an_option_is_a_name_and_a_value() -> None:
    assert _option("size=16") == ("size", 16)
    assert _option("model=ViT-B-32") == ("model", "ViT-B-32")
    assert _option("where=a=b") == ("where", "a=b")
    for wrong in ("size", "=16"):
        with pytest.raises(InvalidRequest, match="name=value"):
            _option(wrong)
