"""Routes: which comparison each cue is recalled by where kernels are active (`kernel: auto`), and the verdicts there.

No fixed similarity finds the memory behind every kind of cue: cosine is best for random masks, raw distance for noise,
a kernel trained for cues for blur, and so on. So every comparison searches, and a calibrated choice (core.choice)
takes, for each cue, the one that is most probably right.

Rules:
- The choice is fitted on one half of a modality's known cues, and thresholds are set on the other half, for each
  comparison on the cues that chose it: what chooses is fixed before a cue that sets a threshold is looked at.
- A comparison that too few cues of the first half choose is left out, and the others chosen among anew: of the second
  half as few would choose it, and set no threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from service.app.comparison import ActiveKernel, Comparison, comparisons, own
from service.app.cues import CueBlocks, stack
from service.app.gate_schemas import CalibrationRecord, ChoiceInfo, ComparisonName
from service.app.gates import SUPPORT, Gate
from service.app.live import spaces_of
from service.bank import Found, View
from service.core.choice import Choice, fit
from service.core.similarity import MAGNITUDE_MAX

if TYPE_CHECKING:
    from service.app.live import Learned, LiveCollection
    from service.app.recall_options import Resolved


@dataclass(frozen=True, eq=False)
class Evidence:
    """What each comparison's search found for a batch of cues (`found` may be left out): the arguments of
    `core.choice`.
    """

    found: Sequence[Found]
    nearest: Tensor
    first: Tensor
    second: Tensor

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.nearest[rows], self.first[rows], self.second[rows]

    def right(self, own: Tensor) -> Tensor:
        """(n, k): whether the comparison's first memory is the cue's own."""
        return self.nearest == own[:, None]


def plainly(live: LiveCollection, gate: Gate) -> bool:
    """Whether a modality is judged by the mass of the bank's nearest rows at the cue, and is meant to be: then so may
    be what another comparison finds. A matrix that was refused is none that was not asked for.
    """
    return gate.plain and live.config.gate.interaction == "bank"


def gather_evidence(
    comparisons: Sequence[Comparison], view: View, cue: Mapping[str, Tensor], weights: Mapping[str, float],
    limit: int = 2, *, exact: bool = False, exclude: Tensor | None = None,
) -> Evidence:  # fmt: skip
    """Search by each comparison, `limit` ≥ 2 rows."""
    found = [c.search(view, cue, weights, limit, exact=exact, exclude=exclude) for c in comparisons]
    distances = [c.distances(f.scores[:, :2].double()) for c, f in zip(comparisons, found, strict=True)]
    return Evidence(
        found,
        torch.stack([f.rows[:, 0] for f in found], dim=1),
        torch.stack([d[:, 0] for d in distances], dim=1),
        torch.stack([d[:, 1] for d in distances], dim=1),
    )


def only(evidence: Evidence, kept: Sequence[int]) -> Evidence:
    """The evidence of some of the comparisons."""
    columns = torch.tensor(kept)
    return Evidence(
        [evidence.found[j] for j in kept] if evidence.found else [],
        evidence.nearest[:, columns], evidence.first[:, columns], evidence.second[:, columns],
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Route:
    """How a modality's cues are recalled under the active kernels.

    info: the comparisons chosen among, in the order of `choice`'s columns, with the margin and the threshold of the
    cues that chose each. alone: those of `kernel` for every cue, as when a request names the kernel.
    """

    info: ChoiceInfo
    choice: Choice
    alone: CalibrationRecord
    under: tuple[str, ...]  # the spaces that had a kernel then; under others it does not hold

    def holds(self, kernels: Iterable[str]) -> bool:
        """Whether the same of the modality's spaces have a kernel now."""
        return set(spaces_of(self.info.modality)) & set(kernels) == set(self.under)

    @property
    def records(self) -> dict[ComparisonName, CalibrationRecord]:
        return {record.compared_by: record for record in self.info.records}

    @property
    def comparisons(self) -> tuple[ComparisonName, ...]:
        return tuple(self.info.comparisons)

    def pick(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """The column of the comparison for each cue, and the probability that it is right."""
        probability, picked = self.choice.probabilities(evidence.nearest, evidence.first, evidence.second).max(dim=1)
        return picked, probability

    def packed(self) -> dict[str, Any]:
        """As JSON, for storage."""
        return {
            "info": self.info.model_dump(mode="json"),
            "choice": asdict(self.choice),
            "alone": self.alone.model_dump(mode="json"),
            "under": self.under,
        }

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any]) -> Route:
        units, mean, scale = (tuple(packed["choice"][name]) for name in ("units", "mean", "scale"))
        coefficients = tuple(map(tuple, packed["choice"]["coefficients"]))
        return cls(
            ChoiceInfo.model_validate(packed["info"]),
            Choice(units, mean, scale, coefficients),
            CalibrationRecord.model_validate(packed["alone"]),
            tuple(packed["under"]),
        )


@dataclass(frozen=True, eq=False)
class Fitted:
    """A choice fitted on some cues: the columns of the evidence that it is among."""

    columns: list[int]
    choice: Choice

    def picked(self, evidence: Evidence, rows: Tensor) -> Tensor:
        """For each of these cues the column of the evidence that it is recalled by."""
        probability = self.choice.probabilities(*only(evidence, self.columns).of(rows))
        return torch.tensor(self.columns)[probability.argmax(dim=1)]


