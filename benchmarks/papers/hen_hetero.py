"""HEN's hetero-association: a picture from its caption alone, and from a caption that two pictures share.

Strategy: a memory is its picture's code and its caption's, one after the other; a cue has the caption's alone. By dot
and L2 the two are compared as the encoders gave them, with zeros where the cue has no picture (the paper's section
3.2). Cosine is the product's: each block at unit length, the first step on the caption's alone, later ones on both.

Rules:
- Captions are unique, except where the figure breaks that.
- A caption is encoded by a sentence encoder (MiniLM), or drawn: its sha256 as a picture, through the picture's own
  encoder (the paper's appendix D).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from benchmarks.papers.hen_cues import whole
from benchmarks.papers.hen_encoders import Coded, at_hand
from benchmarks.papers.hen_findings import Answers, Findings, Hetero, Method, Sheet
from benchmarks.papers.hen_judge import judged
from benchmarks.papers.hen_recall import STEPS_MAX, Bank, Settled, settle
from benchmarks.papers.hen_sets import Pictures
from benchmarks.papers.report import Report
from service.core.names import Similarity
from service.encoders.minilm import MiniLM
from service.encoders.pixel_text import draw_hash
from service.encoders.protocol import Picture

SEED = 0
BROKEN_BETA = 500.0
PAIRS = 2


def measure(
    found: Findings,
    pictures: Pictures,
    sizes: Sequence[int],
    betas: Sequence[float],
    cues: int,
    drawn: int,
    report: Report,
) -> None:
    """Adds the table of captions and the figure of shared ones to what is found of a set."""
    sizes = sorted({min(rows, len(pictures)) for rows in sizes})
    pictures = pictures.take(slice(sizes[-1]))
    captions = pictures.captions or ()
    stored = whole(pictures.pixels)
    encoders, _ = at_hand(stored, pictures.colour)
    own = torch.from_numpy(np.random.default_rng(SEED).permutation(sizes[0])[:cues])
    sentences = torch.from_numpy(MiniLM(torch.get_num_threads()).encode(captions).vectors)
    hashes = [Picture(draw_hash(caption)) for caption in captions]
    for coded in encoders:
        report.progress(f"{pictures.name}: captions, {coded.name}")
        codes = torch.from_numpy(coded.encode(stored))
        texts = {"sentence (MiniLM)": sentences, "pixel_text": torch.from_numpy(coded.encode(hashes))}
        for name, said in texts.items():
            for rows in sizes:
                answers: dict[Method, Answers] = {}
                for similarity in ("dot", "neg_l2", "cosine"):
                    memories = Associated(codes[:rows], said[:rows], similarity)
                    settled = memories.recall(said[own], betas, pictures=drawn)
                    answers[Method(coded.name, similarity)] = judged(coded, memories.codes, settled, own.numpy(), betas)
                found.hetero.append(Hetero(rows, name, answers))
        if coded.name in ("raw pixels", "codec"):
            break_uniqueness(found, coded, codes[: sizes[0]], sentences[: sizes[0]])


class Associated:
    """Memories of a picture's code (n, k) and a caption's (n, m)."""

    def __init__(self, codes: Tensor, said: Tensor, similarity: Similarity) -> None:
        self.codes, self._similarity, self._width = codes, similarity, codes.shape[1]
        parts: tuple[Tensor, ...] = (codes, said)
        if similarity == "cosine":
            # Two unit blocks over √2: their inner product is the mean of the two cosines.
            parts = tuple(torch.nn.functional.normalize(part, dim=-1) / sqrt(2) for part in parts)
        self._bank = Bank.of(torch.cat(parts, dim=-1))

    def recall(self, said: Tensor, betas: Sequence[float], *, pictures: int, steps_max: int = STEPS_MAX) -> Settled:
        """From captions' codes (b, m) alone; codes of pictures are read out."""
        if self._similarity == "cosine":
            said = torch.nn.functional.normalize(said, dim=-1) / sqrt(2)
        cue = torch.cat([torch.zeros(len(said), self._width), said], dim=-1)
        products = self._bank.products(cue)
        by: Similarity = "dot" if self._similarity == "cosine" else self._similarity
        # At the cue, cosine is the caption's alone: twice its half.
        scored = 2 * products if self._similarity == "cosine" else self._bank.scores(products, by)
        return settle(self._bank, scored, cue, betas, by, pictures=pictures, values=self.codes, steps_max=steps_max)


def break_uniqueness(found: Findings, coded: Coded, codes: Tensor, said: Tensor) -> None:
    """HEN's figure 6: pairs of memories drawn at random get one caption, and that caption is asked for."""
    pairs = torch.from_numpy(np.random.default_rng(SEED).permutation(len(codes))[: 2 * PAIRS]).reshape(PAIRS, 2)
    said = said.clone()
    said[pairs[:, 1]] = said[pairs[:, 0]]
    sheet = found.sheets.setdefault("shared", Sheet(("one", "the other", "after one step", "settled"), [], []))
    for similarity in ("dot", "cosine"):
        memories = Associated(codes, said, similarity)
        step, settled = (
            memories.recall(said[pairs[:, 0]], (BROKEN_BETA,), pictures=PAIRS, steps_max=steps)
            for steps in (0, STEPS_MAX)
        )
        for number, pair in enumerate(pairs):
            latents = torch.stack([*codes[pair], step.recalled[0, number], settled.recalled[0, number]])
            sheet.rows.append(list(coded.decode(latents.numpy())))
            weights = f"{float(step.weight[0, number]):.2f}, {float(settled.weight[0, number]):.2f}"
            sheet.labels.append(f"{Method(coded.name, similarity).label}: largest weight {weights}")
