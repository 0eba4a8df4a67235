"""The encoders of HEN's tables: pixels as baselines, the shipped codec, and whichever of the paper's own are here.

Strategy: every encoder is the service's, made by its registry; a `Coded` is one with what the tables need to know.

Rules:
- At hand means loadable. An encoder that is not is named in the report with the reason, and is in no table.
- The paper's own (dVAE, VQ, KL) are loaded from the folders or hub ids that HEN_DVAE, HEN_VQ, HEN_KL and HEN_TINY
  name, onto the device HEN_DEVICE (the processor if none): their weights are on a hub.
- *Equal cells* is a map around pixels, whose code is a grid: each cell z becomes (z, κ)/‖(z, κ)‖, κ the root mean
  square of ‖z‖ over a sample. All cells then have one norm, as the one-hot codes of the paper's dVAE and VQ have:
  nothing scores higher on the cells seen than the memory itself. Nothing is learned and nothing lost: z is κ times the
  first values over the last one, of a mean of memories too. Only cells that are seen whole count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.core.names import Similarity
from service.encoders.cells import observed_share
from service.encoders.protocol import Decoder, Encoder, Picture
from service.encoders.registry import make
from service.errors import EngramError

SIDE = 28
"""The paper's thumbnails: 28×28, and three channels where the pictures have colour."""

BATCH = 256

# How many pictures κ is taken over.
SAMPLE = 1_000

ALL: tuple[Similarity, ...] = ("dot", "neg_l2", "cosine")

_PAPERS = {
    "dVAE": ("dvae", "HEN_DVAE"),
    "VQ": ("vq", "HEN_VQ"),
    "KL": ("kl", "HEN_KL"),
    "tiny": ("tiny", "HEN_TINY"),
}
"""Label → the registry's name, the variable that names a folder with the weights."""


@dataclass(frozen=True, eq=False)
class Coded:
    """encode: pictures → (n, width) float32. decode: (n, width) → (n, h, w, 3). similarities: those that differ."""

    name: str
    words: str
    width: int
    encode: Callable[[Sequence[Picture]], NDArray[np.float32]]
    decode: Callable[[NDArray[np.float32]], NDArray[np.uint8]]
    similarities: tuple[Similarity, ...] = ALL


@dataclass(frozen=True)
class Missing:
    """An encoder that is not at hand, and why."""

    name: str
    why: str


def at_hand(sample: Sequence[Picture], colour: bool) -> tuple[list[Coded], list[Missing]]:
    """The encoders there are for pictures like the sample's (κ is taken over it), the raw pixels first."""
    raw = _pixels(colour, centre=False)
    channels = 3 if colour else 1
    shape = f"{SIDE}×{SIDE}×{channels}"
    found = [
        coded(raw, "raw pixels", f"{shape} values from 0 to 1: HEN's baseline"),
        coded(_pixels(colour, centre=True), "centred pixels", "the same, most of the mean taken out (`pixels`)"),
        equal_cells(raw, SIDE, "raw pixels, equal cells", f"each pixel a unit vector of {channels + 1} values", sample),
    ]
    missing = []
    for name, label, options in [
        ("codec", "codec", {"centre": False}),
        *((name, label, _folder(variable)) for label, (name, variable) in _PAPERS.items()),
    ]:
        try:
            if options is None:
                raise LookupError(f"no weights named: let {_PAPERS[label][1]} name their folder")
            encoder = make(name, options, device=os.environ.get("HEN_DEVICE", "cpu"))
        except (EngramError, LookupError) as error:
            missing.append(Missing(label, str(error)))
            continue
        found.append(coded(encoder, label, f"`{encoder.fingerprint}`"))
    return found, missing


def coded(encoder: Encoder, name: str, words: str) -> Coded:
    """An encoder as it is."""
    if not isinstance(encoder, Decoder):
        raise TypeError(f"{encoder.name} cannot draw what it has encoded")
    draw = encoder.decode
    return Coded(name, words, encoder.dimension, _encoding(encoder), lambda latents: np.stack(draw(latents)))


def equal_cells(encoder: Encoder, grid: int, name: str, words: str, sample: Sequence[Picture]) -> Coded:
    """The encoder with the map of the module's docstring around it. Compared by dot alone: where all rows have one
    norm, L2 is twice dot less a constant, and cosine is dot over the number of cells: the same at another β.
    """
    inner = coded(encoder, name, words)
    cells, depth = grid * grid, encoder.dimension // (grid * grid)
    norms = np.square(inner.encode(sample[:SAMPLE]), dtype=np.float64).sum(axis=1) / cells
    kappa = np.float32(np.sqrt(norms.mean()))

    def encode(pictures: Sequence[Picture]) -> NDArray[np.float32]:
        z = inner.encode(pictures).reshape(len(pictures), cells, depth)
        raised = np.concatenate([z, np.full((len(pictures), cells, 1), kappa, np.float32)], axis=2)
        unit = raised / np.linalg.norm(raised, axis=2, keepdims=True)
        seen = np.stack([_seen_whole(picture, grid) for picture in pictures])
        kept: NDArray[np.float32] = (unit * seen.reshape(len(pictures), cells, 1)).reshape(len(pictures), -1)
        return kept

    def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        u = latents.reshape(len(latents), cells, depth + 1)
        z = kappa * u[..., :depth] / np.maximum(u[..., depth:], np.finfo(np.float32).tiny)
        return inner.decode(z.reshape(len(latents), -1).astype(np.float32))

    return Coded(name, words, cells * (depth + 1), encode, decode, ("dot",))


def _seen_whole(picture: Picture, grid: int) -> NDArray[np.bool_]:
    """(grid, grid): whether no pixel of a cell is hidden."""
    if picture.observed is None:
        return np.ones((grid, grid), np.bool_)
    seen: NDArray[np.bool_] = observed_share(picture.observed, grid) >= 1 - 1e-6
    return seen


def _encoding(encoder: Encoder) -> Callable[[Sequence[Picture]], NDArray[np.float32]]:
    def encode(pictures: Sequence[Picture]) -> NDArray[np.float32]:
        starts = range(0, len(pictures), BATCH)
        parts = [encoder.encode_images(pictures[start : start + BATCH]).vectors for start in starts]
        return np.concatenate(parts) if parts else np.empty((0, encoder.dimension), np.float32)

    return encode


def _pixels(colour: bool, centre: bool) -> Encoder:
    return make("pixels", {"size": SIDE, "colour": colour, "centre": centre})


def _folder(variable: str) -> dict[str, object] | None:
    named = os.environ.get(variable)
    return {"model": named} if named else None
