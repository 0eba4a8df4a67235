"""What a client asks for, step by step: how many requests are under way and in which order, what is asked again and
after which pause. Nothing is sent here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import awaited
from engram.asking import PAUSE_MAX_S, RETRY_MAX_S, UNDER_WAY_MAX, Asking, CollectionAsking, Options
from engram.steps import Call, Pause, Step, Steps, run, run_async
from engram.transport import Body
from service.app.fields import BATCH_MAX
from service.app.operations import OPERATIONS
from service.errors import (
    EngramError,
    InvalidRequest,
    StorageUnavailable,
    TimedOut,
    TooBusy,
    Unavailable,
    Unreachable,
    WeightsMissing,
)

Send = Callable[[list[Body]], None]


class Answering:
    """A transport that answers every store at once, after telling `send` of it; and the same, awaited."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def call(self, operation: str, path: Mapping[str, str], body: Body | None = None, *, timeout_s: Any = None) -> Body:
        assert body is not None
        self._send(body["memories"])
        results = [{"id": memory["id"], "status": "stored"} for memory in body["memories"]]
        return {"version": 7, "results": results}

    def content(self, collection: str, memory_id: str, *, timeout_s: Any = None) -> bytes:
        raise NotImplementedError

    def close(self) -> None: ...


class AnsweringLater(Answering):
    async def call(self, *args: Any, **options: Any) -> Body:  # type: ignore[override]
        return await asyncio.to_thread(super().call, *args, **options)

    async def content(self, *args: Any, **options: Any) -> bytes:  # type: ignore[override]
        raise NotImplementedError

    async def close(self) -> None: ...  # type: ignore[override]


def store(ids: str, batch: int, progress: Callable[[int], None] | None = None) -> Steps[Any]:
    asking: CollectionAsking = Asking(Options()).collection("c")
    return asking.store(({"id": each} for each in ids), batch, True, progress)


@pytest.fixture(params=["called", "awaited"])
def carry_out(request: pytest.FixtureRequest) -> Callable[[Steps[Any], Send], Any]:
    if request.param == "called":
        return lambda steps, send: run(steps, Answering(send))
    return lambda steps, send: asyncio.run(run_async(steps, AnsweringLater(send)))


def test_some_are_under_way_at_once_and_answered_in_order(carry_out: Any) -> None:
    meeting = threading.Barrier(UNDER_WAY_MAX)  # passed only when as many are sent together
    counts: list[int] = []
    ids = "abcdefghi"
    reply = carry_out(store(ids, 1, counts.append), lambda memories: meeting.wait(60) and None)
    assert [result.id for result in reply.results] == list(ids)
    assert (reply.version, counts) == (7, [1] * len(ids))


def test_two_of_one_id_are_never_under_way_together(carry_out: Any) -> None:
    under_way: set[str] = set()
    lock = threading.Lock()

    def send(memories: list[Body]) -> None:
        ids = {memory["id"] for memory in memories}
        with lock:
            assert not ids & under_way
            under_way.update(ids)
        threading.Event().wait(0.01)
        with lock:
            under_way.difference_update(ids)

    ids = "abbcc.dd.aexxa"
    assert [result.id for result in carry_out(store(ids, 2), send).results] == list(ids)


def test_what_cannot_be_sent_is_not_and_a_refusal_is_raised_in_its_turn(carry_out: Any, tmp_path: Path) -> None:
    def send(memories: list[Body]) -> None:
        if memories[0]["id"] == "bad":
            raise InvalidRequest("no")

    counts: list[int] = []
    memories = [{"id": "a"}, {"id": "unread", "image": tmp_path / "none.png"}, {"id": "bad"}, {"id": "b"}]
    steps = Asking(Options()).collection("c").store(memories, 1, True, counts.append)
    with pytest.raises(InvalidRequest, match="no"):
        carry_out(steps, send)
    assert counts == [1, 1]


def attempts(steps: Steps[Any], errors: list[EngramError], reply: Body) -> tuple[list[float], list[Step]]:
    """The pauses and the calls of steps that meet `errors` first; the last error is raised."""
    pauses: list[float] = []
    calls: list[Step] = []
    left = list(errors)
    step = next(steps)
    try:
        while True:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                step = steps.send(None)
                continue
            calls.append(step)
            step = steps.throw(left.pop(0)) if left else steps.send(reply)
    except StopIteration:
        return pauses, calls


FOR_NOW: list[type[EngramError]] = [TooBusy, Unavailable, StorageUnavailable, Unreachable]


