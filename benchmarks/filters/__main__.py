"""Recall of Fashion-MNIST among what filters keep, beside recall of everything, in one process and run.

Times are of the processor that the calling thread had: all of a recall in process runs there, on one thread, and what
else the machine is at does not count.
The full run (60,000 memories) writes results.md beside this file; a smaller one (`--memories 20000`) only prints. Every
cue is asked once a row, in turn.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.load import data
from benchmarks.load.__main__ import MEMORIES, machine, say
from benchmarks.load.server import wait_until_settled
from engram import Client, Collection
from service.bank.segment import SPARSE_SHARE
from service.bank.view import SCAN_VALUES_MAX

CUES = 300
LIMIT = 10
SHARES = (0.5, 0.25, 0.05, 0.005, 0.0005)
PAGE = 100
KEYS = ("rank", "user", "tags", "shop.city", "at")
BURST = 10_000
RESULTS = Path(__file__).with_name("results.md")


@dataclass(frozen=True)
class Row:
    name: str
    filter: dict[str, Any] | None
    kept: int


def memories(images: np.ndarray) -> Iterator[dict[str, Any]]:
    """`rank` is a permutation, so `rank < n` keeps n memories that are no nearer to one another than any; `dark` is one
    half by their brightness, which cues share with their memory."""
    rank = np.random.default_rng(1).permutation(len(images))
    dark = images.mean(axis=1) < np.median(images.mean(axis=1))
    for i, image in enumerate(images):
        payload = {
            "rank": int(rank[i]), "dark": bool(dark[i]), "user": f"u{rank[i] % 2000}",
            "tags": ["all", f"t{rank[i] % 20}"], "shop": {"city": f"c{rank[i] % 200}"},
            "at": f"2026-{1 + rank[i] % 12:02d}-01T00:{rank[i] % 60:02d}:{rank[i] // 60 % 60:02d}Z",
        }  # fmt: skip
        yield {"id": str(i), "vectors": {"v": image}, "payload": payload}


def under(n: int) -> dict[str, Any]:
    return {"must": [{"key": "rank", "range": {"lt": n}}]}


def ids(answer: Any) -> list[str]:
    return [match.id for match in answer.matches]


def timed(call: Any, *arguments: Any, **options: Any) -> tuple[float, Any]:
    started = time.thread_time()
    answer = call(*arguments, **options)
    return time.thread_time() - started, answer


def report(collection: Collection, images: np.ndarray, count: int) -> list[str]:
    own = data.cue_rows(len(images), count)
    cues = data.masked(images[own])
    dark = images.mean(axis=1) < np.median(images.mean(axis=1))
    rows = [Row("everything", None, len(images))]
    rows += [
        Row(f"{share:.2%}".replace(".00", ""), under(int(share * len(images))), int(share * len(images)))
        for share in SHARES
    ]
    rows.append(Row("50%, the darker half", {"must": [{"key": "dark", "match": True}]}, int(dark.sum())))
    for cue in cues[:30]:
        collection.recall(vectors={"v": cue}, limit=LIMIT)
    first_s, _ = timed(collection.recall, vectors={"v": cues[0]}, limit=LIMIT, filter=under(5))
    again_s, _ = timed(collection.recall, vectors={"v": cues[0]}, limit=LIMIT, filter=under(6))
    seconds: dict[str, list[float]] = defaultdict(list)
    hits: dict[str, list[float]] = defaultdict(list)
    same: dict[str, list[bool]] = defaultdict(list)
    short = 0
    for i, cue in enumerate(cues):
        asked = [*rows, Row("0.05%, another user each time", {"must": [{"key": "user", "match": f"u{i}"}]}, 0)]
        for row in asked:
            options = {"vectors": {"v": cue}, "limit": LIMIT} | ({} if row.filter is None else {"filter": row.filter})
            took, _ = timed(collection.recall, **options)
            seconds[row.name].append(took)
            # The search alone, so that what is compared is which memories take part.
            found = ids(collection.recall(**options, update_steps_max=0))
            truth = ids(collection.recall(**options, update_steps_max=0, exact=True))
            short += len(found) < min(LIMIT, len(truth))
            hits[row.name].append(len(set(found) & set(truth)) / len(truth))
            same[row.name].append(found == truth)
    plain = float(np.median(seconds["everything"]))
    plain_hits = float(np.mean(hits["everything"]))
    lines = [
        "| memories kept | counted | recall_at_10 | same ten, in order | median ms | ÷ unfiltered | |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name in seconds:
        row = next((row for row in rows if row.name == name), None)
        median, recall = float(np.median(seconds[name])), float(np.mean(hits[name]))
        counted = "" if row is None else f"{collection.count(row.filter):,}"
        exact = row is None or row.kept < SPARSE_SHARE * len(images) or row.kept * images.shape[1] <= SCAN_VALUES_MAX
        ok = (row is None or collection.count(row.filter) == row.kept) and (
            all(same[name]) if exact else recall >= plain_hits
        )
        verdict = "" if name == "everything" else "scanned" if exact else "graph"
        lines.append(
            f"| {name} | {counted} | {recall:.4f} | {np.mean(same[name]):.3f} | {1e3 * median:.2f} "
            f"| {median / plain:.1f} | {verdict}{'' if ok else ': NOT AS IT SHOULD BE'} |"
        )
    lines += [
        "",
        f"Answers with fewer matches than the filter keeps: {short} of {len(seconds) * count:,}.",
        "",
        f"The first filter on a key reads every payload: {1e3 * first_s:.0f} ms; the next on it {1e3 * again_s:.1f}.",
        "",
        "Without a recall, medians of five, and with the keys indexed:",
        "",
        "| | ms | indexed |",
        "|---|--:|--:|",
    ]
    asked = without_recall(collection, len(images))
    plain_ms = [milliseconds(call, range(5)) for _, call in asked]
    made = [timed(collection.create_payload_index, key) for key in KEYS]
    for (what, call), plain_one in zip(asked, plain_ms, strict=True):
        lines.append(f"| {what} | {plain_one:.1f} | {milliseconds(call, range(5, 10)):.1f} |")
    takes = ", ".join(f"{index['key']} {1e3 * took:.0f} ms and {index['bytes'] / 1e6:.1f} MB" for took, index in made)
    lines += ["", f"Indexing a key of {len(images):,} memories: {takes}."]
    return lines


def milliseconds(call: Callable[[int], Any], numbers: range) -> float:
    return 1e3 * float(np.median([timed(call, i)[0] for i in numbers]))


def first_filters(folder: Path, images: np.ndarray) -> list[str]:
    """What the first filtered recall costs after a start and after a burst of writes, with the keys indexed and not."""
    cue = data.masked(images[:1])[0]
    document = {"must": [{"key": "rank", "range": {"lt": 50}}, {"key": "user", "any": ["u1", "u2"]}]}
    lines = [
        "", "A filter on two keys, processor time of the recall that is the first with it:", "",
        "| | indexed | not indexed |", "|---|--:|--:|",
    ]  # fmt: skip
    spent: dict[str, list[str]] = defaultdict(list)
    for indexed in (True, False):
        if not indexed:
            with Client(path=folder) as client:
                for index in client.collection("filtered").payload_indexes():
                    client.collection("filtered").delete_payload_index(index["key"])
        started = time.process_time()
        with Client(path=folder) as client:
            loaded_s = time.process_time() - started
            collection = client.collection("filtered")
            first_s, _ = timed(collection.recall, vectors={"v": cue}, limit=LIMIT, filter=document)
            again_s, _ = timed(collection.recall, vectors={"v": cue}, limit=LIMIT, filter=document)
            began = time.process_time()
            collection.store(list(memories(images))[:BURST], batch=1000)
            burst_s = time.process_time() - began
            after_s, _ = timed(collection.recall, vectors={"v": cue}, limit=LIMIT, filter=document)
        spent["opening"].append(f"{loaded_s:.1f} s")
        spent["first after opening"].append(f"{1e3 * first_s:.1f} ms")
        spent["the same again"].append(f"{1e3 * again_s:.1f} ms")
        spent[f"storing {BURST:,} again"].append(f"{burst_s:.2f} s")
        spent["first after these"].append(f"{1e3 * after_s:.1f} ms")
    return [*lines, *(f"| {what} | {' | '.join(values)} |" for what, values in spent.items())]


def without_recall(collection: Collection, count: int) -> list[tuple[str, Callable[[int], Any]]]:
    """Each is called with another number every time, so that it asks what was not asked before."""

    def page(document: dict[str, Any] | None) -> list[Any]:
        scroll = collection.scroll(document, batch=PAGE)
        return [next(scroll) for _ in range(PAGE)]

    def just(key: str, **asked: Any) -> dict[str, Any]:
        return {"must": [{"key": key, **asked}]}

    half, few = count // 2, count // 2000
    return [
        ("count by one value of 2,000", lambda i: collection.count(just("user", match=f"u{i}"))),
        ("count by a range", lambda i: collection.count(under(half - i))),
        ("count by a value among a list's", lambda i: collection.count(just("tags", match=f"t{i}"))),
        ("count by a nested value", lambda i: collection.count(just("shop.city", match=f"c{i}"))),
        ("count by a date", lambda i: collection.count(just("at", range={"lt": f"2026-03-{1 + i:02d}"}))),
        (f"a page of {PAGE}, of everything", lambda i: page(None)),
        (f"a page of {PAGE}, of half", lambda i: page(under(half - i))),
        ("all that 0.05% keeps", lambda i: list(collection.scroll(under(few + i)))),
        ("all of one value of 2,000", lambda i: list(collection.scroll(just("user", match=f"u{20 + i}")))),
        ("delete by 0.05%, dry", lambda i: collection.delete(filter=under(few + 20 + i), dry_run=True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filters", description=__doc__)
    parser.add_argument("--memories", type=int, default=MEMORIES)
    parser.add_argument("--cues", type=int, default=CUES)
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)  # as the server has by default
    images = data.images()[: chosen.memories]
    with tempfile.TemporaryDirectory(prefix="engram-filters-") as folder, Client(path=Path(folder) / "data") as client:
        config = {"corruptions": [{"kind": "mask", "share": 0.5}]}
        collection = client.create_collection("filtered", {"v": {"dimension": images.shape[1]}}, **config)
        say("storing")
        collection.store(memories(images), batch=1000)
        say("waiting for graphs and calibration")
        wait_until_settled(collection, len(images))
        say("asking")
        lines = report(collection, images, chosen.cues)
        client.close()
        lines += first_filters(Path(folder) / "data", images)
    text = "\n".join(
        [
            "# Filters: Fashion-MNIST, half of the pixels masked",
            "",
            f"{len(images):,} memories of 784 values with payloads of six keys; {chosen.cues:,} cues, one a call, in "
            f"process, defaults throughout and limit {LIMIT}. Times are the calling thread's processor time. "
            "recall_at_10 is against an exact search among the same memories.",
            "",
            *lines,
            "",
            *(f"- {line}" for line in machine()),
            "",
        ]
    )
    print(text)
    if chosen.memories == MEMORIES:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
