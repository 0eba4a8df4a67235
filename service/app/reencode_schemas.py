"""The re-encoding's part of the contract: what is asked for, and what came of it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from service.app.fields import Reply, Request


class ReencodeRequest(Request):
    """POST /v1/collections/{c}/spaces/{s}/reencode. With nothing, by the encoder that is configured, as it is now."""

    encoder: str | None = Field(default=None, description="an encoder's name; absent: the configured one")
    options: dict[str, Any] | None = Field(
        default=None, description="its options; absent: the configured ones, or another encoder's defaults"
    )
    drop_without_original: bool = Field(
        default=False,
        description="memories whose original is missing, damaged or unreadable to the encoder lose the space; "
        "absent: then nothing is changed",
    )


class Dropped(Reply):
    """Memories that lost the space: how many, and the first ones with why."""

    count: int
    first: dict[str, str]


class ReencodeRecord(Reply):
    """What a re-encoding did; `deleted` of the dropped memories had no other space."""

    space: str
    encoder: str
    fingerprint: str
    former: str = Field(description="the fingerprint before")
    dimension: int
    memories: int = Field(default=0, description="memories encoded")
    dropped: Dropped
    deleted: int = 0
    kernels_dropped: list[str] = Field(description="of the space: they were trained on the former patterns")
    cues_forgotten: list[str] = Field(description="modalities whose supplied cues or negatives were of the former")
    seconds: float
    version: int | None = None
