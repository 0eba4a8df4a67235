"""The images of RecLag's tables: unlike ones to test on, outliers to tune on, and classes left out.

Rules:
- No kind of outlier that is tuned on is tested, and none that is tested is tuned on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers import data


def unlike_sets(known: data.Images, count: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """The test's out-of-distribution sets, at most `count` grey images of 28×28 each."""
    draw = np.random.default_rng(seed)

    def some(images: data.Images) -> NDArray[np.uint8]:
        return images.pixels[draw.permutation(len(images))[:count]]

    return {
        "MNIST": some(data.mnist_small()),
        "silhouettes": some(data.silhouettes()),
        "digits 8×8": some(data.resized(data.digits())),
        "photographs": data.photograph_patches(count, seed).pixels,
        "textures": data.texture_patches(count, seed).pixels,
        "pages": data.page_patches(count, seed).pixels,
        "noise": data.generated("noise", count, seed).pixels,
        "stripes": data.generated("stripes", count, seed).pixels,
        "checks": data.generated("checks", count, seed).pixels,
        "inverted": 255 - some(known),
        "turned by 90°": np.ascontiguousarray(np.rot90(some(known), axes=(1, 2))),
    }


def validation_outliers(known: NDArray[np.uint8], count: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """Outliers to tune on, generated or made from held-out known images; none is of a kind that is tested."""
    draw = np.random.default_rng(seed)
    first, second = (known[draw.permutation(len(known))[:count]] for _ in range(2))
    tiles = np.stack(
        [each.reshape(4, 7, 4, 7).swapaxes(1, 2).reshape(16, 7, 7)[draw.permutation(16)] for each in first]
    )
    return {
        "blobs": data.generated("blobs", count, seed).pixels,
        "flat": data.generated("flat", count, seed).pixels,
        "tiles shuffled": tiles.reshape(-1, 4, 4, 7, 7).swapaxes(2, 3).reshape(-1, 28, 28),
        "two averaged": ((first.astype(np.uint16) + second) // 2).astype(np.uint8),
    }


def of_classes(images: data.Images, classes: tuple[int, ...]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels and labels of the images of these classes, a class labelled by its place among them."""
    if images.labels is None:
        raise ValueError(f"{images.name} has no labels")
    belongs = images.labels[:, None] == np.asarray(classes)
    chosen = belongs.any(1)
    return images.pixels[chosen], belongs[chosen].argmax(1)
