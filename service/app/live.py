"""A collection in memory: its configuration, encoders, bank and calibration records, kept in step with SQL.

SQL is the truth; this is what follows from it, commit by commit, on storage's own thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import structlog
from numpy.typing import NDArray

from service.app.absent import AbsentEncoder
from service.app.filter_schemas import path_of
from service.app.gate_schemas import CalibrationInfo, CalibrationRecord, CalibrationState
from service.app.schemas import CollectionConfig, SpaceConfig
from service.bank import NEVER, Bank, Layout, Rows, SpaceLayout, View
from service.core.similarity import Blocks, Kernel
from service.encoders.corruption import DEFAULT_CORRUPTIONS, Corruption
from service.encoders.protocol import Decoder, Encoder
from service.errors import EngramError, InvalidRequest
from service.storage.learned import Retired
from service.storage.memories import PatternChunk, microseconds_now
from service.storage.payload_indexes import indexed_keys
from service.storage.repository import Collection

if TYPE_CHECKING:
    from service.app.comparison import ActiveKernel
    from service.app.gates import Gate
    from service.app.routes import Route

log = structlog.get_logger()

STALE_SHARE = (
    0.1  # a calibration is redone when the number of memories has moved by this share (log S grows with log N)
)
# A fixed interaction matrix does not grow with the memories, so its threshold does not drift with their number; but
# once half of them are others than it was made from, it stands for what is no longer there.
STALE_SHARE_FIXED = 0.5
WRITABLE_WAIT_S = 10.0  # writes wait no longer for a re-encoding to catch up: it tries again then


@dataclass(frozen=True)
class Space:
    """One space of a collection; `encoder` is None where the caller sends the vectors."""

    name: str
    config: SpaceConfig
    dimension: int
    encoder: Encoder | None

    @property
    def weight(self) -> float:
        return self.config.weight

    @property
    def fault(self) -> EngramError | None:
        """Why the encoder cannot be used, if it cannot."""
        return self.encoder.refusal() if isinstance(self.encoder, AbsentEncoder) else None


MakeEncoder = Callable[[str, Mapping[str, object]], Encoder]


def make_space(name: str, config: SpaceConfig, make_encoder: MakeEncoder) -> Space:
    """The space with its encoder made. Raises `InvalidRequest` where that cannot read the space's source, and what
    making it raises.
    """
    if config.encoder is None:
        assert config.dimension is not None  # SpaceConfig holds one or the other
        return Space(name, config, config.dimension, None)
    encoder = make_encoder(config.encoder, config.options)
    if config.source not in encoder.takes:
        raise InvalidRequest(f"space {name}: the encoder {config.encoder} does not read {config.source}s")
    return Space(name, config, encoder.dimension, encoder)


def make_spaces(config: CollectionConfig, make_encoder: MakeEncoder) -> dict[str, Space]:
    """The configured spaces, as `make_space`."""
    return {name: make_space(name, space, make_encoder) for name, space in config.spaces.items()}


@dataclass(frozen=True, eq=False)
class Learned:
    """What was learned from the memories, replaced as one: `kernels` by space; `gates` and `routes` by modality, made
    under these kernels.
    """

    kernels: Mapping[str, ActiveKernel] = field(default_factory=dict)
    gates: Mapping[str, Gate] = field(default_factory=dict)
    routes: Mapping[str, Route] = field(default_factory=dict)

    def by_id(self, kernel_id: str) -> ActiveKernel | None:
        return next((kernel for kernel in self.kernels.values() if kernel.id == kernel_id), None)


class Changed:
    """The ids written or deleted while somebody keeps a copy of a collection: noted by the writer's thread, taken by
    whoever brings the copy up to date. Takes a string per memory at most.
    """

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._lock = threading.Lock()

    def note(self, ids: Iterable[str]) -> None:
        with self._lock:
            self._ids.update(ids)

    def take(self) -> list[str]:
        with self._lock:
            taken, self._ids = self._ids, set()
        return list(taken)


class LiveCollection:
    """One collection under its encoders of one generation. When an encoder changes, another one takes its place (see
    `reencode`), and this one stays as it was for the recalls that hold it.
    """

    def __init__(self, row: Collection, config: CollectionConfig, spaces: dict[str, Space], device: str) -> None:
        self.id = row.id
        self.name = row.name
        self.generation = row.generation
        self.created_at = row.created_at
        self.config = config
        self.spaces = spaces
        self.similarity = next(iter(config.spaces.values())).similarity
        self.layout = Layout(
            tuple(SpaceLayout(space.name, space.dimension) for space in spaces.values()), self.similarity
        )
        self.blocks = Blocks(
            tuple(space.dimension for space in spaces.values()),
            tuple(space.weight for space in spaces.values()),
            self.similarity,
        )
        self.decoder = _decoder(spaces)
        self.corruptions: list[Corruption] = list(config.corruptions or DEFAULT_CORRUPTIONS)
        self.bank = Bank(self.layout, device=device)
        self.bank.write(None, [], row.version)  # an empty bank, too, stands at its collection's version
        self.indexed = indexed_keys(row.config)  # keys of payloads, see payload_indexes
        self._indexing = threading.Lock()
        self.admission = threading.Lock()  # see duplicates.admitting
        self.described = False  # whether any memory has a caption or an original
        self.learned = Learned()
        self.learning = threading.Lock()  # held from a calibration's first look at the kernels to its end
        self.calibrated_rows: int | None = None  # memories at the last calibration; None before the first
        self.changed_rows = 0  # memories written or deleted since
        self.margins: dict[tuple[str, ...], tuple[int, float | None]] = {}  # see calibrate.stored_margin
        self._retired: list[Kernel] = []
        self.last_write_s = 0.0  # monotonic; calibration waits for quiet
        self.revision = row.revision  # of what was learned, as the database counts it
        self.imported_s = -math.inf  # monotonic; when rows of an import were stored last
        self.changed: Changed | None = None  # where a re-encoding follows
        self.following = threading.RLock()  # held while a commit, or several, are brought to the bank
        self.tell: Callable[[], None] = lambda: None  # other servers, that there is something to follow
        self.read_log: Callable[[], None] | None = None  # brings what others have committed; None: nobody else commits
        self.writable = threading.Event()  # cleared for the moment in which a re-encoding catches up for good
        self.writable.set()
        self.sealing = threading.Lock()
        self.calibration_job: str | None = None  # a calibration that has not looked at the bank yet

    def view(self) -> View:
        """All that may be returned now: what the bank holds, less what has expired."""
        return self.bank.view().at(microseconds_now())

    def rows(
        self,
        ids: Sequence[str],
        vectors: Sequence[Mapping[str, NDArray[np.float32]]],
        payloads: Sequence[Mapping[str, Any] | None],
        expires: Sequence[int | None],
    ) -> Rows:
        """Memories as the bank is told of them."""
        blocks = {
            space.name: np.stack([each.get(space.name, _absent(space.dimension)) for each in vectors])
            for space in self.spaces.values()
        }
        packed = [None if payload is None else orjson.dumps(payload) for payload in payloads]
        return Rows(ids, blocks, packed, moments(expires))

    def follow(self, rows: Rows | None, deletes: Sequence[str], version: int) -> None:
        """Bring a commit, which took this version, to the bank. Called by storage in the order of the commits; what
        other servers have committed before it is brought as well.
        """
        with self.following:
            if version == self.bank.version + 1 or self.read_log is None:
                self.bring(rows, deletes, version)
            else:
                try:
                    self.catch_up(version)
                except EngramError as error:  # the write stands: its caller is not to hear that it failed
                    log.warning("a commit is brought to the bank later", collection=self.name, detail=error.detail)
        self.tell()

    def catch_up(self, version: int | None = None) -> None:
        """Bring what is committed, unless the bank has reached `version` already."""
        with self.following:
            if self.read_log is not None and (version is None or self.bank.version < version):
                self.read_log()

    def bring(self, rows: Rows | None, deletes: Sequence[str], version: int) -> None:
        """Bring rows and deletes to the bank. To be called under `following`."""
        if self.changed is not None:  # before the bank is at this version: who saw it there finds the ids here
            self.changed.note([*deletes, *(() if rows is None else rows.ids)])
        self.bank.write(rows, deletes, version)
        self.changed_rows += len(deletes) + (0 if rows is None else len(rows.ids))
        self.last_write_s = time.monotonic()

    def index(self) -> None:
        """Have the bank keep the columns of the keys that are indexed now; takes a while where some are new."""
        with self._indexing:  # or of two that were changed at once the former's list might be the last
            self.bank.index(map(path_of, self.indexed))

    @property
    def faulty(self) -> bool:
        """Whether a space's encoder cannot be used: its patterns wait for being encoded again."""
        return any(space.fault is not None for space in self.spaces.values())

    def require(self, spaces: Iterable[str]) -> None:
        """Raises why the encoder of one of these spaces cannot be used (`EncoderMismatch`, `WeightsMissing`, ...)."""
        for name in spaces:
            if (fault := self.spaces[name].fault) is not None:
                raise fault

    def wait_writable(self) -> None:
        """Before a write: wait while a re-encoding catches up for good. It only helps that to end; what keeps former
        vectors out is the generation.
        """
        self.writable.wait(WRITABLE_WAIT_S)

    def weights_of(self, spaces: Iterable[str]) -> dict[str, float]:
        """The configured weight of each of these spaces."""
        return {name: self.spaces[name].weight for name in spaces}

    @property
    def gates(self) -> Mapping[str, Gate]:
        return self.learned.gates

    @property
    def records(self) -> dict[str, CalibrationRecord]:
        return {modality: gate.record for modality, gate in self.gates.items()}

    def learn(self, learned: Learned, rows: int, changed_rows: int) -> None:
        """Keep what was learned of `rows` memories, of which `changed_rows` have been written or deleted since."""
        self.calibrated_rows, self.changed_rows, self.margins = rows, changed_rows, {}
        self.adopt(learned)

    def adopt(self, learned: Learned) -> None:
        """Let recalls go by what was learned."""
        before, self.learned = self.learned, learned
        self._let_go(before)

    def without_kernel(self, space: str, retired: Retired) -> None:
        """A space goes on without its kernel; what was calibrated under it is forgotten. Called by storage."""
        before = self.learned
        kernels = {name: kernel for name, kernel in before.kernels.items() if name != space}
        routes = {name: route for name, route in before.routes.items() if route.holds(kernels)}
        self.learned = Learned(kernels, before.gates, routes)
        self.follow(None, [], retired.version)
        self.revised(retired.revision)
        self._let_go(before)

    def revised(self, revision: int) -> None:
        """What was learned is here as of this revision. Called by storage, in the order of the commits: else one that
        follows at once would find a gap that no other server's change is there to fill.
        """
        self.revision = revision

    def _let_go(self, before: Learned) -> None:
        """The bank forgets kernels that no recall can ask for any more: those that went out of use a change ago."""
        in_use = {kernel.kernel for kernel in self.learned.kernels.values()}
        gone = [kernel for kernel in before.kernels.values() if kernel.kernel not in in_use]
        for kernel in gone:
            self.bank.set_graph_kernel(kernel.space, None)
        for space, active in self.learned.kernels.items():
            # A graph serves one comparison; where everything goes by the kernel, it is built on the kernel's keys.
            routes = [route for name, route in self.learned.routes.items() if space in spaces_of(name)]
            by_kernel = bool(routes) and all(route.comparisons == ("kernel",) for route in routes)
            self.bank.set_graph_kernel(space, active.kernel if by_kernel else None)
        if gone:
            for old in self._retired:
                self.bank.drop_kernel(old)
            self._retired = [kernel.kernel for kernel in gone]

    def calibration_state(self) -> CalibrationState:
        """none: nothing to calibrate with; pending: not done yet; stale: too much has changed since; current."""
        if self.view().count == 0:
            return "none"
        if self.calibrated_rows is None:
            return "pending"
        return "stale" if self.changed_rows > self._redone_over(self.calibrated_rows) else "current"

    def _redone_over(self, calibrated_rows: int) -> int:
        share = STALE_SHARE if self.config.gate.interaction == "bank" else STALE_SHARE_FIXED
        return int(share * calibrated_rows)

    def calibration(self) -> CalibrationInfo:
        """The state, with when it ends and why."""
        state, then = self.calibration_state(), self.calibrated_rows
        over = None if then is None else self._redone_over(then)
        drift = f"{self.changed_rows} of {then} memories have changed since"
        why = {
            "none": "nothing is stored",
            "pending": "not calibrated yet: it follows once writes pause",
            "stale": f"{drift}, more than {over}: calibrated again once writes pause",
            "current": f"{drift}; calibrated again once more than {over} have",
        }
        if self.faulty:
            why = dict.fromkeys(why, "not calibrated before the encoders of all spaces can be used")
        return CalibrationInfo(
            state=state, rows_then=then, rows_now=self.view().count, changed_rows=self.changed_rows,
            redone_over=over, why=why[state], modalities=list(self.records.values()),
            choices=[route.info for route in self.learned.routes.values()],
        )  # fmt: skip


def rows_of(chunk: PatternChunk) -> Rows:
    """What is stored, as a bank takes it."""
    return Rows(chunk.ids, chunk.vectors, chunk.payloads, moments(chunk.expires))


def moments(expires: Sequence[int | None]) -> NDArray[np.int64] | None:
    """When memories expire, as a bank takes it."""
    if all(moment is None for moment in expires):
        return None
    return np.array([NEVER if moment is None else moment for moment in expires], np.int64)


@cache
def _absent(dimension: int) -> NDArray[np.float32]:
    """The block of a memory that lacks the space."""
    return np.zeros(dimension, dtype=np.float32)


def spaces_of(modality: str) -> tuple[str, ...]:
    """The spaces that cues of a modality fill."""
    return tuple(modality.removesuffix(":masked").split("+"))


def _decoder(spaces: Mapping[str, Space]) -> tuple[str, Decoder] | None:
    """The first space whose latents can be drawn, and what draws them."""
    encoders: dict[str, object] = {space.name: space.encoder for space in spaces.values()}
    return next(((name, encoder) for name, encoder in encoders.items() if isinstance(encoder, Decoder)), None)
