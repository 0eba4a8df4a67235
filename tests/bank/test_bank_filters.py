"""A restricted view: what a filter and exclusions leave, searched as any view is."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
import torch

from service.bank import Bank, Layout, Rows, SpaceLayout, View
from service.bank import filtering as filtering_module
from service.bank import view as view_module
from service.core.filter import AnyOf, Bounds, Clause, Ids, Range, Values

D = 16
CUES = 8
LIMIT = 10


def rows(start: int, stop: int) -> Rows:
    random = np.random.default_rng(start)
    vectors = random.standard_normal((stop - start, D)).astype(np.float32)
    payloads = [None if n % 7 == 0 else orjson.dumps({"n": n, "of": {"ten": n % 10}}) for n in range(start, stop)]
    return Rows([f"m{n}" for n in range(start, stop)], {"v": vectors}, payloads)


def below(n: int) -> Clause:
    return Clause(must=(Range(("n",), Bounds(lt=n)),))


def ten(*values: int) -> Clause:
    return Clause(must=(AnyOf(("of", "ten"), Values(numbers=frozenset(values))),))


def cues() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(99).standard_normal((CUES, D)).astype(np.float32))


def names(view: View, limit: int = LIMIT, exact: bool = False) -> list[list[str | None]]:
    return view.ids(view.search({"v": cues()}, {"v": 1.0}, limit, exact).rows)


def kept(n: int) -> bool:
    return n % 7 != 0


def graphed(count: int, scan_values_max: int = D) -> Bank:
    """A bank whose rows have one graph, and where nearly no scan is short."""
    bank = Bank(Layout((SpaceLayout("v", D),)), scan_values_max=scan_values_max, quiet_s=1e9)
    bank.write(rows(0, count), [], 1)
    assert bank.seal()
    assert bank.view().parts[0].segment.graphs
    return bank


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1, 0.01])
def test_a_filter_never_costs_matches(share: float) -> None:
    count = 2000
    view = graphed(count).view().restricted(below(int(share * count)))
    matching = [n for n in range(int(share * count)) if kept(n)]
    assert view.count == len(matching)
    found = view.search({"v": cues()}, {"v": 1.0}, LIMIT)
    assert found.exact == (share < 0.2), "few are scanned"
    for line in view.ids(found.rows):
        assert len(set(line)) == min(LIMIT, len(matching))
        assert set(line) <= {f"m{n}" for n in matching}
    truth = view.search({"v": cues()}, {"v": 1.0}, LIMIT, exact=True)
    hits = sum(len(set(a) & set(b)) for a, b in zip(view.ids(found.rows), view.ids(truth.rows), strict=True))
    assert hits >= (0.95 if share > 0.2 else 1.0) * CUES * LIMIT


def test_what_is_small_enough_to_scan_is_scanned_whatever_its_share() -> None:
    view = graphed(1000, scan_values_max=600 * D).view()
    assert not view.search({"v": cues()}, {"v": 1.0}, LIMIT).exact
    assert view.restricted(below(600)).search({"v": cues()}, {"v": 1.0}, LIMIT).exact
    assert not view.restricted(below(800)).search({"v": cues()}, {"v": 1.0}, LIMIT).exact


def test_a_neighbourhood_that_the_filter_empties_is_looked_beyond() -> None:
    """The rows that the filter keeps are far from the cue: the graph's search ends before it has met enough."""
    random = np.random.default_rng(0)
    near = random.standard_normal((1000, D)) * 0.1 + np.eye(D)[0] * 10
    far = random.standard_normal((1000, D)) * 0.1 - np.eye(D)[0] * 10
    payloads = [orjson.dumps({"far": n >= 1000}) for n in range(2000)]
    bank = Bank(Layout((SpaceLayout("v", D),)), scan_values_max=D, quiet_s=1e9)
    vectors = np.concatenate([near, far]).astype(np.float32)
    bank.write(Rows([f"m{n}" for n in range(2000)], {"v": vectors}, payloads), [], 1)
    assert bank.seal()
    view = bank.view().restricted(Clause(must=(AnyOf(("far",), Values(truths=frozenset([True]))),)))
    found = view.search({"v": torch.from_numpy(vectors[:1])}, {"v": 1.0}, LIMIT)
    truth = view.search({"v": torch.from_numpy(vectors[:1])}, {"v": 1.0}, LIMIT, exact=True)
    assert view.ids(found.rows) == view.ids(truth.rows)
    assert int((found.rows >= 0).sum()) == LIMIT


