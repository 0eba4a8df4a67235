"""Cues of 28×28 images: what is missing is 0, what is changed stays in the image's own units."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

SIDE = 28
MASKED = ("half masked at random", "right half blank", "60% window, rest zero")
DECLARED = (*MASKED, "noise σ=.5", "blur σ=1.5")
UNDECLARED = ("noise σ=.5, clipped", "rotated by 10°", "JPEG quality 10", "grey patch of 12×12")


def corrupt(kind: str, rows: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 784) images in [0, 1] → a cue of each."""
    n = len(rows)
    match kind:
        case "noise σ=.5":
            return rows + 0.5 * torch.randn(n, SIDE * SIDE, generator=generator)
        case "noise σ=.5, clipped":
            return (rows + 0.5 * torch.randn(n, SIDE * SIDE, generator=generator)).clamp(0, 1)
        case "grey patch of 12×12":
            return torch.where(_squares(n, 12, generator), 0.5, rows)
        case "blur σ=1.5":
            return _each(rows, lambda image: image.filter(ImageFilter.GaussianBlur(1.5)))
        case "rotated by 10°":
            return _each(rows, lambda image: image.rotate(10, Image.Resampling.BILINEAR))
        case "JPEG quality 10":
            return _each(rows, _jpeg)
    return rows * shown(kind, n, generator)


def shown(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """(n, 784) True where a cue of a masked kind shows its image. Raises ValueError for another kind."""
    match kind:
        case "half masked at random":
            order = torch.rand(n, SIDE * SIDE, generator=generator).argsort(dim=1)
            return torch.ge(order, SIDE * SIDE // 2)
        case "right half blank":
            return (torch.arange(SIDE * SIDE) % SIDE < SIDE // 2).expand(n, -1)
        case "60% window, rest zero":
            return _squares(n, round(SIDE * 0.6**0.5), generator)
    raise ValueError(f"there is no kind of cue {kind!r}")


def _squares(n: int, side: int, generator: torch.Generator) -> Tensor:
    """(n, 784) True inside a square at a random place."""
    top, left = torch.randint(0, SIDE - side + 1, (2, n, 1), generator=generator)
    row, column = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
    inside: Tensor = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return inside


def _each(rows: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    pixels = np.rint(rows.numpy() * 255).astype(np.uint8).reshape(-1, SIDE, SIDE)
    changed = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pixels])
    return torch.from_numpy(changed.reshape(len(rows), -1).astype(np.float32) / 255)


def _jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=10)
    return Image.open(file)
