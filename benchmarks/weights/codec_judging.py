"""The codec's figures: how near its pictures are, how well its latents recall, how fast it is; and a sheet to look at.

    python -m benchmarks.weights.codec_judging     the figures alone, of the weights that ship

Rules:
- Decibels are of a set's mean square error, SSIM is averaged over pictures; pictures are bytes, latents were rounded to
  fp16 as a bank stores them.
- Bicubic is Pillow's, down and up. It is given the codec's grid, as many values, and as many bytes: a thumbnail needs
  one byte a value, a latent two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.papers.hen_judge import squared_error, structural_similarity
from benchmarks.papers.report import Cell, formatted
from benchmarks.weights import codec_recall
from benchmarks.weights.codec_pictures import SOURCES, rendered
from benchmarks.weights.codec_sets import STAMPS_NAME, JudgingSet, judging_sets
from benchmarks.weights.data import DOWNLOADS
from benchmarks.weights.photographs import JUDGES
from service.encoders import codec, registry
from service.encoders.grid import GridEncoder
from service.encoders.protocol import Encoder, Picture
from service.encoders.weights import PackagedFile

SHEET = Path(__file__).parents[2] / "docs" / "codec-sheet.png"
SHOWN = 8
"""Pictures of each set on the sheet."""

TIMED, ROUNDS = 256, 7


def run(results: Path, shipped: PackagedFile = codec.WEIGHTS) -> None:
    """Writes results/codec.md and the sheet."""
    encoder = codec.make(codec.CodecOptions(centre=True), device="cpu", weights=shipped)
    compared: dict[str, Encoder] = {
        "codec": encoder,
        "`centre: false`": codec.make(codec.CodecOptions(centre=False), device="cpu", weights=shipped),
        "pixels": registry.make("pixels", {}),
    }
    cache = DOWNLOADS / "codec-pictures"
    trained_on = {name: rendered(name, cache) for name in SOURCES}
    sets = judging_sets(trained_on.values())
    values = encoder.dimension
    sides = (codec.SIZE // codec.CELL, int((values / 3) ** 0.5), int((2 * values / 3) ** 0.5))
    weights = shipped.read()
    lines = [
        "# The codec that ships",
        f"`make weights` wrote this: {codec.SIZE} x {codec.SIZE} pixels, {values:,} values stored "
        f"({2 * values:,} bytes in fp16), nothing quantised; weights {len(weights):,} bytes, "
        f"sha256 {shipped.sha256[:16]}….",
        "## Reconstruction",
        "PSNR in dB / SSIM of pictures that were not trained on. Bicubic: a thumbnail on the codec's grid, of as many "
        "values, and of as many bytes.",
        *reconstruction(encoder, sets, sides),
        "## Recall",
        *codec_recall.tables(compared, trained_on),
        "## Speed",
        *_speed(encoder, sides[0]),
        "## What it was trained on",
        *_table(
            ("source", "pieces of 64 x 64", "share of a batch", "licence"),
            [(name, len(trained_on[name]), source.share, source.licence) for name, source in SOURCES.items()],
            2,
        ),
        "Never trained on: " + "; ".join(JUDGES) + "; titles that `benchmarks.weights.data.held_out` names; "
        "Fashion-MNIST's test split; MNIST; animal-mnist.",
    ]
    (results / "codec.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    ours = [judged for judged in sets if judged.name != STAMPS_NAME]  # the stamps are GPL: judged by, not copied
    sheet(encoder, ours, sides).save(SHEET, optimize=True)


def drawn(encoder: GridEncoder, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, 64, 64, 3) → the same, through latents as a bank stores them."""
    vectors = encoder.encode_images([Picture(each) for each in pixels]).vectors
    return np.stack(encoder.decode(vectors.astype(np.float16).astype(np.float32)))


def bicubic(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(n, h, w, 3) → the same, through thumbnails of `side` x `side`."""
    size = pixels.shape[2], pixels.shape[1]
    small = (Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in pixels)
    return np.stack([np.asarray(each.resize(size, Image.Resampling.BICUBIC)) for each in small])


def reconstruction(encoder: GridEncoder, sets: Sequence[JudgingSet], sides: Sequence[int]) -> list[str]:
    rows: list[tuple[Cell, ...]] = []
    for judged in sets:
        ways = [drawn(encoder, judged.pixels), *(bicubic(judged.pixels, side) for side in sides)]
        rows.append((judged.name, len(judged.pixels), judged.copies, *(_quality(judged.pixels, way) for way in ways)))
    heads = [f"bicubic {side} x {side} x 3" for side in sides]
    return _table(("set", "pictures", "near copies left out", "codec", *heads), rows)


def _quality(pixels: NDArray[np.uint8], way: NDArray[np.uint8]) -> str:
    decibels = -10 * np.log10(squared_error(pixels, way).mean())
    return f"{decibels:.2f} / {structural_similarity(pixels, way).mean():.3f}"


def _speed(encoder: GridEncoder, side: int) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (TIMED, codec.SIZE, codec.SIZE, 3), dtype=np.uint8)
    pictures = [Picture(each) for each in pixels]
    vectors = encoder.encode_images(pictures).vectors
    thumbnails = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in pixels]
    size = (codec.SIZE, codec.SIZE)
    ways: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("codec", lambda: encoder.encode_images(pictures), lambda: encoder.decode(vectors)),
        (
            f"bicubic {side} x {side} x 3",
            lambda: [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in pixels],
            lambda: [each.resize(size, Image.Resampling.BICUBIC) for each in thumbnails],
        ),
    ]
    rows = [(name, TIMED / _median_s(there), TIMED / _median_s(back)) for name, there, back in ways]
    said = (
        f"Pictures a second of the processor's time, medians of {ROUNDS} runs of {TIMED}, "
        f"{torch.get_num_threads()} thread(s)."
    )
    return [said, *_table(("", "encode", "decode"), rows, 0)]


def _median_s(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return float(np.median(seconds))


def sheet(encoder: GridEncoder, sets: Sequence[JudgingSet], sides: Sequence[int]) -> Image.Image:
    """Every set: its first pictures, the codec's under them, and bicubic's of as many values."""
    gap, label, side = 4, 16, codec.SIZE
    height = label + 3 * side + 2 * gap
    drawing = Image.new("RGB", (SHOWN * (side + gap) + gap, len(sets) * (height + gap) + gap), (255, 255, 255))
    for number, judged in enumerate(sets):
        top = gap + number * (height + gap)
        text = f"{judged.name}: shown, codec, bicubic of as many values ({sides[1]} x {sides[1]} x 3)"
        ImageDraw.Draw(drawing).text((gap, top), text, fill=(0, 0, 0))
        spread = np.linspace(0, len(judged.pixels) - 1, SHOWN).astype(int)
        pixels = judged.pixels[spread]
        for row, way in enumerate((pixels, drawn(encoder, pixels), bicubic(pixels, sides[1]))):
            for column, each in enumerate(way):
                drawing.paste(Image.fromarray(each), (gap + column * (side + gap), top + label + row * (side + gap)))
    return drawing


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 3) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(formatted(cell, digits) for cell in row) + " |" for row in rows]
    return ["\n".join(lines)]


if __name__ == "__main__":
    run(Path(__file__).with_name("results"))
