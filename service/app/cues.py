"""From what a caller sends to blocks: reading images, checking vectors, encoding in batches.

A cue fills the spaces that it can: an image those made from images, a text those whose encoder reads text, vectors
the spaces they name. `modality` names the filled spaces, and whether a mask hid part of the picture: a masked cue
is farther from its memory than a whole one, so it is calibrated apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.app.encoding import EncodeCache, Parts, Vectors, Wanted, content_of, encode
from service.app.live import LiveCollection, Space
from service.app.schemas import Cue
from service.bank import View
from service.core.similarity import MAGNITUDE_MAX, normalise_rows
from service.encoders.picture import read_picture
from service.encoders.protocol import Encoder, Source
from service.errors import (
    EmptyText,
    EngramError,
    InvalidVector,
    MemoryNotFound,
    NothingObserved,
    UnknownSpace,
    WrongDimension,
)

ENCODE_BATCH = 64  # enough to fill a model's batch, little to do again after a crash
PIXELS_AT_ONCE = 32 * 2**20  # decoded pixels held for one batch, the last picture aside: 100 MB


@dataclass(eq=False)
class CueBlocks:
    """The encoded cue: one raw vector per space it fills. `crossed`: the spaces that it fills from another source than
    memories do, as a text fills a joint space of pictures. `without`: a memory that it is not to recall, itself.
    """

    vectors: Vectors
    modality: str
    warnings: list[str]
    crossed: frozenset[str] = frozenset()
    without: str | None = None


def modality_of(spaces: Sequence[str], masked: bool) -> str:
    return "+".join(sorted(spaces)) + (":masked" if masked else "")


def read_parts(cue: Cue, live: LiveCollection, pixels_max: int) -> Parts:
    """Read and check one cue. Raises the `EngramError` that says what is wrong with it."""
    if cue.text is not None and not cue.text.strip():
        raise EmptyText("the text has no characters but spaces")
    vectors = {name: check_vector(vector, name, live) for name, vector in (cue.vectors or {}).items()}
    picture = content = None
    if cue.image is not None:
        files = (cue.image.base64, cue.mask.base64 if cue.mask else None)
        picture, content = read_picture(*files, pixels_max=pixels_max), content_of(*files)
    if picture is None and cue.text is None and not vectors:
        raise NothingObserved("the cue is empty: give it a text, an image or vectors")
    return Parts(picture, cue.text, vectors, content)


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
    live: LiveCollection,
    cues: Sequence[Parts],
    chosen: Mapping[str, float] | None,
    cache: EncodeCache | None = None,
) -> list[CueBlocks | EngramError]:
    """Encode a batch of cues for the `chosen` spaces (None: all of the collection's), each model called once per
    source.
    """
    spaces = [space for space in live.spaces.values() if chosen is None or space.name in chosen]
    fillers = [{space.name: by for space in spaces if (by := _filler(space, cue)) is not None} for cue in cues]
    wanted = [_wanted(live, fills) for fills in fillers]
    blocks: list[CueBlocks | EngramError] = []
    for cue, fills, outcome in zip(cues, fillers, encode(list(zip(cues, wanted, strict=True)), cache), strict=True):
        if isinstance(outcome, EngramError):
            blocks.append(outcome)
            continue
        if not fills:
            names = ", ".join(space.name for space in spaces)
            blocks.append(NothingObserved(f"nothing of this cue fills a space that is searched ({names})"))
            continue
        rows, lost = outcome
        vectors = {name: cue.vectors[name] if by == "vectors" else rows[name] for name, by in fills.items()}
        masked = cue.picture is not None and cue.picture.observed is not None and "image" in fills.values()
        warnings = [*(cue.picture.warnings if cue.picture else ()), *lost]
        crossed = {name for name, by in fills.items() if by not in ("vectors", live.spaces[name].config.source)}
        blocks.append(CueBlocks(vectors, modality_of(list(vectors), masked), warnings, frozenset(crossed)))
    return blocks


def cue_of_memory(
    live: LiveCollection, view: View, memory_id: str, chosen: Mapping[str, float] | None, *, exclude_self: bool
) -> CueBlocks:
    """A stored memory as a cue: its own patterns in the `chosen` spaces. Raises `MemoryNotFound`, `NothingObserved`."""
    row = view.rows_of([memory_id])
    if int(row[0]) < 0:
        raise MemoryNotFound(f"There is no memory {memory_id!r}.")
    searched = [name for name in live.spaces if chosen is None or name in chosen]
    one = torch.ones(1, 1)
    patterns = {name: view.read_out(row[None], one, name)[0].numpy() for name in searched}
    vectors = {name: pattern for name, pattern in patterns.items() if pattern.any()}
    if not vectors:
        raise NothingObserved(f"memory {memory_id} has no pattern in a space that is searched ({', '.join(searched)})")
    return CueBlocks(vectors, modality_of(list(vectors), False), [], without=memory_id if exclude_self else None)


def memory_wants(live: LiveCollection, parts: Parts, has_picture: bool) -> Wanted:
    """What encodes a memory: a space is filled from its own source alone, a caption does not stand in for a picture;
    and not where the memory brings the space's vector.
    """
    has = {"image": has_picture, "text": parts.text is not None}
    return {
        space.name: (space.encoder, space.config.source)
        for space in live.spaces.values()
        if space.encoder is not None and space.name not in parts.vectors and has[space.config.source]
    }


def encode_memories(
    memories: Sequence[tuple[Parts, Wanted]], cache: EncodeCache | None = None
) -> list[CueBlocks | EngramError]:
    """Encode memories, of several collections as it may be, for what each wants (`memory_wants`)."""
    blocks: list[CueBlocks | EngramError] = []
    for (memory, _), outcome in zip(memories, encode(memories, cache), strict=True):
        if isinstance(outcome, EngramError):
            blocks.append(outcome)
            continue
        vectors = {**memory.vectors, **outcome[0]}
        zero = [name for name, vector in vectors.items() if not vector.any()]
        if zero:
            blocks.append(InvalidVector(f"its vector in space {zero[0]} is zero, as if it lacked the space"))
        else:
            blocks.append(CueBlocks(vectors, modality_of(list(vectors), False), outcome[1]))
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


def _wanted(live: LiveCollection, fills: Mapping[str, str]) -> Wanted:
    wanted: dict[str, tuple[Encoder, Source]] = {}
    for name, filled_by in fills.items():
        encoder = live.spaces[name].encoder
        if filled_by != "vectors" and encoder is not None:
            wanted[name] = (encoder, "image" if filled_by == "image" else "text")
    return wanted
