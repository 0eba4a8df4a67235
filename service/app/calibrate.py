"""Calibration: make cues from stored memories by the declared corruptions; learn from them what to expect of real cues.

For each modality (the spaces a cue fills; a masked picture apart) one record holds the margin that auto β rests on
(math.md 6, U-Hop's and Ramsauer's error bounds) and the RecLag threshold log λ, set conformally (RecLag, Theorem 3;
split conformal prediction). Too few cues give a record that says why there is no threshold, never a guess.

Cues that a caller supplied take the place of made ones; known negatives join the score (one half of them) and measure
it (the other half). The same cues with their own memory left out are strangers of the same kind: their accept rate is
reported, not tuned on.

Rules:
- The score is fixed before a cue that sets the threshold is looked at: β comes from cues drawn apart, the interaction
  matrix from the memories, O from the negatives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from service.app.comparison import ActiveKernel, Comparison
from service.app.comparison import own as own_comparison
from service.app.cues import whole_state
from service.app.gate_schemas import CalibrationRecord, NegativesRecord
from service.app.gates import MARGIN_SHARE, SEED, SUPPORT, Gate, SuppliedCues, log_masses, make_interaction
from service.app.known_cues import KnownCues, Supplied, draw, ids_at, plans, supplied_with
from service.app.live import Learned, LiveCollection
from service.app.resources import Resources
from service.app.route_calibration import calibrate_route
from service.app.routes import Route
from service.bank import Found, View
from service.core.beta import auto_beta
from service.core.gate import calibrate
from service.core.similarity import Kernel, scores
from service.errors import CalibrationRefused, LearnedElsewhere
from service.storage.jobs import Job

CUES_MAX = (
    400  # per modality: the threshold's binomial error is about one point there, and a photograph costs some 30 ms
)
BETA_CUES_MAX = 64  # per modality, beside these: the gate's β only has to be of the right size
STORED_SAMPLE = 64  # patterns that the margin of an uncalibrated modality is estimated on
ROUTE_PREFIX = "route:"  # before the modality, where storage keeps a route
QUIET_S = 1.0  # calibration starts when no write has come for this long,
QUIET_WAIT_MAX_S = 30.0  # or after waiting this long for quiet


def margin_for(
    live: LiveCollection, view: View, by: Comparison, record: CalibrationRecord | None, spaces: tuple[str, ...]
) -> float | None:
    """The margin auto β rests on: the calibration's, else what stored patterns themselves show (clean cues: an
    upper bound).
    """
    if record is not None and record.margin is not None:
        return record.margin
    return stored_margin(live, view, spaces, by)


def stored_margin(
    live: LiveCollection, view: View, spaces: tuple[str, ...], by: Comparison | None = None
) -> float | None:
    """The median margin of stored patterns as their own cues, compared as `by` does (None: by the collection's own
    similarity); None with fewer than two. Kept until the bank grows by a tenth.
    """
    by = own_comparison(live) if by is None else by
    kept = live.margins.get((by.name, *spaces))
    if kept is not None and abs(kept[0] - view.count) <= 0.1 * kept[0]:
        return kept[1]
    margin = None
    if view.count > 1:
        rows = view.sample(STORED_SAMPLE, SEED)
        parts = torch.split(view.gather(rows[:, None], raw=by.raw)[:, 0], list(live.blocks.widths), dim=1)
        cue = {name: part for name, part in zip(live.spaces, parts, strict=True) if name in spaces}
        scores = by.search(view, cue, live.weights_of(spaces), 2).scores
        margins = scores[:, 0] - scores[:, 1]
        margins = margins[margins.isfinite()]  # a memory that lacks these spaces finds nothing, itself included
        margin = float(margins.median()) if len(margins) else None
    live.margins[by.name, *spaces] = (view.count, margin)
    return margin


@dataclass(frozen=True, eq=False)
class Calibration:
    """The gates and routes by modality, made over `rows` memories when `changed_rows` had changed since the last."""

    gates: Mapping[str, Gate]
    routes: Mapping[str, Route]
    rows: int
    changed_rows: int

    def packed(self) -> dict[str, Any]:
        """As storage keeps them: a route beside its modality's gate."""
        packed = {modality: gate.packed() for modality, gate in self.gates.items()}
        return packed | {ROUTE_PREFIX + modality: route.packed() for modality, route in self.routes.items()}

    def learned(self, live: LiveCollection, kernels: Mapping[str, ActiveKernel]) -> None:
        """Let recalls go by it, under these kernels."""
        live.learn(Learned(kernels, self.gates, self.routes), self.rows, live.changed_rows - self.changed_rows)


