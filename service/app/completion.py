"""Completion: what of a memory a cue did not bring, as the settled state has it.

Rules:
- Vectors are raw patterns averaged by the settled weights; pictures are decoded from them (`drawing.py`). A caption is
  not: it is the stored one on which most of the weight lies, and none where most lies on memories without.
- Captions and originals are in SQL, read for the matches of a whole batch in one query, and not at all in a collection
  that has none. So they are those of now: of a memory that was deleted a moment after it was found there is none.
- An unknown cue completes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from urllib.parse import quote

import torch
from torch import Tensor

from service.app.live import LiveCollection
from service.app.recall_schemas import RecallResult
from service.bank import View
from service.storage.memories import Description
from service.storage.repository import Repository


def completed(
    live: LiveCollection, view: View, filled: Container[str], rows: Tensor, weights: Tensor
) -> dict[str, list[float]]:
    """For each space that the cues do not fill, the weight of the rows that have it, cue by cue."""
    shares = {}
    for name in live.spaces:
        if name not in filled:
            lacking = view.lacking([name], rows.reshape(-1)).view(rows.shape)
            shares[name] = torch.where(lacking, 0.0, weights).sum(dim=1).tolist()
    return shares


def states(live: LiveCollection, view: View, rows: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Space → (batch, d): the raw patterns averaged by the settled weights."""
    return {name: view.read_out(rows, weights, name) for name in live.spaces}


def describe(
    repository: Repository, live: LiveCollection, results: Sequence[RecallResult],
    heaviest: Sequence[Sequence[tuple[str, float]]],
) -> None:  # fmt: skip
    """Add to results what their matches are called, the caption that was recalled, and where the original is.

    `heaviest`: per result the ids of largest weight with their weights, falling; none where nothing was recalled.
    """
    ids = {match["id"] for result in results for match in result["matches"]}
    ids.update(memory_id for some in heaviest for memory_id, _ in some)
    if not live.described or not ids:
        return
    known = repository.describe(live.id, sorted(ids))
    for result, weighted in zip(results, heaviest, strict=True):
        for match in result["matches"]:
            match["text"] = known[match["id"]].text if match["id"] in known else None
        if weighted:
            weights: dict[str | None, float] = defaultdict(float)
            for memory_id, weight in weighted:
                weights[known[memory_id].text if memory_id in known else None] += weight
            result["text"] = max(weights, key=weights.__getitem__)
            result["original"] = _address(live.name, weighted[0][0], known)


def _address(collection: str, memory_id: str, known: Mapping[str, Description]) -> str | None:
    if memory_id not in known or not known[memory_id].has_original:
        return None
    escaped = quote(memory_id, safe="")
    if memory_id in (".", ".."):  # which clients would take for steps of the path
        escaped = escaped.replace(".", "%2E")
    return f"/v1/collections/{collection}/memories/{escaped}/content"
