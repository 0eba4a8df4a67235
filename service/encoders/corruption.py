"""How a cue differs from its memory, in numbers: what a calibration makes its cues by.

A corruption is one model of a union told apart by `kind`, so it is written in a request, stored with a collection and
printed as it is. It says to which sources it applies (`applies_to`: a picture, a text, a vector given without an
encoder) and whether it hides, that is makes a cue of which part is known to be missing (`hides`), or changes what all
is taken as seen.

Rules:
- Every draw comes from the generator that is passed in: the same generator state gives the same cue.
- Hiding never hides all, and what was hidden stays hidden.
- All values are bounded so that a cue always remains: no share reaches 1.
"""

from __future__ import annotations

import io
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, Field

from service.encoders.protocol import Picture
from service.errors import InvalidRequest

Target = Literal["image", "text", "vector"]

CELLS = 32
"""A mask is drawn in cells of 1/32 of each side: finer ones vanish when a latent averages them."""

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class _Corruption(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    applies_to: ClassVar[frozenset[Target]] = frozenset({"image"})
    hides: ClassVar[bool] = False

    def describe(self) -> str:
        """One line for a person: "mask (share 0.25)"."""
        kind, *values = self.model_dump().items()
        inside = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values
        )
        return f"{kind[1]} ({inside})"


class Noise(_Corruption):
    """Gaussian noise on every channel, the same on all of a grey picture's; `sigma` in units of the whole range (0 to
    1).
    """

    kind: Literal["noise"] = "noise"
    sigma: float = Field(0.1, gt=0.0, le=1.0)


class Blur(_Corruption):
    """Gaussian blur; `sigma` in units of the shorter side."""

    kind: Literal["blur"] = "blur"
    sigma: float = Field(0.02, gt=0.0, le=0.25)


class Brightness(_Corruption):
    """Every value times `factor`, clipped at white."""

    kind: Literal["brightness"] = "brightness"
    factor: float = Field(0.8, ge=0.05, le=20.0)


class Jpeg(_Corruption):
    """Saved as JPEG with that `quality` and read again."""

    kind: Literal["jpeg"] = "jpeg"
    quality: int = Field(50, ge=1, le=95)


class Crop(_Corruption):
    """A rectangle of that `share` of the area, of the picture's proportions and at a random place, is the whole cue."""

    kind: Literal["crop"] = "crop"
    share: Share = 0.9


class Mask(_Corruption):
    """That `share` is hidden, drawn at random: of a picture's cells (`CELLS`), of a vector's coordinates (set to 0)."""

    applies_to: ClassVar[frozenset[Target]] = frozenset({"image", "vector"})
    hides: ClassVar[bool] = True
    kind: Literal["mask"] = "mask"
    share: Share = 0.25


class MissingSide(_Corruption):
    """That `share` of the picture, from one side on, is hidden."""

    hides: ClassVar[bool] = True
    kind: Literal["missing_side"] = "missing_side"
    side: Literal["left", "right", "top", "bottom", "random"] = "random"
    share: Share = 0.25


class Window(_Corruption):
    """A rectangle of that `share` of the area, of the picture's proportions, at a random place, stays observed."""

    hides: ClassVar[bool] = True
    kind: Literal["window"] = "window"
    share: Share = 0.3


class WordDrop(_Corruption):
    """Each word goes with that probability (`share`); one at least stays."""

    applies_to: ClassVar[frozenset[Target]] = frozenset({"text"})
    kind: Literal["word_drop"] = "word_drop"
    share: Share = 0.3


class VectorNoise(_Corruption):
    """Gaussian noise on every coordinate; `sigma` in units of the vector's own root mean square."""

    applies_to: ClassVar[frozenset[Target]] = frozenset({"vector"})
    kind: Literal["vector_noise"] = "vector_noise"
    sigma: float = Field(0.1, gt=0.0, le=10.0)


Corruption = Annotated[
    Noise | Blur | Brightness | Jpeg | Crop | Mask | MissingSide | Window | WordDrop | VectorNoise,
    Field(discriminator="kind"),
]

DEFAULT_CORRUPTIONS: tuple[Corruption, ...] = (
    Noise(sigma=0.1),
    Blur(sigma=0.02),
    Brightness(factor=0.8),
    Brightness(factor=1.2),
    Crop(share=0.9),
    Jpeg(quality=50),
    Mask(share=0.25),
    MissingSide(side="random", share=0.25),
    WordDrop(share=0.3),
    VectorNoise(sigma=0.1),
)
"""Mild ones, of each sort that a user meets unwished. A collection that expects harder cues declares them."""


