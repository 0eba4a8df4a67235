"""What only the client of a server meets: addresses, keys, other people's servers, and every error by its code."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from engram import AsyncClient, Client
from engram.transport import error_of
from service.api.problems import as_response
from service.errors import (
    EngramError,
    FolderInUse,
    InvalidRequest,
    ItemError,
    TimedOut,
    Unauthorized,
    Unavailable,
    error_classes,
)

Serving = Callable[..., AbstractContextManager[str]]


def refused(error: EngramError) -> EngramError:
    """`error` as a server sends it and the client reads it."""
    sent = as_response(error)
    return error_of(httpx.Response(sent.status_code, headers=dict(sent.headers), content=bytes(sent.body)))


def test_every_error_of_the_tree_comes_back_as_itself() -> None:
    classes = error_classes()
    assert len(classes) > 25
    for error_class in classes.values():
        items = (ItemError(3, "invalid_image", "not an image"),)
        back = refused(error_class("what happened", errors=items, retry_after_s=7))
        assert type(back) is error_class
        assert (back.detail, back.errors, back.retry_after_s) == ("what happened", items, 7)


def test_no_two_errors_share_a_code() -> None:
    def below(error_class: type[EngramError]) -> Iterator[type[EngramError]]:
        yield error_class
        for child in error_class.__subclasses__():
            yield from below(child)

    assert len(list(below(EngramError))) == len(error_classes())


def test_a_code_of_a_newer_server_keeps_its_words() -> None:
    problem = {"status": 418, "code": "teapot", "title": "It is a teapot", "detail": "short and stout"}
    error = error_of(httpx.Response(418, json=problem))
    assert type(error) is EngramError
    assert (error.status, error.code, error.title, error.detail) == (418, "teapot", "It is a teapot", "short and stout")


@pytest.fixture(scope="module")
def other_server() -> Iterator[str]:
    """A web server that is not Engram: it says yes to everything, in HTML; and no to /v1/collections/no."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(502 if self.path.endswith("/no") else 200)
            self.end_headers()
            self.wfile.write(b"[]" if self.path.endswith("/list") else b"<html></html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_is_not_engram_is_said_to_be_none(other_server: str) -> None:
    with Client(other_server) as client:
        with pytest.raises(Unavailable, match="other than JSON"):
            client.collections()
        with pytest.raises(Unavailable, match="502"):
            client.collection("no").info()


def test_a_server_that_is_not_there_says_how_to_start_one() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable, match="engram serve"):
        client.collections()


@pytest.mark.parametrize("url", ["http://[", "not an address", "ftp://127.0.0.1:9"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(Unavailable), Client(url) as client:
        client.collections()


def test_a_key_is_asked_for_and_sent(serving: Serving, tmp_path: Path) -> None:
    with serving(tmp_path / "m", ENGRAM_API_KEY="secret") as url:
        for key in (None, "another"):
            with Client(url, api_key=key) as client, pytest.raises(Unauthorized):
                client.collections()
        with Client(url, api_key="secret") as client:
            assert client.collections() == []


def test_a_folder_that_a_server_owns_is_refused_naming_it(
    server_url: str, served_folder: Path, http_client: Client
) -> None:
    http_client.collections()
    with pytest.raises(FolderInUse) as raised:
        Client(path=served_folder)
    assert server_url in raised.value.detail
    assert http_client.collections() is not None


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_does_not_answer_is_waited_for_so_long(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url) as client, pytest.raises(TimedOut, match=r"did not answer .* in 0\.3 s"):
            client.with_options(timeout_s=0.3).collections()

        async def awaited() -> None:
            async with AsyncClient(url, timeout_s=0.3) as client:
                await client.collection("c").count()

        with pytest.raises(TimedOut):
            asyncio.run(awaited())


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest):
        Client("http://127.0.0.1:8000", path="memories")
    for timeout_s in (0, -1, 601):
        with pytest.raises(InvalidRequest):
            Client(timeout_s=timeout_s)


def test_importing_the_package_does_not_bring_torch() -> None:
    check = "import sys, engram, engram.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
