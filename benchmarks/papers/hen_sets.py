"""The pictures of HEN's tables: Fashion-MNIST, and drawings with captions in place of COCO's photographs.

Rules:
- Colour pictures are 64×64, stretched as the encoders stretch them. Drawings over a million pixels are left out: they
  are 2% of openclipart and most of the time it takes to read.
- A caption is a title with its keywords, as the paper joins COCO's captions of an image. It is unique: of pictures with
  one caption (an emoji in both styles) `captioned` takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.papers.data import fashion
from benchmarks.weights.data import TitledPicture, fluent, noto, openclipart

SIDE = 64
PIXELS_MAX = 1_000_000

_SOURCES: dict[str, Callable[[], Sequence[TitledPicture]]] = {
    "Fluent emoji (MIT)": fluent,
    "Noto emoji (Apache-2.0)": noto,
    "openclipart (public domain)": openclipart,
}


@dataclass(frozen=True, eq=False)
class Pictures:
    """pixels: (n, side, side) grey or (n, side, side, 3); captions: (n,), or none; source: where they came from."""

    name: str
    pixels: NDArray[np.uint8]
    captions: tuple[str, ...] | None
    source: str

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def colour(self) -> bool:
        return self.pixels.ndim == 4

    def take(self, chosen: NDArray[np.int64] | slice) -> Pictures:
        """The chosen pictures, in that order."""
        captions = None if self.captions is None else tuple(np.array(self.captions, dtype=object)[chosen])
        return Pictures(self.name, self.pixels[chosen], captions, self.source)

    def captioned(self) -> Pictures:
        """One picture of each caption, the first."""
        first: dict[str, int] = {}
        for number, caption in enumerate(self.captions or ()):
            first.setdefault(caption, number)
        return self.take(np.array(list(first.values()), dtype=np.int64))


def grey() -> Pictures:
    """Fashion-MNIST's 60,000 training pictures. Raises MissingData."""
    images = fashion()
    source = f"Fashion-MNIST's training pictures (Xiao, Rasul, Vollgraf 2017; MIT), {images.source}"
    return Pictures("Fashion-MNIST", images.pixels, None, source)


def colour(seed: int, most: int | None = None) -> Pictures:
    """Emoji and drawings in a random order; of the first `most` if given. Raises MissingData."""
    pixels: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    counts = []
    for name, read in _SOURCES.items():
        kept = [each for each in read() if _pixels(each.file) <= PIXELS_MAX][
            : None if most is None else most - len(pixels)
        ]
        counts.append(f"{len(kept):,} of {name}")
        for each in kept:
            pixels.append(np.asarray(each.picture().resize((SIDE, SIDE), Image.Resampling.BOX)))
            captions.append(", ".join((each.title, *each.keywords)))
        if len(pixels) == most:
            break
    order = np.random.default_rng(seed).permutation(len(pixels))
    source = f"{'; '.join(counts)}; {SIDE}×{SIDE}. Captions are title and keywords"
    return Pictures("drawings", np.stack(pixels), tuple(captions), source).take(order)


def _pixels(file: bytes) -> int:
    """Width times height, from a PNG's header; 0 for another file (emoji's WebP, which are small)."""
    return int.from_bytes(file[16:20]) * int.from_bytes(file[20:24]) if file.startswith(b"\x89PNG") else 0
