"""What each method of a client asks for and makes of the answers: once, for `Client` and `AsyncClient` alike.

Rules:
- Only `Asking.ask` yields a call. What it may ask again (`options.retries`), it asks again; nothing else does.
- What is asked again is safe to repeat: what only reads, and what is done once under its key.
- A collection is read at no version older than its last one seen here, where an operation knows `min_version`.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeVar

from engram.replies import (
    ApiKey,
    CollectionInfo,
    EncoderInfo,
    Memory,
    NewKey,
    Operation,
    Recall,
    StoredItem,
    StoreReply,
    Updated,
)
from engram.reports import Diagnostics, Sizing
from engram.sending import Request, in_requests, picture_bytes, sent_cues, store_requests, with_pictures
from engram.steps import Call, Content, Join, Pause, Start, Step, Steps, Work
from engram.transport import WAIT_MARGIN_S, WAIT_MAX_S, Body
from service.app.fields import BATCH_MAX
from service.app.operations import OPERATIONS
from service.errors import (
    DeviceMissing,
    EngramError,
    InvalidRequest,
    Unavailable,
    Unreachable,
    WeightsMissing,
    WeightsRefused,
)

T = TypeVar("T")

BATCH = 64  # memories a request: an encoder's batch or two, so that progress shows and one request stays short
PAGE = 256  # memories of a scroll's page: some hundred kilobytes of payloads and texts
KEPT: Any = object()  # what an update leaves as it is; None removes
POLL_S = 0.2  # between two looks at a calibration, which takes seconds
UNDER_WAY_MAX = 3  # one that is encoded, one that is decoded, one that is sent; each holds its pictures here and there

RETRIES = 20  # pauses double up to the longest, 40 s in all on average: a server that is started again is waited for
PAUSE_S = 0.1  # the first pause is at most this
PAUSE_MAX_S = 5.0
RETRY_MAX_S = 60.0  # after so long no attempt is begun: a caller who would wait longer does better by asking again
LASTING = (WeightsMissing, WeightsRefused, DeviceMissing)  # 503s that no pause mends


@dataclass(frozen=True)
class Options:
    """`timeout_s`: how long an answer is waited for; `retries`: how often a call is asked again at most;
    `read_your_writes`: whether reads ask for the last version seen. Raises `InvalidRequest`.
    """

    timeout_s: float = 60.0
    retries: int = RETRIES
    read_your_writes: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= WAIT_MAX_S:
            raise InvalidRequest(f"timeout_s is {self.timeout_s:g}, and must be above 0 and at most {WAIT_MAX_S:g}")
        if self.retries < 0:
            raise InvalidRequest(f"retries is {self.retries}, and must be at least 0")


@dataclass
class Seen:
    """What a client has met so far: whether anybody answered, and the last version of each collection."""

    answered: bool = False
    versions: dict[str, int] = field(default_factory=dict)


class Asking:
    """The steps of a client's own methods."""

    def __init__(self, options: Options, seen: Seen | None = None) -> None:
        self.options = options
        self.seen = Seen() if seen is None else seen

    def ask(self, operation: str, path: Mapping[str, str], body: Body | None = None) -> Steps[Body]:
        """Ask for an operation of the table; again, where it only reads or is done once under its key."""
        row = OPERATIONS[operation]
        if row.keyed:
            body = {"idempotency_key": uuid.uuid4().hex, **(body or {})}
        collection = path.get("collection")
        version = self.seen.versions.get(collection) if collection is not None else None
        knows = row.request is not None and "min_version" in row.request.model_fields
        if knows and self.options.read_your_writes and version is not None:
            body = {"min_version": version, **(body or {})}
        # A server's own wait ends with an answer, for which there has to be time.
        timeout_s = self.options.timeout_s + (WAIT_MARGIN_S if body and "timeout_s" in body else 0)
        call = Call(operation, path, body, timeout_s)
        reply: Body = yield from self.again(call, row.reads or row.keyed)
        seen = reply.get("version")
        if collection is not None and isinstance(seen, int):
            self.seen.versions[collection] = max(seen, self.seen.versions.get(collection, 0))
        return reply

    def again(self, step: Step, repeatable: bool) -> Steps[Any]:
        """The step, asked again while that can help."""
        ends = time.monotonic() + RETRY_MAX_S
        attempt = 0
        while True:
            try:
                answer = yield step
            except EngramError as error:
                pause_s = _pause_s(error, attempt) if repeatable and attempt < self.options.retries else None
                # A server that never answered is not there, rather than not there for now.
                absent = isinstance(error, Unreachable) and not self.seen.answered
                self.seen.answered |= not isinstance(error, Unreachable)
                if pause_s is None or absent or time.monotonic() + pause_s > ends:
                    raise
                attempt += 1
            else:
                self.seen.answered = True
                return answer
            yield Pause(pause_s)

    def but(self, **changed: Any) -> Self:
        """The same with other options, those that are not None; what was seen is shared."""
        other = copy(self)
        other.options = replace(self.options, **given(**changed))
        return other

    def collection(self, name: str) -> CollectionAsking:
        return CollectionAsking(name, self.options, self.seen)

    # --- methods of a client ---

    def create_collection(self, name: str, config: Body) -> Steps[None]:
        yield from self.ask("create_collection", {"collection": name}, config)

    def collections(self) -> Steps[list[CollectionInfo]]:
        return [CollectionInfo.of(body) for body in (yield from self.ask("list_collections", {}))["collections"]]

    def encoders(self) -> Steps[list[EncoderInfo]]:
        return [EncoderInfo.of(body) for body in (yield from self.ask("list_encoders", {}))["encoders"]]

    def delete_collection(self, name: str) -> Steps[None]:
        yield from self.ask("delete_collection", {"collection": name})

    def operations(self) -> Steps[list[Operation]]:
        return [Operation.of(body) for body in (yield from self.ask("list_operations", {}))["operations"]]

    def operation(self, operation_id: str) -> Steps[Operation]:
        return Operation.of((yield from self.ask("get_operation", {"id": operation_id})))

    def retry(self, operation_id: str) -> Steps[Operation]:
        return Operation.of((yield from self.ask("retry_operation", {"id": operation_id})))

    def cancel(self, operation_id: str) -> Steps[Operation]:
        return Operation.of((yield from self.ask("cancel_operation", {"id": operation_id})))

    def create_key(self, name: str, scopes: Mapping[str, str], limits: Body) -> Steps[NewKey]:
        body = {"name": name, "scopes": dict(scopes), **limits}
        if "expires_at" in body:
            body["expires_at"] = body["expires_at"].astimezone().isoformat()
        return NewKey.of((yield from self.ask("create_key", {}, body)))

    def keys(self) -> Steps[list[ApiKey]]:
        return [ApiKey.of(body) for body in (yield from self.ask("list_keys", {}))["keys"]]

    def revoke_key(self, key_id: str) -> Steps[None]:
        yield from self.ask("revoke_key", {"id": key_id})


