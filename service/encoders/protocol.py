"""What an encoder is: the one protocol behind which every model sits.

Rules:
- An encoder turns pictures or texts into float32 rows and knows nothing of collections, banks or requests.
- `fingerprint` names everything that decides its numbers (name, weights' hash, preprocessing, options): two
  encoders with one fingerprint give the same vectors, and patterns of another fingerprint are never compared with
  its own.
- Vectors are returned raw (not normalised): normalisation belongs to the similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Source = Literal["image", "text"]
"""The part of a memory that a space's vector is made from."""

DIMENSION_MAX = 65_536
"""The most values in a vector: 256 KB in float32, of which a batch of 1,000 is held at once."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image after normalisation: upright, RGB, 8 bits.

    `pixels` is (height, width, 3) uint8; `observed` is (height, width) bool, False where a mask hides the picture,
    or None when all of it is seen. `warnings` names what was done to the file to bring it here ("alpha composited
    over white").
    """

    pixels: NDArray[np.uint8]
    observed: NDArray[np.bool_] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Encoded:
    """`vectors` is (batch, dimension) float32; `warnings[i]` says what was lost of item i (a text cut to the
    model's length).
    """

    vectors: NDArray[np.float32]
    warnings: tuple[tuple[str, ...], ...] = field(default=())


@runtime_checkable
class Encoder(Protocol):
    name: str
    fingerprint: str
    dimension: int
    takes: frozenset[Source]

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """(batch) pictures → (batch, dimension). Where `observed` is given, hidden pixels must not influence the
        vector.
        """
        ...

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """(batch) non-empty texts → (batch, dimension)."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """An encoder whose image latents can be drawn again."""

    def decode(self, latents: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """(batch, dimension) → batch pictures of (height, width, 3) uint8. Values outside the codec's range are
        clipped.
        """
        ...
