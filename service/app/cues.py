"""From what a caller sends to blocks: reading images, checking vectors, encoding in batches.

A cue fills the spaces that it can: an image those made from images, a text those whose encoder reads text, vectors
the spaces they name. `modality` names the filled spaces, and whether a mask hid part of the picture: a masked cue
is farther from its memory than a whole one, so it is calibrated apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.app.live import LiveCollection, Space
from service.app.schemas import Cue
from service.core.similarity import MAGNITUDE_MAX, normalise_rows
from service.encoders.picture import read_picture
from service.encoders.protocol import Encoder, Picture, Source
from service.errors import (
    EmptyText,
    EngramError,
    InvalidVector,
    NothingObserved,
    UnknownSpace,
    WrongDimension,
)

ENCODE_BATCH = 64  # enough to fill a model's batch, little to do again after a crash
PIXELS_AT_ONCE = 32 * 2**20  # decoded pixels held for one batch, the last picture aside: 100 MB

SOURCES: tuple[Source, ...] = ("image", "text")

Vectors = dict[str, NDArray[np.float32]]


@dataclass(eq=False)
class Parts:
    """What a cue or a memory consists of, read and checked, before encoding."""

    picture: Picture | None = None
    text: str | None = None
    vectors: Vectors = field(default_factory=dict)


@dataclass(eq=False)
class CueBlocks:
    """The encoded cue: one raw vector per space it fills."""

    vectors: Vectors
    modality: str
    warnings: list[str]


def modality_of(spaces: Sequence[str], masked: bool) -> str:
    return "+".join(sorted(spaces)) + (":masked" if masked else "")


def read_parts(cue: Cue, live: LiveCollection, pixels_max: int) -> Parts:
    """Read and check one cue. Raises the `EngramError` that says what is wrong with it."""
    if cue.text is not None and not cue.text.strip():
        raise EmptyText("the text has no characters but spaces")
    vectors = {name: check_vector(vector, name, live) for name, vector in (cue.vectors or {}).items()}
    picture = None
    if cue.image is not None:
        picture = read_picture(cue.image.base64, cue.mask.base64 if cue.mask else None, pixels_max=pixels_max)
    if picture is None and cue.text is None and not vectors:
        raise NothingObserved("the cue is empty: give it a text, an image or vectors")
    return Parts(picture, cue.text, vectors)


T = TypeVar("T")


def in_batches(read: Iterable[tuple[T, Parts]]) -> Iterator[list[tuple[T, Parts]]]:
    """Group what is read for encoding: at most `ENCODE_BATCH`, and no more pictures at once than `PIXELS_AT_ONCE`."""
    batch: list[tuple[T, Parts]] = []
    pixels = 0
    for key, parts in read:
        batch.append((key, parts))
        pixels += 0 if parts.picture is None else parts.picture.pixels[..., 0].size
        if len(batch) == ENCODE_BATCH or pixels >= PIXELS_AT_ONCE:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def check_vector(vector: NDArray[np.float32], name: str, live: LiveCollection) -> NDArray[np.float32]:
    space = live.spaces.get(name)
    if space is None:
        raise UnknownSpace(f"collection {live.name} has no space {name}; it has {', '.join(live.spaces)}")
    if vector.shape[0] != space.dimension:
        raise WrongDimension(f"space {name} takes {space.dimension} values, this vector has {vector.shape[0]}")
    squared = float(vector @ vector)
    if not np.isfinite(squared):
        raise InvalidVector(f"the vector for space {name} holds a NaN, an infinity, or values too large to square")
    if live.similarity != "cosine" and np.abs(vector).max() > MAGNITUDE_MAX:
        raise InvalidVector(f"values compared by {live.similarity} are at most {MAGNITUDE_MAX:g} in size")
    if squared == 0:
        raise InvalidVector(f"the vector for space {name} is zero: it stands for a memory that lacks the space")
    return vector


def encode_cues(
    live: LiveCollection, cues: Sequence[Parts], chosen: Mapping[str, float] | None
) -> list[CueBlocks | EngramError]:
    """Encode a batch of cues for the `chosen` spaces (None: all of the collection's), each model called once per
    source.
    """
    spaces = [space for space in live.spaces.values() if chosen is None or space.name in chosen]
    wanted: list[dict[str, str]] = [{} for _ in cues]  # per cue: space → what fills it
    for fills, cue in zip(wanted, cues, strict=True):
        for space in spaces:
            if (filled_by := _filler(space, cue)) is not None:
                fills[space.name] = filled_by
    rows, lost, failed = _encode(spaces, cues, wanted)
    blocks: list[CueBlocks | EngramError] = []
    for i, (cue, fills) in enumerate(zip(cues, wanted, strict=True)):
        if i in failed:
            blocks.append(failed[i])
            continue
        if not fills:
            names = ", ".join(space.name for space in spaces)
            blocks.append(NothingObserved(f"nothing of this cue fills a space that is searched ({names})"))
            continue
        vectors = {
            name: cue.vectors[name] if filled_by == "vectors" else rows[i][name] for name, filled_by in fills.items()
        }
        masked = cue.picture is not None and cue.picture.observed is not None and "image" in fills.values()
        warnings = [*(cue.picture.warnings if cue.picture else ()), *dict.fromkeys(lost[i])]
        blocks.append(CueBlocks(vectors, modality_of(list(vectors), masked), warnings))
    return blocks


def encode_memories(live: LiveCollection, memories: Sequence[Parts]) -> list[CueBlocks | EngramError]:
    """As `encode_cues`, but a space is filled from its own source alone: a caption does not stand in for a picture."""
    spaces = list(live.spaces.values())
    wanted: list[dict[str, str]] = []
    for memory in memories:
        fills = {}
        for space in spaces:
            if space.name in memory.vectors:
                fills[space.name] = "vectors"
            elif (
                space.encoder is not None
                and getattr(memory, "picture" if space.config.source == "image" else "text") is not None
            ):
                fills[space.name] = space.config.source
        wanted.append(fills)
    rows, lost, failed = _encode(spaces, memories, wanted)
    blocks: list[CueBlocks | EngramError] = []
    for i, memory in enumerate(memories):
        if i in failed:
            blocks.append(failed[i])
            continue
        vectors = {
            name: memory.vectors[name] if filled_by == "vectors" else rows[i][name]
            for name, filled_by in wanted[i].items()
        }
        zero = [name for name, vector in vectors.items() if not vector.any()]
        if zero:
            blocks.append(InvalidVector(f"its vector in space {zero[0]} is zero, as if it lacked the space"))
        else:
            blocks.append(CueBlocks(vectors, modality_of(list(vectors), False), list(dict.fromkeys(lost[i]))))
    return blocks


def stack(cues: Sequence[CueBlocks]) -> dict[str, Tensor]:
    """Cues of one modality → space → (batch, dimension)."""
    return {name: torch.from_numpy(np.stack([cue.vectors[name] for cue in cues])) for name in cues[0].vectors}


def whole_state(live: LiveCollection, cue: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The state the cue starts from, (batch, d) with zero where nothing is observed, and which blocks are (batch,
    spaces).
    """
    first = next(iter(cue.values()))
    if len(live.spaces) == 1:
        return normalise_rows(first, live.blocks), None
    blocks = [cue.get(s.name, first.new_zeros(())).expand(first.shape[0], s.dimension) for s in live.spaces.values()]
    observed = torch.tensor([[name in cue for name in live.spaces]]).expand(first.shape[0], -1)
    return normalise_rows(torch.cat(blocks, dim=1), live.blocks), None if observed.all() else observed


def _filler(space: Space, cue: Parts) -> str | None:
    if space.name in cue.vectors:
        return "vectors"
    if space.encoder is None:
        return None
    if space.config.source == "image" and cue.picture is not None:
        return "image"
    if cue.text is not None and "text" in space.encoder.takes:
        return "text"
    return None


def _encode(
    spaces: Sequence[Space], parts: Sequence[Parts], wanted: Sequence[Mapping[str, str]]
) -> tuple[list[Vectors], list[list[str]], dict[int, EngramError]]:
    """Run each (encoder, source) once over all that need it; spaces that share an encoder share its rows.

    Returns the rows by space, what was lost, and the items that could not be encoded, with why.
    """
    users: dict[tuple[str, Source], list[Space]] = defaultdict(list)
    encoders: dict[str, Encoder] = {}
    for space in spaces:
        if space.encoder is not None:
            encoders[space.encoder.fingerprint] = space.encoder
            for source in SOURCES:
                users[space.encoder.fingerprint, source].append(space)
    rows: list[Vectors] = [{} for _ in parts]
    lost: list[list[str]] = [[] for _ in parts]
    failed: dict[int, EngramError] = {}
    for (fingerprint, source), sharing in users.items():
        needing = [i for i, fills in enumerate(wanted) if any(fills.get(space.name) == source for space in sharing)]
        for i, outcome in zip(needing, _run(encoders[fingerprint], source, [parts[i] for i in needing]), strict=True):
            if isinstance(outcome, EngramError):
                failed[i] = outcome
                continue
            vector, warnings = outcome
            rows[i].update({space.name: vector for space in sharing if wanted[i].get(space.name) == source})
            lost[i].extend(warnings)
    return rows, lost, failed


Row = tuple[NDArray[np.float32], tuple[str, ...]]


def _run(encoder: Encoder, source: Source, parts: Sequence[Parts]) -> list[Row | EngramError]:
    """One encoder over a batch. An encoder refuses a batch whole, so after a refusal each item is tried by itself."""
    if not parts:
        return []
    try:
        if source == "image":
            encoded = encoder.encode_images([part.picture for part in parts if part.picture is not None])
        else:
            encoded = encoder.encode_texts([part.text for part in parts if part.text is not None])
    except EngramError as error:
        return [error] if len(parts) == 1 else [row for part in parts for row in _run(encoder, source, [part])]
    return list(zip(encoded.vectors, encoded.warnings or [()] * len(parts), strict=True))