class CollectionAsking(Asking):
    """The steps of a collection's methods."""

    def __init__(self, name: str, options: Options, seen: Seen) -> None:
        super().__init__(options, seen)
        self.name = name

    def here(self, operation: str, body: Body | None = None, **path: str) -> Steps[Body]:
        """Ask for an operation of this collection."""
        return (yield from self.ask(operation, {"collection": self.name, **path}, body))

    def store(
        self,
        memories: Iterable[Mapping[str, Any]],
        batch: int,
        wait: bool,
        progress: Callable[[int], None] | None,
    ) -> Steps[StoreReply]:
        """Several requests are under way at once, answered in their order: a server decodes and encodes one while the
        next is read from disk and sent. Two that name one id are never under way together: the later one must be the
        later one there.
        """
        results: list[StoredItem] = []
        operations: list[str] = []
        version: int | None = None
        requests = store_requests(memories, batch)
        under_way: list[tuple[Request, set[Any], Any]] = []
        more = True
        while more or under_way:
            request: Request | None = (yield Work(partial(next, requests, None))) if more else None
            more = request is not None
            sent = [memory for memory in request or () if isinstance(memory, dict)]
            ids = {memory["id"] for memory in sent if isinstance(memory.get("id"), str)}
            while under_way and (
                not more or len(under_way) == UNDER_WAY_MAX or any(ids & others for _, others, _ in under_way)
            ):
                earlier, _, started = under_way.pop(0)
                reply: Body | None = None if started is None else (yield Join(started))
                answers: Iterator[StoredItem] = iter(())
                if reply is not None:
                    answers = map(StoredItem.of, reply["results"])
                    version = max((v for v in (version, reply["version"]) if v is not None), default=None)
                    operations += [reply["operation_id"]] if reply.get("operation_id") else []
                results += [next(answers) if isinstance(memory, dict) else memory for memory in earlier]
                if progress is not None:
                    progress(len(earlier))
            if request is not None:
                under_way.append((request, ids, (yield Start(self._stored(sent, wait))) if sent else None))
        return StoreReply(version, tuple(results), tuple(operations))

    def _stored(self, memories: list[Body], wait: bool) -> Steps[Body]:
        body: Body = {"memories": memories, "wait": wait, "timeout_s": self.options.timeout_s}
        return (yield from self.here("store", body))

    def recall(self, cue: Mapping[str, Any], options: Body) -> Steps[Recall]:
        [sent] = yield from sent_cues([cue])
        [recalled] = yield from self._recalls({"cue": sent, **options})
        return recalled

    def recall_batch(self, cues: Iterable[Mapping[str, Any]], options: Body) -> Steps[list[Recall]]:
        asked = yield from sent_cues(list(cues))
        recalled: list[Recall] = []
        for some in in_requests(asked, BATCH_MAX, picture_bytes) if asked else [[]]:
            recalled += yield from self._recalls({"cues": some, **options})
        return recalled

    def _recalls(self, body: Body) -> Steps[list[Recall]]:
        reply = yield from self.here("recall", body)
        shared = {"version": reply["version"], "timings_ms": reply["timings_ms"]}
        return [Recall.of({**result, **shared}) for result in reply["results"]]

    def train(
        self,
        what: str,
        cues: Iterable[Mapping[str, Any]] | None,
        negatives: Iterable[Mapping[str, Any]] | None,
        options: Body,
    ) -> Steps[Operation]:
        body: Body = {"what": what, **options}
        if cues is not None:
            known = list(cues)
            if any("id" not in cue for cue in known):
                raise InvalidRequest("a known cue names its memory: give it an id")
            sent = yield from sent_cues([{k: v for k, v in cue.items() if k != "id"} for cue in known])
            body["cues"] = [{"id": cue["id"], "cue": each} for cue, each in zip(known, sent, strict=True)]
        if negatives is not None:
            body["negatives"] = yield from sent_cues(list(negatives))
        return Operation.of((yield from self.here("train", body)))

    def reencode(self, space: str, body: Body, wait: bool) -> Steps[Operation]:
        operation = Operation.of((yield from self.here("reencode", body, space=space)))
        while wait and operation.status in ("queued", "running"):
            yield Pause(POLL_S)
            operation = yield from self.operation(operation.id)
        if wait:
            operation.check()
        return operation

    def update(self, memory_id: str, changes: Mapping[str, Any], options: Body) -> Steps[Updated]:
        """`changes` that are `KEPT` are none, and None removes."""
        named = {name: value for name, value in changes.items() if value is not KEPT}
        gone: Body = {name: None for name, value in named.items() if value is None}
        body: Body = gone | (yield Work(partial(with_pictures, named)))
        return Updated.of((yield from self.here("patch_memory", body | options, id=memory_id)))

    def get(self, memory_id: str, min_version: int | None) -> Steps[Memory]:
        return Memory.of((yield from self.here("get_memory", given(min_version=min_version), id=memory_id)))

    def get_many(self, ids: Iterable[str], min_version: int | None) -> Steps[list[Memory]]:
        wanted = list(ids)
        found: list[Memory] = []
        for start in range(0, len(wanted), PAGE):
            body = given(ids=wanted[start : start + PAGE], min_version=min_version)
            reply = yield from self.here("get_memories", body)
            found += map(Memory.of, reply["memories"])
        return found

    def page(self, body: Body) -> Steps[tuple[list[Memory], Body | None]]:
        """A page of a scroll, and the request for the next one."""
        reply = yield from self.here("scroll", body)
        cursor = reply["next_cursor"]
        return [Memory.of(memory) for memory in reply["memories"]], None if cursor is None else body | {
            "cursor": cursor
        }

    def content(self, memory_id: str) -> Steps[bytes]:
        data: bytes = yield from self.again(Content(self.name, memory_id, self.options.timeout_s), True)
        return data

    def delete(
        self,
        ids: str | Sequence[str] | None,
        filter: Mapping[str, Any] | None,
        dry_run: bool,
        if_version: int | None,
    ) -> Steps[Any]:
        if if_version is not None:
            if not isinstance(ids, str) or filter is not None or dry_run:
                raise InvalidRequest("if_version belongs to the deletion of one memory, by its id")
            return (yield from self.here("delete_memory", {"if_version": if_version}, id=ids))["deleted"]
        asked = [ids] if isinstance(ids, str) else None if ids is None else list(ids)
        return (yield from self.here("delete_memories", given(ids=asked, filter=filter, dry_run=dry_run)))["deleted"]

    def count(self, filter: Mapping[str, Any] | None, min_version: int | None) -> Steps[int]:
        return int((yield from self.here("count", given(filter=filter, min_version=min_version)))["count"])

    def info(self) -> Steps[CollectionInfo]:
        return CollectionInfo.of((yield from self.here("get_collection")))

    def payload_indexes(self) -> Steps[Any]:
        return (yield from self.here("list_payload_indexes"))["payload_indexes"]

    def create_payload_index(self, key: str) -> Steps[Any]:
        return (yield from self.here("put_payload_index", key=key))

    def delete_payload_index(self, key: str) -> Steps[None]:
        yield from self.here("delete_payload_index", key=key)

    def kernels(self) -> Steps[Any]:
        return (yield from self.here("list_kernels"))["kernels"]

    def retire_kernel(self, kernel_id: str) -> Steps[None]:
        yield from self.here("retire_kernel", kernel=kernel_id)

    def diagnostics(self) -> Steps[Diagnostics]:
        return Diagnostics.of((yield from self.here("get_diagnostics")))

    def sizing(self, body: Body) -> Steps[Sizing]:
        return Sizing.of((yield from self.here("size", body)))

    def wait_until_calibrated(self, timeout_s: float) -> Steps[CollectionInfo]:
        ends = time.monotonic() + timeout_s
        while (info := (yield from self.info())).calibration.state != "current":
            if info.problem is not None:
                raise info.problem.as_error()
            if time.monotonic() >= ends:
                raise Unavailable(f"{self.name}: its calibration is {info.calibration.state} after {timeout_s:g} s")
            yield Pause(POLL_S)
        return info


def given(**fields: Any) -> Body:
    return {name: value for name, value in fields.items() if value is not None}


_jitter = random.Random()  # not the program's: programs that all seed theirs alike would come back together


def _pause_s(error: EngramError, attempt: int) -> float | None:
    """How long to wait before the attempt after this one; None where another would fail as well.

    Full jitter: callers refused together do not come back together. (Brooker, "Exponential Backoff and Jitter", 2015)
    """
    if error.status not in (429, 503) or isinstance(error, LASTING):
        return None
    jitter_s = _jitter.uniform(0, min(PAUSE_MAX_S, PAUSE_S * 2.0**attempt))
    return jitter_s + (error.retry_after_s or 0)