@settings(deadline=None)
@given(
    kinds=st.lists(st.sampled_from(FOR_NOW), max_size=12),
    retry_after_s=st.one_of(st.none(), st.integers(0, 4)),
)
def test_what_failed_for_now_is_asked_again_after_a_pause(
    kinds: list[type[EngramError]], retry_after_s: int | None
) -> None:
    asking = Asking(Options())
    asking.seen.answered = True
    errors = [kind("for now", retry_after_s=retry_after_s) for kind in kinds]
    pauses, calls = attempts(
        asking.operation("x"), errors, {"id": "x", "kind": "", "collection": None, "status": "done", "progress": 1}
    )
    assert len(pauses) == len(errors) == len(calls) - 1
    least_s = retry_after_s or 0
    for number, pause_s in enumerate(pauses):
        assert least_s <= pause_s <= least_s + min(PAUSE_MAX_S, 0.1 * 2**number)


def test_it_ends_after_so_many_and_before_so_long() -> None:
    asking = Asking(Options(retries=2))
    with pytest.raises(TooBusy, match="third"):
        attempts(asking.operation("x"), [TooBusy("first"), TooBusy("second"), TooBusy("third")], {})
    with pytest.raises(TooBusy):
        attempts(asking.operation("x"), [TooBusy("an hour", retry_after_s=int(RETRY_MAX_S) + 1)], {})


@pytest.mark.parametrize(
    "error", [TimedOut("slow"), WeightsMissing("none"), InvalidRequest("wrong"), EngramError("broken")]
)
def test_what_another_attempt_would_meet_as_well_is_raised_at_once(error: EngramError) -> None:
    with pytest.raises(type(error)):
        attempts(Asking(Options()).operation("x"), [error], {})


def test_only_what_is_safe_to_repeat_is_asked_again() -> None:
    here = Asking(Options()).collection("c")
    stored = {"version": 1, "results": []}
    for steps in (here._stored([{"id": "a"}, {"text": "b"}], True), here._stored([{"text": "b"}], True)):
        pauses, calls = attempts(steps, [TooBusy("now")], stored)
        assert len(pauses) == 1
        first, again = [call.body for call in calls if isinstance(call, Call)]
        assert first == again is not None
        assert first["idempotency_key"]
    for steps in (here.train("gate", None, None, {}), here.delete("a", None, False, None)):
        with pytest.raises(TooBusy):
            attempts(steps, [TooBusy("now")], stored)
    assert {name for name, operation in OPERATIONS.items() if operation.method == "GET"} <= {
        name for name, operation in OPERATIONS.items() if operation.reads
    }


def test_a_server_that_never_answered_is_not_waited_for() -> None:
    asking = Asking(Options())
    with pytest.raises(Unreachable):
        attempts(asking.collections(), [Unreachable("nobody")], {"collections": []})
    attempts(asking.collections(), [Unavailable("loading"), Unreachable("gone again")], {"collections": []})


def test_more_cues_than_a_request_takes_go_in_several() -> None:
    cues = [{"vectors": {"v": [float(number)]}} for number in range(2 * BATCH_MAX + 5)]
    steps = Asking(Options()).collection("c").recall_batch(cues, {"limit": 1})
    _, calls = attempts(steps, [], {"version": 1, "timings_ms": {}, "results": []})
    bodies = [call.body for call in calls if isinstance(call, Call) and call.body is not None]
    assert [len(body["cues"]) for body in bodies] == [BATCH_MAX, BATCH_MAX, 5]
    assert [cue for body in bodies for cue in body["cues"]] == cues
    assert all(body["limit"] == 1 for body in bodies)


def test_options_that_are_none() -> None:
    for wrong in ({"timeout_s": 0}, {"timeout_s": 601}, {"retries": -1}):
        with pytest.raises(InvalidRequest):
            Options(**wrong)  # type: ignore[arg-type]
    asking = Asking(Options())
    assert asking.but(timeout_s=2, retries=None).options == Options(timeout_s=2)
    assert asking.options == Options()
    assert asking.but(retries=0).seen is asking.seen


def test_the_awaited_client_is_written_from_the_other() -> None:
    assert awaited.PATH.read_text() == awaited.text(), "write it: python -m engram.awaited"


@pytest.mark.parametrize("asked_for", [True, False])
def test_reads_ask_for_the_last_version_seen_of_their_collection(asked_for: bool) -> None:
    asking = Asking(Options(read_your_writes=asked_for))
    here = asking.collection("c")
    for version in (5, 4):
        attempts(here.delete("a", None, False, None), [], {"version": version, "deleted": []})
    asked = {}
    for name, collection in {"here": here, "another": asking.collection("d")}.items():
        _, [call] = attempts(collection.count(None, None), [], {"count": 1})
        assert isinstance(call, Call)
        asked[name] = (call.body or {}).get("min_version")
    assert asked == {"here": 5 if asked_for else None, "another": None}
