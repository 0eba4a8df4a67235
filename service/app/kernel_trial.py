"""What a kernel is trained on and tried by: cues made from a collection's own memories.

Rules:
- Cues for the trial are draws apart from those trained on (of a corruption without chance, as blur, a memory's cue is
  always the same), and no choice is judged on a cue that it was fitted on. They fill every space that such cues fill in
  the collection, and are compared as its recalls would.
- Cues of the callers' vectors are drawn anew for each step of training; of originals, which take longer to make, a
  stock is made once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.app.calibrate import CUES_MAX
from service.app.comparison import Comparison, comparisons
from service.app.gates import SEED
from service.app.kernel_schemas import TrainKernel, TrialRow
from service.app.known_cues import KnownCues, Plan, draw, ids_at
from service.app.live import LiveCollection, Space
from service.app.resources import Resources
from service.app.routes import Evidence, fit_choice, gather_evidence, halves, picked_min
from service.bank import View
from service.core.kernel import Draw
from service.core.similarity import Kernel
from service.encoders.corruption import Corruption, corrupt_vectors
from service.errors import TrainingRefused

VALUES_MAX = 2**25  # values (128 MB) of the patterns trained on, and of the cues
MEMORIES_MIN = 10  # fewer leave a batch without negatives worth the name
TRIAL_CUES = 400  # of each corruption: the share of a half is known to three points or so
FITTED_MIN = 4  # cues; under so few a choice is noise, and the collection's own similarity is taken
SEARCHED_AT_ONCE = 64  # cues searched for between two beats
CHANCE_MAX = 0.05  # a kernel that is no better is kept once in so many trainings at most
MAKING_S_MAX = 120.0  # to make cues from originals: photographs take some 30 ms each
TRIAL_TURN, STOCK_TURN = 1_000, 2_000  # draws apart from each other and from a calibration's


def source_of(space: Space) -> str:
    """What cues of a space are made from."""
    return "vectors" if space.encoder is None else space.config.source


@dataclass(frozen=True, eq=False)
class Group:
    """Cues of one modality, space → (n, d), the ids of their own memories, and which corruption made each (n,)."""

    modality: str
    cues: dict[str, Tensor]
    owners: list[str]
    kinds: Tensor

    def ways(self, live: LiveCollection, kernels: Mapping[str, Kernel], raw: bool = False) -> tuple[Comparison, ...]:
        return comparisons(live, kernels, tuple(self.cues), self.modality.endswith(":masked"), raw)


def _make(
    resources: Resources, live: LiveCollection, space: Space, kinds: Sequence[Corruption], ids: Sequence[str],
    most: int, turn: int, chosen: Mapping[str, float] | None, progress: Callable[[float], None],
) -> list[Group]:  # fmt: skip
    """At most `most` cues of each corruption, from these memories, filling the spaces `chosen` (None: all they can)."""
    source = source_of(space)
    made: dict[str, list[tuple[int, KnownCues]]] = {}
    for position, kind in enumerate(kinds):
        plan = Plan((source,), [kind], frozenset([space.name]) if source == "vectors" else frozenset())

        def on(share: float, position: int = position) -> None:
            progress((position + share) / len(kinds))

        for modality, known in draw(live, resources, ids, plan, most, turn + position, on, chosen).items():
            if space.name in known.cues:
                made.setdefault(modality, []).append((position, known))
    return [
        Group(
            modality,
            {name: torch.cat([known.cues[name] for _, known in some]) for name in some[0][1].cues},
            [owner for _, known in some for owner in known.owners],
            torch.tensor([position for position, known in some for _ in known.owners]),
        )
        for modality, some in made.items()
    ]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a trial found: its table; of the cues tested how many are found with the kernel and not before (`won`),
    before and not with it (`lost`), and how many more with it than by a choice among the other comparisons
    (`own_gain`).
    """

    table: list[TrialRow]
    tested: int
    won: int
    lost: int
    own_gain: int

    @property
    def better(self) -> bool:
        """By the sign test on the cues that only one of the two finds: chance gives as many with a probability under
        `CHANCE_MAX`.
        """
        differ = self.won + self.lost
        tail = sum(math.comb(differ, k) for k in range(self.won, differ + 1))
        return self.won > self.lost and tail <= CHANCE_MAX * 2**differ

    @property
    def why(self) -> str:
        if not self.tested:
            return "no held-out cue could be made, so nothing shows that it is better"
        found = f"of {self.tested} held-out cues {self.won} are found with it that were not, and {self.lost} no longer"
        if not self.better:
            return f"{found}: no more than chance would have it"
        return f"{found}; the kernel itself makes {self.own_gain:+d} of that, raw distances beside it the rest"


