"""The whole engine against a model of it in plain Python: what is stored, found, filtered, deleted, and there again
after a restart.

The seed is printed; `ENGINE_MODEL_SEED` runs one again.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from service.app.engine import Engine
from service.app.memory_schemas import CountRequest, DeleteRequest, GetRequest, PatchRequest, ScrollRequest
from service.app.schemas import CollectionConfig, Operation, RecallRequest, StoreRequest
from service.app.snapshot_schemas import RestoreRequest
from service.errors import MemoryNotFound, PreconditionFailed
from service.settings import Settings

D = 6
EXPIRES_S = 0.02
IDS = st.sampled_from([f"m{i}" for i in range(7)])
VECTORS = np.random.default_rng(3).standard_normal((12, D)).astype(np.float32)
POINTS = st.integers(0, len(VECTORS) - 1)
PAYLOADS = st.none() | st.fixed_dictionaries(
    {}, optional={"n": st.integers(0, 3), "tags": st.lists(st.sampled_from("xyz"), max_size=2)}
)
FILTERS = st.one_of(
    st.builds(lambda n: ({"must": [{"key": "n", "match": n}]}, lambda p: p.get("n") == n), st.integers(0, 3)),
    st.builds(lambda n: ({"must_not": [{"key": "n", "range": {"gte": n}}]}, lambda p: p.get("n", -1) < n),
              st.integers(0, 3)),
    st.builds(lambda t: ({"must": [{"key": "tags", "match": t}]}, lambda p: t in p.get("tags", [])),
              st.sampled_from("xyz")),
    st.just(({"must": [{"key": "n", "exists": False}]}, lambda p: "n" not in p)),
)  # fmt: skip
SCORED = {"support": "dense", "exact": True, "update_steps_max": 0, "gate": False, "with_payload": True}


def cosine(a: Any, b: Any) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


class EngineMachine(RuleBasedStateMachine):
    where: Settings
    engine: Engine  # one for all examples, but for restarts: opening one takes longer than an example

    def __init__(self) -> None:
        super().__init__()
        self.memories: dict[str, tuple[int, dict[str, Any] | None]] = {}  # id → its point and payload, in order
        created = self.engine.create_collection(
            "c", CollectionConfig.model_validate({"spaces": {"v": {"dimension": D}}})
        )
        self.version = created.version
        self.snapshots: list[tuple[str, dict[str, Any]]] = []  # their ids, and what there was
        self.expired = 0  # memories that have expired and are not removed yet

    def teardown(self) -> None:
        for snapshot_id, _ in self.snapshots:
            self.engine.delete_snapshot("c", snapshot_id)
        self.engine.delete_collection("c")

    @rule()
    def restart(self) -> None:
        self.engine.close()
        EngineMachine.engine = Engine(self.where)

    @rule(batch=st.lists(st.tuples(IDS, POINTS, PAYLOADS), min_size=1, max_size=4), bad=st.booleans())
    def store(self, batch: list[tuple[str, int, Any]], bad: bool) -> None:
        """Stores, replaces; one bad item among them is reported and keeps nothing else out."""
        items = [{"id": id_, "vectors": {"v": VECTORS[point].tolist()}, "payload": p} for id_, point, p in batch]
        reply = self.engine.store(
            "c",
            StoreRequest.model_validate(
                {"memories": [*items, {"id": "bad", "vectors": {"v": [0.0] * D}}][: len(items) + bad]}
            ),
        )
        statuses = []
        for id_, point, payload in batch:
            statuses.append("updated" if id_ in self.memories else "stored")
            self.memories[id_] = (point, payload)
        self.version += 1
        assert [result.status for result in reply.results] == statuses + ["error"] * bad
        assert reply.version == self.version

    @rule(id_=IDS, change=PAYLOADS, point=st.none() | POINTS, at=st.sampled_from([None, "its", "another"]))
    def patch(self, id_: str, change: Any, point: int | None, at: str | None) -> None:
        """A part changes, where the memory is at the version asked for."""
        stored = self.memories.get(id_)
        if stored is None:
            with pytest.raises(MemoryNotFound):
                self.engine.patch("c", id_, PatchRequest.model_validate({"payload": {"n": 1}}))
            return
        now = self.engine.memory("c", id_).version
        request: dict[str, Any] = {} if change is None else {"payload": change}
        request |= {} if point is None else {"vectors": {"v": VECTORS[point].tolist()}}
        request |= {} if at is None else {"if_version": now + (at == "another")}
        if len(request) == (at is not None):
            return
        if at == "another":
            with pytest.raises(PreconditionFailed):
                self.engine.patch("c", id_, PatchRequest.model_validate(request))
            return
        reply = self.engine.patch("c", id_, PatchRequest.model_validate(request))
        self.version += 1
        before, payload = stored
        merged = payload if change is None else {**(payload or {}), **change}
        self.memories[id_] = (before if point is None else point, merged)
        assert (reply.id, reply.version) == (id_, self.version)

    @rule()
    def snapshot(self) -> None:
        operation = self.ended(self.engine.create_snapshot("c"))
        self.snapshots.append((operation.result["id"], dict(self.memories)))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        """All is as it was, under a later version: a restore is a write."""
        snapshot_id, memories = data.draw(st.sampled_from(self.snapshots))
        request = RestoreRequest(replace=True)
        self.ended(self.engine.restore("c", snapshot_id, request))
        self.memories, self.expired = dict(memories), 0
        version = self.engine.collection("c").version
        assert version > self.version
        self.version = version

    def ended(self, operation: Operation) -> Operation:
        """An operation when it has ended; here, since the loop of a server would remove what has expired besides."""
        repository = self.engine.repository
        job = repository.claim([operation.kind], "model")
        assert job is not None
        assert job.id == operation.id
        repository.finish(job.id, self.engine.handlers()[job.kind](job, lambda _: None))
        self.engine.resources.ended(job.id)
        now = self.engine.operation(operation.id)
        assert now.status == "done", now
        return now

    @rule(ids=st.lists(IDS, min_size=1, max_size=2, unique=True), swept=st.booleans())
    def expire(self, ids: list[str], swept: bool) -> None:
        """What has expired is nowhere any more, whether it has been removed already or not."""
        moment = datetime.now(UTC) + timedelta(seconds=EXPIRES_S)
        known = [id_ for id_ in ids if id_ in self.memories]
        for id_ in known:
            self.engine.patch("c", id_, PatchRequest.model_validate({"expires_at": moment.isoformat()}))
            self.version += 1
        time.sleep(max(0.0, (moment - datetime.now(UTC)).total_seconds()) + 0.001)
        for id_ in known:
            del self.memories[id_]
        self.expired += len(known)
        if swept:
            self.sweep()

    @rule()
    def sweep(self) -> None:
        """Removing what has expired is a write."""
        self.engine.expire()
        self.version += bool(self.expired)
        self.expired = 0
        assert self.engine.collection("c").version == self.version

    @rule(ids=st.lists(IDS, min_size=1, max_size=3, unique=True), dry_run=st.booleans())
    def delete(self, ids: list[str], dry_run: bool) -> None:
        self.deleted([id_ for id_ in ids if id_ in self.memories], {"ids": ids, "dry_run": dry_run}, dry_run)

    @rule(kept=FILTERS, dry_run=st.booleans())
    def delete_by_filter(self, kept: Any, dry_run: bool) -> None:
        document, holds = kept
        self.deleted(self.kept(holds), {"filter": document, "dry_run": dry_run}, dry_run)

    def deleted(self, expected: list[str], request: dict[str, Any], dry_run: bool) -> None:
        reply = self.engine.delete("c", DeleteRequest.model_validate(request))
        if not dry_run:
            self.version += bool(expected)
            for id_ in expected:
                del self.memories[id_]
        assert (sorted(reply.deleted), reply.count, reply.version) == (sorted(expected), len(expected), self.version)

    def kept(self, holds: Any) -> list[str]:
        return [id_ for id_, (_, payload) in self.memories.items() if holds(payload or {})]

    @rule(kept=st.none() | FILTERS, page=st.integers(1, 3))
    def scroll(self, kept: Any, page: int) -> None:
        expected = list(self.memories) if kept is None else self.kept(kept[1])
        found, cursor = [], None
        while True:
            reply = self.engine.scroll(
                "c", ScrollRequest(filter=None if kept is None else kept[0], limit=page, cursor=cursor)
            )
            found += [(memory.id, memory.payload) for memory in reply.memories]
            cursor = reply.next_cursor
            if cursor is None:
                break
        assert found == [(id_, self.memories[id_][1]) for id_ in expected]
        counted = self.engine.count("c", CountRequest(filter=None if kept is None else kept[0]))
        assert (counted.count, counted.version) == (len(expected), self.version)

    @rule(
        point=POINTS, kept=st.none() | FILTERS, limit=st.integers(1, 8), offset=st.integers(0, 2),
        excluded=st.lists(IDS, max_size=2),
    )  # fmt: skip
    def recall(self, point: int, kept: Any, limit: int, offset: int, excluded: list[str]) -> None:
        """Every memory that may come, no other, by its similarity; a filter never costs a match."""
        request = SCORED | {"cue": {"vectors": {"v": VECTORS[point].tolist()}}, "limit": limit, "offset": offset}
        request |= {"exclude": excluded} | ({} if kept is None else {"filter": kept[0]})
        reply = self.engine.recall("c", RecallRequest.model_validate(request))
        allowed = [id_ for id_ in (self.memories if kept is None else self.kept(kept[1])) if id_ not in excluded]
        scores = {id_: cosine(VECTORS[point], VECTORS[self.memories[id_][0]]) for id_ in allowed}
        matches = reply["results"][0]["matches"]
        assert reply["version"] == self.version
        assert len({match["id"] for match in matches}) == len(matches)
        for match in matches:
            assert match["similarity"] == pytest.approx(scores[match["id"]], abs=1e-5)
            assert match["payload"] == self.memories[match["id"]][1]
        best = sorted(scores.values(), reverse=True)[offset : offset + limit]
        assert [match["similarity"] for match in matches] == pytest.approx(best, abs=1e-5)

    @invariant()
    def agree(self) -> None:
        found = self.engine.memories("c", GetRequest(ids=[f"m{i}" for i in range(7)]))
        assert {memory.id: memory.payload for memory in found.memories} == {
            id_: payload for id_, (_, payload) in self.memories.items()
        }


def test_the_engine_agrees_with_its_model(new_database: Any, tmp_path: Path) -> None:
    place = new_database(tmp_path)
    url = place if isinstance(place, str) else None
    EngineMachine.where = Settings(data=tmp_path / "memories", database_url=url)
    chosen = int(os.environ.get("ENGINE_MODEL_SEED") or secrets.randbits(32))
    print(f"ENGINE_MODEL_SEED={chosen}")
    EngineMachine.engine = Engine(EngineMachine.where)
    try:
        run_state_machine_as_test(seed(chosen)(EngineMachine), settings=settings(stateful_step_count=10))
    finally:
        EngineMachine.engine.close()
