"""What a recall answers: the reply's shapes, in the words of the API (requests are in `schemas.py`)."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from service.app.fields import Base64Text, Payload, VectorList

# Typed dictionaries, not models: a recall of tenths of a millisecond would spend as long again on building models.


class Match(TypedDict):
    """`weight`: of this memory after the last step. Weights sum to 1 over the support, which is more memories than the
    matches, or fewer: one that is listed beyond it has 0.
    `text`: the caption as it is stored; null where there is none, or captions were not asked for. `vectors`: as they
    were stored. `group` (group_by): the value of the group that it is listed for; a memory of two groups is listed for
    each, with the same weight.
    """

    id: str
    weight: float
    similarity: float
    text: str | None
    payload: Payload | None
    vectors: NotRequired[dict[str, VectorList]]
    group: NotRequired[str | bool | int | float]


class Dynamics(TypedDict):
    """`margin`: similarity of the first candidate less the second's, before any step. `energy`: before, and after
    each step. `compared_by`: the collection's similarity, or `kernel` (`kernels` names them), `neg_l2`,
    `observed_neg_l2`; `probability`: that the first candidate is the cue's own, where `kernel: auto` chose by it.
    """

    steps: int
    converged: bool
    outcome: str
    energy: list[float]
    margin: float | None
    beta: float
    support: int
    certified: bool
    error_bound: float | None
    compared_by: str
    kernels: list[str]
    probability: float | None


class GateReply(TypedDict):
    """`score` is log S (its least along the path, where the gate follows it; less that of known negatives) and
    `threshold` log λ: a cue is accepted when the score is over it. `rejected_at`: 0, rejected before any step; t, fell
    to the origin after t steps; null, never.
    """

    score: float
    threshold: float
    target_tpr: float
    modality: str
    rejected_at: int | None


class Drawing(TypedDict):
    """A state, decoded at the codec's size: the stored patterns averaged by their weights, not a stored picture, so
    that a mixture of memories is a mixture of pictures.
    """

    media_type: str
    base64: Base64Text


Verdict = Literal["known", "ambiguous", "unknown", "uncalibrated"]


class ProblemDict(TypedDict):
    code: str
    detail: str


class RecallResult(TypedDict):
    """`verdict` and `recall` are null where the cue itself was wrong (see `error`); `recall` also in an empty
    collection.

    `candidates`: the memories between which the cue does not decide, the likeliest first; empty where it decides, or
    nothing was recalled. Under `ambiguous` there are two at least.

    What was recalled, unless the cue is `unknown` (then all of it is null or empty):
    `text`: the caption on which most of the settled weight lies; null where most lies on memories without one.
    `original`: the address of the heaviest memory's original; null where it has none.
    `completed`: the spaces that the cue did not fill, each with the settled weight of the memories that have it: 1, all
    of what was recalled has it; 0, none has.
    `reconstruction`: the settled state, decoded, where `reconstruct` asks for it; null where nothing that was recalled
    has the space that draws.
    `state` (with_vectors): the settled state in every space, in the units of the space's own vectors: the stored
    patterns averaged by the settled weights.
    """

    verdict: Verdict | None
    matches: list[Match]
    candidates: list[str]
    recall: Dynamics | None
    gate: GateReply | None
    text: str | None
    original: str | None
    completed: dict[str, float]
    reconstruction: Drawing | None
    state: NotRequired[dict[str, VectorList] | None]
    trace: NotRequired[list[Drawing | None]]
    warnings: list[str]
    error: ProblemDict | None


class Timings(TypedDict):
    encode: float
    search: float
    gate: float
    dynamics: float
    decode: float
    total: float


class RecallReply(TypedDict):
    version: int
    results: list[RecallResult]
    timings_ms: Timings
