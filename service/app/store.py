"""Store: check each item, keep its original, commit a job, encode in batches, commit the memories, let the bank follow.

What is between the job's commit and the memories' is a pipeline of its own: see `workers/ingest.py`, whose steps are
here.

Rules:
- Acknowledged is on disk: with `wait` the memories are committed; without it the originals and the job are.
- An item that only brings vectors needs no encoding and is committed at once.
- A bad item is reported under its position and the rest are stored.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from service.app.cues import CueBlocks, check_vector, memory_wants
from service.app.duplicates import Alike, admitting, find_equal, find_near
from service.app.encoding import Parts, Vectors, Wanted, content_of
from service.app.fields import PAYLOAD_BYTES_MAX, Payload, faults
from service.app.live import LiveCollection
from service.app.resources import Resources
from service.app.schemas import MemoryInput, Problem, StoredItem, StoreReply, StoreRequest
from service.bank import Rows
from service.encoders.picture import media_type, read_picture
from service.encoders.protocol import Picture, Source
from service.errors import Duplicate, EmptyText, EncodersChanged, EngramError, InvalidRequest
from service.storage.jobs import ItemAnswer, JobItem, JobItems, NewItem
from service.storage.memories import MemoryWrite, Written

STORE_JOB = "store"
NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # as JSON writes it, and no backslash before a "u0000" of the text's own


@dataclass(frozen=True, eq=False)
class Accepted:
    """What `accept` did: `results` is complete except for items that are `queued` in job `job_id`; `done` ends with
    it.
    """

    version: int | None
    results: list[StoredItem]
    job_id: str | None
    done: Future[None] | None


@dataclass(eq=False)
class Item:
    """A memory that is checked, and can be stored."""

    id: str
    text: str | None
    payload: dict[str, Any] | None
    vectors: Vectors
    image: bytes | None
    media_type: str | None
    pixels: int
    warnings: list[str]


@dataclass(eq=False)
class Arriving:
    """An item of a job on its way: `pixels` is what its picture takes once decoded, `outcome` what encoding gave."""

    job_id: str
    live: LiveCollection
    item: JobItem
    parts: Parts
    wanted: Wanted
    pixels: int
    outcome: CueBlocks | EngramError | None = None


def accept(resources: Resources, live: LiveCollection, request: StoreRequest) -> Accepted:
    """Check every item; commit those that only bring vectors, and a job for the rest.

    Raises why a space's encoder cannot be used, where an item needs it (`EncoderMismatch`, `WeightsMissing`).
    """
    for space in live.spaces.values():
        if space.fault is not None and any(_given(raw, space.config.source) for raw in request.memories):
            live.require([space.name])
    results: list[StoredItem] = []
    ready: list[tuple[int, Item]] = []
    queued: list[tuple[int, Item]] = []
    for position, raw in enumerate(request.memories):
        try:
            item = _check(resources, live, raw)
        except EngramError as error:
            given = raw.get("id") if isinstance(raw, dict) else getattr(raw, "id", None)
            results.append(_failed(given if isinstance(given, str) else None, error))
            continue
        needs_encoding = item.image is not None or item.text is not None
        (queued if needs_encoding else ready).append((position, item))
        results.append(StoredItem(id=item.id, status="queued", warnings=item.warnings))
    version = None
    if ready:
        writes = [MemoryWrite(item.id, payload=item.payload, vectors=item.vectors) for _, item in ready]
        version, outcomes = _commit_ready(resources, live, writes)
        for (position, item), outcome in zip(ready, outcomes, strict=True):
            if isinstance(outcome, EngramError):
                results[position] = _failed(item.id, outcome)
            else:
                results[position].status, alike = outcome
                results[position].warnings += alike.warnings()
    if not queued:
        return Accepted(version, results, None, None)
    job_id, done = enqueue(resources, live, queued)
    return Accepted(version, results, job_id, done)


def enqueue(resources: Resources, live: LiveCollection, queued: Sequence[tuple[int, Item]]) -> tuple[str, Future[None]]:
    """Commit the originals of items and a job that encodes them; the number of each is its position in the answer."""
    hashes = keep_originals(resources, [item for _, item in queued])
    items = [_job_item(position, item, hash_) for (position, item), hash_ in zip(queued, hashes, strict=True)]
    return resources.enqueue(STORE_JOB, live.id, items)


def keep_originals(resources: Resources, items: Sequence[Item]) -> list[str | None]:
    """The hash of each item's original, once all are on disk."""
    hashes = iter(resources.blobs.put_many([item.image for item in items if item.image is not None]))
    return [None if item.image is None else next(hashes) for item in items]


