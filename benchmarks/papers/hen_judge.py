"""How near what came back is to what was stored, as pictures: mean squared error and 1 - SSIM.

Rules:
- Pictures are compared as drawn, bytes with bytes, over 255: decode(recalled) with decode(stored).
- A state that lies on one memory, up to what float32 resolves, is drawn as that memory: once for all β and cues.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.papers.hen_encoders import Coded
from benchmarks.papers.hen_findings import Answer, Answers
from benchmarks.papers.hen_recall import MASS, Settled

# Wang et al. 2004, with scikit-image's defaults: a flat window, the sample's covariance.
_WINDOW = 7
_K1, _K2 = 0.01, 0.03


def squared_error(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n, h, w, c) twice → (n,): the mean squared difference, of values from 0 to 1."""
    difference = (a.astype(np.float64) - b) / 255
    mean: NDArray[np.float64] = np.square(difference).reshape(len(a), -1).mean(axis=1)
    return mean


def structural_similarity(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(n, h, w, c) twice → (n,): SSIM, averaged over channels; what scikit-image's `structural_similarity` gives."""
    x, y = (torch.from_numpy(np.ascontiguousarray(each)).double().permute(0, 3, 1, 2) / 255 for each in (a, b))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(values, _WINDOW, stride=1)

    unbiased = _WINDOW**2 / (_WINDOW**2 - 1)
    mx, my = mean(x), mean(y)
    vx, vy = (mean(x * x) - mx * mx) * unbiased, (mean(y * y) - my * my) * unbiased
    covariance = (mean(x * y) - mx * my) * unbiased
    index = ((2 * mx * my + _K1**2) * (2 * covariance + _K2**2)) / ((mx * mx + my * my + _K1**2) * (vx + vy + _K2**2))
    found: NDArray[np.float64] = index.mean(dim=(1, 2, 3)).numpy()
    return found


def judged(coded: Coded, values: Tensor, settled: Settled, own: NDArray[np.int64], betas: Sequence[float]) -> Answers:
    """An answer for each β. `values` (n, k): the memories' codes."""
    pictures = settled.recalled.shape[1]
    stored = coded.decode(values[own[:pictures]].numpy())
    lies = torch.where(settled.weight >= 1 - MASS, settled.heaviest, -1)[:, :pictures].numpy()
    held = np.unique(lies[lies >= 0])
    memories = coded.decode(values[held].numpy()) if len(held) else stored[:0]
    answers: Answers = {}
    for number, beta in enumerate(betas):
        drawn = stored.copy()
        on = lies[number] >= 0
        drawn[on] = memories[np.searchsorted(held, lies[number][on])]
        if not on.all():
            drawn[~on] = coded.decode(settled.recalled[number].numpy()[~on])
        dissimilarity, error = compared(drawn, stored)
        heaviest, nearest = ((rows[number].numpy() == own).mean() for rows in (settled.heaviest, settled.nearest))
        answers[beta] = Answer(
            dissimilarity, error, float(heaviest), float(nearest), float(settled.weight[number].mean())
        )
    return answers


def compared(drawn: NDArray[np.uint8], stored: NDArray[np.uint8]) -> tuple[float, float]:
    """1 - SSIM and the squared error, means over the pictures."""
    return float(1 - structural_similarity(drawn, stored).mean()), float(squared_error(drawn, stored).mean())
