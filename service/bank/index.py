"""The one module that knows FAISS: an HNSW graph over rows that never change.

Rules:
- torch is imported before faiss: each brings its own OpenMP, and the other order crashes on some machines.
- FAISS crashes the process when an index is searched and changed at once. A `Graph` is built whole by its constructor
  and has no method that changes it; concurrent searches of it are safe, and FAISS releases the GIL while it searches or
  builds.
- FAISS's flat storage is the matrix: `matrix` is a view of it, not a second copy.
- Scores follow our sign: larger is nearer. FAISS returns inner products as they are and squared distances as positive
  numbers.
- One cue is searched on the calling thread; FAISS spreads only a batch over its OpenMP threads.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import numpy as np
import torch  # noqa: F401 (before faiss: see the rules above)
from numpy.typing import NDArray

from service.core.names import Similarity
from service.errors import InvalidSettings

BUILDS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")

LINKS = 32
"""M: links per node and layer. Wider graphs gain little recall at a few hundred dimensions and cost 8 bytes a link."""

CONSTRUCTION_DEPTH = 128
"""efConstruction. FAISS's default of 40 loses recall; above 128 the build grows faster than the recall."""

SEARCH_DEPTH = 64
"""efSearch at least: the nodes kept while searching. It must be at least the number of rows asked for."""

DOUBT = 2.0
"""How much deeper a search goes for the share of rows left out, and how many more alive rows it must meet. Half of
Fashion-MNIST kept, by brightness: of the nearest ten .949 are found with 0, .981 with 2, .968 where all are kept."""


def _import_faiss() -> Any:
    installed = [name for name in BUILDS if _installed(name)]
    if len(installed) > 1:
        raise InvalidSettings(f"{' and '.join(installed)} are both installed and overwrite each other: keep one.")
    try:
        import faiss
    except ImportError as error:
        raise InvalidSettings(
            "FAISS is missing: install one of the extras, 'engram-memory[cpu]' or 'engram-memory[gpu]'."
        ) from error
    return faiss


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


faiss = _import_faiss()


class _Storage:
    """FAISS's own rows as an array that keeps their index alive as long as any view of them lives."""

    def __init__(self, index: Any, n: int, d: int) -> None:
        self._index = index
        address = faiss.rev_swig_ptr(faiss.downcast_index(index.storage).get_xb(), n * d).ctypes.data
        self.__array_interface__ = {"data": (address, False), "shape": (n, d), "typestr": "<f4", "version": 3}


class Alive:
    """The rows of a graph that a search may return. Never changes; safe to share between threads."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        """`mask` is (n,), True where the row may be returned."""
        self.count = int(mask.sum())
        self.share = self.count / len(mask)
        self.selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))


class Graph:
    """HNSW (Malkov and Yashunin, 2016) over n rows of d values.

    `rows` (n,) maps the graph's rows to the segment's where the graph leaves some out, else None.
    """

    def __init__(
        self, vectors: NDArray[np.float32], similarity: Similarity, rows: NDArray[np.int64] | None = None
    ) -> None:
        """`vectors` is (n, d), n ≥ 1, unit rows under cosine. FAISS copies them; the build uses FAISS's OpenMP
        threads."""
        n, d = vectors.shape
        self._distances = similarity == "neg_l2"
        self._index = faiss.IndexHNSWFlat(d, LINKS, faiss.METRIC_L2 if self._distances else faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = CONSTRUCTION_DEPTH
        self._index.add(np.ascontiguousarray(vectors))
        self.rows = rows
        self.count = n
        self.matrix: NDArray[np.float32] = np.asarray(_Storage(self._index, n, d))

    @property
    def size_bytes(self) -> int:
        """The links alone; the rows are `matrix`."""
        hnsw = self._index.hnsw
        return int(hnsw.neighbors.size() * 4 + hnsw.offsets.size() * 8 + hnsw.levels.size() * 4)

    def search(
        self, cues: NDArray[np.float32], limit: int, alive: Alive | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(batch, d) cues → (batch, limit) scores, falling, and the segment's rows; -1 where too few were found.

        `alive` leaves rows out. A search visits left-out rows as well, so its depth grows by their share. It counts as
        having found too few where it met fewer alive rows near the cue than that share promises: then those that are
        left are elsewhere, and the graph leads to some of them, not to the nearest.
        """
        depth = max(SEARCH_DEPTH, limit)
        if alive is None:
            parameters = faiss.SearchParametersHNSW(efSearch=depth)
            scores, found = self._index.search(cues, limit, params=parameters)
        else:
            depth = int(depth * (1 + DOUBT * (1 - alive.share)))
            parameters = faiss.SearchParametersHNSW(efSearch=int(depth / alive.share), sel=alive.selector)
            scores, found = self._index.search(cues, min(depth, alive.count), params=parameters)
            found[found[:, -1] < 0] = -1
            scores, found = scores[:, :limit], found[:, :limit]
        if self.rows is not None:
            found = np.where(found < 0, -1, self.rows[found])
        return (-scores if self._distances else scores), found
