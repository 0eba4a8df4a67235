"""Sizing: what so many memories would need, before they are stored.

Rules:
- An estimate is arithmetic on a few constants, each with its source beside it, and the reply shows it.
- Bytes follow from how rows, graphs and pages are laid out; times from one machine's measurements
  (`make bench-sizing`, benchmarks/load/results.md: one core of an AMD EPYC), and are good to a factor of two elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.app.live import LiveCollection
from service.app.resources import Resources
from service.app.sizing_schemas import Amount, LatencyClass, Sizing, SizingRequest
from service.bank.index import LINKS
from service.bank.segment import STRING_BYTES, TAIL_BYTES, TAIL_ROWS_MAX, TAIL_ROWS_MIN
from service.storage.footprint import RowShape, memory_bytes

NORM_BYTES = 4  # a row's norm in each space
ROW_NUMBER_BYTES = 32  # a Python int, by which an id finds its row
TABLE_BYTES = 45  # an id's entry in a Python dict, between 30 and 60 as it grows
POINTER_BYTES = 8
GRAPH_OVERHEAD_BYTES = 12  # of a row of FAISS's HNSW: its offset and its level
LINK_BYTES = 4
FILE_BLOCK = 4_096  # a file takes whole blocks
ID_BYTES = 36.0  # a UUID, where nothing is stored to go by

SCAN_VALUES_PER_S = 7.0e9  # 60,000 × 784 in 6.8 ms: "FAISS flat alone"
GRAPH_MS = 0.19  # one search at 60,000 × 784: "FAISS HNSW alone"; it grows with the logarithm of the rows
GRAPH_ROWS, GRAPH_DIMENSION = 60_000, 784
GRAPH_FIXED = 0.3  # of a search's time, what does not grow with the values of a row
RECALL_MS = 0.6  # the rest of a recall: support, gate, step, verdict: "Engram in process" less its search
LOAD_ROW_S, LOAD_VALUE_S = 1.3e-5, 1.7e-8  # of a row, and of each of its values, from the database to the bank
SEAL_ROW_S, SEAL_VALUE_S = 5.0e-6, 1.7e-8  # of a row and of its values, for each doubling of the rows
CLASSES: Sequence[tuple[float, LatencyClass]] = ((1, "under 1 ms"), (5, "1 to 5 ms"), (25, "5 to 25 ms"))

SAMPLED = 1_000  # memories whose sizes stand for all
FILES_SAMPLED = 100


@dataclass(frozen=True)
class Means:
    """Mean bytes of a memory's parts; `with_original` is the share of memories that have a file."""

    id_bytes: float = ID_BYTES
    text_bytes: float = 0.0
    payload_bytes: float = 0.0
    image_bytes: float = 0.0
    with_original: float = 0.0


def measured(resources: Resources, live: LiveCollection) -> Means:
    """The means over the memories stored last. Blocking."""
    found = resources.repository.sample_sizes(live.id, SAMPLED)
    if not found:
        return Means()
    hashes = [row.blob_hash for row in found if row.blob_hash is not None]
    files = [resources.blobs.size_bytes(hash_) for hash_ in hashes[:FILES_SAMPLED]]
    return Means(
        id_bytes=sum(row.id_bytes for row in found) / len(found),
        text_bytes=sum(row.text_bytes for row in found) / len(found),
        payload_bytes=sum(row.payload_bytes for row in found) / len(found),
        image_bytes=sum(files) / len(files) if files else 0.0,
        with_original=len(hashes) / len(found),
    )


def size(resources: Resources, live: LiveCollection, request: SizingRequest) -> Sizing:
    means = measured(resources, live)
    spaces = request.spaces or {space.name: space.dimension for space in live.spaces.values()}
    given = request.model_dump(include={"payload_bytes", "text_bytes", "image_bytes"}, exclude_none=True)
    if request.image_bytes is not None:
        given["with_original"] = float(request.image_bytes > 0)
    means = Means(**{**vars(means), **given})
    is_postgres = resources.repository.is_postgres
    return estimate(request.memories, spaces, means, live.bank.scan_values_max, is_postgres)


def on_disk(resources: Resources, live: LiveCollection, memories: int) -> dict[str, int]:
    """About how many bytes the collection takes in the database, and its originals as files. Blocking."""
    spaces = {space.name: space.dimension for space in live.spaces.values()}
    parts, _ = _disk(memories, spaces, measured(resources, live), resources.repository.is_postgres)
    return {name: round(part) for name, part in parts.items()}


