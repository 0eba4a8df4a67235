"""`engram demo`: start a server, store, calibrate, recall, count, draw the contact sheet, and leave the server up.

Rules:
- Everything goes over HTTP to a server of its own, as any user's program would.
- What is complete is not stored again: a second run starts in seconds.
- Thresholds come from the automatic calibration alone. Cues are fixed beforehand; what fails is printed too.
- However it ends (done, Ctrl-C, SIGTERM, an error), the server it started is stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from engram.client import Client
from engram.demo.cues import DECLARED, SPACES, memories, shown, trials
from engram.demo.data import STRANGERS
from engram.demo.report import (
    Shown,
    Tally,
    explain_calibration,
    print_calibration,
    print_shown,
    print_tallies,
    summary,
    tally,
)
from engram.demo.sheet import draw_sheet
from engram.replies import Calibration
from service.errors import CollectionNotFound, Unavailable
from service.storage.folder import read_owner

START_S = 120.0  # a first start compiles Python and loads torch: some 10 s on two slow cores
STOP_S = 20.0  # a server answers what it has accepted before it stops
POLL_S = 0.1
LOG_COLUMNS = 120  # into a file or a pipe; a terminal has a width of its own
WAIT_S = 300.0  # for one request: encoding a batch of photographs takes seconds, on a busy machine a minute
SENTENCE = "a kitten with whiskers"
RECALL_BATCH = 10  # cues in one request: ten uncompressible pictures of 6 MB stay under the server's bound on a body


def run(output: Path, data: Path, port: int, exit_at_once: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_COLUMNS)
    signal.signal(signal.SIGTERM, _stop)
    output.mkdir(parents=True, exist_ok=True)
    with _server(console, data, port, output / "server.log") as (url, ours), Client(url, timeout_s=WAIT_S) as client:
        calibrations = _fill(console, client)
        groups = _show(console, client)
        tallies = _count(console, client)
        sheet = output / "contact-sheet.png"
        stored = " · ".join(f"{client.collection(name).count():,} {name}" for name in SPACES)
        draw_sheet(groups, f"{stored} stored; thresholds from the automatic calibration alone", summary(tallies), sheet)
        _write_results(output / "results.json", calibrations, groups, tallies)
        console.print(f"\nContact sheet: [bold]{sheet.resolve()}[/]", soft_wrap=True)
        if exit_at_once:
            return
        console.print("\nThe server stays up. Try next:\n")
        for line in (*curl_lines(url), recall_line(url)):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        if ours:
            console.print("\nCtrl-C stops it.")
            while True:
                time.sleep(3600)


def _stop(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


@contextmanager
def _server(console: Console, data: Path, port: int, log: Path) -> Iterator[tuple[str, bool]]:
    """The URL of a server on the data folder: its owner's; or (ours: True) one started here and stopped at the end."""
    owner = read_owner(data)
    if owner is not None and owner.url is not None:
        console.print(f"A server (pid {owner.pid}) has {data} open already at {owner.url}: using it.")
        yield owner.url, False
        return
    command = [sys.executable, "-m", "engram", "serve", "--data", str(data), "--host", "127.0.0.1", "--port", str(port)]
    # The demo decides its server's settings; a key or a bound meant for another server would break it.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ENGRAM_")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ
        )
    try:
        with console.status("Starting the server (the first time takes some seconds)"):
            url = _wait_until_ready(process, data, log)
        console.print(f"Server up at [bold]{url}[/] (pid {process.pid}), memories in {data}, log in {log}")
        yield url, True
    finally:
        console.print("Stopping the server.")
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], data: Path, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise Unavailable(f"the server ended with code {process.returncode}: {last[0]}")
        owner = read_owner(data)
        if owner is not None and owner.url is not None and owner.pid == process.pid:
            try:
                if httpx.get(f"{owner.url}/readyz").is_success:
                    return owner.url
            except httpx.TransportError:
                pass  # announced a moment before it listens
        time.sleep(POLL_S)
    raise Unavailable(f"the server was not ready within {START_S:g} s; its log is {log}")


