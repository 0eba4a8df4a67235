"""Calibrating a route: which comparisons a modality's cues are chosen among, and what each one's verdicts rest on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from service.app.comparison import SCORE_ERROR, Comparison, comparisons
from service.app.gate_schemas import CalibrationRecord, ChoiceInfo
from service.app.gates import MARGIN_SHARE, SEED, SUPPORT, Gate
from service.app.known_cues import KnownCues
from service.app.live import LiveCollection
from service.app.routes import (
    Evidence,
    Route,
    fit_choice,
    gather_evidence,
    halves,
    picked_min,
    plainly,
)
from service.bank import View
from service.core.beta import auto_beta
from service.core.gate import calibrate, log_mass
from service.core.similarity import Kernel
from service.errors import CalibrationRefused


def calibrate_route(
    live: LiveCollection, view: View, kernels: Mapping[str, Kernel], modality: str, drawn: KnownCues, gate: Gate
) -> Route | None:
    """The route of a modality under these kernels, from its known cues; None where no kernel is in its spaces, or where
    the cues are too few to choose by (then they go on by the collection's own similarity).

    Where the modality's own gate does more than sum over the bank, it judges all of its cues, and the records here
    hold margins alone.
    """
    cue = drawn.cues
    among = comparisons(live, kernels, tuple(cue), modality.endswith(":masked"))
    least = picked_min(gate.record.target_tpr)
    if len(among) == 1 or len(drawn.owners) < 2 * least or view.count < 2:
        return None
    own, weights = view.rows_of(drawn.owners), live.weights_of(cue)
    evidence = gather_evidence(among, view, cue, weights, SUPPORT)
    without = gather_evidence(among, view, cue, weights, SUPPORT, exclude=own)
    fitting, judging = halves(len(own), SEED)
    fitted = fit_choice(evidence, own, fitting, least)
    everyone = torch.arange(len(own))
    picked, picked_without = fitted.picked(evidence, everyone), fitted.picked(without, everyone)
    calibration = _Calibration(live, view, drawn, own, gate, evidence, without)
    records = [
        calibration.record(
            among[column], column, fitting[picked[fitting] == column], judging[picked[judging] == column],
            judging[picked_without[judging] == column],
        )
        for column in fitted.columns
    ]  # fmt: skip
    right = evidence.right(own)[judging]
    info = ChoiceInfo(
        modality=modality, comparisons=[among[column].name for column in fitted.columns], cues=len(judging),
        alone={way.name: float(right[:, column].double().mean()) for column, way in enumerate(among)},
        chosen=float(right.gather(1, picked[judging, None]).double().mean()),
        oracle=float(right.any(dim=1).double().mean()),
        picked={
            among[column].name: float((picked[judging] == column).double().mean()) for column in fitted.columns
        },
        records=records,
    )  # fmt: skip
    return Route(
        info, fitted.choice, calibration.record(among[1], 1, fitting, judging, judging), tuple(among[1].kernels)
    )


class _Calibration:
    """What the records of a route's comparisons are made of."""

    def __init__(
        self, live: LiveCollection, view: View, drawn: KnownCues, own: Tensor, gate: Gate, evidence: Evidence,
        without: Evidence,
    ) -> None:  # fmt: skip
        self.live, self.view, self.drawn, self.own, self.gate = live, view, drawn, own, gate
        self.evidence, self.without = evidence, without

    def record(
        self, by: Comparison, column: int, fitting: Tensor, judging: Tensor, strangers: Tensor
    ) -> CalibrationRecord:
        """Of the cues that take this comparison: β's margin from all, the gate's β from those that the choice was
        fitted on, the threshold from the others; `strangers` are cues that take it when their own memory is left out.
        """
        view, before = self.view, self.gate.record
        margins = self._margins(by, column, torch.cat([fitting, judging]))
        record = before.model_copy(
            update={
                "compared_by": by.name, "cues": len(judging), "margin": None, "gate_beta": None, "log_lambda": None,
                "first_share": float((margins > 0).double().mean()) if len(margins) else 0.0,
                "stranger_accept_rate": None, "learning": None, "negatives": None, "refused": None,
            }
        )  # fmt: skip
        if not len(fitting) or not len(judging):
            record.refused = "no known cue is compared so"
            return record
        # A distance's rounding is a share of itself, so what caps β is how far apart memories are, not how long.
        rivals = self.without.found[column].scores[torch.cat([fitting, judging]), 0].double()
        norm_max = float((-rivals).median().clamp_min(1e-12).sqrt()) if by.raw else by.norm_max(view)
        settle = auto_beta(margins, separation="softmax", norm_max=norm_max, support=SUPPORT, share=MARGIN_SHARE)
        record.margin, record.share = settle.margin, settle.share
        if not plainly(self.live, self.gate):
            return record
        record.gate_beta = auto_beta(
            self._margins(by, column, fitting), separation="softmax", norm_max=norm_max, support=SUPPORT,
            share=MARGIN_SHARE,
        ).beta  # fmt: skip
        known = log_mass(self.evidence.found[column].scores[judging], record.gate_beta)
        try:
            # Distances know no origin for an unknown cue to fall to.
            rows = view.count if by.blocks.similarity == "cosine" else None
            threshold = calibrate(known, record.target_tpr, rows).log_lambda
            # A part of a memory is at distance 0 from it but for rounding, and a threshold inside rounding's reach
            # would turn away cues by chance. Lower, it lets in no fewer, and nothing else is so near.
            slack = 2.0 * SCORE_ERROR * (1.0 if by.blocks.similarity == "cosine" else norm_max**2)
            record.log_lambda = threshold - record.gate_beta * slack
        except CalibrationRefused as refusal:
            record.refused = refusal.detail
            return record
        if len(strangers):
            mass = log_mass(self.without.found[column].scores[strangers], record.gate_beta)
            record.stranger_accept_rate = float((mass > record.log_lambda).double().mean())
        return record

    def _margins(self, by: Comparison, column: int, cues: Tensor) -> Tensor:
        state, observed = by.state(self.live, {name: block[cues] for name, block in self.drawn.cues.items()})
        patterns = by.gather(self.view, self.own[cues, None])
        rivals = self.without.found[column].scores[cues, 0]
        return (by.scores(patterns, state, observed)[:, 0] - rivals).double()
