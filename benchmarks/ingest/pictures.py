"""Distinct photographs as a camera's folder has them: JPEG files of 640x480, made of the demo's photographs.

Each is a window of one of them (half to all of its width or height), enlarged to 640x480, mirrored or not, its
brightness and colour varied; no two have the same bytes. Seeded, so that every run stores the same files.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from engram.demo.data import PHOTOGRAPHS

WIDTH, HEIGHT = 640, 480
QUALITY = 88
SEED = 0


def write(folder: Path, count: int) -> list[Path]:
    """`count` files in `folder`, named in order."""
    rng = np.random.default_rng(SEED)
    photographs = [Image.open(io.BytesIO(photograph.read())).convert("RGB") for photograph in PHOTOGRAPHS]
    files = []
    for i in range(count):
        picture = photographs[i % len(photographs)]
        width = min(picture.width, picture.height * WIDTH / HEIGHT) * rng.uniform(0.5, 1)
        height = width * HEIGHT / WIDTH
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        made = picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        made = ImageEnhance.Brightness(made).enhance(rng.uniform(0.7, 1.3))
        made = ImageEnhance.Color(made).enhance(rng.uniform(0.5, 1.5))
        files.append(folder / f"{i:05d}.jpg")
        made.save(files[-1], quality=QUALITY)
    return files
