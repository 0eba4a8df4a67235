"""The real pictures that ordinary Python packages carry, with captions written by looking at each of them.

Rules:
- Nothing is downloaded: every picture lies in the installed files of scikit-image, scikit-learn, PyWavelets or mahotas
  (the `demo` extra). The packages are only located, never imported.
- Left out of those packages: drawings, binary masks, charts, the second of a stereo pair, and pictures that are not the
  package's to give.
- `STRANGERS` is every fifth photograph by name: a rule fixed before any recall was run. A stranger is never stored, so
  it never takes part in a calibration either.
- `paraphrase` says what `caption` says in other words; recalls by sentence use it, never the stored caption.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import NotFound

DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn", "pywt": "PyWavelets", "mahotas": "mahotas"}


@dataclass(frozen=True)
class Photograph:
    """One photograph: `package` and `file` say where it lies."""

    name: str
    package: str
    file: str
    caption: str
    paraphrase: str

    def read(self) -> bytes:
        """The picture's file; a bare array becomes a PNG. Raises `NotFound` naming the package to install."""
        path = _package_file(self.package, self.file)
        return png(np.load(path)["data"]) if path.suffix == ".npz" else path.read_bytes()


PHOTOGRAPHS = (
    Photograph(
        "aero", "pywt", "data/aero.npz",
        "An aerial view of pale fields with dark trees along a forked valley and a road below.",
        "farmland seen from an aeroplane",
    ),
    Photograph(
        "ascent", "pywt", "data/ascent.npz",
        "People climb the steel stairs of a tall lookout tower.",
        "two hikers going up an outdoor metal staircase",
    ),
    Photograph(
        "astronaut", "skimage", "data/astronaut.png",
        "A smiling woman astronaut in an orange space suit sits by her helmet, a flag and a model space shuttle.",
        "portrait of a female spacewoman in her orange flight suit",
    ),
    Photograph(
        "brick", "skimage", "data/brick.png",
        "A wall of dark narrow bricks with pale mortar.",
        "brickwork with light joints",
    ),
    Photograph(
        "camera", "skimage", "data/camera.png",
        "A man in a dark coat looks through a film camera on a tripod in a park.",
        "a photographer at work on a lawn",
    ),
    Photograph(
        "cell", "skimage", "data/cell.png",
        "A single bright round cell floating in grey liquid under a microscope.",
        "one glowing blood cell seen by microscopy",
    ),
    Photograph(
        "chelsea", "skimage", "data/chelsea.png",
        "The face of a ginger tabby cat with green eyes.",
        "a close look at a kitten's whiskers and eyes",
    ),
    Photograph(
        "china", "sklearn", "datasets/images/china.jpg",
        "A red and green Chinese temple tower on a wooded hill above a lake.",
        "an oriental pagoda overlooking the water",
    ),
    Photograph(
        "clock", "skimage", "data/clock_motion.png",
        "A round wall clock blurred by a moving camera.",
        "a smeared picture of a clock on a grey wall",
    ),
    Photograph(
        "coffee", "skimage", "data/coffee.png",
        "A red cup of espresso on a red saucer with a spoon on a wooden table.",
        "a hot drink served in a small mug",
    ),
    Photograph(
        "coins", "skimage", "data/coins.png",
        "Rows of ancient Greek coins on a dark background.",
        "a collection of old silver money",
    ),
    Photograph(
        "flower", "sklearn", "datasets/images/flower.jpg",
        "An orange dahlia in bloom before dark green leaves.",
        "a blossom with many peach-coloured petals",
    ),
    Photograph(
        "grass", "skimage", "data/grass.png",
        "Grass and small leaves on the ground, seen from above.",
        "a lawn from close by",
    ),
    Photograph(
        "gravel", "skimage", "data/gravel.png",
        "Grey gravel that covers the ground.",
        "a surface of many small crushed stones",
    ),
    Photograph(
        "hubble", "skimage", "data/hubble_deep_field.jpg",
        "Thousands of small bright galaxies in black space, seen by the Hubble telescope.",
        "the night sky full of far stars",
    ),
    Photograph(
        "ihc", "skimage", "data/ihc.png",
        "A microscope picture of colon tissue stained brown and blue.",
        "a histology slide of glands",
    ),
    Photograph(
        "luispedro", "mahotas", "demos/data/luispedro.jpg",
        "A young man with short dark hair outdoors looks to the left.",
        "the head and shoulders of a guy in a grey shirt",
    ),
    Photograph(
        "microaneurysms", "skimage", "data/microaneurysms.png",
        "A grey detail of blood vessels and two small dark spots in a retina.",
        "tiny lesions between veins at the back of an eye",
    ),
    Photograph(
        "moon", "skimage", "data/moon.png",
        "The grey surface of the moon with craters.",
        "a lunar landscape from above",
    ),
    Photograph(
        "motorcycle", "skimage", "data/motorcycle_left.png",
        "A red motorcycle parked in a garage in front of shelves.",
        "a motorbike standing indoors",
    ),
    Photograph(
        "nuclear", "mahotas", "demos/data/nuclear.png",
        "Dim cell nuclei on black with a few very bright ones, under a fluorescence microscope.",
        "fluorescent nuclei in the dark",
    ),
    Photograph(
        "page", "skimage", "data/page.png",
        "A printed page of text about image segmentation.",
        "a paragraph from a scanned book",
    ),
    Photograph(
        "retina", "skimage", "data/retina.jpg",
        "The inside of an eye: a round orange retina with branching blood vessels.",
        "an eye doctor's photograph of the fundus",
    ),
    Photograph(
        "rocket", "skimage", "data/rocket.jpg",
        "A white rocket on its launch pad between towers at dusk.",
        "a spacecraft ready for lift-off in the evening",
    ),
    Photograph(
        "text", "skimage", "data/text.png",
        "Handwritten mathematical formulas on lined paper.",
        "equations jotted in ink in a notebook",
    ),
)  # fmt: skip

