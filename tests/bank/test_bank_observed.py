"""Distances over what a cue shows: against their definition, whatever is stored, deleted or sealed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.bank import Bank, Layout, Rows, SpaceLayout
from service.errors import InvalidRequest


@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 40), d=st.integers(1, 12), limit=st.integers(1, 8),
    deleted=st.integers(0, 5), sealed=st.booleans(),
)  # fmt: skip
def test_scores_are_squared_distances_over_the_values_that_are_not_zero(
    seed: int, n: int, d: int, limit: int, deleted: int, sealed: bool
) -> None:
    rng = np.random.default_rng(seed)
    bank = Bank(Layout((SpaceLayout("v", d),)), scan_values_max=0 if sealed else 10**9, quiet_s=0.0)
    stored = (rng.normal(size=(n, d)) * rng.uniform(0.1, 10, (n, 1))).astype(np.float32)
    bank.write(Rows([str(i) for i in range(n)], {"v": stored}, [None] * n), [], 1)
    bank.write(None, [str(i) for i in range(min(deleted, n - 1))], 2)
    while bank.seal_due() and bank.seal():
        pass
    alive = np.arange(min(deleted, n - 1), n)
    cue = np.where(rng.random((3, d)) < 0.5, 0, stored[rng.choice(alive, 3)]).astype(np.float32)
    shown = cue != 0
    view = bank.view()
    found = view.search({"v": torch.from_numpy(cue)}, {"v": 1.0}, limit, raw=True, observed=True)
    assert found.exact
    wanted = -(np.square(stored[None].astype(np.float64) - cue[:, None]) * shown[:, None]).sum(axis=2)
    scale = np.square(stored).sum(axis=1).max()
    best = -np.sort(-wanted[:, alive], axis=1)[:, :limit]
    assert np.allclose(found.scores[:, : best.shape[1]].numpy(), best, atol=1e-5 * scale + 1e-6)
    for line, ids in enumerate(view.ids(found.rows)):
        for column, memory_id in enumerate(ids):
            if memory_id is not None:
                assert np.isclose(float(found.scores[line, column]), wanted[line, int(memory_id)], atol=1e-5 * scale)


def test_a_part_of_a_memory_is_at_no_distance_from_it() -> None:
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(50, 20)).astype(np.float32)
    bank = Bank(Layout((SpaceLayout("v", 20),)))
    bank.write(Rows([str(i) for i in range(50)], {"v": stored}, [None] * 50), [], 1)
    cue = stored.copy()
    cue[:, 5:] = 0
    found = bank.view().search({"v": torch.from_numpy(cue)}, {"v": 1.0}, 2, raw=True, observed=True)
    assert found.rows[:, 0].tolist() == list(range(50))
    assert found.scores[:, 0].abs().max() < 1e-10  # rounding of a unit row times its norm


def test_what_a_cue_shows_is_asked_of_raw_values_alone() -> None:
    bank = Bank(Layout((SpaceLayout("v", 2),)))
    bank.write(Rows(["a"], {"v": np.ones((1, 2), np.float32)}, [None]), [], 1)
    with pytest.raises(InvalidRequest, match="raw values alone"):
        bank.view().search({"v": torch.ones(1, 2)}, {"v": 1.0}, 1, observed=True)