def _fill(console: Console, client: Client) -> dict[str, Calibration]:
    """Store what is not stored yet, wait for the calibrations, and say what they rest on."""
    with _progress(console) as progress:
        for name in SPACES:
            collection = client.collection(name)
            items = memories(name)
            try:
                info = collection.info()
                if list(info.corruptions) != [corruption.describe() for corruption in DECLARED[name]]:
                    client.delete_collection(name)  # made by another version of the demo
                    _create(client, name)
                elif info.count == len(items):
                    console.print(f"[bold]{name}[/]: all {len(items):,} are stored already")
                    continue
            except CollectionNotFound:
                _create(client, name)
            task = progress.add_task(f"storing {name}", total=len(items))
            reply = collection.store(items, progress=partial(progress.advance, task))
            for result in reply.errors:
                console.print(f"[red]{name} {result.id}: {result.error}[/]")
    calibrations = {}
    for name in SPACES:
        with console.status(f"Calibrating {name}: cues are made from what is stored, a threshold is set for each kind"):
            info = client.collection(name).wait_until_calibrated()
        print_calibration(console, info)
        calibrations[name] = info.calibration
    explain_calibration(console)
    return calibrations


def _create(client: Client, name: str) -> None:
    client.create_collection(name, SPACES[name], corruptions=[c.model_dump() for c in DECLARED[name]])


def _show(console: Console, client: Client) -> dict[str, list[Shown]]:
    console.print(f"\nNever stored, never calibrated on: {', '.join(photo.name for photo in STRANGERS)}")
    groups: dict[str, list[Shown]] = {}
    for title, cues in shown().items():
        console.rule(title, align="left")
        groups[title] = []
        for cue in cues:
            answer = client.collection(cue.collection).recall(**cue.body(), limit=3, reconstruct=True)
            groups[title].append(Shown(cue, answer))
            print_shown(console, groups[title][-1])
    return groups


def _count(console: Console, client: Client) -> list[Tally]:
    console.rule("Counted over everything", align="left")
    tallies = []
    with _progress(console) as progress:
        task = progress.add_task("recalling", total=None)
        kinds = list(trials())
        progress.update(task, total=sum(len(trial.cues) for trial in kinds))
        for trial in kinds:
            collection = client.collection(trial.cues[0].collection)
            recalls = []
            for start in range(0, len(trial.cues), RECALL_BATCH):
                batch = trial.cues[start : start + RECALL_BATCH]
                recalls += collection.recall_batch((cue.body() for cue in batch), limit=1)
                progress.advance(task, len(batch))
            for recall in recalls:
                if recall.error is not None:
                    raise Unavailable(f"a cue of the kind {trial.kind} was refused: {recall.error.detail}")
            tallies.append(tally(trial, recalls))
    print_tallies(console, tallies)
    for line in summary(tallies):
        console.print(line)
    return tallies


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def _write_results(
    path: Path, calibrations: dict[str, Calibration], groups: dict[str, list[Shown]], tallies: list[Tally]
) -> None:
    """The same results for a program to read."""
    answers = [
        {
            "group": title,
            "title": s.cue.title,
            "own": s.cue.own,
            "text": s.cue.text,
            "verdict": s.recall.verdict,
            "right": s.right,
            "matches": [asdict(match) for match in s.recall.matches],
            "energy": s.recall.recall.energy if s.recall.recall else None,
            "reconstructed": s.recall.reconstruction is not None,
            "timings_ms": s.recall.timings_ms,
        }
        for title, group in groups.items()
        for s in group
    ]
    results = {
        "calibrations": {name: asdict(calibration) for name, calibration in calibrations.items()},
        "shown": answers,
        "tallies": [asdict(t) for t in tallies],
    }
    path.write_text(json.dumps(results, indent=1))


def curl_lines(url: str) -> list[str]:
    """Three things to try next, each a line for a shell."""
    photos = f"{url}/v1/collections/photos"
    cue = json.dumps({"cue": {"text": SENTENCE}, "limit": 3})
    return [
        f"curl -s {photos}",
        f"curl -s {photos}/recall -H 'Content-Type: application/json' -d '{cue}'",
        f"curl -s {photos}/memories/chelsea/content -o chelsea.png",
    ]


def recall_line(url: str) -> str:
    """The same recall by the `engram` command beside the Python that runs this."""
    command = Path(sys.executable).with_name("engram")
    if command.is_relative_to(Path.cwd()):
        command = command.relative_to(Path.cwd())
    words = [str(command), "recall", SENTENCE, "--collection", "photos", "--url", url]
    return shlex.join(words)
