"""The whole of the `engram` command: a command for every operation, JSON from each, and what a shell completes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from engram import Client
from engram.cli import app, main
from engram.demo.data import png
from service.app.operations import OPERATIONS, STREAMS
from service.storage import peek

BY_COMMAND = {
    "list_encoders": "encoders",
    "create_collection": "create",
    "list_collections": "collections",
    "get_collection": "info",
    "get_diagnostics": "diagnose",
    "size": "sizing",
    "delete_collection": "drop",
    "train": "train",
    "reencode": "reencode",
    "list_kernels": "kernels",
    "retire_kernel": "kernels",
    "list_payload_indexes": "indexes",
    "put_payload_index": "indexes",
    "delete_payload_index": "indexes",
    "store": "store",
    "recall": "recall",
    "get_memories": "get",
    "scroll": "list",
    "delete_memories": "delete",
    "count": "count",
    "get_content": "content",
    "patch_memory": "update",
    "list_operations": "operations",
    "retry_operation": "operations",
    "cancel_operation": "operations",
    "import_rows": "import",
    "export": "export",
    "create_key": "keys create",
    "list_keys": "keys list",
    "revoke_key": "keys revoke",
    "create_snapshot": "snapshot create",
    "list_snapshots": "snapshot list",
    "get_snapshot": "snapshot info",
    "get_snapshot_content": "snapshot download",
    "put_snapshot_content": "snapshot upload",
    "delete_snapshot": "snapshot delete",
    "restore_snapshot": "snapshot restore",
    "put_snapshot_schedule": "snapshot schedule",
    "get_snapshot_schedule": "snapshot schedule",
    "delete_snapshot_schedule": "snapshot schedule",
}
BY_ANOTHER = {
    "get_memory",  # `get` asks for many at once
    "delete_memory",  # `delete`, likewise
    "get_operation",  # `train` and `reencode` follow theirs
}
NO_JSON = {
    "serve", "demo",  # run until they are stopped
    "content",  # writes the bytes
    "convert-dvae", "convert-weights",  # write the file that they were told
}  # fmt: skip


def commands() -> dict[str, Any]:
    """Every command by its words."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            for word, each in inner.items():
                yield from below(f"{name} {word}".strip(), each)

    return dict(below("", typer.main.get_command(app)))


def test_every_operation_has_a_command() -> None:
    assert BY_COMMAND.keys() | BY_ANOTHER == OPERATIONS.keys() | STREAMS.keys()
    assert set(BY_COMMAND.values()) <= commands().keys()


def test_json_is_an_option_wherever_something_is_printed() -> None:
    without = {name for name, command in commands().items() if not any("--json" in p.opts for p in command.params)}
    assert without == NO_JSON


@pytest.fixture
def numbers(server_url: str, http_client: Client, new_name: Callable[[], str]) -> tuple[str, ...]:
    """What says where a collection of one picture and two bare vectors is."""
    collection = http_client.create_collection(new_name(), {"v": {"dimension": 2}})
    picture = png(np.zeros((4, 4, 3), dtype=np.uint8))
    collection.store([{"id": "p", "vectors": {"v": [1, 0]}, "image": picture, "payload": {"n": 1}}])
    collection.store([{"id": name, "vectors": {"v": [1, n]}} for n, name in enumerate(("a", "b"), 1)])
    return "--collection", collection.name, "--url", server_url


@pytest.fixture
def told(capsysbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Any]:
    """A command's JSON, which is all that it prints."""

    def tell(*arguments: object) -> Any:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsysbinary.readouterr()
        assert ended.value.code == 0, printed.err
        return json.loads(printed.out)

    return tell


def test_a_collection_is_made_told_and_forgotten(
    told: Callable[..., Any], server_url: str, new_name: Callable[[], str], tmp_path: Path
) -> None:
    name = new_name()
    (tmp_path / "config.json").write_text('{"duplicates": "refuse", "spaces": {"u": {"dimension": 3}}}')
    spaces = (
        "--space",
        "v=2",
        "--space",
        "image=pixels",
        "--space",
        'small={"encoder": "pixels", "options": {"size": 8}}',
    )
    config = f"@{tmp_path / 'config.json'}"
    made = told("create", name, *spaces, "--config", config, "--json", "--url", server_url)
    assert {space: found["dimension"] for space, found in made["spaces"].items()} == {
        "u": 3, "v": 2, "image": 3072, "small": 192,
    }  # fmt: skip
    assert made["duplicates"] == "refuse"
    assert told("info", name, "--json", "--url", server_url) == made
    assert name in [info["name"] for info in told("collections", "--json", "--url", server_url)]
    assert told("drop", name, "--yes", "--json", "--url", server_url) == {"name": name, "count": 0}
    assert name not in [info["name"] for info in told("collections", "--json", "--url", server_url)]


