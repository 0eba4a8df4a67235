"""The engine in this process, through the client a user imports, on a folder that the server has filled."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from benchmarks.load import data
from benchmarks.load.measure import LIMIT, Row, hand_over, row, rss_mb
from benchmarks.load.server import COLLECTION, wait_until_settled
from engram import Client


def recalled(name: str, collection: Any, cues: Any, own: Any, load_s: float | None, **options: Any) -> Row:
    seconds, first = [], 0
    began = time.perf_counter()
    for cue, memory in zip(cues, own, strict=True):
        started = time.perf_counter()
        answer = collection.recall(vectors={"v": cue}, limit=LIMIT, **options)
        seconds.append(time.perf_counter() - started)
        first += answer.matches[0].id == str(memory)
    elapsed_s = time.perf_counter() - began
    return row(name, first / len(own), seconds, elapsed_s=elapsed_s, load_s=load_s, rss_mb=rss_mb(os.getpid()))


def main(folder: str, memories: int, cues: int) -> None:
    torch.set_num_threads(1)  # as the server has by default
    started = time.perf_counter()
    with Client(path=folder) as client:
        collection = client.collection(COLLECTION)
        wait_until_settled(collection, memories)
        load_s = time.perf_counter() - started
        own = data.cue_rows(memories, cues)
        asked = data.masked(data.images()[own])
        recalled("warm-up", collection, asked[:50], own[:50], None)
        hand_over(
            [
                recalled("Engram in process", collection, asked, own, load_s),
                recalled("Engram in process, no step", collection, asked, own, None, update_steps_max=0),
            ]
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
