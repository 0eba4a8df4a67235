"""What a sizing asks and says: POST /v1/collections/{c}/diagnostics/sizing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.app.fields import PAYLOAD_BYTES_MAX, SPACES_MAX, Name, Reply, Request
from service.encoders.protocol import DIMENSION_MAX

MEMORIES_MAX = 10**10  # beyond it every figure here is a fantasy
FILE_BYTES_MAX = 2**30

LatencyClass = Literal["under 1 ms", "1 to 5 ms", "5 to 25 ms", "over 25 ms"]


class SizingRequest(Request):
    """What is not given is as the collection's memories are now."""

    memories: int = Field(ge=1, le=MEMORIES_MAX, description="how many there would be, those of now among them")
    spaces: (
        Annotated[dict[Name, Annotated[int, Field(ge=1, le=DIMENSION_MAX)]], Field(min_length=1, max_length=SPACES_MAX)]
        | None
    ) = Field(default=None, description="values a vector has, by space, instead of the collection's own")
    payload_bytes: float | None = Field(default=None, ge=0, le=PAYLOAD_BYTES_MAX, description="mean, as JSON")
    text_bytes: float | None = Field(default=None, ge=0, le=PAYLOAD_BYTES_MAX, description="mean, of a caption")
    image_bytes: float | None = Field(default=None, ge=0, le=FILE_BYTES_MAX, description="mean, of an original")


class Amount(Reply):
    bytes: int
    bytes_per_memory: float
    parts: dict[str, int]


class Sizing(Reply):
    """Estimates; what is stored and how it is held is known to a tenth or so, times depend on the machine."""

    memories: int
    spaces: dict[str, int]
    assumed: dict[str, float] = Field(description="mean bytes of an id, a text, a payload and an original")
    ram: Amount = Field(description="once it is sealed: rows, graph, payloads, ids")
    ram_peak_bytes: int = Field(description="while a graph over all is built, beside the one in use")
    disk: Amount
    device: Amount = Field(description="0: banks are held and searched by the processor")
    index: Literal["scan", "graph"] = Field(description="how one cue is searched: a scan is exact")
    graph_from: int = Field(description="the number of memories from which on a graph is built")
    load_s: float = Field(description="from the database to answering by scans, when a server starts")
    seal_s: float = Field(description="until the graph stands, in the background; 0: there is none")
    recall_ms: float = Field(description="one cue of vectors, one step, in process, on one core")
    latency: LatencyClass
    how: list[str] = Field(description="the arithmetic")
