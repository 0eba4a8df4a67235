"""Recall: a batch of encoded cues → candidates → gate → dynamics → verdict, matches, reconstruction.

Rules:
- Nothing here is per element in Python until the reply is built: one search, one gather, one batched fixed point.
- Cues of a batch are grouped by modality, since β and the threshold belong to it.
- The gate sees exactly the rows that the recall may return: a filter restricts the view that everything is asked of.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import orjson
import torch
from torch import Tensor

from service.app.calibrate import margin_for
from service.app.certificates import certify
from service.app.comparison import Comparison, own
from service.app.completion import completed, states
from service.app.cues import CueBlocks, stack
from service.app.drawing import draw, draw_steps
from service.app.gates import SUPPORT, log_masses
from service.app.listing import listed
from service.app.live import LiveCollection
from service.app.recall_options import Resolved
from service.app.recall_schemas import Match, ProblemDict, RecallResult, Verdict
from service.app.routes import Way, ways
from service.app.verdicts import AMBIGUOUS_WEIGHT, CANDIDATES_MAX, heaviest, rivals, twins
from service.bank import Found, View
from service.core.beta import auto_beta
from service.core.names import Separation
from service.core.retrieve import Outcome, retrieve, rounding_of

OUTCOMES = {int(outcome): outcome.name.lower() for outcome in Outcome}
DESCRIBED_MAX = 8  # memories whose captions may be the recalled one: a caption that more share is first among these
VALUES_MAX = (
    4 * 2**20
)  # values (16 MB) that one batch gathers: beyond the cache, and what malloc gives back, it is only slower


class Stopwatch:
    """Seconds spent per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._mark = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._mark
        self._mark = now


Weighted = list[tuple[str, float]]


@dataclass(frozen=True)
class Recalled:
    """`heaviest`: per result the memories of largest weight, whether they are listed or not; none of an unknown cue."""

    version: int
    results: list[RecallResult]
    stages: dict[str, float]
    heaviest: list[Weighted]


@torch.inference_mode()  # no autograd bookkeeping: a tenth of a small recall's time
def recall_blocks(live: LiveCollection, cues: Sequence[CueBlocks], options: Resolved) -> Recalled:
    """Recall a batch of encoded cues. Blocking and CPU-bound: call it from a worker thread."""
    watch = Stopwatch()
    # In this order: a kernel comes to the bank before it is learned, so the view knows every kernel of these.
    learned, whole = live.learned, live.view()
    kept = whole.restricted(options.filter, options.exclude)
    # What a cue leaves out is dead for it, so that every stage is asked of what it may return.
    groups: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for i, cue in enumerate(cues):
        groups[cue.modality, cue.without].append(i)
    results: dict[int, RecallResult] = {}
    heaviest: dict[int, Weighted] = {}
    for (modality, without), members in groups.items():
        view = kept if without is None else kept.restricted(None, frozenset([without]))
        for part in _within_memory(live, view, members, options):
            some = [cues[i] for i in part]
            if view.count == 0:
                results.update((i, _of_nothing(whole, cues[i])) for i in part)
                continue
            for way in ways(live, learned, view, modality, some, options):
                watch.lap("search")
                members_cues = [some[i] for i in way.members]
                recall = _Recall(live, whole, view, modality, members_cues, way, options, watch)
                results.update(zip((part[i] for i in way.members), recall.results(), strict=True))
                heaviest.update(zip((part[i] for i in way.members), recall.heaviest(), strict=True))
    everyone = range(len(cues))
    return Recalled(
        kept.version, [results[i] for i in everyone], watch.seconds, [heaviest.get(i, []) for i in everyone]
    )


