"""What has expired is not there: at every moment a view is one of the memories that are left."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.bank import NEVER, Bank, Layout, Rows, SpaceLayout, View

D = 4


def write(bank: Bank, version: int, memories: dict[str, int | None], deletes: list[str]) -> None:
    """Each memory's vector is made of its id and the version."""
    vectors = [np.random.default_rng(100 * version + int(id_)).standard_normal(D) for id_ in memories]
    rows = Rows(
        list(memories), {"v": np.array(vectors, np.float32).reshape(-1, D)}, [None] * len(memories),
        np.array([NEVER if moment is None else moment for moment in memories.values()], np.int64),
    )  # fmt: skip
    bank.write(rows if memories else None, deletes, version)


def found(view: View) -> tuple[int, list[list[str | None]]]:
    cue = torch.ones(1, D)
    return view.count, view.ids(view.search({"v": cue}, {"v": 1.0}, 8).rows)


moments = st.none() | st.integers(1, 6)
writes = st.lists(
    st.tuples(st.dictionaries(st.sampled_from("123456"), moments, max_size=4), st.lists(st.sampled_from("123456"))),
    min_size=1, max_size=4,
)  # fmt: skip


@given(history=writes, sealed=st.integers(0, 4), clock=st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_at_every_moment_a_view_is_one_of_what_is_left(history, sealed, clock):
    bank = Bank(Layout((SpaceLayout("v", D),)), scan_values_max=D, quiet_s=1e9)
    memories: dict[str, tuple[int, int | None]] = {}
    for version, (batch, deletes) in enumerate(history, start=1):
        write(bank, version, batch, deletes)
        for id_ in deletes:
            memories.pop(id_, None)
        memories |= {id_: (version, moment) for id_, moment in batch.items()}
        if version == sealed:
            bank.seal()
    view = bank.view()
    for now in clock:  # also backwards
        left = Bank(Layout((SpaceLayout("v", D),)), scan_values_max=D, quiet_s=1e9)
        for version in range(1, len(history) + 1):
            batch = {i: m for i, (at, m) in memories.items() if at == version and (m is None or m > now)}
            write(left, version, batch, [])
        seen = view.at(now)
        assert found(seen) == found(left.view())
        assert (seen is view) == (seen.count == view.count)
        assert seen.restricted(None, frozenset("1")).count == left.view().restricted(None, frozenset("1")).count
        assert seen.soonest > now
        assert view.at(now) is seen, "made once"
    if all(moment is None for _, moment in memories.values()):
        assert view.soonest == NEVER


def test_rows_that_never_expire_cost_nothing():
    bank = Bank(Layout((SpaceLayout("v", D),)))
    write(bank, 1, {"1": None, "2": None}, [])
    assert bank.view().parts[0].segment.expires is None
    assert bank.view().at(NEVER - 1) is bank.view()


def test_a_bank_is_waited_for_until_it_is_at_a_version():
    bank = Bank(Layout((SpaceLayout("v", D),)))
    assert not bank.wait_for(1, 0.01)
    write(bank, 1, {"1": None}, [])
    assert bank.wait_for(1, 0)
