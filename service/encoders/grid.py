"""An image encoder whose latent is a grid that a network draws again: what `vq`, `kl`, `tiny` and `dvae` share.

A picture is stretched to `size` x `size` pixels (bicubic), encoded to (channels, grid, grid) and flattened in (row,
column, channel) order: the values of one place lie together, float32 whatever the precision.

Rules:
- A masked picture is encoded `filled`, and then its cells that are not half observed are 0, which says nothing under an
  inner product. Cells next to the mask still see the fill: it is made of observed pixels alone.
- What the network cannot take is met when it is loaded, by a run at a small size, not at the first picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from service.encoders.device import Precision, check_finite, torch_dtype
from service.encoders.fit import fit_warnings
from service.encoders.halving import is_out_of_memory, run_batches
from service.encoders.protocol import DIMENSION_MAX, Encoded, Picture, Source
from service.encoders.visible import filled, observed_cells
from service.encoders.weights import said
from service.errors import InvalidRequest, WeightsRefused, WrongDimension

PIXELS_AT_ONCE = 1 << 19
"""Pixels in one run: eight pictures of 256 x 256. A layer of 128 channels takes 256 MB of float32 then."""

PROBE_SIZE = 64
"""The side of the picture that is run when a network is loaded: two cells and more of any codec there is."""


class Network(Protocol):
    """The codec alone: pixels in [0, 1]."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, size, size) → (n, channels, grid, grid)."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, channels, grid, grid) → (n, 3, size, size). What is outside of [0, 1] is clipped afterwards."""
        ...


class GridOptions(BaseModel):
    """What every one of them takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="a folder on this machine, or a hub id: organisation/repository")
    size: int = Field(256, ge=8, le=2048, description="the side, in pixels, that a picture is stretched to")
    precision: Precision = Field("fp32", description="fp32, fp16 or bf16")


class GridEncoder:
    """An `Encoder` and a `Decoder` (protocol.py); `weights` is the network's digest."""

    takes: frozenset[Source] = frozenset({"image"})

    def __init__(self, name: str, network: Network, options: GridOptions, *, device: str, weights: str) -> None:
        """Raises `InvalidRequest` for a size that does not go, and `WeightsRefused` for a network that does not run."""
        self.name = name
        self._network = network
        self._size, self._precision = options.size, options.precision
        self._device, self._dtype = torch.device(device), torch_dtype(options.precision)
        self._channels, factor = self._probe()
        self._grid = options.size // factor
        self.dimension = self._channels * self._grid**2
        if options.size % factor:
            raise InvalidRequest(f"size is {options.size}; this model needs a multiple of {factor}")
        if self.dimension > DIMENSION_MAX:
            most = int((DIMENSION_MAX / self._channels) ** 0.5) * factor
            raise InvalidRequest(
                f"size {options.size} gives latents of {self.dimension:,} values; a vector has at most "
                f"{DIMENSION_MAX:,}: take a size of at most {most}"
            )
        self.fingerprint = f"{name}/1:size={options.size},precision={options.precision},weights={weights}"

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """(batch) pictures → (batch, dimension). Raises `NothingObserved`, `OutOfMemory`, `InvalidVector`."""
        vectors = np.empty((len(pictures), self.dimension), dtype=np.float32)

        def run(part: slice) -> None:
            pixels = np.stack([self._fitted(picture) for picture in pictures[part]])
            with torch.inference_mode():
                batch = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2).to(self._dtype) / 255
                latents = self._network.encode(batch).permute(0, 2, 3, 1)
                vectors[part] = latents.reshape(len(pixels), -1).float().cpu().numpy()

        run_batches(len(pictures), self._at_once, run)
        check_finite(vectors, self._precision)
        for vector, picture in zip(vectors, pictures, strict=True):
            if picture.observed is not None:
                cells = vector.reshape(self._grid, self._grid, self._channels)
                cells[~observed_cells(picture, self._grid)] = 0.0
        sizes = [picture.pixels.shape[:2] for picture in pictures]
        return Encoded(vectors, tuple(fit_warnings(height, width, "stretched") for height, width in sizes))

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """Raises `InvalidRequest`: images only (`takes`)."""
        raise InvalidRequest(f"the encoder {self.name!r} takes images only")

    def decode(self, latents: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """(batch, dimension) → batch pictures (size, size, 3) uint8. Raises `WrongDimension`, `OutOfMemory`."""
        if latents.ndim != 2 or latents.shape[1] != self.dimension:
            raise WrongDimension(f"latents have shape {latents.shape}; (batch, {self.dimension}) is needed")
        cells = latents.reshape(-1, self._grid, self._grid, self._channels)
        drawn = np.empty((len(latents), self._size, self._size, 3), dtype=np.uint8)

        def run(part: slice) -> None:
            with torch.inference_mode():
                batch = torch.from_numpy(np.ascontiguousarray(cells[part], dtype=np.float32))
                pixels = self._network.decode(batch.to(self._device).permute(0, 3, 1, 2).to(self._dtype))
                shown = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
                drawn[part] = shown.permute(0, 2, 3, 1).cpu().numpy()

        run_batches(len(latents), self._at_once, run)
        return list(drawn)

    @property
    def _at_once(self) -> int:
        return max(1, PIXELS_AT_ONCE // self._size**2)

    def _fitted(self, picture: Picture) -> NDArray[np.uint8]:
        image = Image.fromarray(filled(picture))
        return np.asarray(image.resize((self._size, self._size), Image.Resampling.BICUBIC))

    def _probe(self) -> tuple[int, int]:
        """Channels of a cell, and pixels along its side."""
        try:
            with torch.inference_mode():
                picture = torch.full((1, 3, PROBE_SIZE, PROBE_SIZE), 0.5, device=self._device, dtype=self._dtype)
                latents = self._network.encode(picture)
                drawn = self._network.decode(latents)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise WeightsRefused(
                f"the model of {self.name!r} does not run in {self._precision} on {self._device}: {said(error)}"
            ) from error
        if drawn.shape != picture.shape or latents.ndim != 4 or latents.shape[2] != latents.shape[3]:
            raise WeightsRefused(
                f"the model of {self.name!r} makes latents {tuple(latents.shape)} of a picture {tuple(picture.shape)} "
                f"and draws {tuple(drawn.shape)}"
            )
        return int(latents.shape[1]), PROBE_SIZE // int(latents.shape[2])
