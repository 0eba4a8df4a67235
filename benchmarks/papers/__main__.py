"""`python -m benchmarks.papers [uhop|nonparametric|reclag|kernel|hen ...]`: tables and figures; of all when none is
named.

The environment's PAPERS is `full` (the default; its results are kept in results/) or `quick` (a smaller instance of
everything; written to results/quick/, which is not).
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import get_args

import torch

from benchmarks.papers.data import MissingData
from benchmarks.papers.report import Size

PAPERS = ("uhop", "nonparametric", "reclag", "kernel", "hen")
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    """Runs the papers named; exits with a sentence where data is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers", description=__doc__)
    parser.add_argument("papers", nargs="*", metavar="|".join(PAPERS))
    names = parser.parse_args().papers or list(PAPERS)
    if unknown := set(names) - set(PAPERS):
        parser.error(f"no such paper: {', '.join(sorted(unknown))}; there are {', '.join(PAPERS)}")
    size = os.environ.get("PAPERS", "full")
    if size not in get_args(Size):
        parser.error(f"PAPERS is quick or full, not {size}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    out = RESULTS if size == "full" else RESULTS / "quick"
    for name in names:
        try:
            importlib.import_module(f"benchmarks.papers.{name}").run(size, out)
        except MissingData as error:
            raise SystemExit(f"{name}: {error}") from error
        print(f"{name}: {os.path.relpath(out / f'{name}.md')}", flush=True)


if __name__ == "__main__":
    main()
