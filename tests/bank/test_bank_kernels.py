"""Searches under kernels and over raw values: scanned and by graphs, against the definition; swaps under way."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.bank import Bank, Found, Layout, Rows, SpaceLayout, View
from service.bank import bank as bank_module
from service.bank.bank import KERNELS_MAX
from service.core.similarity import Blocks, Kernel, normalise_rows
from service.errors import InvalidRequest, UnknownSpace, WrongDimension

N, D, R, K = 4000, 32, 24, 10
SPACES = Layout((SpaceLayout("v", D),))


def random_kernel(r: int = R, d: int = D, seed: int = 0) -> Kernel:
    return Kernel(torch.randn(r, d, generator=torch.Generator().manual_seed(seed)) * 3)


def filled(rows: np.ndarray, scan_values_max: int, layout: Layout = SPACES) -> Bank:
    bank = Bank(layout, scan_values_max=scan_values_max)
    bank.write(Rows([str(i) for i in range(len(rows))], {"v": rows}, [None] * len(rows)), [], 1)
    return bank


def seal(bank: Bank) -> int:
    times = 0
    while bank.seal_due():
        assert bank.seal()
        times += 1
    return times


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Around 100 centres, of unequal lengths."""
    rng = np.random.default_rng(1)
    near = rng.normal(size=(100, D))[rng.integers(0, 100, N)] + 0.7 * rng.normal(size=(N, D))
    return (near * rng.lognormal(0, 0.3, size=(N, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def cues(rows: np.ndarray) -> Tensor:
    """Stored rows with noise; a fifth of their values are not known, and 0."""
    rng = np.random.default_rng(2)
    noisy = rows[:100] + 0.3 * rng.normal(size=(100, D)).astype(np.float32)
    noisy[rng.random(size=noisy.shape) < 0.2] = 0
    return torch.from_numpy(noisy)


def dense(rows: np.ndarray, cues: Tensor, metric: str, kernel: Kernel) -> Tensor:
    """(cues, rows) scores in float64."""
    stored, state = torch.from_numpy(rows).double(), cues.double()
    if metric == "raw":
        return -torch.cdist(state, stored).square()
    if metric == "observed":
        return torch.stack([-((stored - cue)[:, cue != 0]).square().sum(1) for cue in state])
    if metric == "kernel":
        weight = kernel.weight.double()
        stored, state = stored @ weight.T, state @ weight.T
    return torch.nn.functional.normalize(state) @ torch.nn.functional.normalize(stored).T


@pytest.mark.parametrize("graph", ["none", "plain", "keys"])
@pytest.mark.parametrize("metric", ["plain", "kernel", "raw", "observed"])
def test_every_metric_by_scan_and_by_graph(metric: str, graph: str, rows: np.ndarray, cues: Tensor) -> None:
    """A graph answers for what it was built on; whatever else is asked is scanned; scores are the metric's own."""
    kernel = random_kernel()
    bank = filled(rows, 10**9 if graph == "none" else 1000)
    bank.add_kernel("v", kernel)
    if graph == "keys":
        bank.set_graph_kernel("v", kernel)
    assert seal(bank) == (graph != "none")
    view = bank.view()
    kernels = {"v": kernel} if metric == "kernel" else None
    asked = {"kernels": kernels, "raw": metric in {"raw", "observed"}, "observed": metric == "observed"}
    found = view.search({"v": cues}, {"v": 1.0}, K, **asked)
    assert found.exact == ((metric, graph) not in {("plain", "plain"), ("kernel", "keys")})
    truth = dense(rows, cues, metric, kernel)
    best = truth.topk(K).values
    own = truth.gather(1, torch.tensor([[int(str(name)) for name in line] for line in view.ids(found.rows)]))
    torch.testing.assert_close(found.scores.double(), own, rtol=1e-4, atol=1e-4)
    right = (own >= best[:, -1:] - 1e-4 * best[:, -1:].abs()).double().mean()
    assert right >= (1.0 if found.exact else 0.9)
    exact = view.search({"v": cues}, {"v": 1.0}, K, exact=True, **asked)
    torch.testing.assert_close(exact.scores.double(), best, rtol=1e-4, atol=1e-4)


@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(1, 30), d=st.integers(1, 8), scale=st.sampled_from([1e-3, 1.0, 40.0])
)
def test_the_identity_is_cosine_and_gathered_rows_are_the_cores(seed: int, n: int, d: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(n, d)).astype(np.float32)
    raw[rng.random(n) < 0.2] = 0
    bank = filled(raw, 0, Layout((SpaceLayout("v", d),)))
    identity, other = Kernel(torch.eye(d) * scale), random_kernel(3, d, seed % 1000)
    bank.add_kernel("v", identity)
    bank.set_graph_kernel("v", identity)
    bank.add_kernel("v", other)
    seal(bank)
    view = bank.view()
    cue = {"v": torch.from_numpy(rng.normal(size=(4, d)).astype(np.float32))}
    plain = view.search(cue, {"v": 1.0}, n, exact=True)
    for exact in (False, True):
        found = view.search(cue, {"v": 1.0}, n, exact=exact, kernels={"v": identity})
        torch.testing.assert_close(found.scores, plain.scores, rtol=1e-5, atol=1e-6)
    blocks = Blocks((d,), (1.0,), kernels=(other,))
    expected = normalise_rows(torch.from_numpy(raw), blocks)
    numbers = view.rows_of([str(i) for i in range(n)])
    torch.testing.assert_close(view.gather(numbers[:, None], {"v": other})[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_graphs_change_their_kernel_one_segment_at_a_time(rows: np.ndarray, cues: Tensor) -> None:
    bank, kernel = filled(rows[:3000], 1000), random_kernel()
    bank.write(Rows([f"more {i}" for i in range(500)], {"v": rows[3000:3500]}, [None] * 500), [], 2)
    assert seal(bank) == 1
    bank.write(Rows([f"new {i}" for i in range(500)], {"v": rows[3500:]}, [None] * 500), [], 3)
    assert seal(bank) == 1
    assert [part.count for part in bank.view().parts if part.count] == [500, 3500]
    plain_bytes = bank.sizes()
    assert plain_bytes["keys"] == 0

    bank.add_kernel("v", kernel)
    assert not bank.seal_due(), "a kernel alone rebuilds nothing"
    assert bank.sizes()["keys"] >= 4 * N
    before = bank.view()
    bank.set_graph_kernel("v", kernel)

    def graph_answers(view: View) -> tuple[list[bool], list[bool]]:
        """Per segment, whether a graph would answer: a plain search, and one under the kernel."""
        built = [part.segment.built_on["v"] for part in view.parts if part.count]
        return [each is None for each in built], [each is kernel for each in built]

    def search(view: View, kernels: dict[str, Kernel] | None) -> Found:
        return view.search({"v": cues}, {"v": 1.0}, K, kernels=kernels)

    truth = dense(rows, cues, "kernel", kernel).topk(K).values
    assert graph_answers(bank.view()) == ([True, True], [False, False])
    assert search(bank.view(), {"v": kernel}).exact, "scanned until the graphs are rebuilt"
    assert not search(bank.view(), None).exact, "the old graphs serve until then"
    assert bank.seal_due()
    assert bank.seal()
    assert graph_answers(bank.view()) == ([False, True], [True, False]), "the smallest first, and it alone"
    assert bank.seal()
    assert not bank.seal_due()
    assert graph_answers(bank.view()) == ([False, False], [True, True])
    found = search(bank.view(), {"v": kernel})
    assert not found.exact
    assert (found.scores >= truth[:, -1:] - 1e-4).double().mean() >= 0.9
    assert search(bank.view(), None).exact
    assert not search(before, None).exact, "a view keeps the graphs that it had"
    assert graph_answers(before) == ([True, True], [False, False])
    sizes = bank.sizes()
    assert sizes["keys"] >= 4 * N * R + 4 * N
    assert sizes["patterns"] == pytest.approx(plain_bytes["patterns"], rel=0.02), "rows are kept once, raw"
    with pytest.raises(ValueError, match="graphs"):
        bank.drop_kernel(kernel)
    bank.set_graph_kernel("v", None)
    bank.drop_kernel(kernel)
    assert search(bank.view(), None).exact, "no graph of keys serves a plain search"
    assert seal(bank) == 2
    assert not search(bank.view(), None).exact
    assert bank.sizes()["keys"] == 0
    with pytest.raises(ValueError, match="kernel"):
        search(bank.view(), {"v": kernel})
    search(before, {"v": kernel})


def test_spaces_under_kernels_score_as_the_formula_says() -> None:
    """Two spaces, one under a kernel that annihilates some rows; graphs of both kinds at once."""
    n = 2000
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(n, 8)).astype(np.float32), rng.normal(size=(n, 12)).astype(np.float32)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    b[::3] = np.linalg.svd(weight.numpy())[2][-1] * 2  # W's null space
    a[::5] = 0
    kernel = Kernel(weight)
    bank = Bank(Layout((SpaceLayout("a", 8), SpaceLayout("b", 12))), scan_values_max=1000)
    bank.write(Rows([str(i) for i in range(n)], {"a": a, "b": b}, [None] * n), [], 1)
    bank.add_kernel("b", kernel)
    bank.set_graph_kernel("b", kernel)
    assert seal(bank) == 1
    view = bank.view()
    cue = {"a": torch.from_numpy(a[1:50] + 0.1), "b": torch.from_numpy(b[1:50] + 0.1)}
    weights = {"a": 2.0, "b": 0.5}
    normalise = torch.nn.functional.normalize
    image, cue_image = torch.from_numpy(b) @ weight.T, cue["b"] @ weight.T
    image[::3] = 0
    cosines = {
        "a": normalise(cue["a"]) @ normalise(torch.from_numpy(a)).T, "b": normalise(cue_image) @ normalise(image).T
    }  # fmt: skip
    for spaces in (("a", "b"), ("b",), ("a",)):
        asked = {name: cue[name] for name in spaces}
        total = sum((weights[name] * cosines[name] for name in spaces), torch.zeros(()))
        truth = total / sum(weights[name] for name in spaces)
        lacks = {"a": ~torch.from_numpy(a).any(1), "b": ~image.any(1)}
        lacking = torch.stack([lacks[name] for name in spaces]).all(0)
        truth = truth.masked_fill(lacking, -torch.inf)
        exact = view.search(asked, weights, K, exact=True, kernels={"b": kernel})
        found = view.search(asked, weights, K, kernels={"b": kernel})
        assert exact.exact
        assert not found.exact
        torch.testing.assert_close(exact.scores, truth.topk(K).values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.scores, truth.gather(1, found.rows), rtol=1e-4, atol=1e-5)
        assert (found.scores >= exact.scores[:, -1:] - 1e-5).double().mean() >= 0.9
        assert torch.equal(view.lacking(spaces, torch.arange(n), {"b": kernel}), lacking)


def test_a_kernel_that_annihilates_all_leaves_no_candidate(rows: np.ndarray, cues: Tensor) -> None:
    for budget in (10**9, 1000):
        bank, nothing = filled(rows[:500], budget), Kernel(torch.zeros(3, D))
        bank.add_kernel("v", nothing)
        bank.set_graph_kernel("v", nothing)
        assert seal(bank) == (budget == 1000), "sealed once, not again and again"
        view = bank.view()
        for exact in (False, True):
            found = view.search({"v": cues}, {"v": 1.0}, K, exact=exact, kernels={"v": nothing})
            assert (found.rows == -1).all()
        assert not view.gather(view.sample(5, 0)[None], {"v": nothing}).any()
        assert view.search({"v": cues}, {"v": 1.0}, K).exact
        assert (view.search({"v": cues}, {"v": 1.0}, K).rows >= 0).all()


def test_raw_values_of_every_size_are_compared() -> None:
    raw = np.array([[1e30, 1e30], [3.0, 4.0], [3.0, 4.001], [3e19, 0.0], [1e-30, 0.0], [0.0, 0.0]], np.float32)
    view = filled(raw, 10**9, Layout((SpaceLayout("v", 2),))).view()
    found = view.search({"v": torch.tensor([[3.0, 4.0], [2.0, 0.0]])}, {"v": 1.0}, 6, raw=True)
    assert view.ids(found.rows)[0][:3] == ["1", "2", "4"]
    assert view.ids(found.rows)[1][0] == "4"
    assert set(view.ids(found.rows)[0][3:5]) == {"0", "3"}, "far, but stored"
    assert found.rows[:, 5].tolist() == [-1, -1], "a zero row lacks the space"
    torch.testing.assert_close(found.scores[0, :3], torch.tensor([0.0, -1e-6, -25.0]), rtol=1e-2, atol=1e-7)
    assert not found.scores[:, :5].isnan().any()
    assert (found.scores[:, :5] > -torch.inf).all()


def test_a_part_of_a_memory_is_at_no_distance_from_it(rows: np.ndarray) -> None:
    view = filled(rows, 10**9).view()
    part = torch.from_numpy(rows[:20]).clone()
    part[:, D // 2 :] = 0
    found = view.search({"v": part}, {"v": 1.0}, 2, raw=True, observed=True)
    assert [line[0] for line in view.ids(found.rows)] == [str(i) for i in range(20)]
    torch.testing.assert_close(found.scores[:, 0], torch.zeros(20), rtol=0, atol=1e-9)
    nothing = view.search({"v": torch.zeros(1, D)}, {"v": 1.0}, 2, raw=True, observed=True)
    assert nothing.scores.tolist() == [[0.0, 0.0]]


def test_what_is_not_asked_right_is_refused(rows: np.ndarray) -> None:
    bank, kernel = filled(rows[:10], 10**9), random_kernel()
    with pytest.raises(UnknownSpace):
        bank.add_kernel("w", kernel)
    with pytest.raises(WrongDimension):
        bank.add_kernel("v", random_kernel(d=D + 1))
    with pytest.raises(InvalidRequest, match="finite"):
        bank.add_kernel("v", Kernel(torch.full((2, D), torch.nan)))
    with pytest.raises(InvalidRequest, match="similarity"):
        Bank(Layout((SpaceLayout("v", D),), "dot")).add_kernel("v", kernel)
    with pytest.raises(ValueError, match="add_kernel"):
        bank.set_graph_kernel("v", kernel)
    early = bank.view()
    many = [random_kernel(seed=i) for i in range(KERNELS_MAX)]
    for each in [*many, many[0]]:  # one again: no error, no second copy
        bank.add_kernel("v", each)
    with pytest.raises(InvalidRequest, match="at once"):
        bank.add_kernel("v", kernel)
    cue = {"v": torch.randn(1, D)}
    view = bank.view()
    for asked in (view.search, early.search):
        with pytest.raises(ValueError, match="know"):
            asked(cue, {"v": 1.0}, 1, kernels={"v": kernel})
    with pytest.raises(ValueError, match="know"):
        early.gather(torch.zeros(1, 1, dtype=torch.int64), {"v": many[0]})
    with pytest.raises(ValueError, match="know"):
        view.matrix({"v": kernel})
    with pytest.raises(ValueError, match="raw"):
        view.search(cue, {"v": 1.0}, 1, kernels={"v": many[0]}, raw=True)
    with pytest.raises(InvalidRequest, match="raw"):
        view.search(cue, {"v": 1.0}, 1, observed=True)
    with pytest.raises(InvalidRequest, match="Raw"):
        Bank(Layout((SpaceLayout("v", D),), "neg_l2")).view().search(cue, {"v": 1.0}, 1, raw=True)
    two = Bank(Layout((SpaceLayout("a", 2), SpaceLayout("b", 2)))).view()
    with pytest.raises(InvalidRequest, match="Raw"):
        two.search({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, {"a": 1.0, "b": 1.0}, 1, raw=True)


def test_a_kernel_added_where_nothing_is_differentiated_follows_later_writes(rows: np.ndarray) -> None:
    """Whoever trains it, in whatever mode: its weight wants gradients, and its tensors are written to elsewhere."""
    bank = filled(rows[:10], 10**9)
    kernel = Kernel(random_kernel().weight.requires_grad_())
    with torch.inference_mode():
        bank.add_kernel("v", kernel)
    bank.write(Rows([str(i) for i in range(10, 50)], {"v": rows[10:50]}, [None] * 40), [], 2)
    with torch.no_grad():
        check(bank.view(), kernel, rows)
    assert not bank.view().gather(torch.zeros(1, 1, dtype=torch.int64), {"v": kernel}).requires_grad


def test_a_view_keeps_copies_of_its_matrix_up_to_a_bound(monkeypatch: pytest.MonkeyPatch, rows: np.ndarray) -> None:
    bank, kernel = filled(rows[:100], 10**9), random_kernel()
    bank.add_kernel("v", kernel)
    view = bank.view()
    monkeypatch.setattr("service.bank.view.MATRIX_BYTES_MAX", 4 * 100 * D)
    keyed, raw = view.matrix({"v": kernel})[0], view.matrix(raw=True)[0]
    assert view.matrix(raw=True)[0] is raw
    assert view.matrix({"v": kernel})[0] is not keyed, "room for one"
    torch.testing.assert_close(raw, torch.from_numpy(rows[:100]), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("service.bank.view.MATRIX_BYTES_MAX", 4 * 100 * D - 1)
    assert view.matrix()[0].shape == (100, D), "the segment's own matrix is no copy"
    with pytest.raises(InvalidRequest, match="dense"):
        View(bank.layout, bank.device, view.parts, 1, view.kernels).matrix({"v": kernel})


# --- with other threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("catch_up_rows", [0, 10**9])
def test_a_kernel_is_added_in_the_midst_of_writes_and_seals(
    catch_up_rows: int, monkeypatch: pytest.MonkeyPatch, rows: np.ndarray
) -> None:
    """However the rows are caught up with, every one has the scale that it would have had from the start."""
    monkeypatch.setattr(bank_module, "CATCH_UP_ROWS", catch_up_rows)
    bank, kernel = Bank(SPACES, scan_values_max=200 * D, quiet_s=0.0), random_kernel()
    failures: list[BaseException] = []

    def writer() -> None:
        for version, start in enumerate(range(0, N, 20), 1):
            ids = [str(i) for i in range(start, start + 20)]
            bank.write(Rows(ids, {"v": rows[start : start + 20]}, [None] * 20), [str(start - 500)], version)
            if version % 7 == 0:
                bank.seal()

    writing = guarded(writer, failures)
    added = 0
    while writing.is_alive():
        bank.add_kernel("v", kernel)
        added += 1
        check(bank.view(), kernel, rows)
        bank.drop_kernel(kernel)
    writing.join()
    assert not failures, failures
    assert added > 3
    bank.add_kernel("v", kernel)
    check(bank.view(), kernel, rows)


def check(view: View, kernel: Kernel, rows: np.ndarray) -> None:
    matrix, numbers = view.matrix({"v": kernel})
    own = [int(str(name)) for (name,) in view.ids(numbers[:, None])]
    expected = normalise_rows(torch.from_numpy(rows[own]), Blocks((D,), (1.0,), kernels=(kernel,)))
    torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-6)


def test_kernels_are_swapped_while_others_search(rows: np.ndarray, cues: Tensor) -> None:
    """Graph kernels change and are rebuilt under readers that take whatever kernel their view has."""
    bank = filled(rows, 1000)
    seal(bank)
    kernels = [random_kernel(seed=i) for i in range(3)]
    truths = {kernel: dense(rows, cues, "kernel", kernel).topk(K).values for kernel in kernels}
    plain = dense(rows, cues, "plain", kernels[0]).topk(K).values
    done, failures = threading.Event(), list[BaseException]()
    by_graph, scanned = [0], [0]

    def reader(number: int) -> None:
        rng = np.random.default_rng(number)
        while not done.is_set():
            view = bank.view()
            known = [kernel for _, kernel in view.kernels]
            kernel = known[rng.integers(len(known))] if known and rng.random() < 0.8 else None
            found = view.search({"v": cues[:5]}, {"v": 1.0}, K, kernels={"v": kernel} if kernel else None)
            truth = (plain if kernel is None else truths[kernel])[:5]
            assert (found.scores.double() >= truth[:, -1:] - 1e-4).double().mean() >= (1.0 if found.exact else 0.8)
            by_graph[0] += kernel is not None and not found.exact
            scanned[0] += kernel is not None and found.exact

    readers = [guarded(lambda number=number: reader(number), failures, done) for number in range(2)]
    for turn in range(6):
        kernel = kernels[turn % 3]
        bank.add_kernel("v", kernel)
        bank.set_graph_kernel("v", kernel)
        for old in kernels:
            if old is not kernel:
                bank.drop_kernel(old)
        done.wait(0.05)
        assert seal(bank) == 1
        done.wait(0.05)
    done.set()
    for thread in readers:
        thread.join()
    assert not failures, failures
    assert by_graph[0] > 0
    assert scanned[0] > 0


def guarded(
    body: Callable[[], None], failures: list[BaseException], done: threading.Event | None = None
) -> threading.Thread:
    def run() -> None:
        try:
            body()
        except BaseException as error:
            failures.append(error)
            if done is not None:
                done.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread
