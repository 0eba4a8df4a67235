"""While collections are loaded: the server lives, is not ready, and says how far it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from service.api.app import create_app
from service.app import engine as engine_module
from service.app.engine import Engine
from service.app.schemas import CollectionConfig
from service.encoders.protocol import Encoder
from service.errors import OutOfMemory
from service.settings import Settings


def get(engine: Engine, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.get(path)

    return asyncio.run(ask())


def test_a_server_answers_before_it_is_ready_and_says_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = {"image": {"encoder": "pixels"}}
    with Engine(Settings(data=tmp_path)) as engine:
        for name in ("first", "second"):
            engine.create_collection(name, CollectionConfig.model_validate({"spaces": spaces}))
    seen: list[httpx.Response] = []
    warmed: list[str] = []
    load = engine_module.collections.load

    with Engine(Settings(data=tmp_path), load=False) as engine:

        def look() -> None:
            assert get(engine, "/livez").status_code == 200
            seen.append(get(engine, "/readyz"))
            refused = get(engine, "/v1/collections")
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            assert refused.headers["retry-after"] == "1"

        def run_once(encoder: Encoder) -> None:
            warmed.append(encoder.name)
            look()
            raise OutOfMemory("of one item")  # said in the log; the collection still answers

        monkeypatch.setattr(engine_module.collections, "load", lambda *given: (look(), load(*given))[1])
        monkeypatch.setattr(engine_module, "run_once", run_once)
        look()
        engine.load(warm=True)
        assert [response.status_code for response in seen] == [503] * 4
        details = [response.json()["detail"] for response in seen]
        assert details[1:] == [
            "loading collection 1 of 2: first",
            "loading collection 2 of 2: second",
            "warming encoder 1 of 1: pixels",
        ]
        assert warmed == ["pixels"], "an encoder that several collections share is warmed once"
        assert get(engine, "/readyz").json() == {"status": "ready"}
        assert len(get(engine, "/v1/collections").json()["collections"]) == 2