def corrupt_picture(picture: Picture, corruption: Corruption, rng: np.random.Generator) -> Picture:
    """A cue made from `picture`, keeping its warnings. Raises `InvalidRequest` for what is no corruption of images."""
    _check(corruption, "image")
    pixels, observed = picture.pixels, picture.observed
    height, width = pixels.shape[:2]
    match corruption:
        case Noise(sigma=sigma):
            # Noise of a grey file is grey: drawn apart per channel, two thirds of it would go in the mean.
            grey = bool((pixels == pixels[..., :1]).all())
            shape = (height, width, 1) if grey else pixels.shape
            noisy = pixels + rng.normal(0.0, 255.0 * sigma, shape).astype(np.float32)
            pixels = np.rint(noisy.clip(0, 255)).astype(np.uint8)
        case Blur(sigma=sigma):
            blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma * min(height, width)))
            pixels = np.asarray(blurred)
        case Brightness(factor=factor):
            pixels = np.rint((pixels * np.float32(factor)).clip(0, 255)).astype(np.uint8)
        case Jpeg(quality=quality):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
            pixels = np.asarray(Image.open(buffer, formats=("JPEG",)))
        case Crop(share=share):
            box = _rectangle(height, width, share, rng)
            pixels = pixels[box]
            observed = None if observed is None else observed[box]
        case Mask(share=share):
            observed = _seen(observed, _random_cells(height, width, share, rng))
        case MissingSide(side=side, share=share):
            observed = _seen(observed, _without_side(height, width, side, share, rng))
        case Window(share=share):
            inside = np.zeros((height, width), dtype=np.bool_)
            inside[_rectangle(height, width, share, rng)] = True
            observed = _seen(observed, inside)
    return Picture(pixels, observed, picture.warnings)


def corrupt_text(text: str, corruption: Corruption, rng: np.random.Generator) -> str:
    """A cue made from `text`, word by word. Raises `InvalidRequest` for what is no corruption of texts."""
    _check(corruption, "text")
    assert isinstance(corruption, WordDrop)
    words = text.split()
    kept = rng.random(len(words)) >= corruption.share
    if words and not kept.any():
        kept[rng.integers(len(words))] = True
    return " ".join(word for word, stays in zip(words, kept, strict=True) if stays)


def corrupt_vectors(
    vectors: NDArray[np.float32], corruption: Corruption, rng: np.random.Generator
) -> NDArray[np.float32]:
    """(n, d) → (n, d) cues. Raises `InvalidRequest` for a corruption that is not for vectors."""
    _check(corruption, "vector")
    if isinstance(corruption, VectorNoise):
        scale = np.sqrt(np.mean(np.square(vectors, dtype=np.float64), axis=1, keepdims=True))
        noisy: NDArray[np.float32] = (vectors + corruption.sigma * scale * rng.standard_normal(vectors.shape)).astype(
            np.float32
        )
        return noisy
    assert isinstance(corruption, Mask)
    count, dimension = vectors.shape
    order = np.argsort(rng.random((count, dimension)), axis=1)
    hidden = order < _count_hidden(dimension, corruption.share)
    return np.where(hidden, np.float32(0.0), vectors)


def _check(corruption: Corruption, target: Target) -> None:
    if target not in corruption.applies_to:
        raise InvalidRequest(f"the corruption {corruption.kind!r} does not apply to {target}s")


def _seen(before: NDArray[np.bool_] | None, now: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is observed both before and now; what was observed before where the two would leave nothing."""
    if before is None:
        return now
    both: NDArray[np.bool_] = before & now
    return both if both.any() else before


def _count_hidden(total: int, share: float) -> int:
    """The nearest number to `share` of `total` that hides something, where there is more than one, and not all."""
    return max(min(round(share * total), total - 1), min(1, total - 1))


def _random_cells(height: int, width: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    rows, columns = min(CELLS, height), min(CELLS, width)
    cells = np.ones(rows * columns, dtype=np.bool_)
    cells[rng.permutation(len(cells))[: _count_hidden(len(cells), share)]] = False
    grid = cells.reshape(rows, columns)
    seen: NDArray[np.bool_] = grid[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    return seen


def _without_side(
    height: int,
    width: int,
    side: Literal["left", "right", "top", "bottom", "random"],
    share: float,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    chosen = str(rng.choice(("left", "right", "top", "bottom"))) if side == "random" else side
    seen = np.ones((height, width), dtype=np.bool_)
    along = seen.T if chosen in ("left", "right") else seen  # a view whose rows run away from the side or towards it
    hidden = _count_hidden(len(along), share)
    if chosen in ("left", "top"):
        along[:hidden] = False
    else:
        along[len(along) - hidden :] = False
    return seen


def _rectangle(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """A rectangle of `share` of the area with the picture's proportions, uniformly placed, one pixel at least."""
    tall, wide = max(1, round(height * share**0.5)), max(1, round(width * share**0.5))
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    return slice(top, top + tall), slice(left, left + wide)
