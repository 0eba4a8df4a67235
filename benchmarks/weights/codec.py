"""`codec`: trains the shipped image codec and writes its figures (results/codec.md) and docs/codec-sheet.png.

    python -m benchmarks.weights codec

An hour and more on one thread. Rendered pictures and checkpoints stay in downloads/codec-pictures: a training that is
stopped leaves the weights of its last checkpoint there.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save

from benchmarks.weights import codec_judging
from benchmarks.weights.codec_pictures import SOURCES, rendered
from benchmarks.weights.codec_training import Plan, train
from benchmarks.weights.data import DOWNLOADS
from service.encoders import codec

PLAN = Plan(steps=15_000)
SHIPPED = Path(codec.__file__).with_name("shipped") / "codec.safetensors"


def run(results: Path) -> None:
    """Renders, trains, writes the weights and their figures; says what their sha256 is, which codec.py holds."""
    cache = DOWNLOADS / "codec-pictures"
    sources = {name: (source.share, rendered(name, cache)) for name, source in SOURCES.items()}
    started = time.perf_counter()

    def report(step: int, error: float, kept: codec.Codec) -> None:
        (cache / "checkpoint.safetensors").write_bytes(packed(kept))
        decibels = -10 * torch.log10(torch.tensor(error)).item()
        print(f"[codec {time.perf_counter() - started:5.0f} s] step {step}: {decibels:.2f} dB in training", flush=True)

    weights = packed(train(sources, PLAN, report))
    SHIPPED.parent.mkdir(exist_ok=True)
    SHIPPED.write_bytes(weights)
    shipped = replace(codec.WEIGHTS, sha256=hashlib.sha256(weights).hexdigest())
    print(f"{SHIPPED}: {len(weights):,} bytes; service/encoders/codec.py holds their sha256: {shipped.sha256}")
    codec_judging.run(results, shipped)


def packed(network: codec.Codec) -> bytes:
    """The weights in half precision, as they are shipped."""
    return save({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()})