def picked_min(target_tpr: float) -> int:
    """How many of the first half's cues must choose a comparison: twice what a threshold needs, since of the other half
    about as many will.
    """
    return 2 * math.ceil(1.0 / (1.0 - target_tpr) - 1.0)


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two halves of `count` cues, drawn at random."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2], order[count // 2 :]


def fit_choice(evidence: Evidence, own: Tensor, rows: Tensor, least: int) -> Fitted:
    """Fit on the cues `rows`; comparisons that fewer than `least` of them choose are left out, the rarest first."""
    columns = list(range(evidence.nearest.shape[1]))
    while True:
        fitted = Fitted(columns, fit(*only(evidence, columns).of(rows), own[rows]))
        picks = fitted.picked(evidence, rows)
        counts = {column: int((picks == column).sum()) for column in columns}
        rarest = min(columns, key=lambda column: (counts[column], -column))
        if len(columns) == 1 or counts[rarest] >= least:
            return fitted
        columns = [column for column in columns if column != rarest]


# --- at recall --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Way:
    """The way that some cues of a batch take: `members` of it, what compares them, what judges them.

    record: the margin that β rests on, and the threshold unless `gate_is_own`: then the gate scores by the collection's
    own similarity, whatever compares. found: what the search has found already; probability: that each one's first
    memory is its own, where that was chosen by. why: there is no gate, where that is not the modality's lack.
    """

    members: Sequence[int]
    comparison: Comparison
    says: str
    kernel_ids: list[str]
    gate: Gate | None
    record: CalibrationRecord | None
    gate_is_own: bool = False
    found: Found | None = None
    probability: list[float] | None = None
    why: str | None = None


def ways(
    live: LiveCollection, learned: Learned, view: View, modality: str, cues: Sequence[CueBlocks], options: Resolved
) -> Iterator[Way]:
    """How each cue of a batch of one modality is recalled."""
    gate, everyone = learned.gates.get(modality), range(len(cues))
    spaces, masked = tuple(cues[0].vectors), modality.endswith(":masked")
    asked = {kernel.space: kernel for kernel in learned.kernels.values() if options.kernel in ("auto", kernel.id)}
    kernels = {name: active.kernel for name, active in asked.items() if name in spaces}
    route = learned.routes.get(modality)
    by_name = {way.name: way for way in comparisons(live, kernels, spaces, masked)}
    if options.kernel not in ("auto", "none") and kernels:
        # Calibrated with every kernel in the cue's spaces; under one of several there is no threshold.
        alone = sum(name in learned.kernels for name in spaces) == 1 and route is not None
        record = route.alone if alone and route is not None else None
        way = _way(live, asked, everyone, by_name["kernel"], gate, record)
        why = f"no threshold was set for {options.kernel} by itself: for lack of known cues, or beside other kernels"
        yield way if way.gate is not None else replace(way, why=why)
    elif options.kernel != "auto" or route is None or options.spaces is not None or options.beta != "auto":
        # A β of the request's own means the collection's similarity: that of a distance is another.
        yield Way(everyone, own(live), live.similarity, [], gate, None if gate is None else gate.record)
    elif large := [i for i in everyone if any(np.abs(v).max() > MAGNITUDE_MAX for v in cues[i].vectors.values())]:
        # Their distances would leave float32.
        yield Way(large, own(live), live.similarity, [], gate, None if gate is None else gate.record)
        rest = [i for i in everyone if i not in set(large)]
        for way in ways(live, learned, view, modality, [cues[i] for i in rest], options) if rest else ():
            yield replace(way, members=[rest[i] for i in way.members])
    else:
        yield from _chosen(
            live, asked, view, stack(cues), [by_name[name] for name in route.comparisons], route, gate, options
        )


def _chosen(
    live: LiveCollection, active: Mapping[str, ActiveKernel], view: View, cue: Mapping[str, Tensor],
    among: Sequence[Comparison], route: Route, gate: Gate | None, options: Resolved,
) -> Iterator[Way]:  # fmt: skip
    dense = options.support == "dense"
    limit = 2 if dense else max(int(options.support), options.reach, SUPPORT)
    weights = live.weights_of(cue)
    evidence = gather_evidence(among, view, cue, weights, limit, exact=options.exact)
    picked, probability = route.pick(evidence)
    for column, comparison in enumerate(among):
        members = torch.nonzero(picked == column).flatten()
        if len(members):
            found = evidence.found[column]
            some = Found(found.rows[members], found.scores[members], found.exact)
            yield _way(
                live, active, members.tolist(), comparison, gate, route.records[comparison.name],
                None if dense else some, probability[members].tolist(),
            )  # fmt: skip


def _way(
    live: LiveCollection, active: Mapping[str, ActiveKernel], members: Sequence[int], comparison: Comparison,
    gate: Gate | None, record: CalibrationRecord | None, found: Found | None = None,
    probability: list[float] | None = None,
) -> Way:  # fmt: skip
    judges_itself = gate is None or plainly(live, gate)
    says = live.similarity if comparison.name == "own" else comparison.name
    return Way(
        members, comparison, says, [active[name].id for name in comparison.kernels],
        gate if not judges_itself else None if record is None else Gate(record), record, not judges_itself, found,
        probability,
    )  # fmt: skip
