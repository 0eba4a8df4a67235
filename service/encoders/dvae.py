"""`dvae`: the latents of DALL-E's discrete VAE (Ramesh et al. 2021, appendix A), in a small module of ours.

A picture becomes one of 8,192 codes in each cell of 8 x 8 pixels. Codes are no vector to remember by, and one-hot they
are 8,192 values a cell. But the decoder's first layer is a 1x1 convolution, linear, so the stored vector is its row for
the cell's code (128 values, without the bias, which `decode` adds): a mixture of such rows is exactly what that layer
makes of the mixture of the one-hots.

Rules:
- The weights are one safetensors file, `dvae.safetensors`, that `engram convert-dvae` makes of the two published
  pickles. The sizes of the network are read from the shapes of its tensors, and every tensor must be there.
- Pixels are mapped to [0.1, 0.9] and back (the paper's logit-Laplace distribution, epsilon 0.1); of the decoder's six
  channels the first three are the picture's, before a sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from service.encoders.device import torch_dtype
from service.encoders.folder import model_folder, weights_file
from service.encoders.grid import GridEncoder, GridOptions
from service.encoders.weights import digest, said
from service.errors import WeightsRefused

WEIGHTS = "dvae.safetensors"

EPSILON = 0.1
"""How far pixels are kept from 0 and 1."""

WIDTHS = (1, 2, 4, 8)
"""Channels of the encoder's four groups, in units of its first; the decoder's are these backwards."""


class DVAEOptions(GridOptions):
    size: int = Field(64, ge=8, le=2048, description="the side, in pixels, that a picture is stretched to")


class Block(nn.Module):
    """Four convolutions beside a shortcut, their sum scaled by `gain`."""

    def __init__(self, channels_in: int, channels_out: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        hidden = channels_out // 4
        inputs, outputs = (channels_in, hidden, hidden, hidden), (hidden, hidden, hidden, channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, kernel, padding=kernel // 2) for i, o, kernel in zip(inputs, outputs, kernels, strict=True)
        )
        self.gain = gain

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found = values
        for conv in self.convs:
            found = conv(functional.relu(found))
        summed: torch.Tensor = self.shortcut(values) + self.gain * found
        return summed


def _groups(first: int, widths: list[int], blocks: int, kernels: tuple[int, ...]) -> nn.ModuleList:
    gain = 1 / (len(widths) * blocks) ** 2
    inputs = [first, *widths]
    return nn.ModuleList(
        nn.Sequential(
            *(Block(inputs[i] if j == 0 else width, width, kernels, gain) for j in range(blocks)),
        )
        for i, width in enumerate(widths)
    )


class Encoder(nn.Module):
    """(n, 3, size, size) mapped pixels → (n, codes, size/8, size/8) logits."""

    def __init__(self, hidden: int, codes: int, blocks: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(3, hidden, 7, padding=3)
        self.groups = _groups(hidden, [width * hidden for width in WIDTHS], blocks, (3, 3, 3, 1))
        self.output = nn.Conv2d(WIDTHS[-1] * hidden, codes, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = self.input(pixels)
        for i, group in enumerate(self.groups):
            values = group(values if i == 0 else functional.max_pool2d(values, 2))
        logits: torch.Tensor = self.output(functional.relu(values))
        return logits


class Decoder(nn.Module):
    """(n, codes, grid, grid), one-hot or a mixture → (n, 6, 8 grid, 8 grid)."""

    def __init__(self, first: int, hidden: int, codes: int, blocks: int) -> None:
        super().__init__()
        self.input = nn.Conv2d(codes, first, 1)
        self.groups = _groups(first, [width * hidden for width in reversed(WIDTHS)], blocks, (1, 3, 3, 3))
        self.output = nn.Conv2d(hidden, 6, 1)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.after_input(self.input(codes))

    def after_input(self, values: torch.Tensor) -> torch.Tensor:
        for i, group in enumerate(self.groups):
            values = group(values if i == 0 else functional.interpolate(values, scale_factor=2.0, mode="nearest"))
        statistics: torch.Tensor = self.output(functional.relu(values))
        return statistics


class DVAE(nn.Module):
    """A `Network` (grid.py)."""

    def __init__(self, *, hidden: int, first: int, codes: int, blocks: int) -> None:
        super().__init__()
        self.encoder = Encoder(hidden, codes, blocks)
        self.decoder = Decoder(first, hidden, codes, blocks)

    def codes(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, size, size) in [0, 1] → (n, size/8, size/8): the likeliest code of each cell."""
        logits: torch.Tensor = self.encoder((1 - 2 * EPSILON) * pixels + EPSILON)
        return logits.argmax(dim=1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        rows = self.decoder.input.weight[:, :, 0, 0].T
        return functional.embedding(self.codes(pixels), rows).permute(0, 3, 1, 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        bias = self.decoder.input.bias
        assert bias is not None
        return shown(self.decoder.after_input(latents + bias[:, None, None]))


def shown(statistics: torch.Tensor) -> torch.Tensor:
    """(n, 6, size, size), what the decoder makes → (n, 3, size, size) pixels in [0, 1]."""
    return ((torch.sigmoid(statistics[:, :3]) - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def network_of(tensors: Mapping[str, torch.Tensor]) -> DVAE:
    """The network that these tensors are of. Raises `ValueError`, naming tensors that are missing, too many or of
    another shape.
    """
    try:
        hidden = tensors["encoder.input.weight"].shape[0]
        first, codes = tensors["decoder.input.weight"].shape[:2]
    except (KeyError, ValueError) as error:
        raise ValueError(f"there is no encoder and decoder of a dVAE ({error})") from error
    blocks = {name.split(".")[3] for name in tensors if name.startswith("encoder.groups.0.")}
    network = DVAE(hidden=hidden, first=first, codes=codes, blocks=max(1, len(blocks)))
    try:
        network.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise ValueError(said(error)) from error
    return network


def dvae(options: DVAEOptions, *, device: str) -> GridEncoder:
    """The encoder. Raises `WeightsMissing`, `WeightsRefused`, and `InvalidRequest` for a size that does not go."""
    from safetensors.torch import load_file

    file = _file(model_folder(options.model, [WEIGHTS]))
    try:
        network = network_of(load_file(file))
    except Exception as error:  # a file that ends early, tensors of something else
        raise WeightsRefused(f"{file} does not hold a dVAE: {said(error)}") from error
    network.eval().requires_grad_(False).to(device, torch_dtype(options.precision))
    weights = digest(network.state_dict(), "dvae", EPSILON)
    return GridEncoder("dvae", network, options, device=device, weights=weights)


def _file(folder: Path) -> Path:
    pickles = [folder / name for name in ("encoder.pkl", "decoder.pkl")]
    if not (folder / WEIGHTS).is_file() and all(file.is_file() for file in pickles):
        raise WeightsRefused(
            f"{folder} holds the published pickles, which run code when they are loaded. Convert them once: "
            f"engram convert-dvae {pickles[0]} {pickles[1]} {folder}"
        )
    return weights_file(folder, [WEIGHTS])
