"""Drawing: states of a recall, decoded as picture files.

Rules:
- What is drawn are raw patterns under a state's weights, never a stored original: a mixture of memories is a mixture of
  pictures, and shows as one.
- Where none of the rows under the weights has the space that draws, nothing is drawn.
- What one answer may draw is bounded before any work is done.
"""

from __future__ import annotations

import weakref
from base64 import b64encode

import numpy as np
import torch
from torch import Tensor

from service.app.live import LiveCollection
from service.app.recall_schemas import Drawing
from service.bank import View
from service.encoders.picture import PictureFormat, write_picture
from service.encoders.protocol import Decoder
from service.errors import InvalidRequest

DRAWN_VALUES_MAX = 2**26
"""Values of all the pictures in one answer: 64 MiB before they are compressed, 85 MiB as base64 if nothing compresses.
A thousand cues with one picture each of up to 149 x 149; a hundred steps of one cue at 469 x 469."""

DECODED_AT_ONCE = 64
"""Latents decoded by one call: what a batch of encoding is, so that a model's memory is bounded alike both ways."""

_values_drawn: weakref.WeakKeyDictionary[Decoder, int] = weakref.WeakKeyDictionary()


def check_drawings(live: LiveCollection, count: int) -> None:
    """Refuse an answer of more pictures than `DRAWN_VALUES_MAX` allows. Raises `InvalidRequest`, saying how many it
    does. One picture is always allowed: the decoder that makes it is the operator's choice.
    """
    if live.decoder is None or count <= 1:
        return
    space, decoder = live.decoder
    if decoder not in _values_drawn:  # a decoder does not say how large it draws, so it is looked at once
        (picture,) = decoder.decode(np.zeros((1, live.layout.space(space).dimension), dtype=np.float32))
        _values_drawn[decoder] = picture.size
    most = max(1, DRAWN_VALUES_MAX // _values_drawn[decoder])
    if count > most:
        raise InvalidRequest(
            f"the answer may draw {count:,} pictures, and at most {most:,} of this collection's size fit in one: send "
            "fewer cues at once, or trace fewer steps (a trace draws update_steps_max + 1)"
        )


def draw(
    live: LiveCollection, view: View, rows: Tensor, weights: Tensor, picture_format: PictureFormat
) -> list[Drawing | None]:
    """The raw patterns of `rows` (batch, k) under `weights` (batch, k), decoded, one file each."""
    if live.decoder is None:
        return [None] * len(rows)
    space, decoder = live.decoder
    drawings: list[Drawing | None] = []
    for some_rows, some_weights in zip(
        torch.split(rows, DECODED_AT_ONCE), torch.split(weights, DECODED_AT_ONCE), strict=True
    ):
        latents = view.read_out(some_rows, some_weights, space)
        there = latents.any(dim=1)
        pictures = iter(decoder.decode(latents[there].numpy()) if bool(there.any()) else ())
        drawings += [_file(next(pictures), picture_format) if some else None for some in there.tolist()]
    return drawings


def draw_steps(
    live: LiveCollection, view: View, rows: Tensor, steps: Tensor, picture_format: PictureFormat
) -> list[Drawing | None]:
    """The states of one cue, of weights `steps` (times, k) over the same `rows` (k,)."""
    return draw(live, view, rows.expand(len(steps), -1), steps, picture_format)


def _file(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], picture_format: PictureFormat) -> Drawing:
    data = write_picture(pixels, picture_format)
    return {"media_type": f"image/{picture_format}", "base64": b64encode(data).decode()}
