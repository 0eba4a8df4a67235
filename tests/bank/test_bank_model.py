"""The bank against a plain dict and brute force: whatever is written, deleted, sealed, and compared under whichever
kernels, in whatever order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.bank import Bank, Layout, Rows, SpaceLayout, View
from service.bank import bank as bank_module
from service.core.similarity import KERNEL_NULL, Kernel

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


Metric = tuple[dict[str, Kernel], bool]
"""Kernels by space, and whether raw values are compared."""


def image(x: np.ndarray, kernel: Kernel | None) -> np.ndarray:
    """Wx̂ at unit length; zero where W has x in its null space."""
    if kernel is None:
        return unit(x)
    weight = kernel.weight.numpy().astype(np.float64)
    there = weight @ unit(x)
    return unit(there) if np.linalg.norm(there) > KERNEL_NULL * np.linalg.norm(weight) else 0 * there


def score(
    layout: Layout,
    cue: dict[str, np.ndarray],
    weights: dict[str, float],
    stored: dict[str, np.ndarray],
    metric: Metric = ({}, False),
) -> float:
    """The definition (float64), -inf for a memory that is no candidate."""
    kernels, raw = metric
    if not any(image(stored[name], kernels.get(name)).any() for name in cue):
        return -math.inf
    if layout.similarity == "cosine" and not raw:
        total = sum(
            weights[name] * image(cue[name], kernels.get(name)) @ image(stored[name], kernels.get(name)) for name in cue
        )
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
        # Tall, wide and singular ones, none of unit size; two for each space.
        self.pool = [
            (
                space.name,
                Kernel(torch.from_numpy(self.rng.normal(size=(r, space.dimension), scale=7).astype(np.float32))),
            )
            for space in (layout.spaces if layout.similarity == "cosine" else ())
            for r in (space.dimension + 2, space.dimension - 1)
        ]
        self.registered: set[tuple[str, Kernel]] = set()
        self.graph_kernels: dict[str, Kernel] = {}
        self.keep_view()

    def vectors(self, n: int) -> dict[str, np.ndarray]:
        """Distinct rows with now and then a lacking space, where there are several."""
        drawn = {s.name: self.rng.normal(size=(n, s.dimension)).astype(np.float32) for s in self.layout.spaces}
        if len(drawn) > 1:
            for block in drawn.values():
                block[self.rng.random(n) < 0.3] = 0
        for name, kernel in self.pool[1::2]:  # some rows that a kernel annihilates
            null = np.linalg.svd(kernel.weight.numpy())[2][-1]
            drawn[name][self.rng.random(n) < 0.1] = null * self.rng.uniform(0.5, 2)
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
        """The real merge runs, and before its result is swapped in, the same thread writes and changes kernels."""
        if not self.bank.seal_due():
            return
        merge = bank_module.merge

        def merge_then_write(*args: object, **kwargs: object) -> object:
            merged = merge(*args, **kwargs)  # type: ignore[arg-type]
            assert not self.bank.seal()
            self.change(ids, deletes)
            for named in self.pool[: len(ids)]:
                self.toggle(named)
            return merged

        bank_module.merge = merge_then_write  # type: ignore[assignment]
        try:
            assert self.bank.seal()
        finally:
            bank_module.merge = merge

    def toggle(self, named: tuple[str, Kernel]) -> None:
        space, kernel = named
        if named not in self.registered:
            self.bank.add_kernel(space, kernel)
            self.registered.add(named)
        elif self.graph_kernels.get(space) is kernel:
            with pytest.raises(ValueError, match="graphs"):
                self.bank.drop_kernel(kernel)
        else:
            self.bank.drop_kernel(kernel)
            self.registered.remove(named)

    @rule(which=st.integers(0, 3))
    def add_or_drop_kernel(self, which: int) -> None:
        if self.pool:
            self.toggle(self.pool[which % len(self.pool)])

    @rule(which=st.integers(0, 3), plain=st.booleans())
    def choose_graph_kernel(self, which: int, plain: bool) -> None:
        if not self.pool:
            return
        space, kernel = self.pool[which % len(self.pool)]
        if plain:
            self.bank.set_graph_kernel(space, None)
            self.graph_kernels.pop(space, None)
        elif (space, kernel) in self.registered:
            self.bank.set_graph_kernel(space, kernel)
            self.graph_kernels[space] = kernel
        else:
            with pytest.raises(ValueError, match="add_kernel"):
                self.bank.set_graph_kernel(space, kernel)

    @rule()
    def keep_view(self) -> None:
        self.kept_view = (self.bank.view(), dict(self.model), set(self.registered))

    def views(self) -> Iterator[tuple[View, dict[str, Stored], list[Metric]]]:
        """The present view and the kept one, each with its model and the metrics that it may be asked for."""
        for view, model, registered in ((self.bank.view(), self.model, self.registered), self.kept_view):
            assert set(view.kernels) == registered
            one_each = dict(named for named in self.pool if named in registered)
            other = dict(named for named in reversed(self.pool) if named in registered)
            metrics: list[Metric] = [({}, False), (one_each, False), (other, False)]
            yield view, model, [*metrics, ({}, True)] if self.layout.similarity == "cosine" else metrics

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
        for view, model, metrics in self.views():
            kernels, raw = metric = metrics[int(self.rng.integers(len(metrics)))]
            if raw and len(names) > 1:
                continue
            exclude = None if excluded is None else view.rows_of(excluded)
            cue = {name: torch.from_numpy(block) for name, block in cues.items()}
            found = view.search(cue, weights, limit, exact=exact, exclude=exclude, kernels=kernels, raw=raw)
            assert found.rows.shape == found.scores.shape == (3, limit)
            assert found.exact or not exact
            for i, ids in enumerate(view.ids(found.rows)):
                one = {name: block[i].astype(np.float64) for name, block in cues.items()}
                expected = {k: score(self.layout, one, weights, vectors, metric) for k, (vectors, _) in model.items()}
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
                np.testing.assert_allclose(scores, [candidates[k] for k in present], rtol=1e-4, atol=1e-4)
                # So few rows that a graph is as good as a scan; ties may fall either way.
                np.testing.assert_allclose(
                    scores, sorted(candidates.values(), reverse=True)[: len(present)], rtol=1e-4, atol=1e-4
                )

    @invariant()
    def same_memories(self) -> None:
        for view, model, metrics in self.views():
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
            for kernels, raw in metrics:
                self.same_patterns(view, model, kernels, raw)
            sample = view.sample(5, seed=self.version)
            assert len(sample) == min(5, len(model)) == len(set(sample.tolist()))
            assert set(sample.tolist()) <= set(numbers.tolist())
            assert torch.equal(sample, view.sample(5, seed=self.version))

    def same_patterns(self, view: View, model: dict[str, Stored], kernels: dict[str, Kernel], raw: bool) -> None:
        """Each metric's matrix: û, û/‖Wû‖ or ξ; who lacks a space under it; and the bound of its norms."""
        matrix, numbers = view.matrix(kernels, raw)
        torch.testing.assert_close(matrix, view.gather(numbers[:, None], kernels, raw)[:, 0], rtol=0, atol=0)
        assert not view.gather(torch.tensor([[-1]]), kernels, raw).any()
        names = [name for (name,) in view.ids(numbers[:, None])]
        start = 0
        for space in self.layout.spaces:
            kernel = kernels.get(space.name)
            for row, name in zip(matrix[:, start : start + space.dimension].numpy(), names, strict=True):
                stored = model[str(name)][0][space.name].astype(np.float64)
                if kernel is None:
                    expected = stored if raw or self.layout.similarity != "cosine" else unit(stored)
                else:
                    length = np.linalg.norm(kernel.weight.numpy().astype(np.float64) @ unit(stored))
                    expected = unit(stored) / length if image(stored, kernel).any() else 0 * stored
                np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-5)
            lacks = [not image(model[str(name)][0][space.name], kernel).any() for name in names]
            assert view.lacking([space.name], numbers, kernels).tolist() == lacks
            start += space.dimension
        norms = [float(row.norm()) for row in matrix]
        assert all(norm <= view.norm_bound(kernels, raw) * (1 + 1e-5) for norm in norms)

    @invariant()
    def version_follows(self) -> None:
        assert self.bank.version == self.bank.view().version == self.version


BankMachine.TestCase.settings = settings(settings(), stateful_step_count=25)
TestBank = BankMachine.TestCase