def test_what_a_command_says_is_there_as_json(
    told: Callable[..., Any], numbers: tuple[str, ...], http_client: Client, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert told("count", "--json", *numbers) == {"count": 3}
    assert told("get", "a", "--json", *numbers)["id"] == "a"
    assert told("list", "--limit", 1, "--json", *numbers)["payload"] == {"n": 1}
    assert told("kernels", "--json", *numbers) == []
    assert told("diagnose", "--json", *numbers)["memories"] == 3
    assert told("delete", "b", "--dry-run", "--json", *numbers) == {"count": 1, "dry_run": True, "deleted": ["b"]}
    assert [encoder["name"] for encoder in told("encoders", "pixels", "--json")] == ["pixels"]
    trained = told("train", "gate", "--json", *numbers)
    assert (trained["kind"], trained["status"]) == ("calibrate", "done")
    with pytest.raises(SystemExit):
        main(["content", "p", *numbers])
    assert capsysbinary.readouterr().out == http_client.collection(numbers[1]).content("p")


def test_a_recall_as_json_has_the_picture_in_base64(
    told: Callable[..., Any], server_url: str, http_client: Client, new_name: Callable[[], str], tmp_path: Path
) -> None:
    collection = http_client.create_collection(new_name(), {"image": {"encoder": "pixels", "options": {"size": 8}}})
    file = tmp_path / "one.png"
    file.write_bytes(png(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)))
    collection.store([{"id": "one", "image": file}])
    at = ("--collection", collection.name, "--url", server_url)
    stored = told("store", file, "--json", *at)
    assert [result["status"] for result in stored["results"]] == ["stored"]
    assert told("delete", stored["results"][0]["id"], "--json", *at)["count"] == 1
    answer = told("recall", file, "--save", tmp_path / "out.png", "--json", *at)
    assert (answer["verdict"], answer["matches"][0]["id"]) == ("uncalibrated", "one")
    assert base64.b64decode(answer["reconstruction"]["data"]) == (tmp_path / "out.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--space", "v"), "a space is NAME=ENCODER"),
        (("--space", 'v={"dim'), "--space takes JSON"),
        (("--config", "[1]"), "--config takes a JSON object"),
        (("--config", "@nowhere"), "nowhere cannot be read"),
    ],
)
def test_what_is_no_configuration_is_said_to_be_none(
    arguments: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["create", "c", *arguments, "--data", str(tmp_path / "m")])
    assert why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def completed(run_environment: Callable[..., dict[str, str]]) -> Callable[..., list[str]]:
    """What bash is told to complete the last word of a line with."""

    def complete(*words: object, **environ: str) -> list[str]:
        line = ["engram", *map(str, words)]
        asked = {"_ENGRAM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(line) - 1)}
        environment = run_environment(**asked, **environ)
        command = Path(sys.executable).with_name("engram")
        done = subprocess.run([command], env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return complete


def test_a_shell_completes_commands_and_options(completed: Callable[..., list[str]]) -> None:
    assert completed("coun") == ["count"]
    assert completed("recall", "--ker") == ["--kernel"]
    assert completed("train", "ga") == ["gate"]


def test_a_shell_completes_what_a_server_has(
    completed: Callable[..., list[str]], numbers: tuple[str, ...], server_url: str, served_folder: Path
) -> None:
    name = numbers[1]
    assert completed("count", "--url", server_url, "--collection", name[:8]) == [name]
    assert completed("info", name[:8], ENGRAM_URL=server_url) == [name]
    assert completed("info", "--data", served_folder, name[:8]) == [name], "through the folder's owner"
    assert completed("reencode", name, "", ENGRAM_URL=server_url) == ["v"]


def test_a_shell_completes_what_a_folder_has_without_opening_it(
    completed: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    with Client(path=folder) as client:
        for name in ("cats", "dogs"):
            client.create_collection(name, {"v": {"dimension": 2}})
        assert completed("count", "--data", folder, "-c", "d") == ["dogs"], "while its owner has no address"
    assert completed("reencode", "--data", folder, "cats", "") == ["v"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no address"])
def test_what_cannot_be_reached_completes_nothing_and_says_nothing(
    completed: Callable[..., list[str]], url: str, tmp_path: Path
) -> None:
    assert completed("info", "", ENGRAM_URL=url) == []
    (tmp_path / "engram.db").write_bytes(b"no database")
    assert completed("info", "", ENGRAM_DATA=str(tmp_path)) == []


def test_what_is_completed_for_kernels_and_operations(tmp_path: Path) -> None:
    with Client(path=tmp_path / "m") as client:
        client.create_collection("c", {"v": {"dimension": 2}}).train("gate")
        client.create_collection("d", {"v": {"dimension": 2}})
        ids = [operation.id for operation in client.operations()]
        assert peek.operations(tmp_path / "m") == ids
        assert peek.kernels(tmp_path / "m", "c") == []
    assert peek.collections(tmp_path / "m") == ["c", "d"]


def test_completion_is_installed(run_environment: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("engram")), "--install-completion", "bash"]
    environment = run_environment(HOME=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "complete_bash" in next(tmp_path.rglob("*.sh")).read_text()
