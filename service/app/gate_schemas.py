"""The gate's part of the contract: how a collection's gate is set up, and what its calibration says of itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.app.fields import Reply, Request

ComparisonName = Literal["own", "kernel", "neg_l2", "observed_neg_l2"]
"""How cues are compared with memories (see comparison.py)."""


class PrototypesSpec(Request):
    prototypes: int = Field(ge=2, le=4_096)


class LearnedSpec(Request):
    learned: int = Field(ge=2, le=4_096, description="memories of a matrix learned by the likelihood of the patterns")


TargetTpr = Annotated[float, Field(ge=0.5, le=0.999)]


class GateConfig(Request):
    """The gate: which rows its mass is summed over, at which states, and the share of declared cues it must let
    through.
    """

    interaction: Literal["bank"] | PrototypesSpec | LearnedSpec = "bank"
    when: Literal["cue", "path"] = Field(
        default="cue",
        description="judge the cue alone, or the least mass over the states that the gate's dynamics visits from it",
    )
    target_tpr: TargetTpr = 0.95


class LearningRecord(Reply):
    """How an interaction matrix was learned. `log_likelihood`: mean of a held-out pattern in nats, before the first and
    after each round; the matrix is that of `best_round`.
    """

    patterns: int
    rounds: int
    best_round: int
    seconds: float
    log_likelihood: list[float]


class NegativesRecord(Reply):
    """What known negatives did: `boosting` of them are in the score, and the others were let in at these rates."""

    boosting: int
    log_background: float | None = Field(description="what counts as a negative's mass everywhere; null: none")
    held_out: int
    accept_rate: float | None = Field(description="share of the held-out negatives that is let in")
    accept_rate_without: float | None = Field(description="the same, had none been in the score")


class CalibrationRecord(Reply):
    """What the gate and β of one modality rest on; `refused` says why there is no threshold."""

    modality: str
    compared_by: ComparisonName = Field(
        default="own", description="`own`: the collection's similarity; under `choices`, the comparison chosen"
    )
    version: int = Field(description="the collection's version when it was made")
    rows: int = Field(description="memories then")
    cues: int = Field(description="cues that the threshold was set by")
    cues_from: Literal["memories", "caller"] = Field(
        default="memories", description="made from stored memories by the corruptions, or supplied with `train`"
    )
    corruptions: list[str]
    margin: float | None = Field(description="the margin that `share` of the cues exceed; auto β comes from it")
    share: float
    first_share: float = Field(description="share of the cues whose own memory came first")
    target_tpr: float
    gate_beta: float | None
    when: Literal["cue", "path"] = "cue"
    log_lambda: float | None
    stranger_accept_rate: float | None = Field(
        description="share of the same cues let in when their own memory was left out: strangers of the same kind"
    )
    learning: LearningRecord | None = None
    negatives: NegativesRecord | None = None
    refused: str | None = None


class ChoiceInfo(Reply):
    """Cues of one modality under a kernel: what they may be compared by, and how the choice fared on cues it was not
    fitted on.
    """

    modality: str
    comparisons: list[ComparisonName]
    cues: int
    alone: dict[str, float]
    chosen: float
    oracle: float
    picked: dict[str, float]
    records: list[CalibrationRecord] = Field(description="what β and the verdicts of the cues that choose each rest on")


CalibrationState = Literal["none", "pending", "current", "stale"]


class CalibrationInfo(Reply):
    """`changed_rows` memories were written or deleted since the last calibration, over `rows_then`; it is redone when
    they are more than `redone_over`.
    """

    state: CalibrationState
    rows_then: int | None
    rows_now: int
    changed_rows: int
    redone_over: int | None
    why: str = Field(description="the state in words")
    modalities: list[CalibrationRecord]
    choices: list[ChoiceInfo] = Field(description="modalities whose cues choose their comparison (`kernel: auto`)")
