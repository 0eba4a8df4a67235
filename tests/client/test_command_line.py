"""The `engram` command as processes: in its own folder, and through the server that owns one."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from engram.cli import energies
from engram.demo.cues import Cue
from engram.demo.data import PHOTOGRAPHS
from engram.demo.report import Shown, print_shown
from engram.replies import Recall

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

    with serving(data) as url:
        # The folder can be opened by one process only: that these answer shows that they went through the server.
        again = run_engram("store", pictures / "pets", "--data", data)
        assert (again.returncode, "1 stored" in again.stdout) == (0, True)
        listed = run_engram("collections", "--data", data)
        assert "memories" in listed.stdout
        assert "image (pixels), joint (bridge), text (bridge)" in listed.stdout

        by_text = run_engram("recall", PHOTOS["rocket"].paraphrase, "--data", data, "--limit", 2)
        assert by_text.returncode == 0
        assert first_match(by_text.stdout) == "rocket.jpg"
        assert "uncalibrated" in by_text.stdout

        saved = tmp_path / "recalled.png"
        mask = tmp_path / "mask.png"
        Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(mask)
        by_half = run_engram(
            "recall", pictures / "flower.jpg", "--mask", mask, "--save", saved, "--limit", 1, ENGRAM_URL=url
        )
        assert by_half.returncode == 0
        assert first_match(by_half.stdout) == "flower.jpg"
        with Image.open(saved) as recalled:
            assert recalled.format == "PNG"


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