def calibrate_collection(
    live: LiveCollection, resources: Resources, kernels: Mapping[str, Kernel], progress: Callable[[float], None],
    supplied: Supplied,
) -> Calibration:  # fmt: skip
    """Calibrate every modality that cues can be made for or were supplied for, under these kernels by space. The caller
    keeps the outcome.
    """
    view, changed_rows = live.view(), live.changed_rows
    rows = view.sample(min(CUES_MAX, view.count), SEED)
    ids = ids_at(view, rows)
    every_plan = list(plans(live))
    drawn: dict[str, KnownCues] = {}
    for_beta: dict[str, KnownCues] = {}
    for done, plan in enumerate(every_plan):

        def drawing(share: float, done: int = done) -> None:
            progress(0.5 * (done + share) / len(every_plan))

        drawn |= draw(live, resources, ids, plan, CUES_MAX, 0, drawing)
        for_beta |= draw(live, resources, ids, plan, BETA_CUES_MAX, 1, lambda _: drawing(1.0))
    drawn |= {modality: KnownCues(cues.tensors(), cues.ids).of(view) for modality, cues in supplied.known.items()}
    gates: dict[str, Gate] = {}
    routes: dict[str, Route] = {}
    for done, (modality, cues) in enumerate(drawn.items()):

        def beat(done: int = done) -> None:
            progress(0.5 + 0.5 * done / len(drawn))

        beat()
        gate = _calibrate_modality(
            live, view, modality, cues, for_beta.get(modality), supplied.negatives.get(modality),
            supplied.target_tpr or supplied.targets.get(modality, live.config.gate.target_tpr),
            modality in supplied.known, beat,
        )  # fmt: skip
        gates[modality] = replace(gate, known=supplied.known.get(modality))
        if (route := calibrate_route(live, view, kernels, modality, cues, gate)) is not None:
            routes[modality] = route
    return Calibration(gates, routes, view.count, changed_rows)


def _calibrate_modality(
    live: LiveCollection,
    view: View,
    modality: str,
    drawn: KnownCues,
    for_beta: KnownCues | None,
    negatives: SuppliedCues | None,
    target_tpr: float,
    by_caller: bool,
    beat: Callable[[], None],
) -> Gate:
    config, cue = live.config.gate, drawn.cues
    record = CalibrationRecord(
        modality=modality, version=view.version, rows=view.count, cues=len(drawn.owners),
        cues_from="caller" if by_caller else "memories", corruptions=[c.describe() for c in drawn.corruptions],
        margin=None, share=MARGIN_SHARE, first_share=0.0, target_tpr=target_tpr, gate_beta=None, when=config.when,
        log_lambda=None, stranger_accept_rate=None,
    )  # fmt: skip
    gate = Gate(record, negatives=negatives)
    if not drawn.owners:
        record.refused = "the memories of all its known cues are gone"
        return gate
    weights = live.weights_of(cue)
    own = view.rows_of(drawn.owners)
    without = view.search(cue, weights, SUPPORT, exclude=own)
    margins = _own_scores(live, view, drawn) - without.scores[:, 0]
    record.first_share = float((margins > 0).double().mean())
    norm_max = math.sqrt(len(live.spaces)) if live.similarity == "cosine" else view.norm_max
    gate_beta = 1.0
    if view.count > 1:
        beta = auto_beta(margins.double(), separation="softmax", norm_max=norm_max, support=SUPPORT, share=MARGIN_SHARE)
        record.margin, record.share = beta.margin, beta.share
        gate_beta = _gate_beta(live, view, tuple(cue), for_beta, norm_max)
    record.gate_beta = gate_beta

    # Everything the score is made of, before a cue is scored.
    fitted = _fitted(live, view, gate, tuple(cue), beat)
    if fitted is None:
        return gate
    gate = _with_negatives(live, view, fitted, for_beta)
    found = view.search(cue, weights, SUPPORT)
    known = _score(live, view, gate, cue, found)
    beat()
    try:
        record.log_lambda = _threshold(live, gate, known)
    except CalibrationRefused as refusal:
        record.refused = refusal.detail
        return gate
    record.stranger_accept_rate = _strangers(live, view, gate, drawn, (found, without), beat)
    if negatives is not None:
        record.negatives = _negatives_record(live, view, gate, negatives, (cue, found))
    return gate


