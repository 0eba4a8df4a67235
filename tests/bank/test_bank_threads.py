"""Readers search while writes and seals run: no lock, no crash, and each answer belongs to its view's version."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch

from service.bank import Bank, Layout, Rows, SpaceLayout

WRITES, WINDOW, DIMENSION = 1500, 200, 16


def test_each_answer_belongs_to_its_views_version() -> None:
    """Write v adds memory v and deletes memory v − WINDOW, so a view at v must hold the last WINDOW of them alone."""
    vectors = np.random.default_rng(0).normal(size=(WRITES + 1, DIMENSION)).astype(np.float32)
    bank = Bank(Layout((SpaceLayout("v", DIMENSION),)), scan_values_max=50 * DIMENSION, quiet_s=0.0)
    done = threading.Event()
    failures: list[BaseException] = []
    answered, seals, graph_answers = [0, 0], [0], [0]

    def writer() -> None:
        for version in range(1, WRITES + 1):
            rows = Rows([str(version)], {"v": vectors[version][None]}, [str(version).encode()])
            bank.write(rows, [str(version - WINDOW)], version)

    def sealer() -> None:
        while not done.is_set():
            seals[0] += bank.seal()

    def reader(number: int) -> None:
        rng = np.random.default_rng(number)
        while not done.is_set() or not answered[number]:
            view = bank.view()
            alive = range(max(1, view.version - WINDOW + 1), view.version + 1)
            if not alive:
                continue
            assert view.count == len(alive)
            asked = [int(rng.choice(alive)) for _ in range(3)]
            found = view.search({"v": torch.from_numpy(vectors[asked])}, {"v": 1.0}, 10)
            ids, payloads = view.ids(found.rows), view.payloads(found.rows)
            assert [line[0] for line in ids] == [str(name) for name in asked], "a stored vector finds itself"
            names = [name for line in ids for name in line if name is not None]
            assert len(names) == 3 * min(10, len(alive))
            assert {int(name) for name in names} <= set(alive)
            assert [p for line in payloads for p in line if p is not None] == [name.encode() for name in names]
            gathered = view.gather(found.rows[:, :1])[:, 0]
            unit = vectors[asked] / np.linalg.norm(vectors[asked], axis=1, keepdims=True)
            np.testing.assert_allclose(gathered.numpy(), unit, rtol=1e-5, atol=1e-6)
            rows = view.rows_of([str(asked[0]), str(view.version - WINDOW), str(view.version + 1)]).tolist()
            assert rows == [int(found.rows[0, 0]), -1, -1]
            answered[number] += 1
            graph_answers[0] += not found.exact

    def guarded(body: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                body()
            except BaseException as error:
                failures.append(error)
                done.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    others = [guarded(sealer), guarded(lambda: reader(0)), guarded(lambda: reader(1))]
    guarded(writer).join()
    done.set()
    for thread in others:
        thread.join()
    assert not failures, failures
    assert min(answered) > 0
    assert seals[0] > 0
    assert graph_answers[0] > 0, "no search ran on a graph"
    assert bank.view().count == WINDOW
