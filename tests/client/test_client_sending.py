"""Several requests under way at once: how many, in which order, and never two of one id."""

from __future__ import annotations

import threading

import pytest

from engram.sending import UNDER_WAY_MAX, answered
from engram.transport import Body
from service.errors import Unavailable


def requests(*ids: str) -> list[list[Body]]:
    """One request of one memory for each letter of a string, or of several."""
    return [[{"id": each} for each in letters] for letters in ids]


def test_some_are_under_way_at_once_and_answered_in_order() -> None:
    meeting = threading.Barrier(UNDER_WAY_MAX)  # passed only when as many are sent together

    def send(memories: list[Body]) -> Body:
        meeting.wait(60)
        return {"of": memories[0]["id"]}

    ids = [str(i) for i in range(3 * UNDER_WAY_MAX)]
    replies = [reply for _, reply in answered(requests(*ids[:10]), send)]
    assert replies == [{"of": each} for each in ids[:10]]


def test_two_of_one_id_are_never_under_way_together() -> None:
    under_way: set[str] = set()
    lock = threading.Lock()

    def send(memories: list[Body]) -> Body:
        ids = {memory["id"] for memory in memories}
        with lock:
            assert not ids & under_way
            under_way.update(ids)
        threading.Event().wait(0.01)
        with lock:
            under_way.difference_update(ids)
        return {"of": sorted(ids)}

    sent = requests("ab", "bc", "c", "d", "d", "ae", "x", "xa")
    assert [reply["of"] for _, reply in answered(sent, send) if reply] == [
        sorted({memory["id"] for memory in request}) for request in sent
    ]


def test_what_cannot_be_sent_is_not_and_a_refusal_is_raised_in_its_turn() -> None:
    def send(memories: list[Body]) -> Body:
        if memories[0]["id"] == "bad":
            raise Unavailable("gone")
        return {}

    replies = answered([[{"id": "a"}], [], [{"id": "bad"}], [{"id": "b"}]], send)
    assert [next(replies), next(replies)] == [([{"id": "a"}], {}), ([], None)]
    with pytest.raises(Unavailable, match="gone"):
        next(replies)
