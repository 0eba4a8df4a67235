"""FAISS by itself, one cue a call on one thread: what a search costs with nothing around it."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
import torch  # noqa: F401 (before faiss: each brings its own OpenMP)

import faiss  # isort: skip

from benchmarks.load import data
from benchmarks.load.measure import SUPPORT, Row, hand_over, row, rss_mb

LINKS, CONSTRUCTION_DEPTH, SEARCH_DEPTH = 32, 128, 64


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def searched(name: str, index: Any, vectors: np.ndarray, cues: np.ndarray, own: np.ndarray) -> Row:
    started = time.perf_counter()
    index.add(vectors)
    load_s = time.perf_counter() - started
    seconds, first = [], []
    began = time.perf_counter()
    for cue in cues:
        started = time.perf_counter()
        _, found = index.search(cue[None], SUPPORT)
        seconds.append(time.perf_counter() - started)
        first.append(found[0, 0])
    elapsed_s = time.perf_counter() - began
    share = float((np.array(first) == own).mean())
    return row(name, share, seconds, elapsed_s=elapsed_s, load_s=load_s, rss_mb=rss_mb(os.getpid()))


def main(memories: int, cues: int) -> None:
    images = data.images()[:memories]
    own = data.cue_rows(memories, cues)
    vectors, asked = unit(images), unit(data.masked(images[own]))
    d = images.shape[1]
    del images
    hnsw = faiss.IndexHNSWFlat(d, LINKS, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction, hnsw.hnsw.efSearch = CONSTRUCTION_DEPTH, SEARCH_DEPTH
    rows = [searched("FAISS HNSW alone", hnsw, vectors, asked, own)]
    del hnsw
    rows.insert(0, searched("FAISS flat alone", faiss.IndexFlatIP(d), vectors, asked, own))
    hand_over(rows)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
