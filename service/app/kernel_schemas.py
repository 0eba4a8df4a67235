"""The kernel's part of the contract: what a training is asked for, and what it says of itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.app.fields import Name, Reply, Request
from service.core.names import Objective, Start
from service.encoders.corruption import Corruption


class TrainKernel(Request):
    """Train a kernel for one space: `cues` to find memories behind corrupted cues, `separation` (U-Hop) or
    `separation_plus` (U-Hop+) to keep memories apart.
    """

    what: Literal["kernel"]
    space: Name | None = Field(default=None, description="absent: the collection's first")
    objective: Objective = "cues"
    start: Start = "whitening"
    corruptions: list[Corruption] | None = Field(
        default=None, min_length=1, max_length=32, description="the cues to train for; absent: the collection's"
    )
    steps_max: int = Field(default=4_000, ge=1, le=100_000)
    time_limit_s: float = Field(
        default=300,
        ge=1,
        le=3_600,
        description="of the training itself; its cues, its trial and a calibration come on top",
    )
    batch: int = Field(default=512, ge=2, le=4_096)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    seed: int = Field(default=0, ge=0, le=2**31 - 1)


class LossPoint(Reply):
    step: int
    loss: float | None = Field(description="mean over the steps since the last point")
    held_out: float


class TrialRow(Reply):
    """Held-out cues of one corruption: the share whose own memory came first, by each comparison alone, by the choice
    made for each cue before, among all comparisons but the new kernel (`others`), and with it (`chosen`), and by
    whichever comparison was right (`oracle`).
    """

    corruption: str
    cues: int
    alone: dict[str, float | None] = Field(
        description="by whitening, `own`, `kernel`, `neg_l2` and `observed_neg_l2`; null: not used for these cues"
    )
    before: float
    others: float
    chosen: float
    oracle: float


class KernelRecord(Reply):
    """How a kernel was trained and why it was kept or dropped."""

    space: str
    objective: Objective
    start: Start
    memories: int = Field(description="memories trained on")
    cues: int = Field(description="corrupted cues trained on; 0 where they are drawn anew for each step, or not used")
    corruptions: list[str]
    steps: int
    best_step: int
    stopped: Literal["steps", "patience", "time"]
    seconds: float
    curve: list[LossPoint]
    trial: list[TrialRow]
    kept: bool
    why: str


class KernelInUse(Reply):
    id: str
    space: str


class KernelInfo(Reply):
    id: str
    space: str
    status: Literal["active", "retired", "dropped"]
    rank: int
    dimension: int
    created_at: str
    record: KernelRecord


class KernelList(Reply):
    kernels: list[KernelInfo]
