"""What `engram recall` makes of an answer: a table, files, and with `--show` a picture on the screen.

Rules:
- What is shown stands side by side: the cue's picture, what was recalled (the settled state, decoded), and the stored
  originals of the first match, or of all between whom the cue does not decide. Of an unknown cue nothing was recalled:
  shown are the originals of what is nearest, under that name.
- A picture to look at is always a file first, and its path is printed; it is opened where there is a screen.
- Where there is nothing to write or to show, that is said, with why.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.client import Collection
from engram.replies import Recall
from engram.shown import shown_payload
from service.errors import ContentNotFound, NotWritable

COLOURS: dict[str | None, str] = {"known": "green", "ambiguous": "yellow", "unknown": "cyan", "uncalibrated": "magenta"}
TILE, GAP, LABEL = 320, 12, 24  # pixels: four pictures side by side fit a laptop's screen
ORIGINALS_SHOWN_MAX = 3  # of those between whom the cue does not decide
OPENING_S = 5.0  # an opener hands over to a viewer in less; one that is the viewer itself stays, and is let be


def print_answer(out: Console, answer: Recall) -> None:
    out.print(f"[bold {COLOURS[answer.verdict]}]{answer.verdict}[/]" + _because(answer))
    for warning in answer.warnings:
        out.print(f"[yellow]{escape(warning)}[/]")
    if answer.candidates:
        out.print(f"the cue does not decide between {escape(', '.join(answer.candidates))}")
    if answer.matches:
        out.print(_matches(answer))
    if answer.original is not None:
        out.print(f"original: {answer.original}", style="dim", soft_wrap=True)
    if answer.recall is not None:
        out.print(f"energy {energies(answer.recall.energy)} ({answer.recall.outcome}, β {answer.recall.beta:.1f})")
    out.print(" · ".join(f"{stage} {ms:.1f}" for stage, ms in answer.timings_ms.items()) + " ms", style="dim")


def _matches(answer: Recall) -> Table:
    compared = ""
    if answer.recall is not None:
        names = {"observed_neg_l2": "−L2 of what is shown"}
        compared = " and ".join(answer.recall.kernels) or names.get(
            answer.recall.compared_by, answer.recall.compared_by
        )
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("memory", overflow="fold")  # whole: it is copied
    table.add_column("weight", justify="right")
    table.add_column(f"similarity ({compared})", justify="right")
    with_text, with_payload = (any(m.text for m in answer.matches), any(m.payload for m in answer.matches))
    grouped = any(m.group is not None for m in answer.matches)
    for heading in ["group"] * grouped + ["caption"] * with_text + ["payload"] * with_payload:
        table.add_column(heading)
    for match in answer.matches:
        said = [str(match.group)] * grouped
        said += [match.text or ""] * with_text + [shown_payload(match.payload)] * with_payload
        table.add_row(escape(match.id), f"{match.weight:.3f}", f"{match.similarity:.3f}", *map(escape, said))
    return table


def energies(values: Sequence[float | None]) -> str:
    """The way of the energy; a dash where it is not known."""
    return " → ".join("–" if value is None else f"{value:.4f}" for value in values) or "–"


def _because(answer: Recall) -> str:
    if answer.gate is None:
        # Where a filter or a lack of cues is the reason, the reply's warnings say so.
        return "" if answer.matches or answer.warnings else ": nothing is stored"
    relation = "over" if answer.gate.score > answer.gate.threshold else "not over"
    return f": log S {answer.gate.score:.2f} is {relation} the threshold {answer.gate.threshold:.2f}"


# --- files ------------------------------------------------------------------------------------------------------------


def drawing_of(file: Path | None) -> dict[str, str]:
    """The format that a file's name asks for; PNG unless it says otherwise."""
    return {"format": "webp" if file is not None and file.suffix.lower() == ".webp" else "png"}


def save_recalled(out: Console, answer: Recall, file: Path) -> None:
    if answer.reconstruction is None:
        out.print(f"[yellow]nothing is written: {_why_no_picture(answer)}[/]")
        return
    _write(file, answer.reconstruction.data)
    out.print(f"recalled picture in {escape(str(file))}", soft_wrap=True)