@dataclass(frozen=True, eq=False)
class Trial:
    """Held-out cues, in the modalities that such cues have in this collection."""

    kinds: Sequence[Corruption]
    space: Space
    groups: list[Group]
    seconds_per_cue: float

    def judge(
        self, live: LiveCollection, view: View, before: Mapping[str, Kernel], after: Mapping[str, Kernel],
        white: Kernel, beat: Callable[[], None],
    ) -> Verdict:  # fmt: skip
        """Search by every comparison, with the kernels of before and after; judge on the half of the cues that no
        choice was fitted on.
        """
        columns: dict[str, list[Tensor]] = {name: [] for name in ("kinds", "before", "others", "chosen", "oracle")}
        alone: list[dict[str, Tensor]] = []
        for group in self.groups:
            own = view.rows_of(group.owners)
            there = torch.nonzero(own >= 0).flatten()
            own, cues = own[there], {name: block[there] for name, block in group.cues.items()}
            fitting, testing = halves(len(own), SEED)
            columns["kinds"].append(group.kinds[there][testing])
            ways = group.ways(live, after)
            evidence = _evidence(live, ways, view, cues, beat)
            right = evidence.right(own)[testing]
            columns["oracle"].append(right.any(dim=1))
            columns["chosen"].append(_chosen(evidence, own, fitting, testing, live))
            for name, kernels, raw in (("before", before, False), ("others", before, True)):
                earlier = _evidence(live, group.ways(live, kernels, raw), view, cues, beat)
                columns[name].append(_chosen(earlier, own, fitting, testing, live))
            whitened = group.ways(live, {self.space.name: white})[1]
            found = {"whitening": _evidence(live, [whitened], view, cues, beat).right(own)[testing, 0]}
            alone.append(found | {way.name: right[:, column] for column, way in enumerate(ways)})
        return self._verdict(columns, alone)

    def _verdict(self, columns: dict[str, list[Tensor]], alone: list[dict[str, Tensor]]) -> Verdict:
        if not self.groups:
            return Verdict([], 0, 0, 0, 0)
        joined = {name: torch.cat(parts) for name, parts in columns.items()}
        by = {
            name: torch.cat(
                [
                    group[name].double() if name in group else torch.full((len(kinds),), torch.nan, dtype=torch.float64)
                    for group, kinds in zip(alone, columns["kinds"], strict=True)
                ]
            )
            for name in dict.fromkeys(name for group in alone for name in group)  # NaN: not used for these cues
        }
        table = []
        for position, kind in enumerate(self.kinds):
            these = joined["kinds"] == position
            if bool(these.any()):
                shares = {name: float(found[these].double().mean()) for name, found in by.items()}
                table.append(
                    TrialRow(
                        corruption=kind.describe(),
                        cues=int(these.sum()),
                        alone={name: None if math.isnan(share) else share for name, share in shares.items()},
                        before=_share(joined["before"], these),
                        others=_share(joined["others"], these),
                        chosen=_share(joined["chosen"], these),
                        oracle=_share(joined["oracle"], these),
                    )
                )
        before, others, chosen = joined["before"], joined["others"], joined["chosen"]
        return Verdict(
            table, len(chosen), int((chosen & ~before).sum()), int((before & ~chosen).sum()),
            int(chosen.sum()) - int(others.sum()),
        )  # fmt: skip


def _evidence(
    live: LiveCollection, ways: Sequence[Comparison], view: View, cues: Mapping[str, Tensor], beat: Callable[[], None]
) -> Evidence:
    """As `gather_evidence`, with a beat between parts of it."""
    weights = live.weights_of(cues)
    count = len(next(iter(cues.values())))
    parts = []
    for start in range(0, max(count, 1), SEARCHED_AT_ONCE):
        beat()
        some = {name: block[start : start + SEARCHED_AT_ONCE] for name, block in cues.items()}
        parts.append(gather_evidence(ways, view, some, weights))
    return Evidence(
        [], torch.cat([part.nearest for part in parts]), torch.cat([part.first for part in parts]),
        torch.cat([part.second for part in parts]),
    )  # fmt: skip