def test_cues_on_the_side_that_the_filter_leaves_out_lose_nothing() -> None:
    """Without `DOUBT` a graph finds .959 of their nearest, since there are enough kept rows that it meets first."""
    random = np.random.default_rng(3)
    vectors = random.standard_normal((4000, D)).astype(np.float32)
    bank = Bank(Layout((SpaceLayout("v", D),)), scan_values_max=D, quiet_s=1e9)
    payloads = [orjson.dumps({"left": bool(value < 0)}) for value in vectors[:, 0]]
    bank.write(Rows([f"m{n}" for n in range(4000)], {"v": vectors}, payloads), [], 1)
    assert bank.seal()
    view = bank.view().restricted(Clause(must=(AnyOf(("left",), Values(truths=frozenset([True]))),)))
    right = torch.from_numpy(random.standard_normal((100, D)).astype(np.float32))
    right[:, 0] = 3 + right[:, 0].abs()
    truth = view.search({"v": right}, {"v": 1.0}, LIMIT, exact=True).rows
    found = [view.search({"v": cue[None]}, {"v": 1.0}, LIMIT) for cue in right]
    assert not any(each.exact for each in found)
    hits = [int(torch.isin(each.rows[0], own).sum()) for each, own in zip(found, truth, strict=True)]
    assert sum(hits) >= 0.99 * 100 * LIMIT


def test_a_view_keeps_its_answer_while_rows_come_go_and_are_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filtering_module, "BLOCK_ROWS", 8)  # several blocks, and a last one that is made again
    bank = Bank(Layout((SpaceLayout("v", D),)), scan_values_max=100 * D, quiet_s=1e9)
    stop = 0
    expected: dict[str, int] = {}
    views = []
    for version, more in enumerate([3, 1, 4, 7, 1, 9, 30, 2, 60], 1):
        bank.write(rows(stop, stop + more), [], version)
        expected |= {f"m{n}": n for n in range(stop, stop + more)}
        stop += more
        gone = [f"m{stop - 2}"]
        bank.write(None, gone, version)
        expected.pop(gone[0], None)
        for clause, keeps in ((below(20), lambda n: n < 20), (ten(3, 4), lambda n: n % 10 in (3, 4))):
            view = bank.view().restricted(clause)
            wanted = {name for name, n in expected.items() if kept(n) and keeps(n)}
            views.append((view, wanted))
        bank.seal()
        if version == 5:
            bank.write(rows(0, 3), [], version)  # replaced: alive again under a new row
            expected |= {f"m{n}": n for n in range(3)}
    assert len(bank.view().parts) > 1
    for view, wanted in views:
        line = view.ids(view.sample(view.count, 0)[None])[0]
        assert set(line) == wanted
        assert len(line) == len(wanted) == view.count
        assert {name for name in names(view, 200)[0] if name} == wanted


def test_exclusions_and_filters_are_left_out_together_and_a_view_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = graphed(500)
    view = bank.view()
    assert view.restricted(None) is view
    assert view.restricted(Clause()) is view
    clause = Clause(must_not=(Ids(frozenset(["m1", "m2"])),))
    without = view.restricted(clause, frozenset(["m3", "nobody"]))
    assert without.count == 497
    assert not {"m1", "m2", "m3"} & {name for line in names(without, 497, exact=True) for name in line}
    assert view.restricted(clause, frozenset(["m3", "nobody"])) is without
    assert view.restricted(clause) is not without
    matrix, numbers = without.matrix()
    assert len(matrix) == len(numbers) == 497
    assert without.matrix()[0] is matrix
    monkeypatch.setattr(view_module, "MATRIX_BYTES_MAX", 5 * matrix.nbytes)
    large = bank.view().restricted(below(400))
    assert large.matrix()[0] is not large.matrix()[0], "the copies of all restrictions are no more than one view's"
    assert without.rows_of(["m1", "m4"]).tolist()[0] == -1
    assert view.restricted(Clause(must=(Ids(frozenset()),))).count == 0


def test_columns_are_counted_and_a_seal_makes_them_before_anybody_waits() -> None:
    bank = Bank(Layout((SpaceLayout("v", D),)), scan_values_max=100 * D, quiet_s=1e9)
    bank.write(rows(0, 50), [], 1)
    before = bank.sizes()["columns"]
    bank.view().restricted(below(20))
    assert bank.sizes()["columns"] > before
    bank.write(rows(50, 200), [], 2)
    assert bank.seal()
    assert bank.view().parts[0].segment.filtering.paths == [("n",)]
    assert bank.view().parts[0].segment.filtering._blocks[("n",)][0].rows == 200