def save_original(out: Console, collection: Collection, answer: Recall, file: Path) -> None:
    if not answer.matches:
        out.print("[yellow]nothing is written: there is no match[/]")
        return
    first = answer.matches[0].id
    _write(file, collection.content(first))
    out.print(f"original of {escape(first)} in {escape(str(file))}", soft_wrap=True)


def _why_no_picture(answer: Recall) -> str:
    return "an unknown cue recalls no picture" if answer.verdict == "unknown" else "what was recalled has no picture"


def _write(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise NotWritable(f"{file}: {error.strerror}") from None


# --- on the screen ----------------------------------------------------------------------------------------------------


def show(
    out: Console, collection: Collection, answer: Recall, cue: Path | None = None, mask: Path | None = None
) -> None:
    """Put what was recalled, and what it was recalled from, side by side; write that to a file, and open it."""
    tiles: list[tuple[str, Image.Image]] = []
    if answer.reconstruction is not None:
        tiles.append((f"recalled ({answer.verdict})", answer.reconstruction.image()))
    unknown = answer.verdict == "unknown"
    some = answer.candidates or tuple(match.id for match in answer.matches[: ORIGINALS_SHOWN_MAX if unknown else 1])
    for memory_id in some[:ORIGINALS_SHOWN_MAX]:
        try:
            original = Image.open(io.BytesIO(collection.content(memory_id)))
        except ContentNotFound:
            continue
        tiles.append((f"near: {memory_id}" if unknown else memory_id, original))
    if not tiles:
        out.print("[yellow]nothing is shown: no match has a picture[/]")
        return
    if unknown:
        out.print("[yellow]nothing was recalled; what is shown is only nearest[/]")
    if answer.reconstruction is not None and len(tiles) == 2:  # a codec draws squares, whatever it was shown
        label, drawn = tiles[0]
        width, height = tiles[1][1].size
        side = max(drawn.size) / max(width, height)
        tiles[0] = (label, drawn.resize((max(1, round(width * side)), max(1, round(height * side)))))
    if cue is not None:
        tiles.insert(0, ("cue", _as_sent(cue, mask)))
    try:
        handle, name = tempfile.mkstemp(prefix="engram-", suffix=".png")
        with os.fdopen(handle, "wb") as file:
            _side_by_side(tiles).save(file, "PNG")
    except OSError as error:
        raise NotWritable(f"a temporary file for the picture: {error.strerror or error}") from None
    out.print(f"picture in {escape(name)}{_opened(Path(name))}", soft_wrap=True)


def _as_sent(cue: Path, mask: Path | None) -> Image.Image:
    """The cue's picture, grey where the mask hides it."""
    picture = Image.open(cue).convert("RGB")
    if mask is None:
        return picture
    values = np.asarray(Image.open(mask).convert("L").resize(picture.size, Image.Resampling.NEAREST), dtype=np.int64)
    missing = Image.fromarray((2 * values > values.max()).astype(np.uint8) * 255)  # as the service reads a mask
    return Image.composite(Image.new("RGB", picture.size, "#dddddd"), picture, missing)


def _side_by_side(tiles: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    sheet = Image.new("RGB", (GAP + len(tiles) * (TILE + GAP), TILE + LABEL + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (label, picture) in enumerate(tiles):
        left = GAP + place * (TILE + GAP)
        scale = TILE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        fitted = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        sheet.paste(fitted, (left + (TILE - size[0]) // 2, GAP + (TILE - size[1]) // 2))
        while label and font.getlength(label) > TILE:
            label = label.rstrip("…")[:-1].rstrip() + "…" if len(label) > 2 else ""
        draw.text((left + TILE / 2, TILE + GAP + 6), label, "black", font, anchor="ma")
    return sheet


def _opened(file: Path) -> str:
    """Open a file for a person to look at; what is to be said of it."""
    command = _opener()
    if command is None:
        return " (no screen to open it on)"
    try:
        process = subprocess.Popen(
            [*command, str(file)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        code = process.wait(OPENING_S)
    except subprocess.TimeoutExpired:
        return ", opened"
    except OSError as error:
        return f" ({command[0]} did not start: {error.strerror})"
    return ", opened" if code == 0 else f" ({command[0]} could not open it: it ended with {code})"


def _opener() -> list[str] | None:
    if sys.platform == "darwin":
        return ["open"]
    if sys.platform == "win32":
        return ["cmd", "/c", "start", ""]
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return ["xdg-open"] if screen and shutil.which("xdg-open") else None
