"""What is in a snapshot's file, entry by entry, both ways.

    snapshot.json                       the collection: configuration, encoders' fingerprints, version
    kernels/000000.json, .npy           each learned kernel, and its weight where it has one
    gates/000000.json                   each calibration record
    memories/00000000.ndjson            some memories, a line each, in the order in which they were first stored
    patterns/<space>/00000000.npy       their raw patterns: a row for each line that names the space
    originals/<sha-256>                 the originals, byte for byte

Rules:
- Plain formats alone: tar, JSON, and NumPy's arrays of float32. Nothing is unpickled, and no SQL is opened.
- Reading trusts nothing: every line is checked as a request is, every array's shape against what the lines say, every
  original against its name. What is wrong is named, in `InvalidSnapshot` or `SnapshotDamaged`.
- A part holds some megabytes of patterns, so neither way holds more than one part, or one original.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ValidationError

from service.app.checks import check_payload
from service.app.fields import faults
from service.app.live import LiveCollection
from service.app.snapshot_schemas import FORMAT, FORMAT_VERSION, GateLine, KernelLine, MemoryLine, SnapshotHead
from service.errors import InvalidRequest, InvalidSnapshot, SnapshotDamaged, StorageUnavailable
from service.storage.copies import Copy, GateRow, KernelRow, MemoryPart, MemoryRow
from service.storage.snapshot_file import HEAD, HEAD_BYTES_MAX, Entry, Readable, read_entries

PART_BYTES = 8 * 2**20  # of patterns and lines: what either way holds at once, beside the entry's own copy
PART_ROWS_MAX = 4_096

LEARNED_BYTES_MAX = 512 * 2**20  # a kernel of 8,192 × 16,384 values, far above what is trained here
PART_BYTES_MAX = 64 * 2**20  # a part of another version of this program may be larger than ours

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Original:
    hash: str
    content: bytes


Item = SnapshotHead | KernelRow | GateRow | MemoryPart | Original


def rows_per_part(dimension: int) -> int:
    """Memories read at once, of that many values each."""
    return max(1, min(PART_ROWS_MAX, PART_BYTES // (4 * dimension + 2_048)))


def head_of(live: LiveCollection, copy: Copy, made_at: Any) -> SnapshotHead:
    row = copy.collection
    return SnapshotHead(
        format="engram-snapshot", format_version=1, engram=_version(), collection=live.name, version=row.version,
        made_at=made_at, created_at=row.created_at, generation=row.generation, memories=row.count,
        kernels=len(copy.kernels), gates=len(copy.gates),
        spaces={name: space.dimension for name, space in live.spaces.items()}, config=row.config,
    )  # fmt: skip


def written(head: SnapshotHead, copy: Copy) -> Iterator[Entry]:
    """The entries before the originals. Raises `StorageUnavailable` for a damaged row of the database."""
    yield Entry(HEAD, head.model_dump_json(indent=1).encode())
    for i, kernel in enumerate(copy.kernels):
        yield Entry(f"kernels/{i:06}.json", _json({k: v for k, v in vars(kernel).items() if k != "weight"}))
        if kernel.weight is not None:
            yield Entry(f"kernels/{i:06}.npy", _npy(kernel.rows, kernel.dimension) + kernel.weight)
    for i, gate in enumerate(copy.gates):
        yield Entry(f"gates/{i:06}.json", _json(vars(gate)))
    for i, part in enumerate(copy.parts):
        spaces: list[list[str]] = [[] for _ in part.memories]
        for space, vectors in part.vectors.items():
            for of_memory, vector in zip(spaces, vectors, strict=True):
                if vector is not None:
                    of_memory.append(space)
        lines = [_line(memory, of_memory) for memory, of_memory in zip(part.memories, spaces, strict=True)]
        yield Entry(f"memories/{i:08}.ndjson", b"".join(lines))
        for space, vectors in part.vectors.items():
            rows = [vector for vector in vectors if vector is not None]
            if rows:
                if any(len(row) != 4 * head.spaces[space] for row in rows):
                    raise StorageUnavailable(
                        f"a pattern of space {space} is damaged: engram fsck says which, and mends what can be"
                    )
                yield Entry(f"patterns/{space}/{i:08}.npy", _npy(len(rows), head.spaces[space]) + b"".join(rows))


def read(file: Readable, original_bytes_max: int) -> Iterator[Item]:
    """What a snapshot's file holds, in its order: the head first. Only at the end of the iteration is it known that all
    of it is as it was written.

    Raises `InvalidSnapshot`, `SnapshotDamaged`.
    """
    sizes = {
        "": HEAD_BYTES_MAX, "kernels": LEARNED_BYTES_MAX, "gates": LEARNED_BYTES_MAX, "memories": PART_BYTES_MAX,
        "patterns": PART_BYTES_MAX, "originals": original_bytes_max,
    }  # fmt: skip
    reading = _Reading()
    for entry in read_entries(file, sizes):
        yield from reading.items(entry)
    yield from reading.end()


def read_head(content: bytes) -> SnapshotHead:
    """Raises `InvalidSnapshot`."""
    try:
        said = orjson.loads(content)
    except ValueError:
        raise InvalidSnapshot(f"its {HEAD} is not JSON") from None
    if isinstance(said, dict) and said.get("format") == FORMAT and said.get("format_version") != FORMAT_VERSION:
        raise InvalidSnapshot(
            f"it is of format {said.get('format_version')}, and this version of Engram reads format {FORMAT_VERSION}"
        )
    return _checked(SnapshotHead, said, HEAD)


class _Reading:
    """The entries' grammar: what may follow what, and what each has to say."""

    def __init__(self) -> None:
        self._head: SnapshotHead | None = None
        self._kernel: KernelLine | None = None
        self._lines: list[MemoryLine] | None = None  # of the part that is being read
        self._vectors: dict[str, list[bytes]] = {}
        self._counted = {"kernels": 0, "gates": 0, "memories": 0}
        self._parts = 0
        self._last_original = ""

    def items(self, entry: Entry) -> Iterator[Item]:
        folder, _, rest = entry.name.partition("/")
        if self._head is None:
            if entry.name != HEAD:
                raise InvalidSnapshot(f"it does not begin with {HEAD}: it is no snapshot of Engram")
            self._head = read_head(entry.content)
            yield self._head
        elif folder == "patterns":
            self._pattern(self._head, entry, rest)
        elif folder == "kernels":
            yield from self._learned_kernel(entry)
        else:
            yield from self._kernel_without_weight()
            yield from self._part()
            if folder == "gates":
                self._expect(entry, f"gates/{self._counted['gates']:06}.json", before="memories")
                line = _checked(GateLine, _loaded(entry), entry.name)
                self._counted["gates"] += 1
                yield GateRow(line.modality, line.record, line.created_at)
            elif folder == "memories":
                self._expect(entry, f"memories/{self._parts:08}.ndjson", before="originals")
                self._lines = [_memory_line(line, entry.name) for line in entry.content.splitlines() if line]
                self._counted["memories"] += len(self._lines)
                self._parts += 1
            elif folder == "originals":
                if hashlib.sha256(entry.content).hexdigest() != rest:
                    raise SnapshotDamaged(f"its entry {entry.name} is not what was written: its name is its sha-256")
                if rest <= self._last_original:
                    raise InvalidSnapshot(f"its entry {entry.name} comes twice, or out of order")
                self._last_original = rest
                yield Original(rest, entry.content)
            else:
                raise InvalidSnapshot(f"a snapshot has no entry {entry.name!r} here")

    def end(self) -> Iterator[Item]:
        yield from self._kernel_without_weight()
        yield from self._part()
        if self._head is None:
            raise InvalidSnapshot("it is empty")
        for what, found in self._counted.items():
            if found != getattr(self._head, what):
                raise InvalidSnapshot(f"it has {found:,} {what}, and its {HEAD} says {getattr(self._head, what):,}")

    def _expect(self, entry: Entry, name: str, before: str) -> None:
        late = self._parts > 0 if before == "memories" else bool(self._last_original)
        if entry.name != name or late:
            raise InvalidSnapshot(f"its entry {entry.name} is not where it belongs: {name}, before the {before}")

    def _learned_kernel(self, entry: Entry) -> Iterator[KernelRow]:
        at = f"kernels/{self._counted['kernels']:06}"
        if self._kernel is not None and entry.name == f"kernels/{self._counted['kernels'] - 1:06}.npy":
            line, self._kernel = self._kernel, None
            yield _kernel_row(line, _values(entry, line.rows, line.dimension))
            return
        yield from self._kernel_without_weight()
        if entry.name != f"{at}.json" or self._counted["gates"] or self._parts:
            raise InvalidSnapshot(f"its entry {entry.name} is not where it belongs")
        self._kernel = _checked(KernelLine, _loaded(entry), entry.name)
        self._counted["kernels"] += 1

    def _kernel_without_weight(self) -> Iterator[KernelRow]:
        if self._kernel is not None:
            line, self._kernel = self._kernel, None
            if line.status != "dropped":
                raise InvalidSnapshot(f"its kernel {line.space}-{line.number} is {line.status} and has no weight")
            yield _kernel_row(line, None)

    def _pattern(self, head: SnapshotHead, entry: Entry, rest: str) -> None:
        space, _, file = rest.partition("/")
        if self._lines is None or file != f"{self._parts - 1:08}.npy" or space in self._vectors:
            raise InvalidSnapshot(f"its entry {entry.name} is not behind the memories that it belongs to")
        if space not in head.spaces:
            raise InvalidSnapshot(f"its entry {entry.name} is of a space that its {HEAD} does not name")
        rows, dimension = sum(space in line.spaces for line in self._lines), head.spaces[space]
        values = _values(entry, rows, dimension)
        self._vectors[space] = [values[at : at + 4 * dimension] for at in range(0, len(values), 4 * dimension)]

    def _part(self) -> Iterator[MemoryPart]:
        """The part that was read, once something else follows."""
        if self._lines is None:
            return
        lines, vectors = self._lines, self._vectors
        self._lines, self._vectors = None, {}
        for line in lines:
            if len(set(line.spaces)) != len(line.spaces) or not vectors.keys() >= set(line.spaces):
                raise InvalidSnapshot(f"its memory {line.id!r} names a space that there are no patterns of")
        spread: dict[str, list[bytes | None]] = {}
        for space, rows in vectors.items():
            following = iter(rows)
            spread[space] = [next(following) if space in line.spaces else None for line in lines]
        if lines:
            yield MemoryPart([_memory_row(line) for line in lines], spread)


