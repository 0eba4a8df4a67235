"""Messages and dictionaries: what is put in comes out, and what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest, MalformedBody
from service.rpc.convert import to_dict, to_message
from service.rpc.messages import message

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=20
)


def there_and_back(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return to_dict(message(name).FromString(to_message(name, body).SerializeToString()), asked=True)


def types(value: Any) -> Any:
    """The same with each scalar's type beside it: 1, 1.0 and True are equal."""
    if isinstance(value, dict):
        return {key: types(item) for key, item in value.items()}
    return [types(item) for item in value] if isinstance(value, list) else (type(value), value)


@given(payload=st.dictionaries(texts, json_values, max_size=4))
def test_payloads_come_out_as_they_went_in(payload: dict[str, Any]) -> None:
    found = there_and_back("MemoryInput", {"payload": payload})["payload"]
    assert types(found) == types(payload)


def test_a_payload_may_be_as_deep_as_over_rest() -> None:
    deep: Any = "bottom"
    for _ in range(120):
        deep = {"a": [deep]}
    assert there_and_back("MemoryInput", {"payload": {"deep": deep}}) == {"payload": {"deep": deep}}


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_vectors_are_bits(values: list[float]) -> None:
    array = np.asarray(values, "<f4")
    found = there_and_back("Cue", {"vectors": {"v": array}})["vectors"]["v"]
    assert found.tobytes() == array.tobytes()
    assert found.dtype == np.float32


def test_absent_and_empty_are_told_apart_where_they_differ() -> None:
    for body in (
        {"collection": "c", "what": "gate"},
        {"collection": "c", "what": "gate", "cues": [], "negatives": []},
        {"collection": "c", "what": "gate", "cues": [{"id": "a", "cue": {"text": "x"}}], "target_tpr": 0.9},
        {"collection": "c", "what": "kernel", "corruptions": [{"kind": "mask", "share": 0.5}, {"kind": "blur"}]},
    ):
        assert there_and_back("TrainRequest", body) == body
    null = {"filter": {"must": [{"key": "a", "match": None}]}}
    assert there_and_back("CountRequest", null) == null
    reply = to_dict(to_message("RecallResult", {"verdict": "unknown", "state": {}, "trace": [None]}), asked=False)
    assert (reply["verdict"], reply["state"], reply["trace"], reply["gate"]) == ("unknown", {}, [None], None)
    assert to_dict(message("RecallResult")(), asked=False)["state"] is None


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"limit": "five"}, "limit: is a number"),
        ({"limit": 1.5}, "limit: is a whole number"),
        ({"limit": 2**70}, "limit: is a whole number"),
        ({"cue": {"text": 5}}, "cue.text: is a text"),
        ({"cue": {"text": "\ud800"}}, "cue.text: the text holds half"),
        ({"cue": {"vectors": {"v": ["x"]}}}, "cue.vectors.v: a vector is a list of numbers"),
        ({"cue": []}, "cue: is an object"),
        ({"filter": {"must": [{"key": 1}]}}, "filter.must.0.key: is a text"),
        ({"filter": {"must": [{"key": "a", "match": 2**64}]}}, "filter.must.0.match: a whole number has"),
        ({"exact": 1}, "exact: is true or false"),
        ({"exclude": "abc"}, "exclude: is a list"),
        ({"nope": 1}, "nope: is not a field"),
    ],
)
def test_what_no_message_holds_is_named(body: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest, match="^" + where):
        to_message("RecallRequest", body)


def test_what_a_newer_client_sends_is_not_passed_over() -> None:
    newer = message("RecallRequest").FromString(b"\xfa\x3f\x01x")  # field 1023
    with pytest.raises(InvalidRequest, match="does not know"):
        to_dict(newer, asked=True)


def test_json_that_is_none_is_malformed() -> None:
    bad = message("MemoryInput")()
    bad.payload.fields["a"].json_value = b"{"
    with pytest.raises(MalformedBody):
        to_dict(bad, asked=True)
