"""The list of encoders: by the client both ways, and by the command."""

from __future__ import annotations

import json

import pytest

from engram import Client
from engram.cli import main


def test_the_client_lists_them_both_ways(client: Client) -> None:
    found = {info.name: info for info in client.encoders()}
    assert {"codec", "bridge", "sentence", "open_clip", "vq", "kl", "tiny", "dvae", "pixels", "pixel_text"} <= set(
        found
    )
    assert found["sentence"].here
    assert (found["sentence"].takes, found["sentence"].dimension) == (("text",), 384)
    assert not found["open_clip"].here
    assert "name a model" in str(found["open_clip"].needs)
    assert found["kl"].models[0].options == {"model": "stabilityai/sd-vae-ft-mse"}


def ran(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command_lists_them_here_and_at_a_server(
    server_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENGRAM_URL", raising=False)
    listed = [json.loads(ran(["encoders", "--json", *where], capsys)[1]) for where in ([], ["--url", server_url])]
    assert listed[0] == listed[1]
    code, said, _ = ran(["encoders"], capsys)
    assert code == 0
    for info in listed[0]:
        assert info["name"] in said


def test_the_command_tells_one_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGRAM_URL", raising=False)
    code, said, _ = ran(["encoders", "vq"], capsys)
    assert code == 0
    assert '{"model": "amused/amused-512", "subfolder": "vqvae"}: not here; licence see its card' in said
    assert "docs/encoders/vq.md" in said
    assert "open_clip" not in said
    code, _, error = ran(["encoders", "clip"], capsys)
    assert code == 1
    assert "there is no encoder 'clip'; there are codec, pixels" in error.replace("\n", " ")
