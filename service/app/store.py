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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import ValidationError

from service.app import idempotency
from service.app.checks import check_moment, check_payload, check_text, check_vectors
from service.app.cues import CueBlocks, memory_wants
from service.app.duplicates import Alike, admitting, find_equal, find_near
from service.app.encoding import Parts, Vectors, Wanted, content_of
from service.app.fields import Payload, faults
from service.app.ids import new_id
from service.app.live import LiveCollection
from service.app.resources import Resources
from service.app.schemas import MemoryInput, Problem, StoredItem, StoreReply, StoreRequest
from service.encoders.picture import media_type, read_picture
from service.encoders.protocol import Picture, Source
from service.errors import Duplicate, EncodersChanged, EngramError, InvalidRequest, PreconditionFailed
from service.storage.jobs import ItemAnswer, JobItem, JobItems, NewItem, NewJob
from service.storage.memories import MemoryWrite, Status, Written
from service.storage.receipts import AlreadyDone, Asked, Receipt

STORE_JOB = "store"


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
    expires_at: int | None = None
    if_version: int | None = None

    def write(self) -> MemoryWrite:
        """What is stored of one that needs no encoding."""
        return MemoryWrite(
            self.id, payload=self.payload, vectors=self.vectors, expires_at=self.expires_at, if_version=self.if_version
        )


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
    """Check every item; commit those that only bring vectors, and a job for the rest, in one transaction.

    Under a key that the same request had before, say what was said then. Raises `IdempotencyKeyReused`, and why a
    space's encoder cannot be used, where an item needs it (`EncoderMismatch`, `WeightsMissing`).
    """
    asked = idempotency.asked(request.idempotency_key, request.memories)
    try:
        if asked is not None:
            resources.repository.check_new(live.id, asked)
        return _accept(resources, live, request, asked)
    except AlreadyDone as done:
        return _accepted_before(resources, live, request, done.reply)


def _accept(resources: Resources, live: LiveCollection, request: StoreRequest, asked: Asked | None) -> Accepted:
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
    job = _job(resources, queued) if queued else None
    version = None
    if ready or job is not None:
        version, results = _commit_ready(resources, live, results, ready, job, asked)
    if job is None:
        return Accepted(version, results, None, None)
    return Accepted(version, results, job.id, resources.watch(live.id, job.id))


def _accepted_before(
    resources: Resources, live: LiveCollection, request: StoreRequest, said: Mapping[str, Any]
) -> Accepted:
    """What `accept` gave for the same request, from its receipt; whom its vectors equal is found anew."""
    results = [StoredItem.model_validate(item) for item in said["results"]]
    there = [place for place, item in enumerate(results) if item.status in ("stored", "updated")]
    if live.config.duplicates == "warn" and there:
        memories = [MemoryInput.model_validate(request.memories[place]) for place in there]
        vectors = [dict(memory.vectors or {}) for memory in memories]
        for place, alike in zip(there, find_equal(live, [str(results[i].id) for i in there], vectors), strict=True):
            results[place].warnings += alike.warnings()
    job_id = said["job_id"]
    done = None if job_id is None else resources.watch(live.id, job_id)
    return Accepted(said["version"], results, job_id, done)


def enqueue(resources: Resources, live: LiveCollection, queued: Sequence[tuple[int, Item]]) -> tuple[str, Future[None]]:
    """Commit the originals of items and a job that encodes them; the number of each is its position in the answer."""
    job = _job(resources, queued)
    return resources.enqueue(STORE_JOB, live.id, job.items)


def _job(resources: Resources, queued: Sequence[tuple[int, Item]]) -> NewJob:
    """What encodes these; their originals are on disk."""
    hashes = keep_originals(resources, [item for _, item in queued])
    items = [_job_item(position, item, hash_) for (position, item), hash_ in zip(queued, hashes, strict=True)]
    return NewJob(STORE_JOB, {"items": len(items)}, items)


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
        write = MemoryWrite(
            body["id"], each.parts.text, body["payload"], *original, blocks.vectors,
            body.get("expires_at"), body.get("if_version"),
        )  # fmt: skip
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
    resources: Resources, live: LiveCollection, writes: Sequence[MemoryWrite], answering: Sequence[JobItems] = (),
    job: NewJob | None = None, receipt: Receipt[Written] | None = None,
) -> Written:  # fmt: skip
    """Commit memories (with their jobs' answers, a new job, a receipt: in one transaction); the bank follows before
    anybody is told.

    Raises `EncodersChanged` where `live` is the collection under former encoders: nothing is written then.
    """
    live.wait_writable()
    rows = None
    if writes:
        rows = live.rows(
            [write.id for write in writes],
            [write.vectors for write in writes],
            [write.payload for write in writes],
            [write.expires_at for write in writes],
        )
    live.described = live.described or any(write.text is not None or write.blob_hash for write in writes)

    def follow(written: Written) -> None:
        if rows is not None and (kept := written.kept):
            live.follow(rows if len(kept) == len(writes) else rows.only(kept), [], written.version)

    written = resources.repository.put_memories(
        live.id, writes, answering, follow, live.generation, job=job, receipt=receipt
    )
    resources.metrics.stored.labels(live.name).inc(len(written.kept))
    resources.after_write(live)
    return written