def _within_memory(
    live: LiveCollection, view: View, members: Sequence[int], options: Resolved
) -> Iterator[Sequence[int]]:
    """Split a batch so that what it gathers stays under `VALUES_MAX`; one cue may need more by itself."""
    dimension = live.layout.dimension
    per_cue = max(options.support, SUPPORT, options.reach) * dimension if options.support != "dense" else view.count
    if options.support == "dense" and (options.reconstruct or options.trace or options.with_vectors):
        per_cue *= dimension  # the patterns under the weights are read out raw, cue by cue
    size = max(1, VALUES_MAX // max(1, per_cue))
    return (members[start : start + size] for start in range(0, len(members), size))


class _Recall:
    """One batch of cues of one modality on its way through the stages; each stage reads what the ones before it
    left.
    """

    def __init__(
        self, live: LiveCollection, whole: View, view: View, modality: str, cues: Sequence[CueBlocks], way: Way,
        options: Resolved, watch: Stopwatch,
    ) -> None:  # fmt: skip
        self.live, self.whole, self.view, self.modality = live, whole, view, modality
        self.cues, self.way, self.options, self.watch = cues, way, options, watch
        self.gate, self.record = way.gate, way.record
        self.by = way.comparison if options.spaces is None else _reweighted(live, way.comparison, dict(options.spaces))
        self.blocks = self.by.blocks

    def results(self) -> list[RecallResult]:
        self.cue = stack(self.cues)
        self.state, self.observed = self.by.state(self.live, self.cue)
        self._search()
        self.watch.lap("search")
        self._gate()
        self.watch.lap("gate")
        self._settle()
        self.certificates = certify(self.by, self.view, self.found, self.settled, self.beta, self.options)
        self.watch.lap("dynamics")
        self._judge()
        results = self._replies()
        self.watch.lap("reply")
        if self.options.reconstruct or self.options.trace:
            self._draw(results)
            self.watch.lap("decode")
        return results

    def _search(self) -> None:
        """The rows that take part, by falling score: `found`; their patterns, gathered per cue or (dense) shared.

        `nearest` are the best scores of at least `SUPPORT` rows, whatever the support: the gate sums over these, and
        the first two tell whether a rival is near.
        """
        options = self.options
        self.order: Tensor | None = None  # dense: the shared patterns' columns by falling score
        if options.support == "dense":
            self.stored, rows = self.by.matrix(self.view)
            hidden = self.view.lacking(list(self.cue), rows, self.by.kernels)
            self.first_scores = self.by.scores(self.stored, self.state, self.observed)
            self.first_scores = self.first_scores.masked_fill(hidden, -torch.inf)
            self.order = self.first_scores.argsort(dim=1, descending=True, stable=True)
            ordered = self.first_scores.gather(1, self.order)
            self.found = Found(rows[self.order].masked_fill(ordered == -torch.inf, -1), ordered, exact=True)
            self.nearest, self.nearest_rows = ordered[:, :SUPPORT], self.found.rows[:, :SUPPORT]
            self.valid = (~hidden).expand_as(ordered) if bool(hidden.any()) else None
            return
        limit = max(options.support, options.reach)
        found = self.way.found
        if found is None:
            found = self.by.search(self.view, self.cue, self._search_weights, max(limit, SUPPORT), exact=options.exact)
        self.nearest, self.nearest_rows = found.scores[:, :SUPPORT], found.rows[:, :SUPPORT]
        self.found = Found(found.rows[:, :limit], found.scores[:, :limit], found.exact)
        self.stored, self.first_scores = self.by.gather(self.view, self.found.rows), self.found.scores
        # Padding is last in a row, so a look at the last column finds it.
        self.valid = self.found.rows >= 0 if bool((self.found.rows[:, -1] < 0).any()) else None

    def _gate(self) -> None:
        """log S per cue, and when it came under λ (-1: never); None where there is no threshold: it holds for this
        modality and the collection's own weights."""
        self.mass: list[float] | None = None
        gate = self.gate
        wanted = self.options.gate and self.options.spaces is None
        if wanted and gate is not None and gate.record.log_lambda is not None:
            rows, nearest = self.nearest_rows, self.nearest
            if self.way.gate_is_own:
                weights = self.live.weights_of(self.cue)
                found = own(self.live).search(self.view, self.cue, weights, SUPPORT, exact=self.options.exact)
                rows, nearest = found.rows, found.scores
            masses = log_masses(self.live, gate, self.view, self.cue, rows, nearest)
            self.mass = masses.amin(dim=1).tolist()
            under = masses <= gate.record.log_lambda
            self.rejected_at = torch.where(under.any(dim=1), under.int().argmax(dim=1), -1).tolist()

    def _why_uncalibrated(self) -> list[str]:
        """Why there is no verdict, for the reply's warnings; nothing where it was not asked for."""
        if self.mass is not None or not self.options.gate:
            return []
        if self.options.spaces is not None:
            return [
                "uncalibrated: a threshold holds for the collection's own spaces and weights, not for the request's"
            ]
        if self.way.why is not None:
            return [f"uncalibrated: {self.way.why}"]
        if self.gate is not None:
            return [f"uncalibrated: {self.gate.record.refused}"]
        if self.live.calibration_state() in ("pending", "stale"):
            return ["uncalibrated: the calibration is under way; ask again in some seconds"]
        return [f"uncalibrated: no cue that fills {self.modality} could be made from the stored memories"]

    def _settle(self) -> None:
        options = self.options
        support = self.found.rows.shape[1]
        self.beta = options.beta if options.beta != "auto" else self._auto_beta(options.separation, support)
        settled = retrieve(
            self.blocks, self.stored, self.state, beta=self.beta, separation=options.separation,
            observed=self.observed, valid=self.valid, first_scores=self.first_scores, step_size=options.step_size,
            update_steps_max=options.update_steps_max, clamp_observed=options.clamp_observed, ties=self._ties(),
            trace=options.trace is not None,
        )  # fmt: skip
        self.settled = settled
        self.weights = settled.weights if self.order is None else settled.weights.gather(1, self.order)

    def _ties(self) -> bool:
        """Whether rounding alone may tell some cue's first two candidates apart."""
        if self.nearest.shape[1] < 2:
            return False
        first, second = self.nearest[:, 0], self.nearest[:, 1]
        return bool((first - second <= rounding_of(first, self.blocks.similarity)).any())

    def _auto_beta(self, separation: Separation, support: int) -> float:
        # Of the whole collection, so that a filter does not change how sharply memories are told apart.
        margin = margin_for(self.live, self.whole, self.by, self.record, tuple(self.cue))
        # Of distances the calibration has seen to rounding; here nothing is left to cap.
        norm_max = math.sqrt(margin) if self.by.raw and margin else self.by.norm_max(self.view)
        return beta_for(margin, separation, norm_max, support)

    def _judge(self) -> None:
        """The verdicts, and the memories that each cue does not tell apart."""
        batch = len(self.cues)
        self.candidates: list[list[str]] = [[] for _ in range(batch)]
        if not self.options.gate:
            self.verdicts: list[Verdict] = ["uncalibrated"] * batch
            return
        # Odds are softmax's, over the rows that were looked at: a sparse separation and a support of one row settle at
        # a β that says little of odds.
        asked = self.options.beta if self.options.separation == "softmax" else "auto"
        odds_beta = asked if asked != "auto" else self._auto_beta("softmax", self.nearest.shape[1])
        close = rivals(self.nearest, odds_beta)
        if any(cue.crossed for cue in self.cues):
            close = close | twins(self.live, self.view, self.cues, self.nearest_rows)
        doubts = (close.any(dim=1) | (self.weights.amax(dim=1) < AMBIGUOUS_WEIGHT)).tolist()
        judged = self.rejected_at if self.mass is not None else [None] * batch
        self.verdicts = [
            "uncalibrated" if at is None else "unknown" if at >= 0 else "ambiguous" if doubt else "known"
            for at, doubt in zip(judged, doubts, strict=True)
        ]
        for i, (verdict, doubt) in enumerate(zip(self.verdicts, doubts, strict=True)):
            if doubt and verdict != "unknown":
                close[i, 0] = True
                rows = torch.cat([self.nearest_rows[i][close[i]], self.found.rows[i][heaviest(self.weights[i])]])
                named = [name for (name,) in self.view.ids(rows[:, None]) if name is not None]
                self.candidates[i] = list(dict.fromkeys(named))[:CANDIDATES_MAX]

    def _draw(self, results: list[RecallResult]) -> None:
        """An unknown cue has no reconstruction."""
        live, view, rows = self.live, self.view, self.found.rows
        if self.options.reconstruct is not None:
            known = self._recalled()
            drawings = draw(live, view, rows[known], self.weights[known], self.options.reconstruct)
            for i, drawing in zip(known, drawings, strict=True):
                results[i]["reconstruction"] = drawing
        if self.options.trace is not None and self.settled.step_weights is not None:
            for i, steps in enumerate(self.settled.steps.tolist()):
                weights = self.settled.step_weights[: steps + 1, i]
                if self.order is not None:
                    weights = weights[:, self.order[i]]
                results[i]["trace"] = draw_steps(live, view, rows[i], weights, self.options.trace)

    def _recalled(self) -> list[int]:
        """The cues that recall anything."""
        return [i for i, verdict in enumerate(self.verdicts) if verdict != "unknown"]

    def heaviest(self) -> list[Weighted]:
        """To be asked after `results`; empty where nothing is to be said of them."""
        if not (self.live.described and self.options.with_text):
            return [[] for _ in self.cues]
        # In the order of the matches, ties too.
        weights, order = self.weights.sort(dim=1, descending=True, stable=True)
        weights, order = weights[:, :DESCRIBED_MAX], order[:, :DESCRIBED_MAX]
        ids = self.view.ids(self.found.rows.gather(1, order))
        return [
            [] if verdict == "unknown" else [(name, w) for name, w in zip(names, weighs, strict=True) if name and w]
            for verdict, names, weighs in zip(self.verdicts, ids, weights.tolist(), strict=True)
        ]

    def _replies(self) -> list[RecallResult]:
        found, settled, options = self.found, self.settled, self.options
        shown = listed(self.view, found, self.weights, options, self._further)
        ids = self.view.ids(shown.rows)
        payloads = self.view.payloads(shown.rows) if options.with_payload else None
        vectors = self._raw_vectors(shown.rows) if options.with_vectors else {}
        shares = completed(self.live, self.view, self.cue, found.rows, self.weights)
        state = states(self.live, self.view, found.rows, self.weights) if options.with_vectors else {}
        rivals = self.nearest[:, 1] if self.nearest.shape[1] > 1 else torch.full_like(self.nearest[:, 0], -torch.inf)
        margins = [m if math.isfinite(m) else None for m in (self.nearest[:, 0] - rivals).tolist()]
        supports = (found.rows >= 0).sum(dim=1).tolist()
        steps, outcomes, energies = settled.steps.tolist(), settled.outcome.tolist(), settled.energy.tolist()
        results: list[RecallResult] = []
        why = self._why_uncalibrated()
        for i, cue in enumerate(self.cues):
            matches: list[Match] = []
            for j, memory_id in enumerate(ids[i]):
                if memory_id is None:
                    break
                payload = None if payloads is None else payloads[i][j]
                match: Match = {
                    "id": memory_id, "weight": shown.weights[i][j], "similarity": shown.similarities[i][j],
                    "text": None, "payload": None if payload is None else orjson.loads(payload),
                }  # fmt: skip
                if shown.groups is not None:
                    match["group"] = shown.groups[i][j]
                if vectors:
                    match["vectors"] = {name: v[i, j].tolist() for name, v in vectors.items() if v[i, j].any()}
                matches.append(match)
            result = empty_result(self.verdicts[i], warnings=[*cue.warnings, *why])
            result["matches"], result["candidates"] = matches, self.candidates[i]
            if self.verdicts[i] != "unknown":
                result["completed"] = {name: share[i] for name, share in shares.items()}
            if options.with_vectors:
                recalled = self.verdicts[i] != "unknown"
                result["state"] = {name: x[i].tolist() for name, x in state.items()} if recalled else None
            certified, error_bound = self.certificates[i]
            result["recall"] = {
                "steps": steps[i], "converged": outcomes[i] == Outcome.CONVERGED, "outcome": OUTCOMES[outcomes[i]],
                "energy": energies[i][: steps[i] + 1] if supports[i] else [], "margin": margins[i],
                "beta": self.beta, "support": supports[i], "certified": certified, "error_bound": error_bound,
                "compared_by": self.way.says, "kernels": self.way.kernel_ids,
                "probability": None if self.way.probability is None else self.way.probability[i],
            }  # fmt: skip
            judged = None if self.gate is None else self.gate.record
            if self.mass is not None and judged is not None and judged.log_lambda is not None:
                result["gate"] = {
                    "score": self.mass[i], "threshold": judged.log_lambda, "target_tpr": judged.target_tpr,
                    "modality": self.modality, "rejected_at": self.rejected_at[i] if self.rejected_at[i] >= 0 else None,
                }  # fmt: skip
            results.append(result)
        return results

    def _further(self, view: View, cue: int, limit: int) -> Found:
        """What else is near one cue, compared as all of it was."""
        alone = {name: block[cue : cue + 1] for name, block in self.cue.items()}
        return self.by.search(view, alone, self._search_weights, limit, exact=self.options.exact)

    @property
    def _search_weights(self) -> dict[str, float]:
        return self.live.weights_of(self.live.spaces) | (self.options.chosen or {})

    def _raw_vectors(self, rows: Tensor) -> dict[str, Tensor]:
        """The matches' vectors as they were stored: space → (batch, limit, dimension)."""
        alone, ones = rows.reshape(-1, 1), torch.ones(rows.numel(), 1)
        return {name: self.view.read_out(alone, ones, name).reshape(*rows.shape, -1) for name in self.live.spaces}


def _of_nothing(whole: View, cue: CueBlocks) -> RecallResult:
    """Where no memory may be returned. If there are some, none that may be is the origin of the cue: that needs no
    threshold.
    """
    if whole.count == 0:
        return empty_result("uncalibrated", warnings=cue.warnings)
    return empty_result("unknown", warnings=[*cue.warnings, "no memory is left by the filter and what is excluded"])


def empty_result(
    verdict: Verdict | None, *, warnings: list[str] | None = None, error: ProblemDict | None = None
) -> RecallResult:
    """A result without matches: of an empty collection, of a cue that was wrong, or to be filled."""
    return {
        "verdict": verdict, "matches": [], "candidates": [], "recall": None, "gate": None, "text": None,
        "original": None, "completed": {}, "reconstruction": None, "warnings": warnings or [], "error": error,
    }  # fmt: skip


def _reweighted(live: LiveCollection, by: Comparison, chosen: Mapping[str, float]) -> Comparison:
    """With the request's weights; a space it leaves out keeps its own for the later steps."""
    return by.reweighted(tuple(chosen.get(space.name, space.weight) for space in live.spaces.values()))


@lru_cache(maxsize=1024)
def beta_for(margin: float | None, separation: Separation, norm_max: float, support: int) -> float:
    """β for a margin (None: a single memory); the few combinations a server meets are remembered."""
    margins = torch.tensor([math.inf if margin is None else margin], dtype=torch.float64)
    return auto_beta(margins, separation=separation, norm_max=norm_max, support=support).beta
