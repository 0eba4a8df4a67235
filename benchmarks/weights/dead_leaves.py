"""Pictures with the statistics of photographs, drawn: dead leaves (Lee, Mumford and Huang 2001).

Strategy: opaque shapes fall on one another until they cover the sheet. Their radii follow r^-3 between two bounds,
which makes the picture scale invariant as photographs are; each has a colour, a shading, and a texture cut from 1/f^α
noise. Occlusion gives the edges, the power law the sizes, the noise what is inside them. Nobody's pictures are needed,
so there are as many as a training wants, and what is learnt from them is nobody's.

Rules:
- Every draw comes from the generator that is passed in.
- A sheet is drawn at twice its size and averaged down: edges are then as soft as a lens and a sensor make them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

RADIUS_MIN, RADIUS_MAX = 4.0, 500.0
"""Of a leaf, in pixels of the sheet as drawn. Smaller leaves vanish when it is averaged down."""

COVERED = 2.5
"""Leaves fall until their areas add up to this many sheets: little of what was there first still shows."""

LEAVES_MAX = 4000
"""On one sheet, however small they come out: bounds the time."""

# From RGB's luma and two chroma differences; leaves differ in luma first, as things do.
_TO_RGB = np.array([[1.0, 1.0, 1.0], [1.4, -0.71, 0.0], [0.0, -0.34, 1.77]])


def textures(draw: np.random.Generator, count: int, side: int) -> NDArray[np.float32]:
    """(count, side, side): noise of zero mean and unit deviation, spectrum f^-α, α from 0.8 to 2, some of it stretched
    along a direction.
    """
    down, across = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    fields = np.empty((count, side, side), dtype=np.float32)
    for i in range(count):
        angle, stretch = draw.uniform(0, np.pi), 2 ** draw.exponential(0.8)
        along = np.cos(angle) * down + np.sin(angle) * across
        other = np.cos(angle) * across - np.sin(angle) * down
        frequency = np.sqrt((along * stretch) ** 2 + (other / stretch) ** 2)
        frequency[0, 0] = np.inf
        spectrum = np.fft.rfft2(draw.standard_normal((side, side))) * frequency ** -draw.uniform(0.8, 2.0)
        field = np.fft.irfft2(spectrum, s=(side, side))
        fields[i] = (field - field.mean()) / field.std()
    return fields


def sheet(draw: np.random.Generator, side: int, fields: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(side, side, 3): one picture of leaves, with textures from `fields` (n, 2·side or more, the same)."""
    drawn = 2 * side
    height = fields.shape[1]
    # One picture's things share a light: its spread of brightness and of colour are drawn once.
    contrast, chroma, texture = draw.uniform(0.10, 0.34), draw.exponential(0.06), draw.exponential(0.07)
    middle = draw.uniform(0.25, 0.65)
    high, low = (RADIUS_MIN * 2 ** draw.uniform(0, 4)) ** -2, RADIUS_MAX**-2
    radii = draw.uniform(low, high, LEAVES_MAX) ** -0.5  # the inverse of r^-3's distribution
    count = int(np.searchsorted(np.cumsum(np.pi * radii**2), COVERED * drawn**2)) + 1
    canvas = np.empty((drawn, drawn, 3), dtype=np.float32)
    # The ground is a leaf that covers all.
    for radius in (np.inf, *radii[:count]):
        mask, top, left = _leaf(draw, radius, drawn)
        if mask is None:
            continue
        rows, columns = mask.shape
        field = fields[draw.integers(len(fields))]
        down, across = draw.integers(height - rows + 1), draw.integers(height - columns + 1)
        grain = field[down : down + rows, across : across + columns]
        luma = middle + contrast * draw.standard_normal()
        colour = np.array([luma, *(chroma * draw.standard_normal(2))]) @ _TO_RGB
        tint = np.array([1.0, *draw.normal(0, 0.15, 2)]) @ _TO_RGB
        slope = draw.normal(0, 0.08, 2)
        shade = slope[0] * np.linspace(-1, 1, rows)[:, None] + slope[1] * np.linspace(-1, 1, columns)[None, :]
        amount = texture * draw.exponential(1.0)
        paint = colour + ((amount * grain + shade)[..., None] * tint)
        target = canvas[top : top + rows, left : left + columns]
        np.copyto(target, paint.astype(np.float32), where=mask[..., None])
    small = canvas.clip(0, 1).reshape(side, 2, side, 2, 3).mean(axis=(1, 3))
    drawn_small: NDArray[np.uint8] = np.rint(small * 255).astype(np.uint8)
    return drawn_small


def _leaf(draw: np.random.Generator, radius: float, side: int) -> tuple[NDArray[np.bool_] | None, int, int]:
    """A leaf's mask, cut at the sheet's border, and its place: an ellipse or a polygon of 3 to 6 corners."""
    if np.isinf(radius):
        return np.ones((side, side), dtype=np.bool_), 0, 0
    centre = draw.uniform(-radius / 2, side + radius / 2, 2)
    corners = int(draw.integers(2, 7))
    if corners == 2:
        angles = np.linspace(0, 2 * np.pi, 12 if radius < 12 else 40, endpoint=False)
    else:
        angles = (np.arange(corners) + draw.uniform(-0.3, 0.3, corners)) * (2 * np.pi / corners)
    aspect, turn = 2 ** draw.normal(0, 0.5), draw.uniform(0, 2 * np.pi)
    x, y = radius * aspect**0.5 * np.cos(angles), radius * aspect**-0.5 * np.sin(angles)
    down, across = centre[0] + x * np.sin(turn) + y * np.cos(turn), centre[1] + x * np.cos(turn) - y * np.sin(turn)
    top, left = max(0, int(down.min())), max(0, int(across.min()))
    bottom, right = min(side, int(down.max()) + 1), min(side, int(across.max()) + 1)
    if bottom - top < 1 or right - left < 1:
        return None, 0, 0
    image = Image.new("1", (right - left, bottom - top))
    ImageDraw.Draw(image).polygon([(a - left, d - top) for a, d in zip(across, down, strict=True)], fill=1)
    return np.asarray(image), top, left
