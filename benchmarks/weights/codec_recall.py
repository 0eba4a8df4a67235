"""How well the codec's latents recall beside the `pixels` thumbnail: the share of cues whose own picture comes first.

Rules:
- Cues are made from the stored picture by the corruptions of service/encoders/corruption.py, at the picture's own size.
- The bank is searched as it is, before any dynamics. Pictures that are byte for byte the same are stored once.
- "alone": the share of pictures of which no other has the same bytes where the cue is seen. No method finds more, but
  by chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.data import fashion
from benchmarks.papers.report import formatted
from service.encoders.corruption import (
    Blur,
    Brightness,
    Corruption,
    Jpeg,
    Mask,
    MissingSide,
    Noise,
    Window,
    corrupt_picture,
)
from service.encoders.protocol import Encoder, Picture

CUES = 1_000
CORRUPTIONS: tuple[Corruption, ...] = (
    Noise(sigma=0.05),
    Noise(sigma=0.1),
    Noise(sigma=0.3),
    Blur(sigma=0.02),
    Brightness(factor=0.8),
    Brightness(factor=1.2),
    Jpeg(quality=50),
    Window(share=0.6),
    Mask(share=0.25),
    Mask(share=0.5),
    MissingSide(side="right", share=0.25),
    MissingSide(side="right", share=0.5),
    MissingSide(side="right", share=0.75),
)


def tables(encoders: Mapping[str, Encoder], trained_on: Mapping[str, NDArray[np.uint8]]) -> list[str]:
    """Markdown: one table for each bank."""
    clothes = np.repeat(fashion("test").pixels[..., None], 3, axis=3)
    # Whole pictures are every fifth and every third of these; that they were trained on judges recall all the same.
    colours = np.concatenate([trained_on["openclipart"][::5], trained_on["emoji"][::3]])
    banks = {
        "Fashion-MNIST's test split, 28 x 28": clothes,
        "drawings and emoji of the training, 64 x 64": colours,
    }
    parts = []
    for name, pixels in banks.items():
        bank = [Picture(each) for each in np.unique(pixels, axis=0)]
        found = {of: identity(encoder, bank) for of, encoder in encoders.items()}
        heads = [*(f"{of}, {by}" for of in found for by in ("dot", "cosine")), "alone"]
        lines = ["| cue | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
        for row, corruption in enumerate(CORRUPTIONS):
            shares = [formatted(share, 3) for of in found for share in found[of][row]]
            lines.append("| " + " | ".join([corruption.describe(), *shares, alone(bank, corruption)]) + " |")
        parts += [f"**{len(bank):,} pictures: {name}; {CUES:,} cues of each kind**", "\n".join(lines)]
    return parts


def alone(bank: Sequence[Picture], corruption: Corruption) -> str:
    """The share of pictures that are alone where a side's cue is seen; for the rest, whose cues differ, a dash."""
    if not isinstance(corruption, MissingSide):
        return formatted(None)
    observed = corrupt_picture(bank[0], corruption, np.random.default_rng(0)).observed
    held = Counter(picture.pixels[observed].tobytes() for picture in bank)
    return formatted(sum(count == 1 for count in held.values()) / len(bank), 3)


def identity(encoder: Encoder, bank: Sequence[Picture]) -> list[tuple[float, float]]:
    """For each corruption: the share of cues whose own picture is first by inner product, and by cosine."""
    vectors = encoder.encode_images(bank).vectors
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = []
    for corruption in CORRUPTIONS:
        draw = np.random.default_rng(0)
        chosen = draw.permutation(len(bank))[:CUES]
        cues = encoder.encode_images([corrupt_picture(bank[i], corruption, draw) for i in chosen]).vectors
        first = [(cues @ by.T).argmax(axis=1) == chosen for by in (vectors, directions)]
        found.append((float(first[0].mean()), float(first[1].mean())))
    return found