Outcome = Duplicate | tuple[Status, Alike]


def _commit_ready(
    resources: Resources, live: LiveCollection, results: Sequence[StoredItem], ready: Sequence[tuple[int, Item]],
    job: NewJob | None, asked: Asked | None,
) -> tuple[int | None, list[StoredItem]]:  # fmt: skip
    """Commit memories of the callers' vectors, which no encoder makes, with the job for the other items: the version
    (None where nothing was written), and `results` with what became of each.
    """
    writes = [item.write() for _, item in ready]
    ids, vectors = [write.id for write in writes], [write.vectors for write in writes]
    receipt: Receipt[Written] | None
    while True:
        said, warned = list(results), live.config.duplicates == "warn"
        try:
            with admitting(live):
                alikes = [Alike()] * len(ready) if warned else find_near(live, ids, vectors)
                places: list[tuple[int, Alike]] = []
                taken = []
                for (position, item), write, alike in zip(ready, writes, alikes, strict=True):
                    if (refusal := alike.refusal(live)) is not None:
                        said[position] = _failed(item.id, refusal)
                    else:
                        places.append((position, alike))
                        taken.append(write)
                if not taken and job is None:
                    return None, said
                answer = partial(_outcomes, said, places)
                receipt = None if asked is None else Receipt(asked, partial(_receipt, answer, job))
                written = commit(resources, live, taken, job=job, receipt=receipt)
            said = answer(written)
            if warned:
                kept = written.kept
                equal = find_equal(live, [ids[place] for place in kept], [vectors[place] for place in kept])
                for place, alike in zip(kept, equal, strict=True):
                    said[ready[place][0]].warnings += alike.warnings()
            return written.version if written.kept else None, said
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


def _outcomes(results: Sequence[StoredItem], places: Sequence[tuple[int, Alike]], written: Written) -> list[StoredItem]:
    """`results`, with what became of the writes that are at these places of it."""
    said = list(results)
    for (position, alike), status in zip(places, written.statuses, strict=True):
        item = said[position]
        if isinstance(status, PreconditionFailed):
            said[position] = _failed(item.id, status)
        else:
            warnings = [*item.warnings, *alike.warnings()]
            said[position] = StoredItem(id=item.id, status=status, warnings=warnings)
    return said


def _receipt(answer: Callable[[Written], Sequence[StoredItem]], job: NewJob | None, written: Written) -> dict[str, Any]:
    """What `_accepted_before` reads."""
    results = [item.model_dump(exclude_defaults=True) for item in answer(written)]
    version = written.version if written.kept else None
    return {"version": version, "results": results, "job_id": None if job is None else job.id}


def _given(raw: object, source: Source) -> bool:
    """Whether a memory of a request, not checked yet, brings an image or a text."""
    return (raw.get(source) if isinstance(raw, dict) else getattr(raw, source, None)) is not None


def _check(resources: Resources, live: LiveCollection, raw: object) -> Item:
    """One memory of a request, checked whole. Raises the `EngramError` that says what is wrong with it."""
    try:
        memory = raw if isinstance(raw, MemoryInput) else MemoryInput.model_validate(raw)
    except ValidationError as error:
        raise InvalidRequest(faults(error)) from None
    vectors = check_vectors(memory.vectors or {}, live)
    image = None if memory.image is None else memory.image.base64
    check_moment(memory.expires_at)
    item = checked(resources, live, memory.id or new_id(), memory.text, memory.payload, vectors, image)
    return replace(item, expires_at=memory.expires_at, if_version=memory.if_version)


def checked(
    resources: Resources, live: LiveCollection, id_: str, text: str | None, payload: Payload | None,
    vectors: Vectors, image: bytes | None,
) -> Item:  # fmt: skip
    """A memory whose vectors are checked, with the rest checked as well. Raises as `accept` reports."""
    if text is not None:
        check_text(text)
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


def _job_item(position: int, item: Item, blob_hash: str | None) -> NewItem:
    body = {
        "position": position, "id": item.id, "text": item.text, "payload": item.payload, "blob_hash": blob_hash,
        "media_type": item.media_type, "pixels": item.pixels, "warnings": item.warnings,
        "expires_at": item.expires_at, "if_version": item.if_version,
        "vectors": {name: base64.b64encode(vector.tobytes()).decode() for name, vector in item.vectors.items()},
    }  # fmt: skip
    return NewItem(body, blob_hash)


def _failed(memory_id: str | None, error: EngramError) -> StoredItem:
    return StoredItem(id=memory_id, status="error", error=Problem(code=error.code, detail=error.detail))


def _failure(item: JobItem, error: EngramError) -> ItemAnswer:
    outcome = _failed(item.body["id"], error).model_dump(mode="json")
    return ItemAnswer(item.position, "failed", {**outcome, "position": item.body["position"]})
