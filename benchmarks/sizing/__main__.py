"""`python -m benchmarks.sizing`: what was estimated beside what is, for collections that are really built.

Each is stored through an engine on a new folder; a process of its own then opens the folder. RAM is by how much more
memory it takes than one that opened a tenth as many: libraries and what loading takes for a moment are in both.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from service.app.engine import Engine
from service.app.schemas import CollectionConfig, StoreRequest
from service.app.sizing_schemas import Sizing, SizingRequest
from service.settings import Settings

SHAPES: list[tuple[int, dict[str, int], int]] = [  # memories, spaces, bytes of payload
    (20_000, {"v": 128}, 60),
    (20_000, {"v": 784}, 60),
    (20_000, {"a": 1_280, "b": 768}, 200),
    (60_000, {"v": 784}, 0),
]
RESULTS = Path(__file__).parent / "results.md"
BATCH = 1_000


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "# Sizing: estimated beside measured", "",
        "`make bench-sizing`. RAM: estimated; by how much more a process takes that opened all than one that opened a"
        " tenth, and freed what it could; what the bank says it holds. Seconds are a processor's.", "",
        "| memories | spaces | RAM MB, estimated / measured / held | disk MB | load s | seal s |",
        "|--:|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        for number, (memories, spaces, payload) in enumerate(SHAPES):
            folder = Path(root) / str(number)
            told = fill(folder, memories, spaces, payload)
            found = opened(folder)
            fill(folder.with_suffix(".tenth"), memories // 10, spaces, payload)
            tenth = opened(folder.with_suffix(".tenth"))
            disk = (folder / "engram.db").stat().st_size
            pairs = [
                " + ".join(map(str, spaces.values())),
                f"{told.ram.bytes / 1e6:.1f} / {(found['rss'] - tenth['rss']) / 1e6:.1f} / {found['held'] / 1e6:.1f}",
                f"{told.disk.bytes / 1e6:.1f} / {disk / 1e6:.1f}",
                f"{told.load_s:g} / {found['load_s']:.2f}",
                f"{told.seal_s:g} / {found['seal_s']:.2f}",
            ]
            lines.append(f"| {memories:,} | {' | '.join(pairs)} |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


def fill(folder: Path, memories: int, spaces: dict[str, int], payload: int) -> Sizing:
    """What was estimated when a first batch was there."""
    drawn = np.random.default_rng(0)
    with Engine(Settings(data=folder)) as engine:
        config = {"spaces": {name: {"dimension": dimension} for name, dimension in spaces.items()}}
        engine.create_collection("c", CollectionConfig.model_validate(config))
        for start in range(0, memories, BATCH):
            items = [
                {
                    "vectors": {n: drawn.standard_normal(d).astype(np.float32) for n, d in spaces.items()},
                    **({"payload": {"filler": "x" * (payload - 13)}} if payload else {}),
                }
                for _ in range(min(BATCH, memories - start))
            ]
            engine.store("c", StoreRequest.model_validate({"memories": items}))
            if start == 0:  # a batch is there, and stands for the rest
                told = engine.size("c", SizingRequest(memories=memories))
    return told


def opened(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.sizing", "open", str(folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def open_folder(folder: Path) -> None:
    torch.set_num_threads(1)
    spent = [0.0]
    from service.bank.bank import Bank

    seal = Bank.seal

    def timed(bank: Bank) -> bool:
        started = time.process_time()
        sealed = seal(bank)
        spent[0] += time.process_time() - started
        return sealed

    Bank.seal = timed  # type: ignore[method-assign]
    started = time.process_time()
    with Engine(Settings(data=folder)) as engine:
        took = time.process_time() - started
        held = sum(sum(live.bank.sizes().values()) for live in engine.resources.lives.values())
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        [resident] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line]
        rss = int(resident.split()[1]) * 1024
    sys.stdout.write(json.dumps({"rss": rss, "held": held, "load_s": took - spent[0], "seal_s": spent[0]}))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "open":
        open_folder(Path(sys.argv[2]))
    else:
        main()
