"""What a kernel is trained on and tried by: cues made from a collection's own memories.

Rules:
- Cues for the trial are drawn apart from those trained on, and no choice is judged on a cue that it was fitted on.
- Cues of the callers' vectors are drawn anew for each step of training; of originals, which take longer to make, a
  stock is made once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.app.comparison import Comparison, comparisons
from service.app.gates import SEED
from service.app.kernel_schemas import TrainKernel, TrialRow
from service.app.known_cues import Plan, draw
from service.app.live import LiveCollection, Space
from service.app.resources import Resources
from service.app.routes import Evidence, fit_choice, gather_evidence, halves
from service.bank import View
from service.core.kernel import Draw
from service.core.similarity import Blocks, Kernel
from service.encoders.corruption import Corruption, corrupt_vectors
from service.errors import TrainingRefused

VALUES_MAX = 2**25  # values (128 MB) of the patterns trained on, and of the cues
MEMORIES_MIN = 10  # fewer leave a batch without negatives worth the name
TRIAL_CUES = 400  # of each corruption: the share of a half is known to three points or so
MAKING_S_MAX = 120.0  # to make cues from originals: photographs take some 30 ms each
TRIAL_TURN, STOCK_TURN = 1_000, 2_000  # draws apart from each other and from a calibration's


def source_of(space: Space) -> str:
    """What cues of a space are made from."""
    return "vectors" if space.encoder is None else space.config.source


@dataclass(frozen=True, eq=False)
class Made:
    """Cues in one space, (n, d), the ids of their own memories, and which corruption made each."""

    vectors: Tensor
    owners: list[str]
    kinds: Tensor
    masked: Tensor


def _make(
    resources: Resources, live: LiveCollection, space: Space, kinds: Sequence[Corruption], ids: Sequence[str],
    most: int, turn: int, progress: Callable[[float], None],
) -> Made:  # fmt: skip
    """At most `most` cues of each corruption, from these memories."""
    source = source_of(space)
    vectors: list[Tensor] = []
    owners: list[str] = []
    made_by: list[int] = []
    masked: list[bool] = []
    for position, kind in enumerate(kinds):
        plan = Plan((source,), [kind], frozenset([space.name]) if source == "vectors" else frozenset())

        def on(share: float, position: int = position) -> None:
            progress((position + share) / len(kinds))

        drawn = draw(live, resources, ids, plan, most, turn + position, on, {space.name: 1.0})
        for modality, known in drawn.items():
            vectors.append(known.cues[space.name])
            owners += known.owners
            made_by += [position] * len(known.owners)
            masked += [modality.endswith(":masked")] * len(known.owners)
    joined = torch.cat(vectors) if vectors else torch.zeros(0, space.dimension)
    return Made(joined, owners, torch.tensor(made_by, dtype=torch.int64), torch.tensor(masked, dtype=torch.bool))


@dataclass(frozen=True, eq=False)
class Trial:
    """Held-out cues. `groups`: those that can be compared in the same ways, by whether a mask told what is missing."""

    kinds: Sequence[Corruption]
    space: Space
    cues: Made
    own: Tensor  # rows of the view
    seconds_per_cue: float

    def _groups(self) -> Iterator[tuple[bool, Tensor]]:
        for masked in (False, True):
            members = torch.nonzero(self.cues.masked == masked).flatten()
            if len(members):
                yield masked, members

    def evidence(
        self, live: LiveCollection, view: View, kernels: Mapping[str, Kernel]
    ) -> list[tuple[Tensor, tuple[Comparison, ...], Evidence]]:
        """Per group its cues, what compares them, and what that finds."""
        found = []
        for masked, members in self._groups():
            ways = comparisons(live, kernels, (self.space.name,), masked)
            cue = {self.space.name: self.cues.vectors[members]}
            found.append((members, ways, gather_evidence(ways, view, cue, {self.space.name: 1.0})))
        return found

    def alone(self, live: LiveCollection, view: View, space: Space, kernel: Kernel) -> Tensor:
        """(n,) whether a kernel by itself finds each cue's memory."""
        blocks = Blocks(
            live.blocks.widths, live.blocks.weights, live.similarity,
            tuple(kernel if name == space.name else None for name in live.spaces),
        )  # fmt: skip
        way = Comparison("kernel", blocks, kernels={space.name: kernel})
        found = way.search(view, {space.name: self.cues.vectors}, {space.name: 1.0}, 1)
        return found.rows[:, 0] == self.own

    def judge(
        self,
        before: list[tuple[Tensor, tuple[Comparison, ...], Evidence]],
        after: list[tuple[Tensor, tuple[Comparison, ...], Evidence]],
        white: Tensor,
    ) -> tuple[list[TrialRow], int]:
        """The table over the half of the cues that no choice was fitted on, and how many more of them are found."""
        count = len(self.own)
        tested, earlier, later, oracle = (torch.zeros(count, dtype=torch.bool) for _ in range(4))
        alone: dict[str, Tensor] = {"whitening": white}
        for (members, _, was), (_, ways, now) in zip(before, after, strict=True):
            fitting, testing = halves(len(members), SEED)
            own_rows = self.own[members]
            tested[members[testing]] = True
            for evidence, right_of in ((was, earlier), (now, later)):
                picked = fit_choice(evidence, own_rows, fitting).picked(evidence, testing)
                right_of[members[testing]] = evidence.right(own_rows)[testing, picked]
            right = now.right(own_rows)
            oracle[members] = right.any(dim=1)
            for column, way in enumerate(ways):
                alone.setdefault(way.name, torch.zeros(count, dtype=torch.bool))[members] = right[:, column]
        table = []
        for position, kind in enumerate(self.kinds):
            these = tested & (self.cues.kinds == position)
            if these.any():
                table.append(
                    TrialRow(
                        corruption=kind.describe(),
                        cues=int(these.sum()),
                        alone={name: _share(right, these) for name, right in alone.items()},
                        before=_share(earlier, these),
                        chosen=_share(later, these),
                        oracle=_share(oracle, these),
                    )
                )
        return table, int(later.sum()) - int(earlier.sum())

    def why(self, gained: int) -> str:
        if not len(self.own):
            return "no held-out cue could be made, so nothing shows that it is better"
        held_out = f"of {len(self.own) - len(self.own) // 2} held-out cues"
        if gained > 0:
            return f"{held_out} {gained} more find their memory with it than without"
        return f"{held_out} no more find their memory with it than without ({gained:+d})"


