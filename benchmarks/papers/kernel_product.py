"""The same cues through the product: pictures in a collection, a kernel trained by an operation, a client's recalls."""

from __future__ import annotations

import io
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import engram
from benchmarks.papers.data import Images
from benchmarks.papers.kernel_cues import MASKED, SIDE, UNDECLARED, corrupt, shown
from benchmarks.papers.report import Cell, Report, Size

SEED = 1
BATCH = 200
TRAIN_S = {"quick": 15, "full": 300}

# The declared kinds in the product's words. Pictures have no values under 0 or over 1, so noise is clipped.
CORRUPTIONS = [
    {"kind": "mask", "share": 0.5},
    {"kind": "missing_side", "side": "right", "share": 0.5},
    {"kind": "window", "share": 0.6},
    {"kind": "noise", "sigma": 0.5},
    {"kind": "blur", "sigma": 1.5 / SIDE},
]
SPACE = {"encoder": "pixels", "options": {"size": SIDE, "colour": False, "centre": False}}


def through_the_product(report: Report, images: Images, cues: int, size: Size) -> None:
    rows = torch.from_numpy(images.rows())
    generator = torch.Generator().manual_seed(SEED)
    judged = torch.randperm(len(rows), generator=generator)[:cues]
    with tempfile.TemporaryDirectory() as folder, engram.Client(path=folder) as client:
        collection = client.create_collection("images", {"image": SPACE}, corruptions=CORRUPTIONS)
        report.progress(f"product: storing {len(rows):,} pictures")
        collection.store({"id": str(i), "image": _png(row)} for i, row in enumerate(rows))
        collection.wait_until_calibrated(600)
        report.progress("product: training")
        operation = collection.train("kernel", space="image", time_limit_s=TRAIN_S[size])
        while operation.status in ("queued", "running"):
            time.sleep(0.5)
            operation = client.operation(operation.id)
        record = operation.result
        if record is None:
            raise RuntimeError(f"the training ended as {operation.status}: {operation.error}")
        _trial(report, record)
        table: list[list[Cell]] = []
        for kind in (*MASKED, "noise σ=.5, clipped", "blur σ=1.5", "noise σ=.5", *UNDECLARED[1:]):
            report.progress(f"product: {kind}")
            made = list(_cues(kind, rows[judged], generator))
            line: list[Cell] = [kind]
            for kernel in ("none", "auto"):
                answers = [
                    answer
                    for start in range(0, len(made), BATCH)
                    for answer in collection.recall_batch(made[start : start + BATCH], limit=1, kernel=kernel)
                ]
                own = [
                    bool(a.matches) and a.matches[0].id == str(i) for a, i in zip(answers, judged.tolist(), strict=True)
                ]
                line.append(sum(own) / len(own))
                line.append(sum(a.verdict in ("known", "ambiguous") for a in answers) / len(answers))
            picks = Counter(a.recall.compared_by for a in answers if a.recall is not None)
            line.append(", ".join(f"{name} {n / len(answers):.2f}" for name, n in picks.most_common()))
            table.append(line)
    report.text(
        f"## Pictures, through the product\n\n{len(rows):,} pictures in a collection with one space ({SPACE}), the "
        f"corruptions {CORRUPTIONS} declared, a kernel trained by `POST …/train` (kept: {record['kept']}; "
        f"{record['why']}; {record['steps']:,} steps in {record['seconds']:.0f} s). {cues:,} cues of each kind, "
        "recalled with `kernel: none` and `kernel: auto`; a masked cue comes with its mask. The last kinds were not "
        "declared. *let in*: verdict known or ambiguous (the target for declared kinds is .95)."
    )
    report.table(
        ["cue", "`none`: own first", "let in", "`auto`: own first", "let in", "compared by"], table,
        "Identity share and verdicts, pictures through the product", digits=3,
    )  # fmt: skip


def _trial(report: Report, record: dict[str, Any]) -> None:
    """The operation's own table: the half of its held-out cues that no choice was fitted on."""
    names = list(record["trial"][0]["alone"])
    rows: list[list[Cell]] = [
        [
            row["corruption"],
            row["cues"],
            *(row["alone"][name] for name in names),
            row["before"],
            row["chosen"],
            row["oracle"],
        ]
        for row in record["trial"]
    ]
    caption = "The training's own trial, as its record has it"
    report.table(["corruption", "cues", *names, "before", "with the kernel", "oracle"], rows, caption)


def _cues(kind: str, rows: Tensor, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Pictures; noise that no picture can hold goes as a vector."""
    if kind in MASKED:
        seen = shown(kind, len(rows), generator)
        yield from ({"image": _png(row), "mask": _png(~see)} for row, see in zip(rows, seen, strict=True))
        return
    changed = corrupt(kind, rows, generator)
    if kind == "noise σ=.5":
        yield from ({"vectors": {"image": row.numpy()}} for row in changed)
    else:
        yield from ({"image": _png(row)} for row in changed)


def _png(row: Tensor) -> bytes:
    file = io.BytesIO()
    pixels = np.rint(row.double().clamp(0, 1).reshape(SIDE, SIDE).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
