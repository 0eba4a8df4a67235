"""What is asked of one encoder's codes of a set of pictures: answers at every β, ranks, overlaps, kernel memories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.papers.hen_cues import HOWS, Hidden, How, cued
from benchmarks.papers.hen_encoders import Coded
from benchmarks.papers.hen_findings import Answer, Asked, Findings, KernelMemories, Method, Overlap, Sheet
from benchmarks.papers.hen_judge import compared, judged
from benchmarks.papers.hen_kernel_memory import ROWS_MAX, TUNING_ROWS, KernelMemory, chosen
from benchmarks.papers.hen_recall import Bank, first_scores, settle
from service.core.diagnostics import relative_rank
from service.encoders.protocol import Picture

SEED = 0
HALF: Hidden = "half"
RANK_BETAS = (20.0, 60.0, 100.0, 500.0, 2_000.0)

# Other memories that each cue is compared with in the histograms.
OTHERS = 20

# Cues on the sheet of examples, and the β that they are recalled at.
EXAMPLES = 8
EXAMPLES_BETA = 500.0


@dataclass(frozen=True, eq=False)
class Measured:
    """One encoder's codes of a set, and what is asked of them. own: the cues' rows; stored: the set's pictures."""

    found: Findings
    coded: Coded
    bank: Bank
    own: NDArray[np.int64]
    stored: Sequence[Picture]

    def cues(self, hidden: Hidden, how: How, rows: NDArray[np.int64] | None = None) -> Tensor:
        chosen = self.own if rows is None else rows
        return torch.from_numpy(self.coded.encode(cued([self.stored[row] for row in chosen], hidden, how)))

    def asked(self, hidden: Hidden, betas_of: Mapping[int, Sequence[float]], pictures: int) -> None:
        """Answers by every similarity to both kinds of cue. betas_of: memories, ascending → the β asked for."""
        zeroed, masked = (self.cues(hidden, how) for how in HOWS)
        self._asked(hidden, "masked", masked, betas_of, pictures)
        if not torch.equal(zeroed, masked):
            self._asked(hidden, "zeroed", zeroed, betas_of, pictures)
            return
        # To raw pixels, black and hidden are one.
        for method in (Method(self.coded.name, similarity) for similarity in self.coded.similarities):
            for rows in betas_of:
                same, other = Asked(hidden, "masked", rows), Asked(hidden, "zeroed", rows)
                self.found.found[method][other] = self.found.found[method][same]
                self.found.first[method][other] = self.found.first[method][same]
        overlaps = self.found.overlaps[self.coded.name]
        overlaps[hidden, "zeroed"] = overlaps[hidden, "masked"]

    def _asked(
        self, hidden: Hidden, how: How, cues: Tensor, betas_of: Mapping[int, Sequence[float]], pictures: int
    ) -> None:
        products = self.bank.products(cues)
        self._overlap(hidden, how, cues, products[:, : min(betas_of)])
        for similarity in self.coded.similarities:
            method = Method(self.coded.name, similarity)
            scored = first_scores(self.bank, products, cues, similarity)
            for size, betas in betas_of.items():
                bank, some = self.bank.first(size), scored[:, :size].contiguous()
                settled = settle(bank, some, cues, betas, similarity, pictures=pictures)
                asked = Asked(hidden, how, size)
                answers = judged(self.coded, self.bank.patterns, settled, self.own, betas)
                self.found.found.setdefault(method, {})[asked] = answers
                self.found.first.setdefault(method, {})[asked] = float((settled.first.numpy() == self.own).mean())

    def _overlap(self, hidden: Hidden, how: How, cues: Tensor, products: Tensor) -> None:
        count = products.shape[1]
        lengths = torch.linalg.vector_norm(cues, dim=-1, keepdim=True).clamp_min(1e-12)
        cosines = products / self.bank.norms[:count] / lengths
        own = torch.from_numpy(self.own)[:, None]
        further = torch.from_numpy(np.random.default_rng(SEED).integers(1, count, (len(cues), OTHERS)))
        self.found.overlaps.setdefault(self.coded.name, {})[hidden, how] = Overlap(
            cosines.gather(1, own)[:, 0].numpy(), cosines.gather(1, (own + further) % count).reshape(-1).numpy()
        )

    def ranked(self, size: int) -> None:
        """HEN's figure 7: the rank of the cues, and of what is recalled step by step, over that of their memories; half
        masked, dot.
        """
        bank, cues = self.bank.first(size), self.cues(HALF, "masked")
        scored = first_scores(bank, bank.products(cues), cues, "dot")
        settled = settle(bank, scored, cues, RANK_BETAS, "dot", pictures=len(cues), trail=True)
        assert settled.trail is not None
        whole_rank, cue_rank = (relative_rank(rows).rank for rows in (bank.patterns[self.own], cues))
        self.found.ranks[self.coded.name] = {
            beta: [
                rank / whole_rank
                for rank in (cue_rank, *(relative_rank(after[number]).rank for after in settled.trail))
            ]
            for number, beta in enumerate(RANK_BETAS)
        }

    def kernel_memories(self, sizes: Sequence[int], pictures: int) -> None:
        """Kernel memory networks on this encoder's codes, their kernel chosen on cues of other memories. Of the sizes,
        those that hold the memories asked for, up to `ROWS_MAX`.
        """
        sizes = [size for size in sizes if self.own.max() < size <= min(ROWS_MAX, len(self.bank))]
        held = np.arange(min(TUNING_ROWS, sizes[0]))
        tuning = np.setdiff1d(held, self.own)[:pictures]

        def wrong(recalled: Tensor) -> float:
            return self._judged_states(recalled, tuning).dissimilarity

        shape = chosen(self.bank.patterns[: len(held)], self.cues(HALF, "masked", tuning), wrong)
        memories = KernelMemories(self.coded.name, shape, {}, {})
        for size in sizes:
            memory = KernelMemory(self.bank.patterns[:size], shape.scale, shape.power)
            drawn = self.own[:pictures]
            again = memory.recall(self.bank.patterns[drawn], 1)
            memories.kept[size] = float((again - self.bank.patterns[drawn]).abs().max())
            for how in HOWS:
                settled = memory.recall(self.cues(HALF, how, drawn), shape.steps)
                memories.by_rows[how, size] = self._judged_states(settled, drawn, size)
        self.found.kernels.append(memories)

    def _judged_states(self, states: Tensor, own: NDArray[np.int64], size: int | None = None) -> Answer:
        """States that no weights belong to: whose nearest memory counts as the heaviest."""
        safe = torch.nan_to_num(states.float(), nan=0.0, posinf=1e6, neginf=-1e6).clamp(-1e6, 1e6)
        bank = self.bank.first(size or len(self.bank))
        nearest = (bank.squares - 2 * bank.products(safe)).argmin(-1).numpy()
        dissimilarity, error = compared(self.coded.decode(safe.numpy()), self._drawn(own))
        share = float((nearest == own).mean())
        return Answer(dissimilarity, error, share, share, float("nan"))

    def drawn_examples(self, size: int) -> None:
        """A row for the sheet of examples: what this encoder's best-known use recalls of the first cues."""
        own = self.own[:EXAMPLES]
        sheet = self.found.sheets.setdefault("examples", Sheet(tuple(f"cue {n + 1}" for n in range(len(own))), [], []))
        cues = self.cues(HALF, "masked", own)
        bank = self.bank.first(size)
        if not sheet.rows:
            sheet.rows.append([picture.pixels for picture in cued([self.stored[row] for row in own], HALF, "zeroed")])
            sheet.labels.append("cue")
        sheet.rows.append(list(self._drawn(own)))
        sheet.labels.append(f"{self.coded.name}: stored")
        for similarity in self.coded.similarities:
            scored = first_scores(bank, bank.products(cues), cues, similarity)
            settled = settle(bank, scored, cues, (EXAMPLES_BETA,), similarity, pictures=len(own))
            sheet.rows.append(list(self.coded.decode(settled.recalled[0].numpy())))
            sheet.labels.append(f"recalled by {Method(self.coded.name, similarity).label.rpartition(', ')[2]}")

    def _drawn(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.coded.decode(self.bank.patterns[rows].numpy())
