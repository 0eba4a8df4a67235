"""The demo as a program: a first run to its end, then what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import betabinom

from engram.demo.cues import DECLARED
from engram.demo.data import STORED
from engram.demo.run import curl_lines
from service.storage.folder import read_owner

SURE = 0.9995  # each of some twenty bounds holds with this probability, if the calibration keeps its word


def start(output: Path, module: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ENGRAM_", "DEMO_", "PORT"))}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "160", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=output.parent,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that came to its end."""
    folder = tmp_path_factory.mktemp("demo") / "demo-output"
    process = start(folder, "engram.demo", PORT="0", DEMO_EXIT="1")
    said, _ = process.communicate()
    (folder / "said.txt").write_text(said)
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_photographs_come_back_from_parts_and_from_sentences(results: dict[str, Any]) -> None:
    stored = [answer for answer in results["shown"] if answer["own"] is not None]
    assert [answer["group"] for answer in stored].count("A photograph from a sentence") == 4
    for answer in stored:
        assert answer["matches"][0]["id"] == answer["own"], answer
        assert answer["matches"][0]["weight"] > 0.75
        assert answer["reconstructed"] == (answer["verdict"] in ("known", "ambiguous"))
        assert answer["energy"][-1] <= answer["energy"][1] + 1e-5
        assert answer["timings_ms"]["total"] > 0


def test_what_is_accepted_and_refused_is_what_the_calibration_promises(results: dict[str, Any]) -> None:
    """Of n calibration cues the k-th lowest score is the threshold: a fresh cue is refused with probability
    Beta(k, n + 1 - k), so m of them are refused Beta-binomially; strangers are let in as the left-out cues were.
    """
    records = {
        (name, record["modality"]): record
        for name, calibration in results["calibrations"].items()
        for record in calibration["modalities"]
    }
    counted: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
    for tally in results["tallies"]:
        if tally["declared"] or tally["stranger"]:
            false = tally["accepted"] if tally["stranger"] else tally["cues"] - tally["accepted"]
            count = counted[tally["collection"], tally["modality"], tally["stranger"]]
            count[0] += false
            count[1] += tally["cues"]
    assert len(counted) == 11
    for (collection, modality, stranger), (false, cues) in counted.items():
        record = records[collection, modality]
        n = record["cues"]
        if stranger:
            accepted = round(record["stranger_accept_rate"] * n)
            bound = betabinom.ppf(SURE, cues, accepted + 1, n - accepted + 1)
        else:
            k = int((1 - record["target_tpr"]) * (n + 1) + 1e-9)
            bound = betabinom.ppf(SURE, cues, k, n + 1 - k)
        assert false <= bound, (collection, modality, stranger, false, cues, bound)


def test_what_is_unlike_anything_stored_is_refused(results: dict[str, Any]) -> None:
    tallies = {tally["kind"]: tally for tally in results["tallies"]}
    assert tallies["static noise"]["accepted"] == 0
    static = [answer for answer in results["shown"] if answer["title"] == "static noise"]
    assert [answer["verdict"] for answer in static] == ["unknown"]


def test_every_photograph_is_counted_by_every_declared_kind(results: dict[str, Any]) -> None:
    photos = [t for t in results["tallies"] if t["declared"] and t["collection"] == "photos"]
    assert len(photos) == len(DECLARED["photos"])
    assert [tally["cues"] for tally in photos] == [len(STORED)] * len(photos)


def test_sentences_in_other_words_find_their_photograph(results: dict[str, Any]) -> None:
    [tally] = [tally for tally in results["tallies"] if tally["kind"] == "sentence in other words"]
    assert tally["cues"] == 20
    assert tally["first"] >= 15


def test_it_says_all_that_it_did(output: Path) -> None:
    said = (output / "said.txt").read_text()
    for words in (
        "cues declared: noise (sigma 0.1)",
        "missing_side (side right, share 0.5)",
        "log S >",
        "energy",
        "encode",
    ):
        assert words in said
    assert "camera, coffee, hubble, motorcycle, text" in said
    assert re.search(r"\d+ falsely rejected", said)
    assert re.search(r"\d+ falsely accepted", said)
    assert str(output / "contact-sheet.png") in said
    assert "Traceback" not in said


def test_the_contact_sheet_is_a_picture_of_its_size(output: Path) -> None:
    with Image.open(output / "contact-sheet.png") as sheet:
        assert sheet.width == 1200
        assert 1500 < sheet.height < 3000
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 10_000


def test_its_server_is_gone_when_it_has_ended(output: Path, results: dict[str, Any]) -> None:
    assert read_owner(output / "memories") is None


def test_a_second_run_stores_nothing_again_and_ctrl_c_ends_it_cleanly(output: Path) -> None:
    """While its server is up, the lines that it tells people to try work when they are pasted."""
    process = start(output, "engram", "demo", "--port", "0")
    assert process.stdout is not None
    lines = []
    while not lines or "Never stored, never calibrated on" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    assert sum("are stored already" in line for line in lines) == 3
    owner = read_owner(output / "memories")
    assert owner is not None
    assert owner.url is not None

    listed, recalled, original = curl_lines(owner.url)
    assert json.loads(subprocess.check_output(listed, shell=True, cwd=output))["count"] == 20
    [answer] = json.loads(subprocess.check_output(recalled, shell=True, cwd=output))["results"]
    assert answer["matches"][0]["id"] == "chelsea"
    subprocess.check_call(original, shell=True, cwd=output)
    with Image.open(output / "chelsea.png") as picture:
        assert picture.size == (451, 300)

    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate()
    assert process.returncode == 130
    assert "Stopping the server." in rest
    assert "Traceback" not in rest
    assert read_owner(output / "memories") is None


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(tmp_path / "demo-output", "engram", "demo", "--port", str(port))
        said, _ = process.communicate()
    assert process.returncode == 1
    assert f"port {port}" in said
    assert "Traceback" not in said


def test_sigterm_stops_its_server_too(output: Path) -> None:
    process = start(output, "engram", "demo", "--port", "0", "--exit")
    while (owner := read_owner(output / "memories")) is None or owner.url is None:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert read_owner(output / "memories") is None