def _memory_row(line: MemoryLine) -> MemoryRow:
    return MemoryRow(
        line.id, line.version, line.text, line.payload, line.original, line.media_type, line.created_at,
        line.updated_at, line.expires_at,
    )  # fmt: skip


def _memory_line(content: bytes, name: str) -> MemoryLine:
    try:
        said = orjson.loads(content)
    except ValueError:
        raise InvalidSnapshot(f"a line of its {name} is not JSON") from None
    line = _checked(MemoryLine, said, name)
    if (line.original is None) != (line.media_type is None):
        raise InvalidSnapshot(f"{name}: memory {line.id!r} has an original without a media type, or the reverse")
    if line.payload is not None:
        try:
            check_payload(line.payload)
        except InvalidRequest as error:
            raise InvalidSnapshot(f"{name}: memory {line.id!r}: {error.detail}") from None
    return line


def _line(memory: MemoryRow, spaces: list[str]) -> bytes:
    said = {("original" if name == "blob_hash" else name): value for name, value in vars(memory).items()}
    return _json({**said, "spaces": spaces}) + b"\n"


def _kernel_row(line: KernelLine, weight: bytes | None) -> KernelRow:
    if weight is not None and line.status == "dropped":
        raise InvalidSnapshot(f"its kernel {line.space}-{line.number} is dropped and has a weight")
    return KernelRow(
        line.space, line.number, line.objective, line.status, line.rows, line.dimension, weight, line.record,
        line.created_at,
    )  # fmt: skip


