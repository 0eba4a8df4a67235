"""`codec`: pictures of 64 x 64 as 16 x 16 cells of unit length, and back: two small networks that this package ships.

Strategy: the analysis turns each cell's pixels and those of its eight neighbours into one vector of `CHANNELS` values
at unit length; the synthesis draws the picture from the cells, seeing 13 x 13 of them around each. Both were trained
together by benchmarks/weights/codec.py, on pictures whose licences allow it; its results/codec.md says on which, and
how near the pictures are.

Why unit length: for a cue c made of some of a memory's own cells, the others 0, and any pattern v of the bank,

    ⟨c, v⟩ = Σ_seen ⟨c_i, v_i⟩ ≤ Σ_seen |c_i||v_i| = number of cells seen = ⟨c, own⟩      (Cauchy-Schwarz),

so by inner product a hidden part never brings another memory before the cue's own, unless that one shares all that is
seen; and inner product and cosine rank alike. Cells at the border of a mask are the exception: they see some of the
fill.

What that leaves is a share that all pictures have in common (two photographs have a cosine of .66), and under it a
threshold for the unknown sees little. So by default most of each picture's mean cell m is taken out, as `pixels` does:

    v_i = z_i - (1 - MEAN_WEIGHT) m,    m = mean of the cells seen

which is linear, and inverted by `decode` (mean of v = MEAN_WEIGHT m), also for what a recall returns, a mean of
latents. Two photographs then have a cosine of -.01 on average. `centre: false` gives the cells of unit length.

Rules:
- A cell is never zero, not even a black picture's: zero means hidden.
- Hidden pixels are shown in the colours around them (surroundings.py): the analysis sees no farther than a cell.
- The synthesis was also trained on means of two latents, to draw the mean of the two pictures: what is recalled as a
  mixture is drawn as one. Cells of a mixture are shorter than 1 and are not made longer; a hidden cell is drawn grey.
- Nothing is quantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load
from torch import nn
from torch.nn import functional

from service.encoders.grid import GridEncoder, GridOptions
from service.encoders.protocol import Encoded, Picture
from service.encoders.surroundings import surrounded
from service.encoders.weights import PackagedFile

SIZE = 64
CELL = 4
"""Pixels along a cell's side."""

CHANNELS = 5

WEIGHTS = PackagedFile(
    module="service",
    path="encoders/shipped/codec.safetensors",
    sha256="3f95029f29b9b35f7ea9f2426709bebb3297974e7cfb3900e83dbade70cbf9ad",
    requirement="engram-memory",
)

WIDTH, BLOCKS = 96, 2
"""Channels between the layers, and residual blocks, of either network: half a million weights in both."""

LEAK = 0.1
"""Slope of the networks' rectifiers under zero."""


MEAN_WEIGHT = 1 / 32
"""What is left of the mean cell: so little that cosine hardly sees it, enough for fp16 to return it."""


class CodecOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    centre: bool = Field(True, description="take most of the mean cell out; false keeps all cells at unit length")


class Analysis(nn.Module):
    """(n, 3, height, width) in [0, 1] → (n, `CHANNELS`, height / 4, width / 4), cells of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3 * CELL**2, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*(_Residual(2 * WIDTH, 1) for _ in range(BLOCKS)))
        self.last = nn.Conv2d(WIDTH, CHANNELS, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks(self.first(functional.pixel_unshuffle(pixels, CELL) - 0.5))
        unit: torch.Tensor = functional.normalize(self.last(functional.leaky_relu(hidden, LEAK)).float(), dim=1)
        return unit


class Synthesis(nn.Module):
    """(n, `CHANNELS`, rows, columns) → (n, 3, 4 rows, 4 columns), nearly in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*(_Residual(WIDTH, 3) for _ in range(BLOCKS)))
        self.last = nn.Conv2d(WIDTH, 3 * CELL**2, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = functional.leaky_relu(self.blocks(self.first(latents)), LEAK)
        pixels: torch.Tensor = functional.pixel_shuffle(self.last(hidden).float(), CELL) + 0.5
        return pixels


class Codec(nn.Module):
    """Both networks: a `Network` (grid.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.analysis, self.synthesis = Analysis(), Synthesis()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.analysis(pixels.contiguous(memory_format=torch.channels_last))
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.synthesis(latents.contiguous(memory_format=torch.channels_last))
        return pixels


class _Residual(nn.Module):
    """x + W₂ f(W₁ f(x)), with kernels of `kernel` x `kernel`; at first the identity."""

    def __init__(self, inner: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, inner, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(inner, WIDTH, kernel, padding=kernel // 2)
        nn.init.zeros_(self.second.weight)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        inner = self.first(functional.leaky_relu(values, LEAK))
        changed: torch.Tensor = values + self.second(functional.leaky_relu(inner, LEAK))
        return changed


class CodecEncoder(GridEncoder):
    """A `GridEncoder` that fills hidden pixels by what is around them."""

    def _fitted(self, picture: Picture) -> NDArray[np.uint8]:
        image = Image.fromarray(surrounded(picture))
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def make(options: CodecOptions, *, device: str, weights: PackagedFile = WEIGHTS) -> CodecEncoder:
    """The encoder, loaded. Raises `WeightsMissing`, and `WeightsRefused` for weights that are not those that ship."""
    network = Codec()
    network.load_state_dict({name: tensor.float() for name, tensor in load(weights.read()).items()})
    network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    grid = GridOptions(model="codec", size=SIZE, precision="fp32")
    kind = CentredCodec if options.centre else CodecEncoder
    return kind("codec", network, grid, device=device, weights=weights.sha256[:32])


class CentredCodec(CodecEncoder):
    """The latents less most of each picture's mean cell, and back."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.fingerprint += ",centred"

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        encoded = super().encode_images(pictures)
        cells = encoded.vectors.reshape(len(pictures), -1, CHANNELS)
        seen = cells.any(axis=2, keepdims=True)
        mean = cells.sum(axis=1, keepdims=True) / seen.sum(axis=1, keepdims=True)
        centred = np.where(seen, cells - (1 - MEAN_WEIGHT) * mean, np.float32(0))
        return Encoded(centred.reshape(encoded.vectors.shape).astype(np.float32), encoded.warnings)

    def decode(self, latents: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        if latents.ndim != 2 or latents.shape[1] != self.dimension:
            return super().decode(latents)  # which says what is wrong
        cells = latents.astype(np.float32).reshape(len(latents), -1, CHANNELS)
        mean = cells.mean(axis=1, keepdims=True)
        return super().decode((cells + (1 / MEAN_WEIGHT - 1) * mean).reshape(latents.shape))