def reply(resources: Resources, accepted: Accepted) -> StoreReply:
    """The reply as things stand: items of a finished job carry their outcome, the others stay `queued`."""
    if accepted.job_id is None:
        return StoreReply(version=accepted.version, results=accepted.results)
    job = resources.repository.get_job(accepted.job_id)
    results = list(accepted.results)
    if job.status == "done" and job.result is not None:
        for position, outcome in job.result["results"]:
            results[position] = StoredItem.model_validate(outcome)
        versions = [v for v in (accepted.version, job.result["version"]) if v is not None]
        return StoreReply(version=max(versions, default=None), results=results)
    if job.status in ("queued", "running"):
        return StoreReply(version=accepted.version, results=results, operation_id=accepted.job_id)
    error = Problem.model_validate(job.error or {"code": "cancelled", "detail": "the operation was cancelled"})
    results = [
        StoredItem(id=item.id, status="error", error=error) if item.status == "queued" else item for item in results
    ]
    version, answered = _answers(resources, accepted.job_id)  # what was done before it ended stands
    for position, outcome in answered:
        results[position] = StoredItem.model_validate(outcome)
    return StoreReply(version=version or accepted.version, results=results)


def arriving(resources: Resources, collection_id: int, job_id: str, item: JobItem) -> Arriving:
    """A job's item with what is known of it: its picture is not decoded yet, and never has to be if `pixels` is 0.

    Raises `CollectionNotFound`, and why the encoder of a space that the item needs cannot be used.
    """
    live, body = resources.live_by_id(collection_id), item.body
    vectors = {
        name: np.frombuffer(base64.b64decode(packed), dtype=np.float32) for name, packed in body["vectors"].items()
    }
    has_picture = body["blob_hash"] is not None
    parts = Parts(None, body["text"], vectors, content=body["blob_hash"])
    wanted = memory_wants(live, parts, has_picture)
    live.require(wanted)
    resources.encoded.look_up(parts, wanted)
    decoded = any(
        source == "image" and (encoder.fingerprint, source) not in parts.known for encoder, source in wanted.values()
    )
    # A job of an earlier version does not say how large its pictures are: each goes by itself.
    pixels = body.get("pixels", resources.settings.image_pixels_max) if decoded else 0
    if has_picture and not decoded:
        resources.decoded.take(body["blob_hash"])
    return Arriving(job_id, live, item, parts, wanted, pixels)


def decode(resources: Resources, arrived: Arriving) -> Picture:
    """The picture of an item. Raises the `EngramError` that says why there is none."""
    content = arrived.item.body["blob_hash"]
    picture = resources.decoded.take(content)
    if picture is None:
        picture = read_picture(resources.blobs.get(content), pixels_max=resources.settings.image_pixels_max)
    return picture


