"""`python -m benchmarks.weights [codec|bridge ...]`: trains and writes the weights that are shipped, of both when none
is named, and the figures in results/.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch

from benchmarks.papers.data import MissingData

WEIGHTS = ("codec", "bridge")
RESULTS = Path(__file__).with_name("results")


def main() -> None:
    """Makes the weights named; exits with a sentence where data is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=__doc__)
    parser.add_argument("weights", nargs="*", metavar="|".join(WEIGHTS))
    names = parser.parse_args().weights or list(WEIGHTS)
    if unknown := set(names) - set(WEIGHTS):
        parser.error(f"no such weights: {', '.join(sorted(unknown))}; there are {', '.join(WEIGHTS)}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        try:
            importlib.import_module(f"benchmarks.weights.{name}").run(RESULTS)
        except MissingData as error:
            raise SystemExit(f"{name}: {error}") from error


if __name__ == "__main__":
    main()