def _values(entry: Entry, rows: int, dimension: int) -> bytes:
    """The float32 values of a .npy file of (rows, dimension), all of them finite."""
    header = _npy(rows, dimension)
    if not entry.content.startswith(header) or len(entry.content) != len(header) + 4 * rows * dimension:
        raise InvalidSnapshot(f"its entry {entry.name} is not an array of {rows} × {dimension} float32")
    values = entry.content[len(header) :]
    if not np.isfinite(np.frombuffer(values, dtype="<f4")).all():
        raise InvalidSnapshot(f"its entry {entry.name} holds a NaN or an infinity")
    return values


def _npy(rows: int, dimension: int) -> bytes:
    """The header of NumPy's format 1.0 for (rows, dimension) little-endian float32: what np.load reads, and np.save
    writes."""
    said = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dimension}), }}".encode()
    length = -(-(10 + len(said) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + said.ljust(length - 1) + b"\n"


def _loaded(entry: Entry) -> Any:
    try:
        return orjson.loads(entry.content)
    except ValueError:
        raise InvalidSnapshot(f"its {entry.name} is not JSON") from None


def _checked(model: type[M], said: Any, name: str) -> M:
    try:
        return model.model_validate(said)
    except ValidationError as error:
        raise InvalidSnapshot(f"its {name} is not what a snapshot has there: {faults(error)}") from None


def _json(value: Any) -> bytes:
    return orjson.dumps(value)


def _version() -> str:
    try:
        return version("engram-memory")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
