"""Changing encoders: a space is encoded again from the kept originals while the former encoder answers, then swapped.

    drafts of all memories ─▶ a second bank beside the first ─▶ catch up with what was written ─▶ swap, as one
    (SQL, resumable)          (from SQL, with its graphs)       (ids the first bank was told of)

Rules:
- Until the swap recalls, stores and deletes go by the former encoder. A recall holds the collection that it began with,
  so it sees one encoder or the other, never both.
- What is written meanwhile is noted by id and drafted again, until nothing is left at the version that is swapped at.
  For the last of it writes wait; vectors of the former encoder that come later are refused by their generation, and
  encoded again.
- The swap is one transaction (patterns, configuration, the space's kernels and calibration records, the job's end) and,
  after its commit and before anybody is answered, one assignment.
- A job that was interrupted goes on with the drafts there are; one that ends without the swap leaves nothing behind.
- Only what is wrong with an original counts it as lost. Any other error (memory, disk) ends the job.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import structlog

from service.app.calibrate import ROUTE_PREFIX
from service.app.collections import DEVICE, REENCODED_AT, fill
from service.app.cues import ENCODE_BATCH, in_batches
from service.app.encoding import Parts, encode
from service.app.live import Changed, Learned, LiveCollection, Space, make_space, rows_of, spaces_of
from service.app.reencode_schemas import Dropped, ReencodeRecord, ReencodeRequest
from service.app.resources import REENCODE_JOB, Resources
from service.app.schemas import SpaceConfig
from service.app.store import STORE_JOB
from service.encoders.picture import read_picture
from service.errors import (
    Conflict,
    ContentNotFound,
    EncoderMismatch,
    EngramError,
    InvalidImage,
    InvalidRequest,
    OriginalsMissing,
    UnknownEncoder,
    UnknownSpace,
    WeightsMissing,
)
from service.storage.drafts import Draft, Lost, Original, Swapped
from service.storage.jobs import Job
from service.storage.memories import IN_MAX, Drafted

log = structlog.get_logger()

NAMED_MAX = 20  # memories without an original that are named; the count says how many there are
CAUGHT_UP = 64  # changed memories that are left to the moment in which writes wait: a batch
ROUNDS_MAX = 20  # of catching up while writes go on; who stores faster than this encodes waits for the last one
DRAFTING_SHARE = 0.8  # of the progress: what follows is loading and catching up
WAITS_FOR_AN_ENCODER = {EncoderMismatch.code, WeightsMissing.code, UnknownEncoder.code}  # why a store job failed


def enqueue_reencode(resources: Resources, live: LiveCollection, name: str, request: ReencodeRequest) -> str:
    """Check a re-encoding and commit its job; its id.

    Raises `UnknownSpace`, `InvalidRequest` (the space is the callers', or of this encoder already), `UnknownEncoder`,
    `WeightsMissing`, `OriginalsMissing`, and `Conflict` while another one is under way.
    """
    if name not in live.spaces:
        raise UnknownSpace(f"collection {live.name} has no space {name}; it has {', '.join(live.spaces)}")
    space = live.spaces[name]
    if space.encoder is None:
        raise InvalidRequest(f"space {name} of {live.name} holds the callers' own vectors: store other ones instead")
    config = _configured(space.config, request)
    encoder = make_space(name, config, resources.make_encoder).encoder
    assert encoder is not None  # `_configured` names one
    whole = not resources.repository.lacking(live.id, name, config.source, 1)  # else fsck has removed damaged ones
    if encoder.fingerprint == space.encoder.fingerprint and space.fault is None and whole:
        raise InvalidRequest(f"space {name} of {live.name} holds patterns of {encoder.fingerprint} already")
    if (active := resources.repository.active_job(live.id, REENCODE_JOB)) is not None:
        raise Conflict(f"the operation {active} encodes {live.name} again already; cancel it or wait")
    if not request.drop_without_original:
        missing = _without_original(resources, live, space)
        if missing.count:
            raise _refusal(live, name, missing)
    payload = {
        "space": name, "encoder": config.encoder, "options": config.options, "fingerprint": encoder.fingerprint,
        "drop_without_original": request.drop_without_original,
    }  # fmt: skip
    return resources.enqueue(REENCODE_JOB, live.id, payload={"reencode": payload})[0]


def run_reencode_job(resources: Resources, job: Job, beat: Callable[[float], None]) -> dict[str, Any]:
    """Draft, load, catch up, swap; after a crash it goes on with the drafts there are.

    Raises `OriginalsMissing` where originals turn out to be unreadable, unless they may be dropped.
    """
    assert job.collection_id is not None
    live = resources.live_by_id(job.collection_id)
    try:
        record = _Reencoding(resources, live, job, beat).run()
    except EngramError:
        resources.repository.remove_drafts(job.id)  # the job fails, and will not go on
        raise
    finally:
        live.changed = None
        live.writable.set()
        resources.repository.remove_drafts()  # of a job that is done or cancelled; of one to be resumed they stay
    waited_for = {space.fault.code for space in live.spaces.values() if space.fault is not None}
    if resources.repository.requeue(live.id, STORE_JOB, waited_for | WAITS_FOR_AN_ENCODER):
        resources.wake_workers()
    resources.after_write(resources.live_by_id(live.id))
    return record


class _Reencoding:
    """One job's work, step by step."""

    def __init__(
        self, resources: Resources, live: LiveCollection, job: Job, beat: Callable[[float], None]
    ) -> None:  # fmt: skip
        self._resources, self._repository = resources, resources.repository
        self._live, self._job, self._beat = live, job, beat
        asked = job.payload["reencode"]
        self._name: str = asked["space"]
        self._may_drop: bool = asked["drop_without_original"]
        former = live.spaces[self._name]
        assert former.encoder is not None  # checked when the job was queued
        self._former = former.encoder.fingerprint
        config = former.config.model_copy(update={"encoder": asked["encoder"], "options": asked["options"]})
        self._space = make_space(self._name, config, resources.make_encoder)
        assert self._space.encoder is not None
        self._encoder = self._space.encoder
        self._fingerprint = self._encoder.fingerprint
        if self._fingerprint != asked["fingerprint"]:
            raise EncoderMismatch(
                f"the encoder was {asked['fingerprint']} when this began and is {self._fingerprint} now; start again"
            )
        self._source = config.source
        self._drafted = Drafted(self._name, job.id)
        self._successor: LiveCollection | None = None
        self._lost_some = False  # since the last look; and ever
        self._lost_any = False
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        self._live.changed = self._changed = Changed()  # before anything is read: what is written from now on is noted
        self._draft_all()
        self._check_lost()
        self._follow()
        self._successor = self._loaded()
        self._follow()
        with self._learning():
            return self._swap(self._successor)

    # --- drafts ---

    def _draft_all(self) -> None:
        total = self._repository.count_originals(self._live.id, self._source)
        done = self._repository.count_drafts(self._job.id)  # of before an interruption
        self._lost_some = done > 0
        after = 0
        while some := self._repository.undrafted(self._live.id, self._drafted, self._source, after, ENCODE_BATCH):
            self._draft(some)
            after, done = some[-1].key, done + len(some)
            self._beat(DRAFTING_SHARE * min(1.0, done / max(1, total)))

    def _draft(self, originals: Sequence[Original]) -> None:
        """Encode originals and keep the outcomes, as many at once as their pictures leave memory for."""
        lost: list[Draft] = []

        def read() -> Iterator[tuple[Original, Parts]]:
            for original in originals:
                try:
                    yield original, self._parts(original)
                except (ContentNotFound, InvalidRequest) as error:
                    lost.append(Draft(original.key, original.version, None, error.detail))

        for batch in in_batches(read()):
            drafts: list[Draft] = []
            # Nothing is remembered of it: a collection's worth would drive out what cues and stores come back to.
            encoded = encode([(parts, {self._name: (self._encoder, self._source)}) for _, parts in batch])
            for (original, _), outcome in zip(batch, encoded, strict=True):
                if isinstance(outcome, InvalidRequest):
                    lost.append(Draft(original.key, original.version, None, outcome.detail))
                    continue
                if isinstance(outcome, EngramError):
                    raise outcome
                vector = outcome[0][self._name]
                why = None if vector.any() else "its vector is zero, as if it lacked the space"
                drafts.append(Draft(original.key, original.version, vector if why is None else None, why))
                self._lost_some |= why is not None
            self._repository.put_drafts(self._job.id, drafts)
        if lost:
            self._lost_some = True
            self._repository.put_drafts(self._job.id, lost)

    def _parts(self, original: Original) -> Parts:
        """Raises `ContentNotFound`, `InvalidImage`."""
        if self._source == "text":
            if original.text is None:
                raise ContentNotFound("it was stored without a text")
            return Parts(text=original.text)
        if original.blob_hash is None:
            raise ContentNotFound("it was stored without an image")
        content = self._resources.blobs.get(original.blob_hash)
        if hashlib.sha256(content).hexdigest() != original.blob_hash:
            raise InvalidImage("its original is damaged: the bytes are not those that were stored")
        return Parts(read_picture(content, pixels_max=self._resources.settings.image_pixels_max))

    def _check_lost(self) -> None:
        self._lost_any |= self._lost_some
        if self._lost_some and not self._may_drop:
            lost = self._repository.lost(self._live.id, self._drafted, NAMED_MAX)
            if lost.count:
                raise _refusal(self._live, self._name, lost)
        self._lost_some = False

    # --- the second bank ---

    def _loaded(self) -> LiveCollection:
        """The collection under the new encoder, with its bank as far as the drafts have come."""
        live, row = self._live, self._repository.get_collection(self._live.name)
        config = live.config.model_copy(update={"spaces": {**live.config.spaces, self._name: self._space.config}})
        spaces = {**live.spaces, self._name: self._space}
        successor = LiveCollection(replace(row, generation=live.generation + 1), config, spaces, DEVICE)
        fill(self._resources, successor, self._drafted)
        while successor.bank.seal_due() and successor.bank.seal():
            self._beat(DRAFTING_SHARE)
        successor.index()
        return successor

    def _follow(self) -> None:
        """Catch up while writes go on, until little is left."""
        for _ in range(ROUNDS_MAX):
            if self._catch_up() <= CAUGHT_UP:
                break
            self._beat(DRAFTING_SHARE)

    def _catch_up(self) -> int:
        """Draft what was written since the last time, bring it to the second bank, and say how many that were."""
        ids = self._changed.take()
        for start in range(0, len(ids), IN_MAX):
            part = ids[start : start + IN_MAX]
            originals = self._repository.undrafted_of(self._live.id, self._drafted, self._source, part)
            for first in range(0, len(originals), ENCODE_BATCH):
                self._draft(originals[first : first + ENCODE_BATCH])
                self._beat(DRAFTING_SHARE)
            if self._successor is not None:
                self._bring(self._successor, part)
        return len(ids)

    def _bring(self, successor: LiveCollection, ids: Sequence[str]) -> None:
        """Memories as they are now; those written again meanwhile are noted, and come again."""
        layout = [(space.name, space.dimension) for space in successor.spaces.values()]
        gone, bank = set(ids), successor.bank
        with self._repository.iter_patterns(successor.id, layout, ids=ids, drafted=self._drafted) as stream:
            for chunk in stream.chunks:
                bank.write(rows_of(chunk), [], bank.version)
                gone.difference_update(chunk.ids)
        bank.write(None, list(gone), bank.version)

    # --- the swap ---

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Held, so that nothing is learned of the former patterns after the swap, and no kernel comes or goes."""
        while not self._live.learning.acquire(timeout=1.0):
            self._beat(DRAFTING_SHARE)  # a calibration under way takes its time; the lease is kept meanwhile
        try:
            yield
        finally:
            self._live.learning.release()

    def _swap(self, successor: LiveCollection) -> dict[str, Any]:
        live = self._live
        self._resources.live_by_id(live.id)  # raises if it was deleted
        gone = {name for name in live.gates if self._touches(name)}
        kernels = {name: kernel for name, kernel in live.learned.kernels.items() if name != self._name}
        for name, kernel in kernels.items():
            successor.bank.add_kernel(name, kernel.kernel)
        routes = {name: route for name, route in live.learned.routes.items() if not self._touches(name)}
        gates = {name: gate for name, gate in live.gates.items() if name not in gone}
        successor.learned = Learned(kernels, gates, routes)

        def then(swapped: Swapped | None) -> None:
            if swapped is not None:
                successor.described = live.described
                successor.revision = swapped.revision
                if successor.indexed != live.indexed:  # changed since the second bank was begun
                    successor.indexed = live.indexed
                    successor.index()
                successor.bank.write(None, swapped.deleted, swapped.version)
                self._resources.replace(successor)

        while True:
            live.writable.clear()
            live.catch_up()
            at = live.bank.version
            if self._catch_up():  # else what the bank holds at this version is in the drafts and the second bank
                continue
            self._check_lost()
            self._beat(1.0)  # the last look at whether the job is still wanted
            record = self._record(gone)
            stored = [name for name in self._repository.get_gates(live.id) if self._touches(name)]
            row = self._row(successor, at)
            swapped = self._repository.swap_space(
                live.id, self._drafted, at, row, stored, record.model_dump(mode="json"), then
            )  # fmt: skip
            if swapped is not None:
                made = {"version": swapped.version, "memories": swapped.memories, "deleted": len(swapped.deleted)}
                return record.model_copy(update=made).model_dump(mode="json")

    def _touches(self, modality: str) -> bool:
        """Whether a gate's or a route's record is of this space, among others."""
        return self._name in spaces_of(modality.removeprefix(ROUTE_PREFIX))

    def _row(self, successor: LiveCollection, at: int) -> dict[str, Any]:
        """The collection's configuration as it is kept."""
        row = self._repository.get_collection(successor.name).config
        return {
            **row,
            "config": successor.config.model_dump(mode="json"),
            "fingerprints": {**row["fingerprints"], self._name: self._fingerprint},
            REENCODED_AT: at + 1,
        }

    def _record(self, gone: set[str]) -> ReencodeRecord:
        live, lost = self._live, Lost(0, [])
        if self._lost_any:
            lost = self._repository.lost(live.id, self._drafted, NAMED_MAX)
        supplied = [name for name in sorted(gone) if live.gates[name].known or live.gates[name].negatives]
        kernel = live.learned.kernels.get(self._name)
        return ReencodeRecord(
            space=self._name, encoder=self._space.config.encoder or "", fingerprint=self._fingerprint,
            former=self._former, dimension=self._space.dimension,
            dropped=Dropped(count=lost.count, first=dict(lost.first)),
            kernels_dropped=[] if kernel is None else [kernel.id], cues_forgotten=supplied,
            seconds=round(time.monotonic() - self._began, 1),
        )  # fmt: skip


def _configured(config: SpaceConfig, request: ReencodeRequest) -> SpaceConfig:
    """The space with the encoder and the options that are asked for."""
    name = request.encoder or config.encoder
    kept = config.options if name == config.encoder else {}
    return config.model_copy(update={"encoder": name, "options": kept if request.options is None else request.options})


def _without_original(resources: Resources, live: LiveCollection, space: Space) -> Lost:
    """The memories of a space that nothing is kept of to encode again."""
    count, first = 0, []
    for memory_id, has_text, blob_hash in resources.repository.iter_origins(live.id, space.name):
        if space.config.source == "text":
            why = None if has_text else "it was stored without a text"
        elif blob_hash is None:
            why = "it was stored without an image"
        else:
            why = None if resources.blobs.exists(blob_hash) else "the file of its original is gone"
        if why is not None:
            count += 1
            first += [(memory_id, why)] if count <= NAMED_MAX else []
    return Lost(count, first)


def _refusal(live: LiveCollection, space: str, lost: Lost) -> OriginalsMissing:
    named = "; ".join(f"{memory_id}: {why}" for memory_id, why in lost.first)
    more = f"; and {lost.count - len(lost.first):,} more" if lost.count > len(lost.first) else ""
    return OriginalsMissing(
        f"{lost.count:,} memories of space {space} of {live.name} cannot be encoded again ({named}{more}). Store them "
        "again or delete them; with drop_without_original they lose the space"
    )
