"""Segments with graphs: their recall, their scores, when they are used and when a scan takes over; what a seal
leaves.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from service.bank import Bank, Found, Layout, Rows, SpaceLayout, View
from service.bank.segment import SPARSE_SHARE
from service.bank.view import MATRIX_BYTES_MAX
from service.core.names import Similarity
from service.errors import (
    InvalidRequest,
    InvalidVector,
    NothingObserved,
    UnknownSpace,
    WrongDimension,
)

N, D, K = 20_000, 64, 10


def clustered(n: int, d: int, seed: int) -> np.ndarray:
    """Rows around 200 centres, of unequal lengths."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(200, d))[rng.integers(0, 200, n)] + 0.7 * rng.normal(size=(n, d))
    return (rows * rng.lognormal(0, 0.3, size=(n, 1))).astype(np.float32)


def filled(layout: Layout, vectors: dict[str, np.ndarray], scan_values_max: int = 100_000, at_once: int = 5000) -> Bank:
    bank = Bank(layout, scan_values_max=scan_values_max)
    n = len(next(iter(vectors.values())))
    for version, start in enumerate(range(0, n, at_once), 1):
        block = {name: rows[start : start + at_once] for name, rows in vectors.items()}
        ids = [str(i) for i in range(start, min(n, start + at_once))]
        bank.write(Rows(ids, block, [None] * len(ids)), [], version)
    return bank


def one_space(similarity: str = "cosine", n: int = N) -> tuple[Bank, Tensor]:
    """A sealed bank of one space and 200 cues for it: stored rows with noise."""
    rows = clustered(n, D, seed=1)
    bank = filled(Layout((SpaceLayout("v", D),), similarity), {"v": rows})  # type: ignore[arg-type]
    assert bank.seal()
    noise = np.random.default_rng(2).normal(size=(200, D)).astype(np.float32)
    return bank, torch.from_numpy(rows[:200] + 0.3 * noise)


def recall_at_k(found: Found, exact: Found) -> float:
    """The share of found rows that score at least as the exact k-th does: rows tied with it are as right as it is."""
    return float((found.scores >= exact.scores[:, -1:] - 1e-5 * exact.scores[:, -1:].abs()).float().mean())


@pytest.fixture(scope="module", params=["cosine", "dot", "neg_l2"])
def graphed(request: pytest.FixtureRequest) -> tuple[View, Tensor]:
    bank, cues = one_space(request.param)
    return bank.view(), cues


def test_graph_recall_and_scores(graphed: tuple[View, Tensor]) -> None:
    view, cues = graphed
    found = view.search({"v": cues}, {"v": 1.0}, K)
    exact = view.search({"v": cues}, {"v": 1.0}, K, exact=True)
    assert not found.exact
    assert exact.exact
    assert recall_at_k(found, exact) >= 0.9
    stored = view.gather(found.rows)
    expected = {
        "cosine": (stored * torch.nn.functional.normalize(cues)[:, None]).sum(2),
        "dot": (stored * cues[:, None]).sum(2),
        "neg_l2": -((stored - cues[:, None]) ** 2).sum(2),
    }[view.layout.similarity]
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-4)


def test_exact_search_is_brute_force(graphed: tuple[View, Tensor]) -> None:
    view, cues = graphed
    matrix, rows = view.matrix()
    if view.layout.similarity == "neg_l2":
        scores = -torch.cdist(cues.double(), matrix.double()).square()
    else:
        state = torch.nn.functional.normalize(cues) if view.layout.similarity == "cosine" else cues
        scores = state.double() @ matrix.double().T
    best = scores.topk(K)
    found = view.search({"v": cues}, {"v": 1.0}, K, exact=True)
    torch.testing.assert_close(found.scores.double(), best.values, rtol=1e-4, atol=1e-4)
    own = scores.gather(1, torch.searchsorted(rows, found.rows))
    torch.testing.assert_close(own, best.values, rtol=1e-4, atol=1e-4)


