"""Changing a memory in part: what is sent changes, the rest stays, and only the spaces that a changed part fills are
encoded again.

Encoding is done here, in the request, not as a job: it is one picture and one text, as of a recall's cue, and nothing
of it needs to be resumed. The memory as it is gets read where it is written, in one transaction (`storage.updates`).
"""

from __future__ import annotations

from typing import Any

from service.app import idempotency
from service.app.checks import check_callers_space, check_moment, check_payload, check_text, check_vectors
from service.app.cues import CueBlocks, encode_memories, memory_wants
from service.app.duplicates import admitting, find_near
from service.app.encoding import Parts, Vectors, content_of
from service.app.live import LiveCollection
from service.app.memory_schemas import PatchReply, PatchRequest
from service.app.resources import Resources
from service.encoders.picture import media_type, read_picture
from service.encoders.protocol import Source
from service.errors import EncodersChanged, EngramError, UnknownSpace
from service.storage.receipts import AlreadyDone, Asked, Receipt
from service.storage.updates import Changed, MemoryChange, Payload


def patch(resources: Resources, live: LiveCollection, memory_id: str, request: PatchRequest) -> PatchReply:
    """Raises `MemoryNotFound`, `PreconditionFailed`, `InvalidRequest` (also where no space would be left), `Duplicate`
    where the collection refuses those, `IdempotencyKeyReused`, and why an encoder that is needed cannot be used."""
    sent = request.model_dump(exclude={"idempotency_key"}, exclude_unset=True)
    asked = idempotency.asked(request.idempotency_key, ["patch", memory_id, sent])
    try:
        if asked is not None:
            resources.repository.check_new(live.id, asked)
        while True:
            try:
                return _patch(resources, live, memory_id, request, asked)
            except EncodersChanged:
                live = resources.successor(live)
    except AlreadyDone as done:
        return PatchReply.model_validate(done.reply)


def merge_patch(target: Any, changes: Any) -> Any:
    """RFC 7396: what `target` is when `changes` are merged into it; neither is changed."""
    if not isinstance(changes, dict):
        return changes
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def _patch(
    resources: Resources, live: LiveCollection, memory_id: str, request: PatchRequest, asked: Asked | None
) -> PatchReply:
    given = request.model_fields_set
    values: dict[str, Any] = {}
    if "expires_at" in given:
        check_moment(request.expires_at)
        values["expires_at"] = request.expires_at
    if request.payload is not None:
        check_payload(request.payload)
    gone: dict[str, None] = {}
    if "text" in given:
        values["text"] = request.text
        if request.text is None:
            gone |= _filled_by(live, "text")
        else:
            check_text(request.text)
    if "image" in given and request.image is None:
        values |= {"blob_hash": None, "media_type": None}
        gone |= _filled_by(live, "image")
    for name, vector in request.vectors.items():
        if vector is None:
            check_callers_space(name, live)
            if name not in live.spaces:
                raise UnknownSpace(f"collection {live.name} has no space {name}; it has {', '.join(live.spaces)}")
            gone[name] = None
    vectors, warnings = _encoded(resources, live, request, values)
    changes: dict[str, Any] = {**gone, **vectors}
    with admitting(live):
        if vectors:
            kept = resources.repository.get_vectors(live.id, memory_id)
            whole = {name: vector for name, vector in kept.items() if name not in changes} | vectors
            (alike,) = find_near(live, [memory_id], [whole])
            if (refusal := alike.refusal(live)) is not None:
                raise refusal
            warnings += alike.warnings()
        return _commit(
            resources,
            live,
            memory_id,
            request,
            MemoryChange(values, _payload(request) if "payload" in given else None, changes, request.if_version),
            warnings,
            asked,
        )


def _encoded(
    resources: Resources, live: LiveCollection, request: PatchRequest, values: dict[str, Any]
) -> tuple[Vectors, list[str]]:
    """The vectors that change, and what was lost in making them; the original is kept, and named in `values`."""
    vectors = check_vectors({name: vector for name, vector in request.vectors.items() if vector is not None}, live)
    parts = Parts(None, request.text, vectors)
    warnings: list[str] = []
    if request.image is not None:
        image = request.image.base64
        parts.picture = read_picture(image, pixels_max=resources.settings.image_pixels_max)
        parts.content = content_of(image)
        warnings += parts.picture.warnings
    wanted = memory_wants(live, parts, request.image is not None)
    live.require(wanted)
    (outcome,) = encode_memories([(parts, wanted)], resources.encoded)
    if isinstance(outcome, EngramError):
        raise outcome
    assert isinstance(outcome, CueBlocks)
    if request.image is not None:
        (values["blob_hash"],) = resources.blobs.put_many([request.image.base64])
        values["media_type"] = media_type(request.image.base64)
    return outcome.vectors, [*warnings, *outcome.warnings]


def _commit(
    resources: Resources, live: LiveCollection, memory_id: str, request: PatchRequest, change: MemoryChange,
    warnings: list[str], asked: Asked | None,
) -> PatchReply:  # fmt: skip
    live.wait_writable()
    live.described = live.described or request.text is not None or request.image is not None

    def reply(changed: Changed) -> PatchReply:
        return PatchReply(id=memory_id, version=changed.version, warnings=warnings)

    def follow(changed: Changed) -> None:
        rows = live.rows([memory_id], [changed.vectors], [changed.payload], [changed.expires_at])
        live.follow(rows, [], changed.version)

    receipt: Receipt[Changed] | None = None
    if asked is not None:
        receipt = Receipt(asked, lambda changed: reply(changed).model_dump())
    changed = resources.repository.change_memory(live.id, memory_id, change, follow, live.generation, receipt)
    resources.after_write(live)
    return reply(changed)


def _payload(request: PatchRequest) -> Any:
    """The payload as a function of what it is."""
    if request.payload is None or request.payload_mode == "replace":
        return lambda before: request.payload

    def merged(before: Payload | None) -> Payload:
        after: Payload = merge_patch(before, request.payload)
        check_payload(after)
        return after

    return merged


def _filled_by(live: LiveCollection, source: Source) -> dict[str, None]:
    """The spaces that are made of a part of a memory."""
    return {
        name: None for name, space in live.spaces.items() if space.encoder is not None and space.config.source == source
    }
