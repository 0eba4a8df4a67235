"""The bank against a plain dict and brute force: whatever is written, deleted and sealed, in whatever order."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.bank import Bank, Layout, Rows, SpaceLayout
from service.bank import bank as bank_module

IDS = [f"m{i}" for i in range(12)]
LAYOUTS = [
    Layout((SpaceLayout("a", 3), SpaceLayout("b", 5))),
    Layout((SpaceLayout("a", 4),)),
    Layout((SpaceLayout("a", 4),), "dot"),
    Layout((SpaceLayout("a", 4),), "neg_l2"),
]

Stored = tuple[dict[str, np.ndarray], bytes | None]


def unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x)
    return x / norm if norm else x


def score(
    layout: Layout, cue: dict[str, np.ndarray], weights: dict[str, float], stored: dict[str, np.ndarray]
) -> float:
    """The definition (float64), -inf for a memory that is no candidate."""
    if not any(stored[name].any() for name in cue):
        return -math.inf
    if layout.similarity == "cosine":
        total = sum(weights[name] * unit(cue[name]) @ unit(stored[name]) for name in cue)
        return float(total / sum(weights[name] for name in cue))
    (name,) = cue
    if layout.similarity == "dot":
        return float(cue[name] @ stored[name])
    return -float(((cue[name] - stored[name]) ** 2).sum())


class BankMachine(RuleBasedStateMachine):
    @initialize(
        layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**32 - 1), budget=st.sampled_from([0, 60, 8_000_000])
    )
    def start(self, layout: Layout, seed: int, budget: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.layout = layout
        self.bank = Bank(layout, scan_values_max=budget, quiet_s=0.0)
        self.model: dict[str, Stored] = {}
        self.version = 0
        self.kept_view = (self.bank.view(), dict(self.model))

    def vectors(self, n: int) -> dict[str, np.ndarray]:
        """Distinct rows with now and then a lacking space, where there are several."""
        drawn = {s.name: self.rng.normal(size=(n, s.dimension)).astype(np.float32) for s in self.layout.spaces}
        if len(drawn) > 1:
            for block in drawn.values():
                block[self.rng.random(n) < 0.3] = 0
        return drawn

    def change(self, ids: list[str], deletes: list[str]) -> None:
        vectors = self.vectors(len(ids))
        payloads = [None if self.rng.random() < 0.5 else b'{"n": %d}' % self.version for _ in ids]
        self.version += 1
        self.bank.write(Rows(ids, vectors, payloads) if ids else None, deletes, self.version)
        for memory_id in deletes:
            self.model.pop(memory_id, None)
        for row, memory_id in enumerate(ids):
            self.model[memory_id] = ({name: block[row].copy() for name, block in vectors.items()}, payloads[row])

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=8), deletes=st.lists(st.sampled_from(IDS), max_size=4))
    def write(self, ids: list[str], deletes: list[str]) -> None:
        self.change(ids, deletes)

    @rule()
    def seal(self) -> None:
        due = self.bank.seal_due()
        assert self.bank.seal() is due

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=8), deletes=st.lists(st.sampled_from(IDS), max_size=4))
    def write_while_sealing(self, ids: list[str], deletes: list[str]) -> None:
        """The real merge runs, and before its result is swapped in, the same thread writes."""
        if not self.bank.seal_due():
            return
        merge = bank_module.merge

        def merge_then_write(*args: object, **kwargs: object) -> object:
            merged = merge(*args, **kwargs)  # type: ignore[arg-type]
            assert not self.bank.seal()
            self.change(ids, deletes)
            return merged

        bank_module.merge = merge_then_write  # type: ignore[assignment]
        try:
            assert self.bank.seal()
        finally:
            bank_module.merge = merge

    @rule()
    def keep_view(self) -> None:
        self.kept_view = (self.bank.view(), dict(self.model))

    @invariant()
    def same_answers(self) -> None:
        """The present view and one taken earlier both answer as the model did at their version, for every set of
        spaces."""
        every = self.layout.names
        for names in {every, every[:1], every[1:]} - {()}:
            for exact in (False, True):
                self.search(names, exact, excluding=bool(self.rng.random() < 0.5))

    def search(self, names: tuple[str, ...], exact: bool, excluding: bool) -> None:
        limit = int(self.rng.integers(1, 16))
        weights = dict(zip(names, self.rng.uniform(0.1, 10, len(names)).tolist(), strict=True))
        cues = {name: block for name, block in self.vectors(3).items() if name in names}
        excluded = self.rng.choice(IDS, 3).tolist() if excluding else None
        for view, model in ((self.bank.view(), self.model), self.kept_view):
            exclude = None if excluded is None else view.rows_of(excluded)
            cue = {name: torch.from_numpy(block) for name, block in cues.items()}
            found = view.search(cue, weights, limit, exact=exact, exclude=exclude)
            assert found.rows.shape == found.scores.shape == (3, limit)
            assert found.exact or not exact
            for i, ids in enumerate(view.ids(found.rows)):
                one = {name: block[i].astype(np.float64) for name, block in cues.items()}
                expected = {k: score(self.layout, one, weights, vectors) for k, (vectors, _) in model.items()}
                if excluded is not None:
                    expected.pop(excluded[i], None)
                candidates = {k: s for k, s in expected.items() if s > -math.inf}
                present = [k for k in ids if k is not None]
                assert len(present) == min(limit, len(candidates)), "min(limit, candidates) come back"
                assert ids == present + [None] * (limit - len(present))
                assert len(set(present)) == len(present)
                scores = found.scores[i, : len(present)].numpy()
                assert (found.scores[i, len(present) :] == -math.inf).all()
                assert (np.diff(scores) <= 0).all()
                np.testing.assert_allclose(scores, [candidates[k] for k in present], rtol=1e-4, atol=1e-5)
                # So few rows that a graph is as good as a scan; ties may fall either way.
                np.testing.assert_allclose(
                    scores, sorted(candidates.values(), reverse=True)[: len(present)], rtol=1e-4, atol=1e-5
                )

    @invariant()
    def same_memories(self) -> None:
        for view, model in ((self.bank.view(), self.model), self.kept_view):
            assert view.count == len(model)
            rows = view.rows_of(IDS)
            assert [i for i, row in zip(IDS, rows.tolist(), strict=True) if row >= 0] == [i for i in IDS if i in model]
            ids, payloads = view.ids(rows[:, None]), view.payloads(rows[:, None])
            patterns = view.gather(rows[:, None])[:, 0]
            raw = {name: view.read_out(rows[:, None], torch.ones(len(IDS), 1), name) for name in self.layout.names}
            for i, memory_id in enumerate(IDS):
                stored = model.get(memory_id)
                assert ids[i] == [None if stored is None else memory_id]
                assert payloads[i] == [None if stored is None else stored[1]]
                start = 0
                for space in self.layout.spaces:
                    expected = np.zeros(space.dimension) if stored is None else stored[0][space.name]
                    np.testing.assert_allclose(raw[space.name][i], expected, rtol=1e-5, atol=1e-6)
                    block = patterns[i, start : start + space.dimension]
                    kept = unit(expected) if self.layout.similarity == "cosine" else expected
                    np.testing.assert_allclose(block, kept, rtol=1e-5, atol=1e-6)
                    start += space.dimension
            matrix, numbers = view.matrix()
            assert matrix.shape == (len(model), self.layout.dimension)
            assert {name for (name,) in view.ids(numbers[:, None])} == set(model)
            torch.testing.assert_close(matrix, view.gather(numbers[:, None])[:, 0], rtol=0, atol=0)
            for names in {self.layout.names, self.layout.names[:1], self.layout.names[-1:]}:
                lacks = [
                    not any(model[name][0][space].any() for space in names) for (name,) in view.ids(numbers[:, None])
                ]
                assert view.lacking(names, numbers).tolist() == lacks
                assert view.lacking(names, torch.tensor([-1])).tolist() == [True]
            norms = [float(matrix[i].norm()) for i in range(len(matrix))]
            assert all(norm <= view.norm_max * (1 + 1e-5) for norm in norms)
            sample = view.sample(5, seed=self.version)
            assert len(sample) == min(5, len(model)) == len(set(sample.tolist()))
            assert set(sample.tolist()) <= set(numbers.tolist())
            assert torch.equal(sample, view.sample(5, seed=self.version))

    @invariant()
    def version_follows(self) -> None:
        assert self.bank.version == self.bank.view().version == self.version


BankMachine.TestCase.settings = settings(settings(), stateful_step_count=25)
TestBank = BankMachine.TestCase
