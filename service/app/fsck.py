"""fsck: everything that a data folder keeps, checked against everything else; with `repair`, mended where that loses
nothing that was not lost.

    database ─▶ collections: patterns, payloads, kernels ─▶ originals ─▶ snapshots ─▶ temporary files ─▶ banks

Rules:
- Nothing is written without `repair`, but that the database is brought to this version's schema, as by any start.
- What is damaged is moved aside where it is a file, and removed where it is a row that nothing can be read from. A
  memory is never deleted.
- Into a database whose own structure is damaged nothing is written at all.
- A pattern has no checksum: bits that flipped and left it a number are not seen.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import orjson
from pydantic import ValidationError

from service.app.findings import Report, State, pattern_fault, values_fault
from service.app.live import rows_of
from service.app.schemas import CollectionConfig, SpaceConfig
from service.app.snapshots import verify
from service.bank import Bank, Layout, SpaceLayout
from service.core.names import Similarity
from service.errors import (
    CollectionNotFound,
    ContentNotFound,
    EngramError,
    InvalidRequest,
    NotFound,
    SnapshotDamaged,
    StorageUnavailable,
)
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.collection import HIDDEN
from service.storage.database import Database
from service.storage.folder import DataFolder
from service.storage.integrity import StoredPattern
from service.storage.repository import Collection, Repository
from service.storage.snapshot_store import WORKSPACE, Workspace, open_store
from service.storage.writer import Writer

Tell = Callable[[str, float], None]
"""Hears what is being checked, and how much of it is (0..1)."""

RESTORED = "bring its collections back from snapshots (engram snapshot restore)"
GIVEN_AGAIN = "store them again, or delete them"
HOUSEKEPT = "nothing to do: a server removes them, an hour after they were last stored"
AT_START = "nothing to do: the next start removes them"

TOLD_EACH = 1_000  # patterns
COMPARED_MAX = 3  # times that a bank is loaded where another server goes on writing


def fsck(
    settings: Settings, *, repair: bool = False, compact: bool = False, tell: Tell = lambda _what, _share: None
) -> Report:
    """Check the data folder, which this process owns meanwhile. `compact`: then write a sound SQLite database anew.

    Raises `InvalidRequest` for a PostgreSQL database that is to be compacted, `FolderInUse` naming its owner,
    `NotFound` where there is no database in it, `OriginalsElsewhere`, `StorageFull` (compacting), and
    `StorageUnavailable` where a PostgreSQL server does not answer.
    """
    if compact and settings.database_url is not None:
        raise InvalidRequest("PostgreSQL compacts its own tables: ask it for VACUUM FULL")
    with ExitStack() as opened:
        folder = DataFolder.open(settings.data)
        opened.callback(folder.close)
        check = _Check(settings, folder, repair, tell)
        if (repository := _opened(settings, folder, opened, check.report)) is not None:
            check.database(repository)
        check.files(repository)
        if repository is not None:
            check.banks(repository)
            if compact:
                check.compact(repository)
    return check.report


def _opened(settings: Settings, folder: DataFolder, opened: ExitStack, report: Report) -> Repository | None:
    """None where the database is too damaged to be opened."""
    if settings.database_url is not None:
        database = Database.open(settings.database_url.get_secret_value())
    else:
        if not folder.database_path.exists():
            raise NotFound(f"there is no {folder.database_path.name} in {folder.path}: it holds no memories")
        try:
            database = Database.open(folder.database_path)
        except StorageUnavailable as error:
            report.add("database_damaged", "lost", folder.database_path.name, error.detail, RESTORED)
            return None
    opened.callback(database.close)
    writer = Writer(database)
    opened.callback(writer.close)
    return Repository(database, writer)


class _Check:
    """One check, part by part."""

    def __init__(self, settings: Settings, folder: DataFolder, repair: bool, tell: Tell) -> None:
        self.report = Report()
        self._settings, self._repair, self._tell = settings, repair, tell
        self._mend_rows = repair  # until the database turns out to be damaged itself
        self._blobs_root = settings.originals or folder.blobs_path
        self._snapshots = folder.path / "snapshots"
        self._workspace = self._snapshots / WORKSPACE
        self._fit: list[tuple[Collection, Layout]] = []  # what a bank can be made of

    @property
    def _mended(self) -> State:
        return "repaired" if self._mend_rows else "repairable"

    # --- the database ---

    def database(self, repository: Repository) -> None:
        self._tell("the database", 0.0)
        try:
            self._structure(repository)
            rows = repository.every_collection()
            total, done = max(1, sum(row.count for row in rows)), 0
            for row in rows:
                self.report.count("collections")
                self._collection(repository, row, partial(self._seen, done, total))
                done += row.count
        except StorageUnavailable as error:
            self._damaged(error)

    def _seen(self, done: int, total: int, seen: int) -> None:
        self._tell("patterns", (done + seen) / total)

    def _damaged(self, error: StorageUnavailable) -> None:
        self._mend_rows = False
        self.report.add("database_damaged", "lost", "database", error.detail, RESTORED)

    def _structure(self, repository: Repository) -> None:
        faults = repository.database_faults()
        for line in faults.structure:
            self._mend_rows = False
            self.report.add("database_damaged", "lost", "database", line, RESTORED)
        for line in faults.indexes:
            self.report.add("index_damaged", self._mended, "database", line)
        for table, rows in faults.orphans.items():
            for row in rows:
                self.report.add("orphan_rows", self._mended, table, f"row {row}")
        if self._mend_rows and faults.indexes:
            repository.rebuild_indexes()
        if self._mend_rows and faults.orphans:
            repository.remove_orphans(faults.orphans)

    def _collection(self, repository: Repository, row: Collection, seen: Callable[[int], None]) -> None:
        try:
            config = CollectionConfig.model_validate(row.config["config"])
        except (ValidationError, KeyError, TypeError) as error:
            self.report.add(
                "database_damaged", "lost", row.name, f"its configuration cannot be read: {error}", RESTORED
            )
            return
        dimensions = _dimensions(config, repository.pattern_dimensions(row.id))
        self._missing(repository, row, config)
        damaged = self._patterns(repository, row, config, dimensions, seen)
        if self._mend_rows and damaged:
            repository.remove_patterns(row.id, damaged)
        if self._mend_rows or not damaged:
            layout = Layout(tuple(SpaceLayout(*each) for each in dimensions.items()), _similarity(config))
            self._fit.append((row, layout))
        self.report.count("memories", row.count)
        for id_, payload in repository.iter_payloads(row.id):
            try:
                orjson.loads(payload)
            except (ValueError, TypeError):
                self.report.add("payload_damaged", "lost", f"{row.name}/{id_}", "it is not JSON", GIVEN_AGAIN)
        self._kernels(repository, row, dimensions)

    def _missing(self, repository: Repository, row: Collection, config: CollectionConfig) -> None:
        """To be looked for before damaged ones are removed: those are told of as damaged."""
        for name, space in config.spaces.items():
            for id_ in repository.lacking(row.id, name, space.source) if space.encoder is not None else ():
                detail = f"it has the {space.source} that space {name} is made from"
                self.report.add("pattern_missing", "repairable", f"{row.name}/{id_}", detail, _encoded_again(row, name))

    def _patterns(
        self, repository: Repository, row: Collection, config: CollectionConfig, dimensions: Mapping[str, int],
        seen: Callable[[int], None],
    ) -> list[tuple[int, str]]:  # fmt: skip
        """The damaged ones, by their memories' keys and their spaces."""
        damaged = []
        for number, each in enumerate(repository.iter_stored_patterns(row.id), start=1):
            self.report.count("patterns")
            if number % TOLD_EACH == 0:
                seen(min(row.count, number // len(dimensions)))
            fault = pattern_fault(each.dtype, each.dimension, each.vector, dimensions.get(each.space))
            if fault is None:
                continue
            damaged.append((each.key, each.space))
            name, space = f"{row.name}/{each.id} {each.space}", config.spaces.get(each.space)
            if space is None:  # nothing reads it
                self.report.add("pattern_damaged", self._mended, name, fault)
            elif _can_be_made(space, each):
                self.report.add("pattern_damaged", self._mended, name, fault, _encoded_again(row, each.space))
            else:
                self.report.add("pattern_damaged", "lost", name, fault, GIVEN_AGAIN)
        return damaged

    def _kernels(self, repository: Repository, row: Collection, dimensions: Mapping[str, int]) -> None:
        damaged = []
        for each in repository.iter_weights(row.id):
            self.report.count("kernels")
            wanted = dimensions.get(each.space)
            fault = values_fault(each.weight, each.rows * each.dimension)
            if fault is None and each.status == "active" and each.dimension != wanted:
                fault = f"it is of {each.dimension} dimensions, and its space has {wanted}"
            if fault is not None:
                damaged.append(each.key)
                name, again = (
                    f"{row.name} {each.space}-{each.number}",
                    f"engram train kernel -c {row.name} --space {each.space}",
                )
                self.report.add("kernel_damaged", self._mended, name, f"{fault} ({each.status})", again)
        if self._mend_rows and damaged:
            repository.drop_kernels(row.id, damaged)

    # --- files ---

    def files(self, repository: Repository | None) -> None:
        """`repository`: None where it cannot be asked who names an original."""
        blobs = Blobs(self._blobs_root, tidy=False)
        if repository is not None and repository.is_shared:
            repository.share_originals(blobs, f"{socket.gethostname()}:{self._blobs_root.absolute()}")
        for number, (folder, there) in enumerate(blobs.by_folder()):
            self._tell("originals", number / 256)
            try:
                named = None if repository is None else repository.named_originals(folder)
            except StorageUnavailable as error:
                self._damaged(error)
                repository = named = None
            self._originals(repository, named, blobs, there)
        self._kept_snapshots()
        stale = [*blobs.stale(), *Workspace.stale(self._workspace)]
        for path in stale:
            self.report.add("temporary_stale", "note", str(path), "removed" if self._repair else "", AT_START)
            if self._repair:
                path.unlink(missing_ok=True)

    def _originals(
        self, repository: Repository | None, named: set[str] | None, blobs: Blobs, there: Sequence[str]
    ) -> None:
        """The files of a folder against the hashes of that beginning which are named (None: it is not known)."""
        for hash_ in there:
            self.report.count("originals")
            try:
                fault = None if blobs.is_whole(hash_) else "its bytes are not those that were stored"
            except ContentNotFound:  # housekeeping was there meanwhile
                continue
            except StorageUnavailable as error:
                fault = error.detail
            if fault is not None:
                if self._repair:
                    fault = f"{fault}; moved to {blobs.quarantine(hash_)}"
                self._lost_original(
                    repository, "original_damaged", hash_, fault, wanted=named is None or hash_ in named
                )
            elif named is not None and hash_ not in named:
                self.report.add("original_unnamed", "note", hash_, "", HOUSEKEPT)
        for hash_ in sorted((named or set()).difference(there)):
            if not blobs.exists(hash_):
                self._lost_original(repository, "original_missing", hash_, "there is no such file", wanted=True)

    def _lost_original(self, repository: Repository | None, kind: str, hash_: str, fault: str, *, wanted: bool) -> None:
        """A finding for each who names it."""
        names = repository.named_by(hash_) if repository is not None and wanted else []
        for name in names:
            self.report.add(kind, "lost", name, f"original {hash_}: {fault}", GIVEN_AGAIN)
        if not names:  # nobody misses it, as far as is known
            state: State = "lost" if wanted else "repaired" if self._repair else "repairable"
            self.report.add(kind, state, hash_, fault)

    def _kept_snapshots(self) -> None:
        store = open_store(self._settings.snapshots, self._snapshots)
        try:
            kept = store.list()
        except StorageUnavailable as error:
            self.report.add("snapshot_unreadable", "lost", "snapshots", error.detail)
            return
        total, done = max(1, sum(each.size_bytes for each in kept)), 0
        for each in kept:
            self.report.count("snapshots")
            name, size = f"{each.collection}/{each.id}", each.size_bytes
            try:
                verify(store, each, size, partial(self._read, done / total, size / total))
            except SnapshotDamaged as error:
                detail = error.detail
                if self._repair:
                    detail = f"{detail}; moved to {store.quarantine(each.collection, each.id)}"
                self.report.add("snapshot_damaged", "repaired" if self._repair else "repairable", name, detail)
            except EngramError as error:
                self.report.add("snapshot_unreadable", "lost", name, error.detail)
            done += size

    def _read(self, before: float, share: float, at: float) -> None:
        self._tell("snapshots", before + at * share)

    def compact(self, repository: Repository) -> None:
        if any(each.kind == "database_damaged" for each in self.report.found):
            return
        self._tell("the database, written anew", 0.0)
        before = repository.size_bytes()
        repository.compact()
        self.report.add("database_compacted", "note", "database", f"{before:,} bytes, now {repository.size_bytes():,}")

    # --- banks ---

    def banks(self, repository: Repository) -> None:
        """Load each collection as a server would, and compare."""
        for number, (row, layout) in enumerate(self._fit):
            if row.name.startswith(HIDDEN):  # nobody loads it
                continue
            self._tell("banks", number / len(self._fit))
            try:
                if (fault := _bank_fault(repository, row.id, layout)) is not None:
                    self.report.add("bank_differs", "lost", row.name, fault)
                self.report.count("banks")
            except CollectionNotFound:  # another server deleted it meanwhile
                continue
            except StorageUnavailable as error:
                self._damaged(error)


def _bank_fault(repository: Repository, collection_id: int, layout: Layout) -> str | None:
    """How a bank that is loaded from the database differs from it. Raises `CollectionNotFound`."""
    spaces = [(space.name, space.dimension) for space in layout.spaces]
    fault = None
    for _ in range(COMPARED_MAX):
        bank = Bank(layout)
        with repository.iter_patterns(collection_id, spaces) as stream:
            bank.write(None, [], stream.version)
            for chunk in stream.chunks:
                bank.write(rows_of(chunk), [], stream.version)
            version, count = stream.version, stream.count
        view, ids = bank.view(), repository.ids(collection_id)
        held = view.all_ids()
        if repository.version_of(collection_id) != version:  # another server has written meanwhile
            continue
        if view.version != version:
            fault = f"the bank is at version {view.version:,}, the database at {version:,}"
        elif set(held) != ids or not len(held) == view.count == count:
            fault = f"the bank holds {view.count:,} memories, the database {count:,}; {len(ids ^ set(held)):,} differ"
        else:
            fault = None
        break
    return fault


def _dimensions(config: CollectionConfig, stored: Mapping[str, Mapping[int, int]]) -> dict[str, int]:
    """Of each space: the callers' own as configured; an encoder's is that of most of its patterns, since its weights
    may not be here. One without patterns takes none: 1."""
    return {
        name: space.dimension or max(sizes := stored.get(name) or {1: 1}, key=sizes.__getitem__)
        for name, space in config.spaces.items()
    }


def _similarity(config: CollectionConfig) -> Similarity:
    return next(iter(config.spaces.values())).similarity


def _can_be_made(space: SpaceConfig, pattern: StoredPattern) -> bool:
    has = {"image": pattern.blob_hash is not None, "text": pattern.has_text}
    return space.encoder is not None and has[space.source]


def _encoded_again(row: Collection, space: str) -> str:
    return f"engram reencode {row.name} {space}"