def _fitted(
    live: LiveCollection, view: View, gate: Gate, spaces: tuple[str, ...], beat: Callable[[], None],
    without: Tensor | None = None,
) -> Gate | None:  # fmt: skip
    """The gate with its interaction matrix, made of the memories but the rows `without`; None, and the record says why,
    where these are too few.
    """
    spec, record = live.config.gate.interaction, gate.record
    if spec == "bank":
        return gate
    assert record.gate_beta is not None
    try:
        matrix, learning = make_interaction(live, view, spec, spaces, record.gate_beta, beat, without)
    except CalibrationRefused as refusal:
        record.refused = refusal.detail
        return None
    record.learning = learning
    return replace(gate, interaction=matrix)


def _with_negatives(live: LiveCollection, view: View, gate: Gate, for_beta: KnownCues | None) -> Gate:
    """The gate with half of its negatives in the score, over a background: the mass that most known cues exceed.

    It comes from the cues drawn for β; where none could be, or there is one negative, the score stays plain.
    """
    boosting = 0 if gate.negatives is None else len(gate.negatives) // 2
    if not boosting or for_beta is None or not for_beta.owners:
        return gate
    found = view.search(for_beta.cues, live.weights_of(for_beta.cues), SUPPORT)
    plain = _score(live, view, gate, for_beta.cues, found)
    background = plain.quantile(1.0 - gate.record.target_tpr, interpolation="lower")
    return gate.boosted(live, boosting, float(background))


def _threshold(live: LiveCollection, gate: Gate, known: Tensor) -> float:
    rows = gate.record.rows if gate.interaction is None else gate.interaction.shape[0]
    if live.similarity == "neg_l2":
        return calibrate(known, gate.record.target_tpr, None).log_lambda
    return calibrate(known, gate.record.target_tpr, rows, gate.log_against).log_lambda


