"""Photographs with captions that judge the bridge. Nothing is ever trained on them: they are under the GPL.

Each function gives `Captioned` photographs, or raises `MissingData` naming Debian's package.

Rules:
- Photographs only. Tux Paint's stamps are cut-outs with a sentence each; its cartoons, letters and signs are left out
  by folder, the drawings among the rest by name (`DRAWN`, by looking at each), and second copies by their pixels.
- GCompris's photographs are scenes and things whose names are words ("long_nosed_monkey"). Constants of the bridge were
  chosen on these, so they are reported apart.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.papers.data import MissingData
from engram.demo.data import PHOTOGRAPHS
from service.encoders.picture import read_picture

STAMPS = Path("/usr/share/tuxpaint/stamps")
GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")

NOT_PICTURES = ("symbols/*", "*/cartoon/*")
"""Of the stamps: letters, coins, notes and shapes, and cartoons."""

DRAWN = (
    "animals/insects/bee", "animals/mammals/echidna", "animals/mammals/hedgehog", "clothes/button", "clothes/t_*",
    "clothes/hats/*", "food/pizza", "household/key", "medical/tooth", "naturalforces/lightningbolt",
    "people/body_parts/eye", "seasonal/christmas/Santa", "seasonal/christmas/[a-w]*[!h]",
    "seasonal/christmas/xmas_tp_bulb",
    "seasonal/easter/*", "seasonal/halloween/[!g]*", "seasonal/halloween/ghost", "seasonal/hanukkah/*",
    "seasonal/newyears/*", "space/planets/0_sun", "town/flags/*", "town/monuments/inukshuk-outline",
    "town/roadsigns/arrow", "town/roadsigns/crossroads", "town/roadsigns/give_way_sign", "town/roadsigns/hospital",
    "town/roadsigns/roundabout", "town/roadsigns/stop*", "town/roadsigns/t-junction", "town/roadsigns/toilets",
    "town/roadsigns/xing_*", "town/roadsigns/yield", "vehicles/emergency/sedan_police",
)  # fmt: skip

GCOMPRIS_FOLDERS = (
    "erase/resource", "explore_world_animals/resource/animals", "explore_farm_animals/resource/animals",
    "explore_monuments/resource/*", "categorization/resource/images/others", "categorization/resource/images/tools",
    "categorization/resource/images/monuments", "categorization/resource/images/renewable", "solar_system/resource",
)  # fmt: skip

SAME = 2.0
"""Two pictures whose 16×16 thumbnails differ by less, in levels of 255 on the mean, are one."""


@dataclass(frozen=True, eq=False)
class Captioned:
    """pixels: (height, width, 3) uint8, over white. Pictures with one caption are equally right for it."""

    name: str
    caption: str
    pixels: NDArray[np.uint8]


def stamps(*, drawn: bool = False, folder: Path = STAMPS) -> list[Captioned]:
    """Tux Paint's stamps (Debian's tuxpaint-stamps-default), by path; with the drawings among them when `drawn`."""
    found: list[Captioned] = []
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        told = path.with_suffix(".txt")
        mirrored = name.endswith(("_mirror", "_flip"))
        if mirrored or not told.is_file() or any(fnmatch(name, pattern) for pattern in NOT_PICTURES):
            continue
        if drawn or not any(fnmatch(name, pattern) for pattern in DRAWN):
            caption = told.read_text(encoding="utf-8").splitlines()[0].strip()
            found.append(Captioned(name, caption, _pixels(path.read_bytes())))
    if not found:
        raise MissingData(f"Tux Paint's stamps: none under {folder}: apt install tuxpaint-stamps-default")
    return found if drawn else _without_copies(found)


def gcompris(folder: Path = GCOMPRIS) -> list[Captioned]:
    """GCompris's photographs of animals, monuments, things and planets (Debian's gcompris-qt-data)."""
    found: list[Captioned] = []
    for path in sorted(folder.glob("*.rcc")):
        for name, file in _resources(path.read_bytes()):
            inside = name.removeprefix("/gcompris/src/activities/")
            if name.endswith(".webp") and any(fnmatch(str(Path(inside).parent), each) for each in GCOMPRIS_FOLDERS):
                found.append(Captioned(inside, _words(Path(inside).stem), _pixels(file)))
    if not found:
        raise MissingData(f"GCompris's photographs: none in {folder}: apt install gcompris-qt-data")
    return _without_copies(found)


def demo(*, paraphrased: bool) -> list[Captioned]:
    """The demo's photographs with their captions, or with the same said in other words."""
    return [
        Captioned(each.name, each.paraphrase if paraphrased else each.caption, read_picture(each.read()).pixels)
        for each in PHOTOGRAPHS
    ]


def _pixels(file: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(file), formats=("PNG", "WEBP")) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def _without_copies(pictures: list[Captioned]) -> list[Captioned]:
    kept: list[Captioned] = []
    seen: list[NDArray[np.float32]] = []
    for picture in pictures:
        small = Image.fromarray(picture.pixels).resize((16, 16), Image.Resampling.BOX)
        thumbnail = np.asarray(small, dtype=np.float32)
        if all(np.abs(thumbnail - other).mean() >= SAME for other in seen):
            kept.append(picture)
            seen.append(thumbnail)
    return kept


def _words(stem: str) -> str:
    """ "greatPyramid2" → "great pyramid"."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"\d+$", "", stem))
    return apart.replace("_", " ").lower().strip()


def _resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, file) of each file in one of Qt's binary resource collections (`rcc --binary`, versions 1 to 3)."""
    if data[:4] != b"qres":
        raise MissingData("GCompris's photographs: not Qt resources: apt install --reinstall gcompris-qt-data")
    version, tree, contents, names = struct.unpack(">4I", data[4:20])
    size = 14 if version == 1 else 22

    def walk(node: int, parent: str) -> Iterator[tuple[str, bytes]]:
        name_at, flags, first, second = struct.unpack(">IHII", data[tree + node * size :][:14])
        length = int.from_bytes(data[names + name_at :][:2])
        path = parent + data[names + name_at + 6 :][: 2 * length].decode("utf-16-be") if node else ""
        if flags & 2:  # a folder: its children's count, and the first of them
            for child in range(second, second + first):
                yield from walk(child, f"{path}/")
        elif not flags & 4:  # not the Zstandard compression, which pictures never get
            start = contents + second
            file = data[start + 4 : start + 4 + int.from_bytes(data[start : start + 4])]
            yield path, zlib.decompress(file[4:]) if flags & 1 else file

    yield from walk(0, "")
