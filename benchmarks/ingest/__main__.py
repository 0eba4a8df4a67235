"""Ingest beside the bare model: how busy storing pictures from files keeps it, in process and over HTTP.

The full run writes results.md beside this file; a smaller one (`--pictures 256`) only prints. Every way is a process of
its own, one after the other, each as often as `--repetitions` says; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks.ingest import pictures
from benchmarks.load.__main__ import machine, say

PICTURES = 1_024  # the time until the model first has something to do is then some 2% of the whole
REPETITIONS = 3
COLLECTIONS = (("pixels", "bridge"), ("bridge",))
WAYS = {
    "bare": "the model alone, in a loop",
    "in_process": "stored in process, from files",
    "over_http": "stored over HTTP, from files",
}
RESULTS = Path(__file__).with_name("results.md")

Measured = dict[tuple[tuple[str, ...], str], list[dict[str, float]]]


def measure(folder: Path, repetitions: int) -> Measured:
    measured: Measured = defaultdict(list)
    for repetition in range(repetitions):
        for encoders in COLLECTIONS:
            for way in WAYS:
                load = os.getloadavg()[0]
                command = [sys.executable, "-m", "benchmarks.ingest.ways", way, str(folder), *encoders]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                found = {**json.loads(printed.splitlines()[-1]), "load": load}
                measured[encoders, way].append(found)
                say(f"{repetition + 1}: {'+'.join(encoders)}, {WAYS[way]}: {found['per_s']:.1f}/s (load {load:.1f})")
    return measured


def report(measured: Measured, count: int, repetitions: int) -> str:
    lines = [
        "# Ingest: pictures from files, beside the bare model",
        "",
        f"{count:,} distinct JPEG photographs of {pictures.WIDTH}x{pictures.HEIGHT}; medians of {repetitions} "
        "interleaved repetitions, each way in a process of its own. The bare model's pictures are decoded before its "
        "clock runs.",
        "",
        "| encoders | | images a second | ÷ bare | of each repetition | in the model | its CPU ms each | peak MB "
        "| load |",
        "|---|---|--:|--:|---|--:|--:|--:|---|",
    ]
    for encoders in COLLECTIONS:
        bare = [found["per_s"] for found in measured[encoders, "bare"]]
        for way, name in WAYS.items():
            found = measured[encoders, way]
            per_s = [each["per_s"] for each in found]
            ratio = "" if way == "bare" else f"{median(per_s) / median(bare):.2f}"
            ratios = "" if way == "bare" else ", ".join(f"{a / b:.2f}" for a, b in zip(per_s, bare, strict=True))
            peak = f"{max(each['peak_mb'] for each in found):,.0f}"
            if way == "over_http":
                peak += f" (client {max(each['client_peak_mb'] for each in found):,.0f})"
            load = ", ".join(f"{one['load']:.1f}" for one in found)
            busy = f"{median(each['busy'] for each in found):.0%}" if way == "in_process" else ""
            cpu = "" if way == "over_http" else f"{median(each['cpu_ms'] for each in found):.1f}"
            cells = [" + ".join(encoders), name, f"{median(per_s):.1f}", ratio, ratios, busy, cpu, peak, load]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "In the model: the share of the whole time that the pipeline's thread spent in the encoders' calls. Its CPU, "
        "an image: what that thread had of a core meanwhile, which other programs hardly change.",
        "",
        "A collection is calibrated, which runs its encoders over some hundred cues, once writes pause, or 30 s after "
        "the first: a run that takes longer than that includes it.",
        "",
        "Peak: the process's resident memory, weights and libraries included. Load: the machine's average over the "
        "minute before each repetition began, other programs included.",
        "",
        *(f"- {line}" for line in machine()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest", description=__doc__)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="engram-pictures-") as name:
        say(f"making {chosen.pictures:,} photographs")
        pictures.write(Path(name), chosen.pictures)
        text = report(measure(Path(name), chosen.repetitions), chosen.pictures, chosen.repetitions)
    print(text)
    if (chosen.pictures, chosen.repetitions) == (PICTURES, REPETITIONS):
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
