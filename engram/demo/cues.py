"""The demo's collections, the corruptions they declare, and the cues made from them.

Rules:
- A cue is made by the declared corruption itself with a seed of its own: a fresh draw of what the calibration was
  told of.
- The shown cues are fixed here, before any recall; whether they pass is for the run to say.
- Hidden pixels are blanked in the picture that is sent: nothing of them leaves this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.demo.data import PHOTOGRAPHS, STORED, STRANGERS, Photograph, backgrounds, digits, faces, png, static
from service.encoders.corruption import (
    DEFAULT_CORRUPTIONS,
    Corruption,
    MissingSide,
    Noise,
    Window,
    WordDrop,
    corrupt_picture,
    corrupt_text,
)
from service.encoders.picture import read_picture

LEFT_HALF = MissingSide(side="right", share=0.5)
WINDOW = Window(share=0.3)
FEW_WORDS = WordDrop(share=0.6)
DIGIT_NOISE = Noise(sigma=0.2)
FACE_HALF = MissingSide(side="random", share=0.5)

DECLARED: dict[str, list[Corruption]] = {
    "photos": [*(c for c in DEFAULT_CORRUPTIONS if c.applies_to & {"image", "text"}), LEFT_HALF, WINDOW, FEW_WORDS],
    "digits": [DIGIT_NOISE, MissingSide(side="random", share=0.25)],
    "faces": [Noise(sigma=0.1), FACE_HALF],
}
SPACES: dict[str, dict[str, Any]] = {
    "photos": {
        "image": {"encoder": "codec"},
        "joint": {"encoder": "bridge"},
        "text": {"encoder": "sentence", "source": "text"},
    },
    "digits": {"image": {"encoder": "pixels", "options": {"size": 8, "colour": False}}},
    "faces": {"image": {"encoder": "pixels", "options": {"size": 25, "colour": False}}},
}
FRESH_SEED = 1_000  # far from the calibration's own


@dataclass(frozen=True)
class Cue:
    """What is sent, and the id of the memory it came from: None for a stranger."""

    title: str
    collection: str
    own: str | None
    text: str | None = None
    image: bytes | None = None
    mask: bytes | None = None

    def body(self) -> dict[str, Any]:
        return {"text": self.text, "image": self.image, "mask": self.mask}


@dataclass(frozen=True)
class Trial:
    """Cues of one kind. `declared`: the calibration made its own of that kind, so it promises their acceptance."""

    kind: str
    cues: list[Cue]
    declared: bool = False


def memories(collection: str) -> list[dict[str, Any]]:
    """What is stored in one of the demo's collections."""
    if collection == "digits":
        return [{"id": name, "image": image, "payload": {"digit": label}} for name, image, label in digits()]
    if collection == "faces":
        return [{"id": name, "image": image} for name, image in faces()]
    return [
        {"id": photo.name, "image": photo.read(), "text": photo.caption, "payload": {"from": photo.package}}
        for photo in STORED
    ]


def shown() -> dict[str, list[Cue]]:
    """The cues that the terminal and the contact sheet show, by heading."""
    photos = {photo.name: photo for photo in PHOTOGRAPHS}
    digit, digit_image, _ = digits()[42]
    face, face_image = faces()[7]
    return {
        "A photograph from a part of it": [
            _pictured("from its left half", "photos", "chelsea", photos["chelsea"].read(), LEFT_HALF),
            _pictured("from a window of 30%", "photos", "china", photos["china"].read(), WINDOW),
        ],
        "A photograph from a sentence": [
            Cue("from a sentence", "photos", name, text=photos[name].paraphrase)
            for name in ("astronaut", "chelsea", "flower", "rocket")
        ],
        "Small pictures": [
            _pictured("from a noisy copy", "digits", digit, digit_image, DIGIT_NOISE),
            _pictured("from half of it", "faces", face, face_image, FACE_HALF),
        ],
        "Never stored: nothing should come back": [
            *(Cue(photo.name, "photos", None, image=photo.read()) for photo in STRANGERS),
            Cue("static noise", "photos", None, image=static(FRESH_SEED)),
        ],
    }


def trials() -> Iterator[Trial]:
    """Every cue that is counted: all photographs by all declared corruptions, all strangers, the small pictures."""
    for corruption in DECLARED["photos"]:
        kind = corruption.describe()
        if "image" in corruption.applies_to:
            yield Trial(kind, [_part(photo, corruption) for photo in STORED], declared=True)
        else:
            yield Trial(f"caption, {kind}", list(_captions(STORED, corruption)), declared=True)
    yield Trial("sentence in other words", [Cue("", "photos", p.name, text=p.paraphrase) for p in STORED])
    yield Trial("stranger, whole", [Cue("", "photos", None, image=photo.read()) for photo in STRANGERS])
    yield Trial("stranger, left half", [_part(photo, LEFT_HALF) for photo in STRANGERS])
    yield Trial("stranger, window", [_part(photo, WINDOW) for photo in STRANGERS])
    yield Trial("stranger, caption", [Cue("", "photos", None, text=photo.caption) for photo in STRANGERS])
    yield Trial("static noise", [Cue("", "photos", None, image=static(seed)) for seed in range(len(STORED))])
    for collection, images in (("digits", [d[:2] for d in digits()[::18]]), ("faces", faces())):
        for corruption in DECLARED[collection]:
            cues = [
                _pictured("", collection, name, image, corruption, seed) for seed, (name, image) in enumerate(images)
            ]
            yield Trial(f"{collection}, {corruption.describe()}", cues, declared=True)
    yield Trial("background, no face", [Cue("", "faces", None, image=image) for image in backgrounds()])


def _part(photo: Photograph, corruption: Corruption) -> Cue:
    return _pictured("", "photos", None if photo in STRANGERS else photo.name, photo.read(), corruption)


def _captions(photographs: Sequence[Photograph], corruption: Corruption) -> Iterator[Cue]:
    rng = np.random.default_rng(FRESH_SEED)
    for photo in photographs:
        yield Cue("", "photos", photo.name, text=corrupt_text(photo.caption, corruption, rng))


def _pictured(title: str, collection: str, own: str | None, image: bytes, corruption: Corruption, seed: int = 0) -> Cue:
    """A picture as `corruption` leaves it, with the mask of what it hides."""
    picture = corrupt_picture(read_picture(image), corruption, np.random.default_rng(FRESH_SEED + seed))
    if picture.observed is None:
        return Cue(title, collection, own, image=png(picture.pixels))
    hidden = ~picture.observed
    blanked = np.where(hidden[:, :, None], np.uint8(0), picture.pixels)
    return Cue(title, collection, own, image=png(blanked), mask=png(hidden.astype(np.uint8) * 255))