def commit_encoded(resources: Resources, live: LiveCollection, encoded: Sequence[Arriving]) -> None:
    """Commit a collection's encoded items and the answers of all, of several jobs as it may be (each job's together),
    in one transaction. Raises `Conflict` where a job no longer runs, `EncodersChanged` where they are to be encoded
    again; nothing of any is done then.
    """
    answering = {each.job_id: JobItems(each.job_id, [], [], []) for each in encoded}
    arrived: list[tuple[Arriving, MemoryWrite, list[str]]] = []
    for each in encoded:
        body, blocks = each.item.body, each.outcome
        if not isinstance(blocks, CueBlocks):
            assert blocks is not None
            answering[each.job_id].failed.append(_failure(each.item, blocks))
            continue
        original = (body["blob_hash"], body["media_type"])
        write = MemoryWrite(body["id"], each.parts.text, body["payload"], *original, blocks.vectors)
        arrived.append((each, write, [*body["warnings"], *blocks.warnings]))
    with admitting(live):
        writes = []
        alikes = find_near(live, [write.id for _, write, _ in arrived], [write.vectors for _, write, _ in arrived])
        for (each, write, warnings), alike in zip(arrived, alikes, strict=True):
            answer = answering[each.job_id]
            if (refusal := alike.refusal(live)) is not None:
                answer.failed.append(_failure(each.item, refusal))
                continue
            writes.append(write)
            answer.positions.append(each.item.position)
            answer.notes.append({"position": each.item.body["position"], "warnings": [*warnings, *alike.warnings()]})
        if writes:
            commit(resources, live, writes, list(answering.values()))
        else:
            resources.repository.answer_together({job_id: answer.failed for job_id, answer in answering.items()})


def job_result(resources: Resources, job_id: str) -> dict[str, Any]:
    """What a store job whose items are all answered ends with."""
    version, answered = _answers(resources, job_id)
    return {"version": version, "results": answered}


def _answers(resources: Resources, job_id: str) -> tuple[int | None, list[tuple[int, dict[str, Any]]]]:
    """What became of a job's items so far: the last version, and (position in the request, `StoredItem`)."""
    version = None
    answered = []
    for answer in resources.repository.item_answers(job_id):
        outcome = answer.result
        version = max(version or 0, outcome.pop("version", 0)) or None
        answered.append((outcome.pop("position"), outcome))
    return version, answered


def commit(
    resources: Resources, live: LiveCollection, writes: Sequence[MemoryWrite], answering: Sequence[JobItems] = ()
) -> Written:
    """Commit memories (with their jobs' answers, in one transaction); the bank follows before anybody is told.

    Raises `EncodersChanged` where `live` is the collection under former encoders: nothing is written then.
    """
    live.wait_writable()
    rows = Rows(
        ids=[write.id for write in writes],
        vectors={
            space.name: np.stack([write.vectors.get(space.name, _absent(space.dimension)) for write in writes])
            for space in live.spaces.values()
        },
        payloads=[None if write.payload is None else orjson.dumps(write.payload) for write in writes],
    )
    live.described = live.described or any(write.text is not None or write.blob_hash for write in writes)
    written = resources.repository.put_memories(
        live.id, writes, answering, lambda written: live.follow(rows, [], written.version), live.generation
    )
    resources.metrics.stored.labels(live.name).inc(len(writes))
    resources.after_write(live)
    return written


Outcome = Duplicate | tuple[Literal["stored", "updated"], Alike]


def _commit_ready(
    resources: Resources, live: LiveCollection, writes: Sequence[MemoryWrite]
) -> tuple[int | None, list[Outcome]]:
    """Commit memories of the callers' vectors, which no encoder makes: the version, and what became of each."""
    ids, vectors = [write.id for write in writes], [write.vectors for write in writes]
    while True:
        try:
            if live.config.duplicates == "warn":
                written = commit(resources, live, writes)
                return written.version, list(zip(written.statuses, find_equal(live, ids, vectors), strict=True))
            return commit_admitted(resources, live, writes)
        except EncodersChanged:
            live = resources.successor(live)


def commit_admitted(
    resources: Resources, live: LiveCollection, writes: Sequence[MemoryWrite]
) -> tuple[int | None, list[Outcome]]:
    """Commit to a collection that refuses duplicates those that are none. Raises `EncodersChanged`."""
    with admitting(live):
        alikes = find_near(live, [write.id for write in writes], [write.vectors for write in writes])
        refusals = [alike.refusal(live) for alike in alikes]
        taken = [write for write, refusal in zip(writes, refusals, strict=True) if refusal is None]
        if not taken:
            return None, [refusal for refusal in refusals if refusal is not None]
        written = commit(resources, live, taken)
    statuses = iter(written.statuses)
    return written.version, [
        (next(statuses), alike) if refusal is None else refusal for refusal, alike in zip(refusals, alikes, strict=True)
    ]