def test_the_graphs_storage_is_the_matrix_and_outlives_the_bank() -> None:
    bank, _ = one_space(n=2000)
    view = bank.view()
    segment = view.parts[0].segment
    assert segment.vectors["v"].data_ptr() == segment.graphs["v"].matrix.ctypes.data
    matrix, _ = view.matrix()
    assert matrix.data_ptr() == segment.vectors["v"].data_ptr(), "one segment, one space, none dead: no copy"
    before = matrix.clone()
    del view, segment, bank
    torch.testing.assert_close(matrix, before, rtol=0, atol=0)


def test_many_dead_rows_are_scanned_round_and_few_are_not() -> None:
    bank, cues = one_space(n=3000)
    bank.write(None, [str(i) for i in range(200, 1000)], 10)
    some_dead = bank.view().search({"v": cues}, {"v": 1.0}, K)
    assert not some_dead.exact
    truth = bank.view().search({"v": cues}, {"v": 1.0}, K, exact=True)
    assert recall_at_k(some_dead, truth) >= 0.9
    bank.write(None, [str(i) for i in range(1000, 2500)], 11)  # 700 of 3,000 left
    assert not bank.view().search({"v": cues}, {"v": 1.0}, K).exact
    bank.write(None, [str(i) for i in range(2500, 2700)], 12)  # 500 left
    view = bank.view()
    assert view.count < SPARSE_SHARE * 3000
    scanned = view.search({"v": cues}, {"v": 1.0}, K)
    assert scanned.exact
    alive = {str(i) for i in [*range(200), *range(2700, 3000)]}
    assert {name for line in view.ids(scanned.rows) for name in line} <= alive
    assert bank.seal_due(), "more dead than alive"
    assert bank.seal()
    assert not bank.seal_due()
    torch.testing.assert_close(bank.view().search({"v": cues}, {"v": 1.0}, K).scores, scanned.scores)
    assert len(bank.view().parts[0].segment.ids) == 500


def test_an_empty_bank_is_small_whatever_its_spaces() -> None:
    """As many spaces as a collection may have, of the largest dimension: not one row of it is stored yet."""
    widest = Layout(tuple(SpaceLayout(str(i), 65_536) for i in range(16)))
    assert Bank(widest).sizes()["patterns"] <= 20_000_000
    assert Bank(Layout((SpaceLayout("v", 784),))).sizes()["patterns"] <= 2**20 + 10_000
    rows = np.random.default_rng(10).normal(size=(40, 65_536)).astype(np.float32)
    bank = filled(Layout((SpaceLayout("v", 65_536),)), {"v": rows}, at_once=3)
    kept = bank.view().read_out(bank.view().rows_of(["39"])[:, None], torch.ones(1, 1), "v")
    torch.testing.assert_close(kept, torch.from_numpy(rows[39:]), rtol=1e-5, atol=1e-6)