def _strangers(
    live: LiveCollection, view: View, gate: Gate, drawn: KnownCues, found: tuple[Found, Found],
    beat: Callable[[], None],
) -> float | None:  # fmt: skip
    """The share of the cues let in when their own memory is left out; `found`: with it, and without.

    A row cannot be taken out of a matrix that was made of all. Another is made without half of the cues' memories, and
    its threshold set by the other half's cues; None where these are too few for that.
    """
    whole, without = found
    assert gate.record.log_lambda is not None
    if gate.interaction is None:
        return _share_over(gate.record.log_lambda, _score(live, view, gate, drawn.cues, without))
    own = view.rows_of(drawn.owners)
    rows = torch.unique(own)
    # Drawn, not every second row: memories may have been stored in turns of their kinds.
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[: len(rows) // 2]]
    strange = torch.isin(own, rows)
    apart = replace(gate, record=gate.record.model_copy())
    judge = _fitted(live, view, apart, tuple(drawn.cues), beat, without=rows)
    if judge is None:
        return None
    score = _score(live, view, judge, drawn.cues, whole)  # a matrix takes nothing from what was found
    try:
        return _share_over(_threshold(live, judge, score[~strange]), score[strange])
    except CalibrationRefused:
        return None


def _gate_beta(
    live: LiveCollection, view: View, spaces: tuple[str, ...], for_beta: KnownCues | None, norm_max: float
) -> float:
    """Auto β, from cues that the threshold is not set by; where none could be made, from the stored patterns."""
    if for_beta is not None and for_beta.owners:
        rival = view.search(for_beta.cues, live.weights_of(spaces), 1, exclude=view.rows_of(for_beta.owners))
        margins = (_own_scores(live, view, for_beta) - rival.scores[:, 0]).double()
    else:
        margin = stored_margin(live, view, spaces)
        margins = torch.tensor([math.inf if margin is None else margin], dtype=torch.float64)
    return auto_beta(margins, separation="softmax", norm_max=norm_max, support=SUPPORT, share=MARGIN_SHARE).beta


def _own_scores(live: LiveCollection, view: View, drawn: KnownCues) -> Tensor:
    """The score of each cue's own memory."""
    state, observed = whole_state(live, drawn.cues)
    return scores(live.blocks, view.gather(view.rows_of(drawn.owners)[:, None]), state, observed)[:, 0]


def _score(live: LiveCollection, view: View, gate: Gate, cue: Mapping[str, Tensor], found: Found) -> Tensor:
    return log_masses(live, gate, view, cue, found.rows, found.scores).amin(dim=1)


def _share_over(log_lambda: float, score: Tensor) -> float:
    return float((score > log_lambda).double().mean())


def _negatives_record(
    live: LiveCollection, view: View, gate: Gate, negatives: SuppliedCues, known: tuple[Mapping[str, Tensor], Found]
) -> NegativesRecord:
    """How many of the negatives that are not in the score are let in; and how many would be, were none in it."""
    boosting = 0 if gate.opposed is None else len(gate.opposed)
    cue = negatives.tensors(slice(boosting, None))
    found = view.search(cue, live.weights_of(cue), SUPPORT)
    assert gate.record.log_lambda is not None
    plain = replace(gate, opposed=None)
    try:
        plain_lambda = _threshold(live, plain, _score(live, view, plain, *known))
        rate_without = _share_over(plain_lambda, _score(live, view, plain, cue, found))
    except CalibrationRefused:  # without the negatives there would be no threshold
        rate_without = None
    return NegativesRecord(
        boosting=boosting, log_background=gate.log_background if boosting else None,
        held_out=len(negatives) - boosting,
        accept_rate=_share_over(gate.record.log_lambda, _score(live, view, gate, cue, found)),
        accept_rate_without=rate_without,
    )  # fmt: skip


def run_calibrate_job(resources: Resources, job: Job, beat: Callable[[float], None]) -> dict[str, Any]:
    """Calibrate a collection once writes pause; another round follows by itself if it has drifted meanwhile."""
    assert job.collection_id is not None
    live = resources.live_by_id(job.collection_id)
    live.catch_up()  # with what another server stored before it asked for this
    waiting_since = time.monotonic()
    while (now := time.monotonic()) - live.last_write_s < QUIET_S and now - waiting_since < QUIET_WAIT_MAX_S:
        time.sleep(0.05)
    while True:
        with resources.learning(job.collection_id) as live:
            live.calibration_job = None  # what is written from here on may ask for another
            at = live.revision
            supplied, skipped = supplied_with(live, resources, job)
            kernels = live.learned.kernels
            under = {name: active.kernel for name, active in kernels.items()}
            calibration = calibrate_collection(live, resources, under, beat, supplied)
            beat(1.0)  # the last look at whether the job is still wanted
            try:
                resources.repository.put_gates(live.id, calibration.packed(), at, live.revised)
            except LearnedElsewhere:
                resources.look()
                continue
            calibration.learned(live, kernels)
            live.tell()
            break
    for modality in supplied.negatives.keys() - calibration.gates.keys():
        detail = f"the negatives that fill {modality} are not used: no known cue fills it"
        skipped.append({"position": None, "code": "nothing_observed", "detail": detail})
    resources.calibrate_if_due(live)
    records = [gate.record.model_dump(mode="json") for gate in calibration.gates.values()]
    return {"modalities": records, "skipped": skipped}