STRANGERS = PHOTOGRAPHS[4::5]
STORED = tuple(photograph for photograph in PHOTOGRAPHS if photograph not in STRANGERS)

FACES_COUNT = 100  # of the 200 patches in lfw_subset.npy the first 100 are faces, the rest background


def proportions(name: str) -> tuple[int, int] | None:
    """Width and height of a photograph; None for a name that is none. A codec's own pictures are square."""
    for photograph in PHOTOGRAPHS:
        if photograph.name == name:
            with Image.open(io.BytesIO(photograph.read())) as picture:
                return picture.size
    return None


def digits() -> list[tuple[str, bytes, int]]:
    """Scikit-learn's 1,797 handwritten digits (UCI, 8×8, grey levels 0..16): (id, PNG, what it shows)."""
    with gzip.open(_package_file("sklearn", "datasets/data/digits.csv.gz")) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pictures = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return [
        (f"{index:04d}", png(picture), int(label))
        for index, (picture, label) in enumerate(zip(pictures, table[:, 64], strict=True))
    ]


def faces() -> list[tuple[str, bytes]]:
    """The faces of Labeled Faces in the Wild that scikit-image carries (25×25, grey): (id, PNG)."""
    return [(f"{index:03d}", png(patch)) for index, patch in enumerate(_patches()[:FACES_COUNT])]


def backgrounds() -> list[bytes]:
    """Patches from behind those faces, as PNGs: never stored."""
    return [png(patch) for patch in _patches()[FACES_COUNT:]]


def _patches() -> NDArray[np.uint8]:
    patches: NDArray[np.uint8] = np.round(np.load(_package_file("skimage", "data/lfw_subset.npy")) * 255).astype(
        np.uint8
    )
    return patches


def static(seed: int, size: int = 128) -> bytes:
    """A PNG of uniform colour noise: a picture of nothing."""
    return png(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """(height, width[, 3]) uint8 → PNG, lightly compressed: a cue is sent once, within this machine."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _package_file(package: str, file: str) -> Path:
    found = importlib.util.find_spec(package)
    path = Path(found.submodule_search_locations[0]) / file if found and found.submodule_search_locations else None
    if path is None or not path.is_file():
        raise NotFound(
            f"{file} of {DISTRIBUTIONS[package]}; the demo's pictures come with: pip install 'engram-memory[demo]'"
        )
    return path
