"""A small residual network trained on Fashion-MNIST, and the penultimate features that every detector is given.

Rules:
- Trained from the seed on one thread: the same arguments give the same network on the same machine.
- Features are taken without augmentation, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

# Of Fashion-MNIST's training pixels, 0 to 1.
_MEAN, _DEVIATION = 0.286, 0.353

_BATCH = 64
_LEARNING_RATE = 0.1
_WEIGHT_DECAY = 5e-4
_WARM_UP_SHARE = 0.2
_SHIFT = 1  # pixels; a wider one needs more epochs than these few
_EVALUATED_AT_ONCE = 500


@dataclass(frozen=True, eq=False)
class Features:
    """hidden: the penultimate layer, not negative; logits: the last; labels: the classes' numbers, where known."""

    hidden: Float[Tensor, "n d"]
    logits: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def predicted(self) -> Int[Tensor, " n"]:
        """The class of the largest logit."""
        return self.logits.argmax(-1)

    def take(self, chosen: Tensor | slice) -> Features:
        """The chosen ones, in that order."""
        return Features(self.hidden[chosen], self.logits[chosen], None if self.labels is None else self.labels[chosen])


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        sum_: Tensor = inner + self.shortcut(x)
        return sum_.relu()


class Classifier(nn.Module):
    """A 5×5 convolution, then three residual blocks (He et al. 2016) at 14×14, 7×7 and 4×4, averaged to `4·width`
    features, and a linear layer.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            _Residual(width, width, 1), _Residual(width, 2 * width, 2), _Residual(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 28, 28) pixels, standardised, to (n, classes) logits."""
        logits: Tensor = self.head(self.body(x))
        return logits


def trained(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    width: int,
    epochs: int,
    seed: int,
    told: Callable[[str], None],
) -> Classifier:
    """A classifier of the labels 0 … c-1: SGD with Nesterov momentum, one cycle of the learning rate, images shifted by
    a pixel and mirrored; `told` hears of each epoch.
    """
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    x, y = _standardised(pixels), torch.from_numpy(labels)
    network: Classifier = Classifier(int(y.max()) + 1, width).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        network.parameters(), _LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=_WEIGHT_DECAY
    )
    batches = len(x) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, _LEARNING_RATE, total_steps=epochs * batches, pct_start=_WARM_UP_SHARE
    )
    for epoch in range(epochs):
        order, total = torch.randperm(len(x), generator=draw), 0.0
        for chosen in torch.split(order[: batches * _BATCH], _BATCH):
            images = _augmented(x[chosen], draw).contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(network(images), y[chosen])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        told(f"epoch {epoch + 1} of {epochs}, loss {total / batches:.3f}")
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features(network: Classifier, pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None = None) -> Features:
    """The penultimate features and logits of grey images of 28×28."""
    hidden = torch.cat([network.body(part) for part in torch.split(_standardised(pixels), _EVALUATED_AT_ONCE)])
    return Features(hidden, network.head(hidden), None if labels is None else torch.from_numpy(labels))


def _standardised(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy((pixels.astype(np.float32) / 255 - _MEAN) / _DEVIATION).unsqueeze(1)


def _augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image shifted by up to a pixel each way, the border repeated, and half of them mirrored."""
    count, side = len(images), images.shape[-1]
    padded = nn.functional.pad(images, (_SHIFT,) * 4, mode="replicate").squeeze(1)
    top, left = torch.randint(0, 2 * _SHIFT + 1, (2, count, 1), generator=draw)
    along = torch.arange(side)
    mirrored = torch.rand(count, 1, generator=draw) < 0.5
    across = torch.where(mirrored, along.flip(0), along) + left
    rows = torch.arange(count)[:, None, None]
    return padded[rows, (top + along)[:, :, None], across[:, None, :]].unsqueeze(1)