def estimate(memories: int, spaces: dict[str, int], means: Means, scan_values_max: int, is_postgres: bool) -> Sizing:
    """Pure. `spaces`: the dimension of each."""
    n, values = memories, sum(spaces.values())
    graph_from = scan_values_max // values + 1
    graphed = n >= graph_from
    ram, ram_how = _ram(n, spaces, means, graphed)
    disk, disk_how = _disk(n, spaces, means, is_postgres)
    peak = sum(ram.values()) + (n * (4 * values + 4 * max(spaces.values())) if graphed else 0)
    doublings = math.log2(max(2, n))
    seal_s = n * (SEAL_ROW_S * len(spaces) + SEAL_VALUE_S * values) * doublings if graphed else 0.0
    search_ms, search_how = _search(n, spaces, graphed)
    recall_ms = RECALL_MS + search_ms
    latency: LatencyClass = next((name for under, name in CLASSES if recall_ms < under), "over 25 ms")
    how = [
        f"graph from {scan_values_max:,} values / {values:,} a memory = {graph_from:,} memories on"
        f" ({n:,}: {'a graph' if graphed else 'scanned'})",
        *ram_how,
        *disk_how,
        "device: 0, banks are held by the processor",
        f"load: {n:,} × ({LOAD_ROW_S:g} s + {values:,} values × {LOAD_VALUE_S:g} s)",
        f"seal: {n:,} × ({len(spaces)} × {SEAL_ROW_S:g} s + {values:,} × {SEAL_VALUE_S:g} s) × {doublings:.1f} (log₂)"
        if graphed
        else "seal: nothing to build",
        "seal is of pictures; vectors without structure take several times as long",
        search_how,
        f"recall: {RECALL_MS:g} ms besides the search",
    ]
    return Sizing(
        memories=n, spaces=spaces, assumed={name: round(value, 3) for name, value in vars(means).items()},
        ram=_amount(n, ram), ram_peak_bytes=round(peak), disk=_amount(n, disk), device=_amount(n, {}),
        index="graph" if graphed else "scan", graph_from=graph_from,
        load_s=_rounded(n * (LOAD_ROW_S + LOAD_VALUE_S * values)), seal_s=_rounded(seal_s),
        recall_ms=_rounded(recall_ms), latency=latency, how=how,
    )  # fmt: skip


def _ram(n: int, spaces: dict[str, int], means: Means, graphed: bool) -> tuple[dict[str, float], list[str]]:
    row = sum(4 * dimension + NORM_BYTES for dimension in spaces.values())
    first = min(max(TAIL_BYTES // (4 * sum(spaces.values())), TAIL_ROWS_MIN), TAIL_ROWS_MAX)
    rows = n if graphed else first * 2 ** max(0, math.ceil(math.log2(n / first)))
    # Every row has 2M links on the ground; one in M is a layer up, with M more, and so on.
    links = LINK_BYTES * (2 * LINKS + LINKS / (LINKS - 1)) + GRAPH_OVERHEAD_BYTES
    payload = POINTER_BYTES + (means.payload_bytes + STRING_BYTES if means.payload_bytes else 0)
    id_ = POINTER_BYTES + STRING_BYTES + means.id_bytes + TABLE_BYTES + ROW_NUMBER_BYTES
    parts = {
        "patterns": rows * row,
        "graph": n * links * len(spaces) if graphed else 0.0,
        "payloads": n * payload,
        "ids": n * id_,
    }
    how = [
        f"patterns: {rows:,} × {row:,} bytes (4 a value, and a norm a space)"
        + ("" if graphed else f"; what is not sealed has room that doubles, from {first} memories"),
        f"graph: {n:,} × {links:.0f} bytes of links × {len(spaces)}" if graphed else "graph: none",
        f"payloads: {n:,} × {payload:.0f} bytes; ids: {n:,} × {id_:.0f} bytes, as Python holds them",
        "not counted: the program itself (some 300 MB with torch), encoders, columns for filters",
    ]
    return parts, how


def _disk(n: int, spaces: dict[str, int], means: Means, is_postgres: bool) -> tuple[dict[str, float], list[str]]:
    shape = RowShape(means.id_bytes, means.text_bytes, means.payload_bytes, means.with_original, spaces)
    row = memory_bytes(shape, is_postgres)
    file = math.ceil(means.image_bytes / FILE_BLOCK) * FILE_BLOCK
    parts = {"database": n * row, "originals": n * means.with_original * file}
    where = "PostgreSQL" if is_postgres else "SQLite"
    vectors = 4 * sum(spaces.values())
    how = [
        f"database: {n:,} × {row:,.0f} bytes in {where}'s pages ({vectors:,} of vectors, the rest rows and indexes)",
        f"originals: {n:,} × {means.with_original:.2f} × {file:,} bytes in whole blocks, equal ones once",
        "not counted: snapshots, logs, operations of the last week",
    ]
    return parts, how


def _search(n: int, spaces: dict[str, int], graphed: bool) -> tuple[float, str]:
    if not graphed:
        scanned = n * sum(spaces.values())
        told = f"search: {scanned:,} values scanned at {SCAN_VALUES_PER_S:g} a second"
        return 1000 * scanned / SCAN_VALUES_PER_S, told
    each = [GRAPH_FIXED + (1 - GRAPH_FIXED) * dimension / GRAPH_DIMENSION for dimension in spaces.values()]
    times = sum(each) * math.log(n) / math.log(GRAPH_ROWS)
    graphs = "1 graph" if len(spaces) == 1 else f"{len(spaces)} graphs"
    told = f"search: {graphs}, {GRAPH_MS:g} ms for one of {GRAPH_ROWS:,} × {GRAPH_DIMENSION}, × {times:.2f} for these"
    return GRAPH_MS * times, told


def _amount(n: int, parts: dict[str, float]) -> Amount:
    total = sum(parts.values())
    rounded = {name: round(part) for name, part in parts.items()}
    return Amount(bytes=round(total), bytes_per_memory=round(total / n, 1), parts=rounded)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