def test_a_short_answer_of_a_graph_falls_back_to_the_scan() -> None:
    """Rows on two far islands: a graph's search for rows of one, all dead, seldom reaches the other."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000, D)).astype(np.float32)
    rows[:, 0] += np.where(np.arange(2000) < 1000, 50, -50)
    bank = filled(Layout((SpaceLayout("v", D),)), {"v": rows})
    assert bank.seal()
    whole = bank.view()
    bank.write(None, [str(i) for i in range(1000)], 2)
    half = bank.view()
    cue = {"v": torch.from_numpy(rows[:20])}  # of the island that is dead in the later view
    assert not whole.search(cue, {"v": 1.0}, K).exact
    assert half.search(cue, {"v": 1.0}, K).exact, "the graph alone finds fewer than ten"
    for view in (whole, half):
        for limit in (K, view.count - 1, view.count, view.count + 7):
            found = view.search(cue, {"v": 1.0}, limit)
            assert ((found.rows >= 0).sum(dim=1) == min(limit, view.count)).all()
            assert all(len(set(line)) == len(line) for line in (row[row >= 0].tolist() for row in found.rows))


def test_several_spaces_score_as_the_formula_says() -> None:
    n = 4000
    a, b, c = clustered(n, 24, seed=3), clustered(n, 40, seed=4), np.zeros((n, 8), np.float32)
    b[::3] = 0  # a third lack b
    a[::7] = 0  # some lack a, some both; all lack c
    bank = filled(Layout((SpaceLayout("a", 24), SpaceLayout("b", 40), SpaceLayout("c", 8))), {"a": a, "b": b, "c": c})
    assert bank.seal()
    view = bank.view()
    assert set(view.parts[0].segment.graphs) == {"a", "b"}, "no graph over a space that no memory has"
    rng = np.random.default_rng(5)
    picked = np.flatnonzero(a.any(1) & b.any(1))[:100]
    cue = {
        "a": torch.from_numpy(a[picked] + 0.2 * rng.normal(size=(100, 24)).astype(np.float32)),
        "b": torch.from_numpy(b[picked] + 0.2 * rng.normal(size=(100, 40)).astype(np.float32)),
        "c": torch.from_numpy(rng.normal(size=(100, 8)).astype(np.float32)),
    }
    weights = {"a": 2.0, "b": 0.5, "c": 1.0}
    normalise = torch.nn.functional.normalize
    cosines = {
        name: normalise(cue[name]) @ normalise(torch.from_numpy(rows)).T
        for name, rows in (("a", a), ("b", b), ("c", c))
    }
    for spaces in (("a", "b", "c"), ("a", "b"), ("b",), ("c",)):
        asked = {name: cue[name] for name in spaces}
        truth = sum((weights[name] * cosines[name] for name in spaces), torch.zeros(())) / sum(
            weights[name] for name in spaces
        )
        has_one = torch.from_numpy(np.any([{"a": a, "b": b, "c": c}[name].any(1) for name in spaces], axis=0))
        truth = truth.masked_fill(~has_one, -torch.inf)
        exact = view.search(asked, weights, K, exact=True)
        found = view.search(asked, weights, K)
        expected = truth.topk(K).values
        torch.testing.assert_close(exact.scores, expected, rtol=1e-4, atol=1e-5)
        if spaces == ("c",):
            assert (found.rows == -1).all(), "who has none of the cue's spaces is no candidate"
            continue
        assert not found.exact
        assert recall_at_k(found, exact) >= 0.9
        names = [[int(str(name)) for name in line] for line in view.ids(found.rows)]
        own = truth.gather(1, torch.tensor(names))
        torch.testing.assert_close(found.scores, own, rtol=1e-4, atol=1e-5)


def test_a_load_ends_in_few_segments_and_quiet_moments_merge_them() -> None:
    """Sealed whenever due, each segment is over twice all smaller ones; in a quiet moment they are merged."""
    rows = clustered(6000, 8, seed=6)
    bank = Bank(Layout((SpaceLayout("v", 8),)), scan_values_max=400 * 8, quiet_s=3600.0)
    built = 0
    for version, start in enumerate(range(0, len(rows), 50), 1):
        ids = [str(i) for i in range(start, start + 50)]
        bank.write(Rows(ids, {"v": rows[start : start + 50]}, [None] * 50), [], version)
        while bank.seal_due():
            assert bank.seal()
            built += bank.view().parts[0].count
    sizes = sorted(part.count for part in bank.view().parts if part.segment.graphs)
    assert all(size > 2 * sum(sizes[:i]) for i, size in enumerate(sizes))
    assert len(sizes) <= 5  # log₃ of 6,000 rows in steps of 25
    assert built <= 6000 * np.log(6000 / 25) / np.log(1.5)
    assert sum(part.count for part in bank.view().parts) == 6000
    quiet = Bank(Layout((SpaceLayout("v", 8),)), scan_values_max=100 * 8, quiet_s=0.0)
    for version, start in enumerate((0, 4000), 1):  # 1,000 rows beside 4,000: too few for the busy rule
        ids = [str(i) for i in range(start, start + (4000 if start == 0 else 1000))]
        quiet.write(Rows(ids, {"v": rows[start : start + len(ids)]}, [None] * len(ids)), [], version)
        assert quiet.seal()
    assert [part.count for part in quiet.view().parts if part.count] == [1000, 4000]
    assert quiet.seal_due()
    assert quiet.seal()
    assert [part.count for part in quiet.view().parts if part.count] == [5000]
    assert not quiet.seal_due()


def test_a_small_bank_is_scanned_and_stays_so() -> None:
    bank = filled(Layout((SpaceLayout("v", 8),)), {"v": clustered(500, 8, seed=7)}, scan_values_max=4000)
    assert not bank.seal_due()
    assert not bank.seal()
    cue = {"v": torch.randn(3, 8)}
    assert bank.view().search(cue, {"v": 1.0}, 5).exact
    assert bank.sizes()["graph"] == 0
    bank.write(None, [str(i) for i in range(500)], 9)
    found = bank.view().search(cue, {"v": 1.0}, 5)
    assert (found.rows == -1).all()
    assert (found.scores == -torch.inf).all()


def test_rewriting_one_memory_leaves_no_growing_waste() -> None:
    bank = Bank(Layout((SpaceLayout("v", 4),)))
    row = np.ones((1, 4), np.float32)
    for version in range(1, 3001):
        bank.write(Rows(["same"], {"v": row * version}, [None]), [], version)
        if bank.seal_due():
            assert bank.seal()
    view = bank.view()
    assert view.count == 1
    assert sum(part.count for part in view.parts) <= 1100
    raw = view.read_out(view.rows_of(["same"])[:, None], torch.ones(1, 1), "v")
    torch.testing.assert_close(raw, torch.full((1, 4), 3000.0))


def test_blocks_bound_a_scan_without_changing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for similarity in ("cosine", "neg_l2"):
        bank = filled(Layout((SpaceLayout("v", D),), similarity), {"v": clustered(1000, D, seed=8)}, 10**9)  # type: ignore[arg-type]
        bank.write(None, [str(i) for i in range(0, 1000, 3)], 9)
        cue = {"v": torch.randn(5, D, generator=torch.Generator().manual_seed(0))}
        whole = bank.view().search(cue, {"v": 1.0}, 20)
        with monkeypatch.context() as smaller:
            smaller.setattr("service.bank.segment.BLOCK_VALUES_MAX", 7 * D)
            blocked = bank.view().search(cue, {"v": 1.0}, 20)
        torch.testing.assert_close(blocked.scores, whole.scores)
        assert torch.equal(blocked.rows, whole.rows)


def test_huge_tiny_and_zero_values_stay_finite() -> None:
    rows = np.array([[1e30, 1e30], [1e-30, -1e-30], [1.0, 0.0]], np.float32)
    bank = filled(Layout((SpaceLayout("v", 2),)), {"v": rows})
    cue = torch.tensor([[1e-30, 1e-30], [1e30, -1e30], [0.0, 0.0]])
    found = bank.view().search({"v": cue}, {"v": 1.0}, 3)
    assert bank.view().ids(found.rows)[0][0] == "0"
    assert bank.view().ids(found.rows)[1][0] == "1"
    torch.testing.assert_close(found.scores[:2, 0], torch.ones(2))
    torch.testing.assert_close(found.scores[2], torch.zeros(3))
    kept = bank.view().read_out(torch.tensor([[0], [1]]), torch.ones(2, 1), "v")
    torch.testing.assert_close(kept, torch.from_numpy(rows[:2]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "neg_l2"])
def test_lacking_says_who_is_no_candidate(similarity: Similarity) -> None:
    """In every order of rows, dead ones and several parts among them: `search` returns exactly those that do not lack
    the space."""
    bank = Bank(Layout((SpaceLayout("v", 2),), similarity), scan_values_max=0)
    rows = np.array([[1, 0], [0, 0], [2, 2], [1, 3]], np.float32)
    bank.write(Rows(["a", "b", "c", "d"], {"v": rows}, [None] * 4), [], 1)
    assert bank.seal()
    bank.write(Rows(["c", "e"], {"v": rows[:2]}, [None] * 2), ["d"], 2)
    view = bank.view()
    asked = view.rows_of(["e", "a", "no such memory", "b", "c"])
    assert view.lacking(["v"], asked).tolist() == [True, False, True, True, False]
    found = view.search({"v": torch.ones(1, 2)}, {"v": 1.0}, 4, exact=True)
    assert sorted(name for name in view.ids(found.rows)[0] if name is not None) == ["a", "c"]
    assert view.lacking(["v"], asked[:0]).shape == (0,)


def test_what_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        Layout(())
    with pytest.raises(InvalidRequest):
        Layout((SpaceLayout("a", 2), SpaceLayout("a", 2)))
    with pytest.raises(InvalidRequest):
        Layout((SpaceLayout("a", 0),))
    with pytest.raises(InvalidRequest):
        Layout((SpaceLayout("a", 2), SpaceLayout("b", 2)), "dot")
    bank = Bank(Layout((SpaceLayout("a", 2), SpaceLayout("b", 3))))
    good = {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 3), np.float32)}
    bad: list[tuple[type[Exception], dict[str, np.ndarray]]] = [
        (WrongDimension, {**good, "b": np.ones((1, 2), np.float32)}),
        (WrongDimension, {**good, "b": np.ones((2, 3), np.float32)}),
        (WrongDimension, {"a": good["a"]}),
        (UnknownSpace, {**good, "c": np.ones((1, 2), np.float32)}),
        (InvalidVector, {**good, "a": np.array([[np.nan, 1]], np.float32)}),
        (InvalidVector, {**good, "a": np.array([[np.inf, 1]], np.float32)}),
        (InvalidVector, {**good, "a": np.full((1, 2), 3e38, np.float32)}),
    ]
    for error, vectors in bad:
        with pytest.raises(error):
            bank.write(Rows(["x"], vectors, [None]), [], 1)
    with pytest.raises(InvalidRequest):
        bank.write(Rows(["x"], good, []), [], 1)
    assert (bank.version, bank.view().count) == (0, 0), "a refused write leaves nothing"
    bank.write(Rows(["x", "y", "x"], {name: np.repeat(v, 3, 0) for name, v in good.items()}, [None] * 3), ["z"], 4)
    assert bank.view().count == 2
    with pytest.raises(ValueError, match="version"):
        bank.write(None, [], 3)
    view = bank.view()
    with pytest.raises(NothingObserved):
        view.search({}, {}, 1)
    with pytest.raises(UnknownSpace):
        view.search({"c": torch.ones(1, 2)}, {"c": 1.0}, 1)
    with pytest.raises(WrongDimension):
        view.search({"a": torch.ones(1, 3)}, {"a": 1.0}, 1)
    with pytest.raises(InvalidRequest):
        view.search({"a": torch.ones(1, 2)}, {"a": 0.0}, 1)
    with pytest.raises(InvalidRequest):
        view.search({"a": torch.ones(1, 2)}, {"a": 1.0}, 0)
    with pytest.raises(UnknownSpace):
        view.read_out(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), "c")
    with pytest.raises(UnknownSpace):
        view.lacking(["a", "c"], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(IndexError):
        view.ids(torch.tensor([[2]]))


def test_a_dense_matrix_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = filled(Layout((SpaceLayout("v", 8),)), {"v": clustered(100, 8, seed=9)})
    monkeypatch.setattr("service.bank.view.MATRIX_BYTES_MAX", 3000)
    assert MATRIX_BYTES_MAX > 3000
    assert bank.view().matrix()[0].shape == (100, 8), "the segment's own matrix is no copy"
    bank.write(None, ["3"], 2)
    with pytest.raises(InvalidRequest, match="dense"):
        bank.view().matrix()
