"""The contact sheet: every shown cue with what came back, as one PNG.

Drawn at twice its size and reduced, so that type and round corners are smooth. The type is the one inside Pillow.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engram.demo.cues import Cue
from engram.demo.data import proportions
from engram.demo.report import Shown
from engram.replies import Recall

WIDTH = 1200  # pixels of the finished sheet: a README's column, and readable on a laptop
SCALE = 2
MARGIN, GUTTER, PADDING = 36, 20, 16
COLUMNS = 2
CARD_WIDTH = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GUTTER) // COLUMNS
TILE = 148
ARROW = 30
CARD_HEIGHT = 2 * PADDING + 30 + TILE
MATCHES = 3

PAPER, CARD, INK, MUTED, LINE, TILE_BACK = "#f4f2ee", "#ffffff", "#1d2129", "#737985", "#e2dfd8", "#eceae5"
VERDICTS: dict[str | None, str] = {
    "known": "#1f7a4d",
    "ambiguous": "#b26a00",
    "unknown": "#5b6472",
    "uncalibrated": "#8a3ab9",
}
WRONG = "#c0392b"


class Sheet:
    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, words: str, size: int, fill: str = INK, *, bold: bool = False, anchor: str = "la"
    ) -> None:
        font = ImageFont.load_default(size * SCALE)
        stroke = 0.6 * SCALE * size / 20 if bold else 0
        self._draw.text((x * SCALE, y * SCALE), words, fill, font, anchor, stroke_width=stroke, stroke_fill=fill)

    def width(self, words: str, size: int) -> float:
        return ImageFont.load_default(size * SCALE).getlength(words) / SCALE

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str | None,
        radius: float = 0,
        outline: str | None = None,
    ) -> None:
        corners = tuple(round(v * SCALE) for v in (x, y, x + width, y + height))
        self._draw.rounded_rectangle(corners, radius * SCALE, fill, outline, SCALE if outline else 0)

    def line(self, points: Sequence[tuple[float, float]], fill: str, width: float) -> None:
        self._draw.line([(x * SCALE, y * SCALE) for x, y in points], fill, round(width * SCALE), joint="curve")

    def picture(self, picture: Image.Image, x: float, y: float, side: int, aspect: float | None = None) -> None:
        """`picture` whole and centred in a square, stretched to `aspect` (width / height); a small one keeps square
        pixels.
        """
        picture = picture.convert("RGBA")
        aspect = aspect or picture.width / picture.height
        size = (round(side * SCALE * min(1.0, aspect)), round(side * SCALE * min(1.0, 1 / aspect)))
        way = Image.Resampling.NEAREST if max(picture.size) <= 32 else Image.Resampling.LANCZOS
        picture = picture.resize(size, way)
        corner = (round(x * SCALE) + (side * SCALE - size[0]) // 2, round(y * SCALE) + (side * SCALE - size[1]) // 2)
        self.image.paste(picture, corner, picture)


def draw_sheet(groups: Mapping[str, Sequence[Shown]], subtitle: str, counts: Sequence[str], path: Path) -> None:
    """Write the sheet to `path`: a heading per group, two cards a row, the counts under them."""
    rows = sum(-(-len(group) // COLUMNS) for group in groups.values())
    head, heading = 104, 46
    height = head + heading * len(groups) + rows * (CARD_HEIGHT + GUTTER) + 60 + 26 * len(counts) + MARGIN
    sheet = Sheet(height)
    sheet.text(MARGIN, 34, "Engram", 34, bold=True)
    sheet.text(MARGIN, 76, subtitle, 16, MUTED)
    y = float(head)
    for title, group in groups.items():
        sheet.text(MARGIN, y + 12, title, 20, bold=True)
        y += heading
        for index, shown in enumerate(group):
            column = index % COLUMNS
            _card(sheet, MARGIN + column * (CARD_WIDTH + GUTTER), y, shown)
            if column == COLUMNS - 1 or index == len(group) - 1:
                y += CARD_HEIGHT + GUTTER
    sheet.text(MARGIN, y + 12, "Counted, not chosen", 20, bold=True)
    for index, line in enumerate(counts):
        sheet.text(MARGIN, y + 48 + 26 * index, line, 16)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.image.resize((WIDTH, height), Image.Resampling.LANCZOS).save(path, "PNG", optimize=True)


def _card(sheet: Sheet, x: float, y: float, shown: Shown) -> None:
    cue, recall = shown.cue, shown.recall
    sheet.box(x, y, CARD_WIDTH, CARD_HEIGHT, CARD, 12, LINE)
    title = cue.title if cue.own is None else f"{_label(cue)}, {cue.title}"
    sheet.text(x + PADDING, y + PADDING - 2, title, 16, bold=True)
    top = y + PADDING + 30
    left = x + PADDING
    _cue_tile(sheet, left, top, cue)
    middle, tip = top + TILE / 2, left + TILE + ARROW - 6
    sheet.line([(left + TILE + 7, middle), (tip, middle)], MUTED, 1.6)
    sheet.line([(tip - 6, middle - 5), (tip, middle), (tip - 6, middle + 5)], MUTED, 1.6)
    _answer_tile(sheet, left + TILE + ARROW, top, recall)
    _verdict(sheet, left + 2 * TILE + ARROW + PADDING, top, shown)


def _label(cue: Cue) -> str:
    return f"{cue.collection[:-1]} {cue.own}" if cue.collection != "photos" else str(cue.own)


def _cue_tile(sheet: Sheet, x: float, y: float, cue: Cue) -> None:
    sheet.box(x, y, TILE, TILE, TILE_BACK, 6)
    if cue.image is not None:
        sheet.picture(_seen(cue.image, cue.mask), x, y, TILE)
        return
    lines = textwrap.wrap(f"“{cue.text}”", 16, break_on_hyphens=False)
    first = y + TILE / 2 - 11 * (len(lines) - 1)
    for index, line in enumerate(lines):
        sheet.text(x + TILE / 2, first + 22 * index, line, 16, anchor="mm")


def _seen(image: bytes, mask: bytes | None) -> Image.Image:
    """The cue's picture, see-through with a fine hatch where the mask hides it."""
    picture = Image.open(io.BytesIO(image)).convert("RGBA")
    if mask is None:
        return picture
    hidden = np.asarray(Image.open(io.BytesIO(mask)).convert("L")) > 0
    rows, columns = np.indices(hidden.shape)
    period = max(2, max(hidden.shape) // 24)
    stripe = ((rows + columns) // (period // 2)) % 2 == 0
    pixels = np.array(picture)
    pixels[hidden & stripe] = (205, 202, 195, 255)
    pixels[hidden & ~stripe] = (0, 0, 0, 0)
    return Image.fromarray(pixels)


def _answer_tile(sheet: Sheet, x: float, y: float, recall: Recall) -> None:
    sheet.box(x, y, TILE, TILE, TILE_BACK, 6)
    picture = recall.image()
    if picture is not None:
        width, height = proportions(recall.matches[0].id) or picture.size
        sheet.picture(picture, x, y, TILE, width / height)
        return
    sheet.text(x + TILE / 2, y + TILE / 2, "nothing comes back", 14, MUTED, anchor="mm")


def _verdict(sheet: Sheet, x: float, y: float, shown: Shown) -> None:
    recall = shown.recall
    words = str(recall.verdict).upper()
    width = sheet.width(words, 13) + 22
    sheet.box(x, y, width, 24, VERDICTS[recall.verdict], 12)
    sheet.text(x + width / 2, y + 12.5, words, 13, "#ffffff", anchor="mm")
    sheet.text(
        x + width + 10, y + 12.5, "right" if shown.right else "wrong", 14,
        VERDICTS["known"] if shown.right else WRONG, anchor="lm",
    )  # fmt: skip
    bar = LINE if recall.verdict == "unknown" else VERDICTS[recall.verdict]
    room = CARD_WIDTH - 3 * PADDING - 2 * TILE - ARROW
    for index, match in enumerate(recall.matches[:MATCHES]):
        line = y + 38 + 26 * index
        ink = INK if index == 0 and recall.verdict != "unknown" else MUTED
        sheet.text(x, line, match.id, 14, ink)
        sheet.text(x + room, line, f"{match.weight:.2f}", 14, ink, anchor="ra")
        sheet.box(x, line + 18, room, 3, TILE_BACK)
        if match.weight > 0.005:
            sheet.box(x, line + 18, room * match.weight, 3, bar)
    if recall.gate is not None:
        relation = ">" if recall.gate.score > recall.gate.threshold else "<"
        sheet.text(x, y + 118, f"gate {recall.gate.score:.1f} {relation} {recall.gate.threshold:.1f}", 13, MUTED)
    sheet.text(x, y + 135, f"{recall.timings_ms['total']:.0f} ms", 13, MUTED)
