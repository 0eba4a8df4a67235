"""The file of a snapshot: an uncompressed tar that any program opens, in which no bit can change unseen.

    snapshot.json            what it is
    …                        its content, entry by entry (see app/snapshot_content.py)
    SHA256SUMS               a line for each entry before it, as sha256sum writes them: `sha256sum -c SHA256SUMS`
    summary.json             the sha-256 of every byte before its own header, and counts; padded to one block

Rules:
- Written and read front to back, an entry at a time: memory holds the largest entry, not the file.
- There is one way to write a header (a plain file, no owner, no date), padding is zeros, and the end is two empty
  blocks: the reader makes each of these anew and compares, so what no checksum covers cannot differ either.
- Nothing is ever written to a path that a snapshot names: names are matched against what there may be, and read.
- `TAIL_BYTES` at the end hold the summary, so a store answers what a snapshot is without reading it all.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, Protocol

import orjson

from service.errors import InvalidSnapshot, SnapshotDamaged

BLOCK = 512
HEAD = "snapshot.json"
SUMS = "SHA256SUMS"
SUMMARY = "summary.json"
END = bytes(2 * BLOCK)
TAIL_BYTES = 2 * BLOCK + len(END)  # the summary's header, the summary, and the end

HEAD_BYTES_MAX = 4 * 2**20  # a collection's configuration with its description; some kilobytes as a rule
SUM_BYTES_MAX = 64 + 2 + 256 + 1  # a line of SHA256SUMS: a tar's name has at most 255 characters
CHUNK = 2**20

_SUM = re.compile(rb"([0-9a-f]{64})  ([\x21-\x7e]{1,255})\n")


@dataclass(frozen=True)
class Entry:
    name: str
    content: bytes


@dataclass(frozen=True)
class Summary:
    """`sha256` is of every byte before the summary; `missing` originals were named by memories and not there."""

    sha256: str
    entries: int
    originals: int
    missing: int


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class SnapshotWriter:
    """Writes entries to `file`; nothing is synced or renamed here."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._all = hashlib.sha256()
        self._sums = tempfile.TemporaryFile()  # noqa: SIM115  closed by `finish`
        self._entries = 0

    def add(self, name: str, content: bytes) -> None:
        self._sums.write(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
        self._entries += 1
        self._write(_header(name, len(content)) + content + _padding(len(content)))

    def finish(self, originals: int, missing: int) -> Summary:
        """Write the checksums and the end."""
        with self._sums as sums:
            size = sums.tell()
            self._write(_header(SUMS, size))
            sums.seek(0)
            while chunk := sums.read(CHUNK):
                self._write(chunk)
            self._write(_padding(size))
        summary = Summary(self._all.hexdigest(), self._entries, originals, missing)
        self._write(_tail(summary))
        return summary

    def _write(self, data: bytes) -> None:
        self._all.update(data)
        self._file.write(data)


def read_entries(file: Readable, size_max: dict[str, int]) -> Iterator[Entry]:
    """The entries before SHA256SUMS, then (at the end of the iteration) all that there is of checksums is compared.

    size_max: the largest content of an entry, by the folder that it is in ("" for those in none); an entry of another
    folder is refused. Raises `InvalidSnapshot`, and `SnapshotDamaged` naming what differs: what was read before is to
    be undone then.
    """
    whole, entries, after = hashlib.sha256(), 0, "the beginning"
    with tempfile.TemporaryFile() as sums:
        while True:
            header = _exactly(file, BLOCK, f"the header after {after}")
            name, size = _named(header, after)
            whole.update(header)
            if name == SUMS:
                break
            folder = name.partition("/")[0] if "/" in name else ""
            if folder not in size_max or name == SUMMARY:
                raise InvalidSnapshot(f"a snapshot has no entry {name!r}")
            if size > size_max[folder]:
                raise InvalidSnapshot(f"its entry {name} has {size:,} bytes, and {size_max[folder]:,} are read at most")
            content = _exactly(file, size, name)
            padding = _exactly(file, -size % BLOCK, name)
            if padding.strip(b"\0"):
                raise SnapshotDamaged(f"its entry {name} is followed by bytes that were not written")
            whole.update(content)
            whole.update(padding)
            sums.write(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
            entries, after = entries + 1, name
            yield Entry(name, content)
        _compare_sums(file, size, sums, whole)
    tail = _exactly(file, TAIL_BYTES, SUMMARY)
    summary = read_tail(tail)
    if summary.sha256 != whole.hexdigest():
        raise SnapshotDamaged(f"its {SUMS} or its {SUMMARY} is not what was written: the sum of the whole differs")
    if summary.entries != entries or file.read(1):
        raise SnapshotDamaged(f"its {SUMMARY} is not that of this file")


def read_tail(tail: bytes) -> Summary:
    """The summary, from the last `TAIL_BYTES`. Raises `SnapshotDamaged`."""
    try:
        said: dict[str, Any] = orjson.loads(tail[BLOCK : 2 * BLOCK])
        summary = Summary(str(said["sha256"]), int(said["entries"]), int(said["originals"]), int(said["missing"]))
    except (ValueError, KeyError, TypeError):
        raise SnapshotDamaged(f"its {SUMMARY}, which ends it, cannot be read: it is cut short or damaged") from None
    if _tail(summary) != tail:
        raise SnapshotDamaged(f"its {SUMMARY} is not as it was written")
    return summary


def head_size(beginning: bytes) -> int:
    """The size of snapshot.json, from the file's first block. Raises `InvalidSnapshot`, `SnapshotDamaged`."""
    if len(beginning) < BLOCK:
        raise SnapshotDamaged("it is cut short: it has no beginning")
    name, size = _named(beginning[:BLOCK], "the beginning")
    if name != HEAD or size > HEAD_BYTES_MAX:
        raise InvalidSnapshot(f"it does not begin with {HEAD}: it is no snapshot of Engram")
    return size


def _compare_sums(file: Readable, size: int, computed: IO[bytes], whole: Any) -> None:
    """SHA256SUMS, of that size, against the lines made while reading."""
    computed.seek(0)
    left, held = size, b""
    while line := computed.readline():
        while b"\n" not in held and left:
            chunk = _exactly(file, min(CHUNK, left), SUMS)
            whole.update(chunk)
            left, held = left - len(chunk), held + chunk
            if b"\n" not in held and len(held) > SUM_BYTES_MAX:
                raise SnapshotDamaged(f"its {SUMS} is not what was written")
        said, newline, held = held.partition(b"\n")
        if said + newline != line:
            _raise_differing(line, said + newline)
    padding = _exactly(file, -size % BLOCK, SUMS)
    if held or left or padding.strip(b"\0"):
        raise SnapshotDamaged(f"its {SUMS} is not what was written: it names entries that are not there")
    whole.update(padding)


def _raise_differing(found: bytes, said: bytes) -> None:
    name = found[66:-1].decode()
    match = _SUM.fullmatch(said)
    if match is None or match[2].decode() != name:
        raise SnapshotDamaged(f"its {SUMS} is not what was written, where it should name {name}")
    raise SnapshotDamaged(f"its entry {name} is not what was written: its sha-256 is not that of {SUMS}")


def _named(header: bytes, after: str) -> tuple[str, int]:
    """The name and size in a header, which is the one that we would write."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        same = _header(info.name, info.size) == header
    except (tarfile.HeaderError, ValueError, UnicodeError):
        same = False
    if not same:
        raise SnapshotDamaged(f"the header after {after} is damaged, or this is no snapshot of Engram")
    return info.name, info.size


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def _tail(summary: Summary) -> bytes:
    said = orjson.dumps(summary.__dict__)
    return _header(SUMMARY, BLOCK) + said.ljust(BLOCK) + END


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _exactly(file: Readable, size: int, what: str) -> bytes:
    """The next `size` bytes, read piece by piece: a size that is not there takes no memory."""
    pieces = []
    while size:
        piece = file.read(min(size, 16 * CHUNK))
        if not piece:
            raise SnapshotDamaged(f"it ends in the middle of {what}")
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