@cache
def _absent(dimension: int) -> NDArray[np.float32]:
    """The block of a memory that lacks the space."""
    return np.zeros(dimension, dtype=np.float32)


def _given(raw: object, source: Source) -> bool:
    """Whether a memory of a request, not checked yet, brings an image or a text."""
    return (raw.get(source) if isinstance(raw, dict) else getattr(raw, source, None)) is not None


def _check(resources: Resources, live: LiveCollection, raw: object) -> Item:
    """One memory of a request, checked whole. Raises the `EngramError` that says what is wrong with it."""
    try:
        memory = raw if isinstance(raw, MemoryInput) else MemoryInput.model_validate(raw)
    except ValidationError as error:
        raise InvalidRequest(faults(error)) from None
    for name in memory.vectors or ():
        if name in live.spaces and (encoder := live.spaces[name].config.encoder) is not None:
            raise InvalidRequest(f"space {name} is filled by its encoder {encoder}; send the image or text instead")
    vectors = {name: check_vector(vector, name, live) for name, vector in (memory.vectors or {}).items()}
    image = None if memory.image is None else memory.image.base64
    return checked(resources, live, memory.id or uuid.uuid4().hex, memory.text, memory.payload, vectors, image)


def checked(
    resources: Resources, live: LiveCollection, id_: str, text: str | None, payload: Payload | None,
    vectors: Vectors, image: bytes | None,
) -> Item:  # fmt: skip
    """A memory whose vectors are checked, with the rest checked as well. Raises as `accept` reports."""
    if text is not None and not text.strip():
        raise EmptyText("the text has no characters but spaces")
    if payload is not None:
        check_payload(payload)
    kind: str | None = None
    warnings: tuple[str, ...] = ()
    pixels = 0
    if image is not None:
        picture = read_picture(image, pixels_max=resources.settings.image_pixels_max)
        warnings, pixels = picture.warnings, picture.pixels[..., 0].size
        resources.decoded.give(content_of(image), picture)
        kind = media_type(image)
    sources = {"image": image is not None, "text": text is not None}
    if not vectors and not any(s.encoder is not None and sources[s.config.source] for s in live.spaces.values()):
        raise InvalidRequest(f"nothing of this memory fills a space of {live.name} ({', '.join(live.spaces)})")
    return Item(id_, text, payload, vectors, image, kind, pixels, list(warnings))


def check_payload(payload: Mapping[str, Any]) -> None:
    """Raises `InvalidRequest` for what cannot be kept, or found again by a filter."""
    try:
        json.dumps(payload, allow_nan=False)  # orjson would write a NaN as null, and say nothing
        packed = orjson.dumps(payload)
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest(
            "the payload is not JSON with finite numbers of at most 64 bits, 254 levels deep"
        ) from None
    if NUL.search(packed):
        raise InvalidRequest("the payload holds the character U+0000, where SQL's texts end: no filter would find it")
    if len(packed) > PAYLOAD_BYTES_MAX:
        raise InvalidRequest(f"the payload is larger than {PAYLOAD_BYTES_MAX} bytes")


def _job_item(position: int, item: Item, blob_hash: str | None) -> NewItem:
    body = {
        "position": position, "id": item.id, "text": item.text, "payload": item.payload, "blob_hash": blob_hash,
        "media_type": item.media_type, "pixels": item.pixels, "warnings": item.warnings,
        "vectors": {name: base64.b64encode(vector.tobytes()).decode() for name, vector in item.vectors.items()},
    }  # fmt: skip
    return NewItem(body, blob_hash)


def _failed(memory_id: str | None, error: EngramError) -> StoredItem:
    return StoredItem(id=memory_id, status="error", error=Problem(code=error.code, detail=error.detail))


def _failure(item: JobItem, error: EngramError) -> ItemAnswer:
    outcome = _failed(item.body["id"], error).model_dump(mode="json")
    return ItemAnswer(item.position, "failed", {**outcome, "position": item.body["position"]})
