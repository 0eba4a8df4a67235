"""How the codec is trained: both networks together, to draw what was shown.

Strategy: AdamW on batches drawn from every source by its share, one cosine of the learning rate, and a running mean of
the weights, which is what is kept. The loss of a batch is the sum of
- the root mean square error of each picture's reconstruction, averaged: neither the plainest nor the busiest decide;
- the same for the mean of two pictures, drawn from the mean of their latents (`MIXTURE`), so that what is recalled as a
  mixture looks like one;
- the squared distance between the cells of a picture and those of a copy that was noised, blurred, lit otherwise or
  partly hidden (`STEADY`), over cells at least half observed: cues are such copies;
- exp(2(c - 1)) for the cosine c of cells at one place of two pictures (`SPREAD`; Wang and Isola 2020): memories lie as
  far apart as drawing them allows.

Rules:
- Convolutions run in bfloat16 until `LAST_FLOAT32` of the steps remain: twice as fast on a processor that has it, and
  eight bits of mantissa are too few for the last decibel.
- Everything random comes from the seed, and steps are counted, not minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from service.encoders.codec import CELL, Codec

MIXTURE = 0.1
STEADY = 0.15
SPREAD = 0.01
"""Weights of the other parts of the loss beside the first. In short runs, 0.5 for STEADY cost 1.6 dB on clothes and 0.2
on photographs, and 0.03 for SPREAD 0.9 and 0.2 more.
"""

LAST_FLOAT32 = 0.2
LEARNING_RATE = 2e-3
WARM_UP = 100
"""Steps until the learning rate is reached."""


@dataclass(frozen=True)
class Plan:
    steps: int
    batch: int = 32
    seed: int = 0
    checkpoint_every: int = 500


Report = Callable[[int, float, Codec], None]
"""Step, the mean square error since the last report, the running mean of the networks."""


def train(sources: Mapping[str, tuple[float, NDArray[np.uint8]]], plan: Plan, report: Report) -> Codec:
    """Sources are name → (share of a batch, (n, 64, 64, 3) pictures). Returns the running mean of the networks."""
    torch.manual_seed(plan.seed)
    draw = np.random.default_rng(plan.seed)
    network, kept = Codec(), Codec()
    kept.load_state_dict(network.state_dict())
    kept.requires_grad_(False)
    for each in (network, kept):
        each.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    errors: list[float] = []
    for step in range(plan.steps):
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * step / plan.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels = _batch(draw, sources, plan.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=step < plan.steps * (1 - LAST_FLOAT32)):
            loss, error = _loss(network, pixels, draw)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        errors.append(float(error))
        with torch.no_grad():
            forgets = 1 - min(0.998, step / (step + 20))
            for mean, value in zip(kept.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, forgets)
        if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps:
            report(step + 1, float(np.mean(errors)), kept)
            errors.clear()
    return kept.eval()


def _batch(
    draw: np.random.Generator, sources: Mapping[str, tuple[float, NDArray[np.uint8]]], count: int
) -> torch.Tensor:
    """(count, 3, 64, 64) in [0, 1]."""
    shares = np.array([share for share, _ in sources.values()])
    counts = draw.multinomial(count, shares / shares.sum())
    parts = [
        pictures[np.sort(draw.integers(len(pictures), size=number))]
        for (_, pictures), number in zip(sources.values(), counts, strict=True)
    ]
    pixels = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)
    return (pixels.float() / 255).contiguous(memory_format=torch.channels_last)


def _loss(network: Codec, pixels: torch.Tensor, draw: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the mean square error of the reconstructions without a gradient."""
    count = len(pixels)
    quarter, half = count // 4, count // 2
    latents = network.encode(pixels)
    weight = 0.5 + 0.5 * torch.rand(quarter, 1, 1, 1)
    mixed = [weight * all_of[:quarter] + (1 - weight) * all_of[quarter:half] for all_of in (latents, pixels)]
    drawn = network.decode(torch.cat([latents, mixed[0]]))
    squared = (drawn - torch.cat([pixels, mixed[1]])).square().mean(dim=(1, 2, 3))
    roots = (squared + 1e-5).sqrt()
    changed, observed = corrupted(pixels[half:], draw)
    apart = (network.encode(changed) - latents[half:].detach()).square().sum(dim=1, keepdim=True) / 2
    steady = (apart * observed).sum() / observed.sum()
    spread = torch.exp(2 * ((latents * latents.roll(1, dims=0)).sum(dim=1) - 1)).mean()
    loss = roots[:count].mean() + MIXTURE * roots[count:].mean() + STEADY * steady + SPREAD * spread
    return loss, squared[:count].mean().detach()


def corrupted(pixels: torch.Tensor, draw: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of a batch, all corrupted in one of five ways, and which cells (n, 1, 16, 16) then still count."""
    rows, columns = pixels.shape[2] // CELL, pixels.shape[3] // CELL
    observed = torch.ones(len(pixels), 1, rows, columns)
    match int(draw.integers(5)):
        case 0:
            pixels = pixels + draw.uniform(0.02, 0.15) * torch.randn_like(pixels)
        case 1:  # a grey picture's noise
            pixels = pixels + draw.uniform(0.02, 0.15) * torch.randn_like(pixels[:, :1])
        case 2:
            pixels = _blurred(pixels, draw.uniform(0.5, 1.5))
        case 3:
            pixels = pixels * draw.uniform(0.75, 1.3)
        case _:
            seen = torch.stack([_side_hidden(draw, *pixels.shape[2:]) for _ in pixels])
            mean = (pixels * seen).sum(dim=(2, 3), keepdim=True) / seen.sum(dim=(2, 3), keepdim=True)
            pixels = torch.where(seen > 0, pixels, mean)
            observed = (functional.avg_pool2d(seen, CELL) >= 0.5).float()
    return pixels.clamp(0, 1).contiguous(memory_format=torch.channels_last), observed


def _side_hidden(draw: np.random.Generator, height: int, width: int) -> torch.Tensor:
    """(1, height, width): 1 but for a quarter to three quarters from one side, 0."""
    seen = np.ones((height, width), dtype=np.float32)
    along = seen if draw.random() < 0.5 else seen.T
    hidden = int(draw.integers(len(along) // 4, 3 * len(along) // 4 + 1))
    along[:hidden] = 0.0
    return torch.from_numpy((seen[::-1, ::-1] if draw.random() < 0.5 else seen).copy())[None]


def _blurred(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = 4
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = functional.pad(pixels, (reach,) * 4, mode="replicate")
    across = functional.conv2d(padded, kernel, groups=3)
    return functional.conv2d(across, kernel.transpose(2, 3), groups=3)
