"""What judges the codec: pictures of 64 x 64 that it was not trained on, near copies of the training's left out.

Rules:
- Titles of openclipart and of emoji that `held_out` names, Fashion-MNIST's test split, and sets of which nothing is
  trained on: digits, silhouettes, the demo's photographs, Tux Paint's stamps.
- A near copy differs from some picture or piece of the training by at most `NEAR` as thumbnails of 16 x 16. Flat pieces
  of photographs all resemble one another and would go, though from other photographs: `patches` is not thinned.
- A set whose package is not installed raises `MissingData`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.papers.data import MissingData, fashion, mnist_small, silhouettes
from benchmarks.weights import data
from benchmarks.weights.codec_pictures import piece, square
from engram.demo.data import PHOTOGRAPHS

NEAR = 0.03
"""Root mean square difference, values from 0 to 1: about 8 levels of 255."""

STAMPS_NAME = "objects photographed (Tux Paint)"
STAMPS = Path("/usr/share/tuxpaint/stamps")
DRAWN = ("cartoon", "symbols")
"""Folders of stamps that hold drawings and letters."""

COUNT_MAX = 1_000
"""Of a set, drawn at random: enough for two decimals."""

PIECES = 40
"""Of each photograph of the demo."""


@dataclass(frozen=True, eq=False)
class JudgingSet:
    name: str
    pixels: NDArray[np.uint8]
    """(n, 64, 64, 3)"""
    copies: int
    """Near copies of the training's pictures that were left out."""


def judging_sets(trained_on: Iterable[NDArray[np.uint8]]) -> list[JudgingSet]:
    """All of them; `trained_on` is (n, 64, 64, 3) each. Raises `MissingData`."""
    draw = np.random.default_rng(1)
    grey = {
        "MNIST digits": mnist_small().pixels,
        "Fashion-MNIST, test": fashion("test").pixels,
        "silhouettes": silhouettes().pixels,
    }
    found = {
        name: [square(Image.fromarray(pixels[i]).convert("RGB")) for i in draw.permutation(len(pixels))[:COUNT_MAX]]
        for name, pixels in grey.items()
    }
    drawings = [each for each in data.openclipart() if data.held_out(each.title)]
    emoji = [each for each in (*data.noto(), *data.fluent()) if data.held_out(each.title)]
    found["openclipart, held out"] = [square(each.picture()) for each in drawings]
    found["emoji, held out"] = [square(each.picture()) for each in emoji]
    photographs = [Image.open(io.BytesIO(each.read()), formats=("PNG", "JPEG")).convert("RGB") for each in PHOTOGRAPHS]
    found["whole photographs"] = [square(image) for image in photographs]
    found[STAMPS_NAME] = [square(image) for image in stamps()]
    known = torch.cat([thumbnails(pixels) for pixels in trained_on])
    sets = []
    for name, pictures in found.items():
        pixels = np.stack(pictures)
        copied = near_copies(thumbnails(pixels), known)
        sets.append(JudgingSet(name, pixels[~copied], int(copied.sum())))
    patches = [piece(draw, image) for image in photographs for _ in range(PIECES)]
    return [*sets, JudgingSet("photo patches", np.stack(patches), 0)]


def stamps() -> list[Image.Image]:
    folder = Path(os.environ.get("TUXPAINT_STAMPS", STAMPS))
    files = [file for file in sorted(folder.rglob("*.png")) if not set(file.relative_to(folder).parts) & set(DRAWN)]
    if not files:
        raise MissingData(
            f"Tux Paint's stamps: none in {folder}; apt install tuxpaint-stamps-default, or let TUXPAINT_STAMPS name "
            "the folder"
        )
    stamps = []
    for file in files:
        rgba = Image.open(file, formats=("PNG",)).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        stamps.append(Image.alpha_composite(white, rgba).convert("RGB"))
    return stamps


def thumbnails(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """(n, 64, 64, 3) → (n, 768), 0 to 1, in pieces: the training's pictures are gigabytes."""
    parts = []
    for start in range(0, len(pixels), 4_096):
        part = torch.from_numpy(np.array(pixels[start : start + 4_096])).permute(0, 3, 1, 2).float() / 255
        parts.append(torch.nn.functional.avg_pool2d(part, 4).flatten(1))
    return torch.cat(parts)


def near_copies(pictures: torch.Tensor, trained_on: torch.Tensor) -> NDArray[np.bool_]:
    """(n, d), (m, d) → (n,): which are within `NEAR` of some row."""
    nearest = torch.full((len(pictures),), torch.inf)
    for start in range(0, len(trained_on), 16_384):
        distances = torch.cdist(pictures, trained_on[start : start + 16_384])
        nearest = torch.minimum(nearest, distances.min(dim=1).values)
    copied: NDArray[np.bool_] = (nearest <= NEAR * pictures.shape[1] ** 0.5).numpy()
    return copied
