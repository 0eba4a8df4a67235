"""The `engram` command as processes: in its own folder, and through the server that owns one."""

from __future__ import annotations

import csv
import io
import json
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from engram import Client, Collection
from engram.collections_command import gate
from engram.demo.cues import Cue
from engram.demo.data import PHOTOGRAPHS
from engram.demo.report import Shown, print_shown
from engram.demo.run import SENTENCE, recall_line
from engram.recalled import energies, print_answer, save_recalled, show
from engram.replies import CollectionInfo, Recall

Start = Callable[..., subprocess.Popen[str]]
Run = Callable[..., subprocess.CompletedProcess[str]]
Serving = Callable[..., AbstractContextManager[str]]
PHOTOS = {photo.name: photo for photo in PHOTOGRAPHS}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three photographs, one captioned by a text beside it and one by a table, and a file that only pretends."""
    folder = tmp_path / "pictures"
    (folder / "pets").mkdir(parents=True)
    (folder / "pets" / "cat.png").write_bytes(PHOTOS["chelsea"].read())
    (folder / "pets" / "cat.txt").write_text(PHOTOS["chelsea"].caption)
    (folder / "rocket.jpg").write_bytes(PHOTOS["rocket"].read())
    (folder / "flower.jpg").write_bytes(PHOTOS["flower"].read())
    (folder / "broken.png").write_bytes(b"no picture at all")
    captions = [("filename", "caption"), *((f"{name}.jpg", PHOTOS[name].caption) for name in ("rocket", "flower"))]
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([*captions, ("moon.jpg", "the moon")])
    return folder


def test_store_and_recall_in_a_folder_and_then_through_its_server(
    run_engram: Run, serving: Serving, pictures: Path, tmp_path: Path
) -> None:
    data, captions = tmp_path / "memories", tmp_path / "captions.csv"

    stored = run_engram("store", pictures, "--captions", captions, "--data", data)
    assert stored.returncode == 1, "one picture was refused"
    assert "Made the collection memories" in stored.stdout
    assert "3 stored, 1 refused" in stored.stdout
    assert "broken.png" in stored.stdout
    assert "invalid_image" in stored.stdout
    assert "caption for moon.jpg" in stored.stdout
    assert "calibrating…" in stored.stdout
    assert "being calibrated" not in run_engram("collections", "--data", data).stdout

    with serving(data) as url:
        # The folder can be opened by one process only: that these answer shows that they went through the server.
        again = run_engram("store", pictures / "pets", "--data", data)
        assert (again.returncode, "1 stored" in again.stdout) == (0, True)
        assert "calibrating…" not in again.stdout
        listed = run_engram("collections", "--data", data)
        assert "memories" in listed.stdout
        assert "image (codec), joint (bridge), text (sentence)" in listed.stdout

        by_text = run_engram("recall", PHOTOS["rocket"].paraphrase, "--data", data, "--limit", 2)
        assert by_text.returncode == 0
        assert first_match(by_text.stdout) == "rocket.jpg"
        assert "uncalibrated" in by_text.stdout
        assert PHOTOS["rocket"].caption in by_text.stdout, "a match by its caption"

        shown = tmp_path / "shown"
        shown.mkdir()
        saved = tmp_path / "recalled.webp"
        mask = tmp_path / "mask.png"
        Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(mask)
        by_half = run_engram(
            "recall", pictures / "flower.jpg", "--mask", mask, "--save", saved, "--limit", 1, "--show", ENGRAM_URL=url,
            TMPDIR=str(shown), DISPLAY="", WAYLAND_DISPLAY="",
        )  # fmt: skip
        assert by_half.returncode == 0
        assert first_match(by_half.stdout) == "flower.jpg"
        with Image.open(saved) as recalled:
            assert recalled.format == "WEBP"
        [sheet] = shown.glob("engram-*.png")
        assert f"picture in {sheet} (no screen to open it on)" in by_half.stdout
        with Image.open(sheet) as side_by_side:
            assert side_by_side.width > 3 * 320, "the cue, what was recalled, and its original"

        missing = run_engram("recall", "a rocket", "--original", tmp_path / "no" / "f.png", ENGRAM_URL=url)
        assert missing.returncode == 1
        assert missing.stderr.startswith("The file cannot be written: ")
        assert missing.stderr.endswith("(not_writable)\n")
        copy = tmp_path / "original.jpg"
        given = run_engram("recall", PHOTOS["rocket"].paraphrase, "--original", copy, ENGRAM_URL=url)
        assert given.returncode == 0
        assert copy.read_bytes() == PHOTOS["rocket"].read()

        other = run_engram("recall", "a cat", "--collection", "cats", ENGRAM_URL=url)
        assert other.returncode == 1
        assert "; there is memories (collection_not_found)" in other.stderr


def answered(**fields: object) -> Recall:
    blank: dict[str, object] = {
        "verdict": "unknown",
        "matches": [],
        "recall": None,
        "gate": None,
        "version": 1,
        "timings_ms": {},
    }
    return Recall.of({**blank, **fields})


def test_an_unknown_cue_writes_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_recalled(Console(), answered(), tmp_path / "f.png")
    assert "nothing is written: an unknown cue recalls no picture" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


PIXELS = {"image": {"encoder": "pixels", "options": {"size": 16}}, "v": {"dimension": 2}}


@pytest.fixture
def collection(local_client: Client, new_name: Callable[[], str]) -> Collection:
    made = local_client.create_collection(new_name(), PIXELS)
    colours = np.zeros((2, 8, 12, 3), dtype=np.uint8)
    colours[0, :, :6], colours[1, :4] = 255, 255
    pictured = [{"id": f"p{i}", "image": picture, "vectors": {"v": [i, 1]}} for i, picture in enumerate(colours)]
    made.store([*pictured, {"id": "bare", "vectors": {"v": [-1, -1]}}])
    return made


@pytest.mark.parametrize(("code", "told"), [(0, ", opened"), (3, "(xdg-open could not open it: it ended with 3)")])
def test_a_picture_is_opened_where_there_is_a_screen(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: str
) -> None:
    opener = tmp_path / "xdg-open"
    opener.write_text(f'#!/bin/sh\necho "$1" > "{tmp_path}/asked"\nexit {code}\n')
    opener.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("DISPLAY", ":9")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    console = Console(file=io.StringIO(), width=300)
    show(console, collection, collection.recall(vectors={"v": [0, 1]}, beta=100, reconstruct=True))
    shown = (tmp_path / "asked").read_text().strip()
    assert console.file.getvalue().strip() == f"picture in {shown}{told if code == 0 else ' ' + told}"  # type: ignore[attr-defined]
    with Image.open(shown) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    tiles = pixels[80:260, 12:332], pixels[80:260, 344:664]
    assert all(tile[:, :140].mean() > 230 and tile[:, 180:].mean() < 25 for tile in tiles), "recalled, and its original"


def test_what_an_unknown_cue_is_near_is_shown_as_that(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    near = replace(collection.recall(vectors={"v": [0, 1]}), verdict="unknown", reconstruction=None, candidates=())
    show(Console(width=300), collection, near)
    assert capsys.readouterr().out.startswith("nothing was recalled; what is shown is only nearest\npicture in ")
    show(Console(width=300), collection, collection.recall(vectors={"v": [-1, -1]}, limit=1))
    assert capsys.readouterr().out == "nothing is shown: no match has a picture\n"


def test_those_between_whom_a_cue_does_not_decide_are_named(
    collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    print_answer(Console(width=300), collection.recall(vectors={"v": [0.55, 1]}, beta=1))
    assert "the cue does not decide between p" in capsys.readouterr().out


def test_why_there_is_no_verdict_is_what_the_reply_says(capsys: pytest.CaptureFixture[str]) -> None:
    match = {"id": "a", "weight": 1.0, "similarity": 1.0}
    print_answer(Console(), answered(verdict="uncalibrated", matches=[match], warnings=["uncalibrated: too few"]))
    assert capsys.readouterr().out.splitlines()[:2] == ["uncalibrated", "uncalibrated: too few"]


def record(refused: str | None) -> dict[str, object]:
    numbers = {"version": 1, "rows": 3, "cues": 3, "first_share": 1.0, "target_tpr": 0.95, "stranger_accept_rate": None}
    return {
        "modality": "image",
        "corruptions": [],
        "gate_beta": None,
        "log_lambda": None,
        "refused": refused,
        **numbers,
    }


@pytest.mark.parametrize(
    ("state", "refused", "told"),
    [
        ("none", [], "nothing stored"),
        ("pending", [], "being calibrated"),
        ("stale", [None], "being recalibrated"),
        ("current", [None, None], "calibrated"),
        ("current", [None, "too few"], "partly"),
        ("current", ["too few", "too few"], "too few"),
    ],
)
def test_the_gate_is_told_by_what_its_records_rest_on(state: str, refused: list[str | None], told: str) -> None:
    calibration = {"state": state, "modalities": [record(why) for why in refused]}
    info = {"name": "c", "version": 1, "count": 3, "created_at": "", "spaces": {}, "recall": {}, "corruptions": []}
    info |= {"gate": {}, "calibration": calibration, "indexing": False, "bytes": {}}
    assert gate(CollectionInfo.of(info)) == told


def test_ctrl_c_while_storing_says_how_far_it_came(start_engram: Start, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(1)
    for number in range(2000):
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    process = start_engram("store", folder, "--data", tmp_path / "memories")
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("Made the collection")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate()
    assert process.returncode == 130, rest
    assert " of 2,000 stored, and maybe more that were sent; run the same command to go on" in " ".join(rest.split())
    assert "Traceback" not in rest


def test_the_demo_gives_a_line_for_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Path(sys.executable).with_name("engram")
    rest = ["recall", SENTENCE, "--collection", "photos", "--url", "http://127.0.0.1:8000"]
    monkeypatch.chdir(tmp_path)
    assert shlex.split(recall_line(rest[-1])) == [str(command), *rest]
    monkeypatch.chdir(command.parents[2])
    assert shlex.split(recall_line(rest[-1])) == [str(command.relative_to(command.parents[2])), *rest]


def first_match(output: str) -> str:
    lines = output.splitlines()
    ruler = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    return lines[ruler + 1].split()[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["store", "nowhere"], "nowhere is neither a file nor a folder"),
        (["recall", "picture.jpg"], "picture.jpg looks like a picture, and there is no such file"),
        (["recall", "a cat"], "there is no data folder memories"),
        (["collections", "--data", "nowhere"], "there is no data folder nowhere"),
        (["collections", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["collections", "--url", "http://127.0.0.1:9", "--data", "x"], "give either --data (a folder) or --url"),
        (["serve", "--host", "0.0.0.0"], "ENGRAM_API_KEY"),
        (["serve", "--port", "99999"], "port"),
    ],
)
def test_an_error_is_one_line(run_engram: Run, tmp_path: Path, arguments: list[str], told: str) -> None:
    done = run_engram(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert told.lower() in done.stderr.lower()
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_server_is_one_line_with_its_code(run_engram: Run, server_url: str) -> None:
    done = run_engram("recall", "a cat", "--collection", "none", "--url", server_url)
    assert done.returncode == 1
    assert done.stderr.startswith("There is no such collection: ")
    assert done.stderr.endswith("(collection_not_found)\n")


@pytest.mark.parametrize(("energy", "told"), [([], "–"), ([None, -1.5], "– → -1.5000"), ([0.25], "0.2500")])
def test_energies_that_are_not_known_are_dashes(
    energy: list[float | None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dynamics = {"steps": 1, "converged": False, "outcome": "unfinished", "energy": energy, "margin": None, "beta": 2.0}
    dynamics |= {"support": 0, "certified": False, "error_bound": None}
    answer = {"verdict": "unknown", "matches": [], "recall": dynamics, "gate": None, "version": 1, "timings_ms": {}}
    assert energies(energy) == told
    cue = Cue("a stranger", "photos", None, text="nobody")
    print_shown(Console(width=200), Shown(cue, Recall.of(answer)))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("energy")]
    assert line.split() == f"energy {told} (unfinished, steps 1, β 2.0)".split()


def test_misuse_is_told_from_refusal(run_engram: Run) -> None:
    assert run_engram("recall").returncode == 2
    assert run_engram("remember", "x").returncode == 2
    assert run_engram("--help").returncode == 0


def test_memories_are_listed_counted_and_deleted_by_a_filter(run_engram: Run, tmp_path: Path) -> None:
    data, even = tmp_path / "memories", '{"must": [{"key": "parity", "match": "even"}]}'
    with Client(path=data) as client:
        made = client.create_collection("numbers", {"v": {"dimension": 2}})
        made.store(
            {"id": f"m{n}", "vectors": {"v": [1.0, n]}, "payload": {"parity": "odd" if n % 2 else "even"}}
            for n in range(7)
        )
    at = ("--collection", "numbers", "--data", data)
    assert run_engram("count", *at).stdout == "7\n"
    assert run_engram("count", "--filter", even, *at).stdout == "4\n"
    listed = run_engram("list", "--filter", even, "--limit", 2, "--json", *at)
    assert [json.loads(line)["id"] for line in listed.stdout.splitlines()] == ["m0", "m2"]
    assert "m5" in run_engram("list", *at).stdout
    assert run_engram("delete", "--filter", even, "--dry-run", *at).stdout == "4 would be deleted\nm0, m2, m4, m6\n"
    asked = run_engram("delete", "--filter", even, *at)
    assert (asked.returncode, "Delete 4 memories" in asked.stdout) == (1, True), "nobody said yes"
    assert run_engram("delete", "--filter", even, "--yes", *at).stdout.startswith("4 deleted")
    assert run_engram("delete", "m1", "nobody", *at).stdout == "1 deleted\nm1\n"
    assert run_engram("count", *at).stdout == "2\n"
    wrong = run_engram("count", "--filter", '{"must": [{"key": "a"}]}', *at)
    assert (wrong.returncode, "filter.must.0: " in wrong.stderr) == (1, True)
    assert "takes JSON" in run_engram("count", "--filter", "{", *at).stderr
