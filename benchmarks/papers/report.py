"""A paper's report: tables and figures as one Markdown file, with how they came about in its head.

Rules:
- Numbers are formatted here alone. A cell of several numbers is one figure per seed: it prints as mean ± standard
  deviation (of the sample, n - 1).
- The head says the command, the size, the seeds, the machine, torch, the threads, and the seconds: of a clock, and of
  the processor, which other work on the machine does not lengthen.
- Figures are PNG files of a bounded size beside the Markdown: they are kept in the repository.
"""

from __future__ import annotations

import io
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from PIL import Image

Size = Literal["quick", "full"]
Cell = str | int | float | Sequence[float] | None

# Results are committed; a figure of this width needs no more.
FIGURE_BYTES_MAX = 200_000
_DPI = 110
_COLOURS = 64


class Report:
    """Collects a paper's text, tables and figures, and writes `out_dir/<slug>.md`."""

    def __init__(self, title: str, out_dir: Path, slug: str, size: Size, seed: int | Sequence[int]) -> None:
        self.title, self.out_dir, self.slug, self.size = title, out_dir, slug, size
        self.seeds = [seed] if isinstance(seed, int) else list(seed)
        self._parts: list[str] = []
        self._started, self._started_cpu = time.perf_counter(), time.process_time()
        out_dir.mkdir(parents=True, exist_ok=True)

    def seconds(self) -> float:
        """Since the report was begun."""
        return time.perf_counter() - self._started

    def progress(self, text: str) -> None:
        """One line for whoever waits."""
        print(f"[{self.slug} {self.seconds():5.0f} s] {text}", flush=True)

    def text(self, text: str) -> None:
        """A paragraph, or any Markdown."""
        self._parts.append(text.strip())

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, digits: int = 3) -> None:
        """`digits`: decimals of every float. Raises ValueError for a row of another length than the headers."""
        if wrong := [row for row in rows if len(row) != len(headers)]:
            raise ValueError(f"a row of {len(wrong[0])} cells under {len(headers)} headers: {wrong[0]}")
        numeric = [
            all(row[column] is None or not isinstance(row[column], str) for row in rows)
            for column in range(len(headers))
        ]
        lines = [
            "| " + " | ".join(headers) + " |",
            "|" + "|".join("--:" if right else "---" for right in numeric) + "|",
            *("| " + " | ".join(formatted(cell, digits) for cell in row) + " |" for row in rows),
        ]
        self._parts += [f"**{caption}**", "\n".join(lines)]

    def figure(self, name: str, figure: Figure, caption: str) -> Path:
        """Saves `<slug>-<name>.png` and shows it. Raises ValueError when it is over `FIGURE_BYTES_MAX`."""
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=_DPI, bbox_inches="tight")
        kept = io.BytesIO()
        Image.open(drawn).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(kept, "PNG", optimize=True)
        if kept.tell() > FIGURE_BYTES_MAX:
            raise ValueError(f"figure {name} has {kept.tell()} bytes, over {FIGURE_BYTES_MAX}")
        path = self.out_dir / f"{self.slug}-{name}.png"
        path.write_bytes(kept.getvalue())
        self._parts.append(f"![{caption}]({path.name})\n\n*{caption}*")
        return path

    def write(self) -> Path:
        """Writes the Markdown file, replacing the one before it."""
        path = self.out_dir / f"{self.slug}.md"
        path.write_text("\n\n".join([f"# {self.title}", self._head(), *self._parts]) + "\n", encoding="utf-8")
        return path

    def _head(self) -> str:
        lines = [
            ("command", f"`PAPERS={self.size} make papers-{self.slug}`"),
            ("seeds", ", ".join(map(str, self.seeds))),
            ("machine", f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"),
            ("software", f"torch {torch.__version__}, Python {platform.python_version()}"),
            ("seconds", f"{self.seconds():,.0f}, of the processor {time.process_time() - self._started_cpu:,.0f}"),
        ]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])


def formatted(cell: Cell, digits: int = 3) -> str:
    """A cell as the tables print it: text as it is, whole numbers with commas, floats with `digits` decimals (one alone
    in powers of ten where that shows nothing), several as mean ± standard deviation, nothing and NaN as a dash.
    """
    match cell:
        case None:
            return "–"
        case str():
            return cell.replace("|", r"\|")
        case int():
            return f"{cell:,}"
        case float():
            return _float(cell, digits)
    values = [float(value) for value in cell]
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return _float(mean, digits)
    return f"{mean:,.{digits}f} ± {statistics.stdev(values):,.{digits}f}"


def _float(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value and (abs(value) < 0.5 * 10**-digits or abs(value) >= 1e7):
        return f"{value:.1e}"
    return f"{value:,.{digits}f}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