def _chosen(evidence: Evidence, own: Tensor, fitting: Tensor, testing: Tensor, live: LiveCollection) -> Tensor:
    """Whether the choice, fitted on one part of the cues, finds each of the other's memory."""
    right = evidence.right(own)[testing]
    if evidence.nearest.shape[1] == 1 or len(fitting) < FITTED_MIN:
        return right[:, 0]
    # A comparison that would be left out of the collection's recalls is left out here.
    served = picked_min(live.config.gate.target_tpr) / (CUES_MAX // 2)
    fitted = fit_choice(evidence, own, fitting, int(served * len(fitting)))
    return right.gather(1, fitted.picked(evidence, testing)[:, None])[:, 0]


def make_trial(
    resources: Resources, live: LiveCollection, view: View, space: Space, kinds: Sequence[Corruption], rows: Tensor,
    progress: Callable[[float], None],
) -> Trial:  # fmt: skip
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED + 1))[:TRIAL_CUES]]
    began = time.monotonic()
    groups = _make(resources, live, space, kinds, ids_at(view, chosen), TRIAL_CUES, TRIAL_TURN, None, progress)
    made = sum(len(group.owners) for group in groups)
    return Trial(kinds, space, groups, (time.monotonic() - began) / max(1, made))


@dataclass(frozen=True, eq=False)
class Lesson:
    """What to train on: `cues` is their number, 0 where they are drawn anew for each step, or not used."""

    patterns: Tensor
    draw: Draw | None
    cues: int


def make_lesson(
    resources: Resources, live: LiveCollection, view: View, space: Space, request: TrainKernel,
    kinds: Sequence[Corruption], rows: Tensor, trial: Trial, progress: Callable[[float], None],
) -> Lesson:  # fmt: skip
    """What to train on. Raises `TrainingRefused` where too few cues can be made."""
    if request.objective != "cues":
        return Lesson(_patterns(live, view, space, rows), None, 0)
    need = _need(live, view, trial, lambda: progress(0.0))
    if source_of(space) == "vectors":
        patterns = _patterns(live, view, space, rows)
        return Lesson(patterns, _fresh(patterns, kinds, need), 0)
    affordable = int(MAKING_S_MAX / max(trial.seconds_per_cue, 1e-6))
    most = max(MEMORIES_MIN, min(len(rows), VALUES_MAX // space.dimension // len(kinds), affordable // len(kinds)))
    stock = _make(
        resources, live, space, kinds, ids_at(view, rows[:most]), most, STOCK_TURN, {space.name: 1.0}, progress
    )
    owners = [owner for group in stock for owner in group.owners]
    places = {memory_id: place for place, memory_id in enumerate(dict.fromkeys(owners))}
    kept = view.rows_of(places)
    if len(kept) < 2 or bool((kept < 0).any()):
        raise TrainingRefused(f"too few cues for the space {space.name} could be made from its memories' originals")
    vectors = torch.cat([group.cues[space.name] for group in stock])
    table = torch.full((len(places), len(kinds)), -1)
    made_by = torch.cat([group.kinds for group in stock])
    table[torch.tensor([places[owner] for owner in owners]), made_by] = torch.arange(len(owners))
    return Lesson(_patterns(live, view, space, kept), _from_stock(vectors, table, need), len(owners))


def _need(live: LiveCollection, view: View, trial: Trial, beat: Callable[[], None]) -> Tensor:
    """(kinds,) how much each corruption is trained for: as often as no comparison but a kernel finds the memory, and a
    tenth for those that one always does. Taken from the half of the trial's cues that it is not judged on.
    """
    missed = torch.zeros(len(trial.kinds), dtype=torch.float64)
    count = torch.zeros(len(trial.kinds), dtype=torch.float64)
    for group in trial.groups:
        own = view.rows_of(group.owners)
        fitting, _ = halves(len(own), SEED)
        cues = {name: block[fitting] for name, block in group.cues.items()}
        solved = _evidence(live, group.ways(live, {}, raw=True), view, cues, beat).right(own[fitting]).any(dim=1)
        missed.index_add_(0, group.kinds[fitting], (~solved).double())
        count.index_add_(0, group.kinds[fitting], torch.ones(len(fitting), dtype=torch.float64))
    return (missed / count.clamp_min(1.0)).float() + 0.1


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


def _from_stock(vectors: Tensor, table: Tensor, need: Tensor) -> Draw:
    """`table` (memories, kinds): where in `vectors` the cue of each is, -1 where a corruption left nothing of it."""

    def draw_from_stock(rows: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial((table[rows] >= 0) * need, 1, generator=generator)
        return vectors[table[rows].gather(1, chosen)[:, 0]]

    return draw_from_stock


def _patterns(live: LiveCollection, view: View, space: Space, rows: Tensor) -> Tensor:
    part = live.blocks.slices[list(live.spaces).index(space.name)]
    return torch.cat([view.gather(some[None])[0, :, part] for some in torch.split(rows, 1024)])


def _share(right: Tensor, these: Tensor) -> float:
    return float(right[these].double().mean()) if bool(these.any()) else 0.0