def make_trial(
    resources: Resources, live: LiveCollection, view: View, space: Space, kinds: Sequence[Corruption], rows: Tensor,
    progress: Callable[[float], None],
) -> Trial:  # fmt: skip
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED + 1))[:TRIAL_CUES]]
    began = time.monotonic()
    made = _make(resources, live, space, kinds, _ids(view, chosen), TRIAL_CUES, TRIAL_TURN, progress)
    seconds = (time.monotonic() - began) / max(1, len(made.owners))
    return Trial(kinds, space, made, view.rows_of(made.owners), seconds)


@dataclass(frozen=True, eq=False)
class Lesson:
    patterns: Tensor
    draw: Draw | None
    cues: int


def make_lesson(
    resources: Resources, live: LiveCollection, view: View, space: Space, request: TrainKernel,
    kinds: Sequence[Corruption], rows: Tensor, trial: Trial,
    before: list[tuple[Tensor, tuple[Comparison, ...], Evidence]], progress: Callable[[float], None],
) -> Lesson:  # fmt: skip
    """What to train on. Cues of the callers' vectors are drawn anew for each step; of originals, which take longer, a
    stock is made.
    """
    if request.objective != "cues":
        return Lesson(_patterns(live, view, space, rows), None, 0)
    need = _need(trial, before)
    if source_of(space) == "vectors":
        patterns = _patterns(live, view, space, rows)
        return Lesson(patterns, _fresh(patterns, kinds, need), 0)
    affordable = int(MAKING_S_MAX / max(trial.seconds_per_cue, 1e-6))
    most = max(MEMORIES_MIN, min(len(rows), VALUES_MAX // space.dimension // len(kinds), affordable // len(kinds)))
    stock = _make(resources, live, space, kinds, _ids(view, rows[:most]), most, STOCK_TURN, progress)
    places = {memory_id: place for place, memory_id in enumerate(dict.fromkeys(stock.owners))}
    kept = view.rows_of(places)
    if len(kept) < 2 or bool((kept < 0).any()):
        raise TrainingRefused(f"too few cues for the space {space.name} could be made from its memories' originals")
    owners = torch.tensor([places[memory_id] for memory_id in stock.owners])
    return Lesson(_patterns(live, view, space, kept), _from_stock(stock, owners, len(places), need), len(owners))


def _need(trial: Trial, before: list[tuple[Tensor, tuple[Comparison, ...], Evidence]]) -> Tensor:
    """(kinds,) how much each corruption is trained for: as often as no fixed comparison finds the memory, and a tenth
    for those that one always does.
    """
    solved = torch.zeros(len(trial.own), dtype=torch.bool)
    for members, ways, evidence in before:
        fixed = torch.tensor([way.name != "kernel" for way in ways])
        solved[members] = evidence.right(trial.own[members])[:, fixed].any(dim=1)
    missed = [1.0 - _share(solved, trial.cues.kinds == kind) for kind in range(len(trial.kinds))]
    return torch.tensor(missed) + 0.1


def _fresh(patterns: Tensor, kinds: Sequence[Corruption], need: Tensor) -> Draw:
    def draw_fresh(rows: Tensor, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        chosen = torch.multinomial(need, len(rows), replacement=True, generator=generator)
        cues = patterns[rows].clone()
        for position, kind in enumerate(kinds):
            some = chosen == position
            if some.any():
                cues[some] = torch.from_numpy(corrupt_vectors(cues[some].numpy(), kind, rng))
        return cues

    return draw_fresh


def _from_stock(stock: Made, owners: Tensor, memories: int, need: Tensor) -> Draw:
    table = torch.full((memories, len(need)), -1)
    table[owners, stock.kinds] = torch.arange(len(owners))

    def draw_from_stock(rows: Tensor, generator: torch.Generator) -> Tensor:
        there = table[rows] >= 0  # a corruption may have left nothing of a memory
        chosen = torch.multinomial(there * need, 1, generator=generator)
        return stock.vectors[table[rows].gather(1, chosen)[:, 0]]

    return draw_from_stock


def _patterns(live: LiveCollection, view: View, space: Space, rows: Tensor) -> Tensor:
    part = live.blocks.slices[list(live.spaces).index(space.name)]
    return torch.cat([view.gather(some[None])[0, :, part] for some in torch.split(rows, 1024)])


def _ids(view: View, rows: Tensor) -> list[str]:
    return [memory_id for line in view.ids(rows[:, None]) for memory_id in line if memory_id is not None]


def _share(right: Tensor, these: Tensor) -> float:
    return float(right[these].double().mean()) if bool(these.any()) else 0.0
