"""What the client gives back: frozen dataclasses that mirror the API's replies.

Rules:
- Each is built from the reply's dictionary, over HTTP and in process alike.
- A field that a newer server adds is passed over; a field that is missing is an error at once, not later.
- Binary content is `bytes`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from service.errors import Conflict, EngramError, Unavailable, error_classes

if TYPE_CHECKING:
    from PIL import Image

Parts = Mapping[str, type["Reply"]]


class Reply:
    """`of(body)` builds the dataclass from a reply; `PARTS` says which fields are replies themselves."""

    PARTS: ClassVar[Parts] = {}

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        try:
            return cls(**{name: cls._part(name, value) for name, value in body.items() if name in names})
        except TypeError as error:
            raise Unavailable(f"the reply is not one this client knows: {error}") from None

    @classmethod
    def _part(cls, name: str, value: Any) -> Any:
        part = cls.PARTS.get(name)
        if isinstance(value, list):
            return tuple(part.of(item) if part and item is not None else item for item in value)
        return part.of(value) if part and value is not None else value


@dataclass(frozen=True)
class KnownModel(Reply):
    options: dict[str, str]
    licence: str
    here: bool
    size_bytes: int | None


@dataclass(frozen=True)
class EncoderInfo(Reply):
    """`dimension` is None where the model decides it; `needs` says what to do where `here` is False."""

    PARTS: ClassVar[Parts] = {"models": KnownModel}

    name: str
    about: str
    takes: tuple[str, ...]
    decodes: bool
    dimension: int | None
    licence: str | None
    size_bytes: int | None
    here: bool
    needs: str | None
    models: tuple[KnownModel, ...]
    page: str


@dataclass(frozen=True)
class ApiKey(Reply):
    """`hint` is what the key begins with; `last_used_at` is to the minute."""

    id: str
    name: str
    hint: str
    scopes: dict[str, str]
    rate_limit: str | None
    concurrent_max: int | None
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None


@dataclass(frozen=True, kw_only=True)
class NewKey(ApiKey):
    """With the key itself, which is shown once."""

    key: str = field(repr=False)


@dataclass(frozen=True)
class Problem(Reply):
    code: str
    detail: str

    def as_error(self) -> EngramError:
        return error_classes().get(self.code, EngramError)(self.detail)


@dataclass(frozen=True)
class StoredItem(Reply):
    """`status` is stored | updated | queued | error."""

    PARTS: ClassVar[Parts] = {"error": Problem}

    id: str | None
    status: str
    warnings: tuple[str, ...] = ()
    error: Problem | None = None


@dataclass(frozen=True)
class StoreReply:
    """One result per memory, in their order. `operations`: of the batches still being encoded when the wait ended."""

    version: int | None
    results: tuple[StoredItem, ...]
    operations: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[StoredItem, ...]:
        return tuple(result for result in self.results if result.error is not None)


@dataclass(frozen=True)
class Updated(Reply):
    """The collection's version at which the memory changed, and what was lost of a picture or text."""

    id: str
    version: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation(Reply):
    PARTS: ClassVar[Parts] = {"error": Problem}

    id: str
    kind: str
    collection: str | None
    status: str
    progress: float
    result: dict[str, Any] | None = None
    error: Problem | None = None

    def check(self) -> None:
        """Of one that has ended: raises why it failed, and `Conflict` where it was cancelled."""
        if self.error is not None:
            raise self.error.as_error()
        if self.status != "done":
            raise Conflict(f"the operation {self.id} is {self.status}")


@dataclass(frozen=True)
class Match(Reply):
    """`text`: its caption, as it is stored. `group`: the value of the group it is listed for (`group_by`)."""

    id: str
    weight: float
    similarity: float
    text: str | None = None
    payload: dict[str, Any] | None = None
    vectors: dict[str, list[float]] | None = None
    group: str | bool | int | float | None = None


@dataclass(frozen=True)
class Dynamics(Reply):
    """`energy`: before, and after each step; None where it is no finite number. `compared_by`, `kernels`: what the
    candidates were compared by; `probability`: that the first is the cue's own, where that was chosen by.
    """

    steps: int
    converged: bool
    outcome: str
    energy: tuple[float | None, ...]
    margin: float | None
    beta: float
    support: int
    certified: bool
    error_bound: float | None
    compared_by: str = "cosine"
    kernels: tuple[str, ...] = ()
    probability: float | None = None


@dataclass(frozen=True)
class Gate(Reply):
    """`rejected_at`: 0, rejected before any step; t, fell to the origin after t steps; None, accepted."""

    score: float
    threshold: float
    target_tpr: float
    modality: str
    rejected_at: int | None


@dataclass(frozen=True)
class Drawing(Reply):
    """A decoded picture; `data` is the file's bytes."""

    media_type: str
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        data = body["base64"]  # text in JSON, bytes over gRPC
        return cls(body["media_type"], data if isinstance(data, bytes) else base64.b64decode(data))

    def image(self) -> Image.Image:
        from PIL import Image

        return Image.open(io.BytesIO(self.data))


@dataclass(frozen=True)
class Recall(Reply):
    """`verdict` is known | ambiguous | unknown | uncalibrated; None with an `error`, which only a batch has.

    `candidates`: the ids between which the cue does not decide; none where it does. What was recalled: `text`, its
    caption; `reconstruction` (see `image`); `original`, the address of the first match's own picture (its bytes:
    `Collection.content`); `completed`, how much of it has each space that the cue did not fill, from 0 to 1; `state`,
    its vectors by space (`with_vectors`).
    """

    PARTS: ClassVar[Parts] = {
        "matches": Match,
        "recall": Dynamics,
        "gate": Gate,
        "reconstruction": Drawing,
        "trace": Drawing,
        "error": Problem,
    }

    verdict: str | None
    matches: tuple[Match, ...]
    recall: Dynamics | None
    gate: Gate | None
    version: int
    timings_ms: dict[str, float]
    candidates: tuple[str, ...] = ()
    text: str | None = None
    original: str | None = None
    completed: dict[str, float] = field(default_factory=dict)
    reconstruction: Drawing | None = None
    state: dict[str, list[float]] | None = None
    trace: tuple[Drawing | None, ...] | None = None
    warnings: tuple[str, ...] = ()
    error: Problem | None = None

    def image(self) -> Image.Image | None:
        """The reconstruction as a Pillow image; None when there is none (not asked for, or the cue is unknown)."""
        return self.reconstruction.image() if self.reconstruction else None


@dataclass(frozen=True)
class Memory(Reply):
    id: str
    version: int
    text: str | None
    payload: dict[str, Any] | None
    spaces: tuple[str, ...]
    has_content: bool
    media_type: str | None
    created_at: str
    updated_at: str
    expires_at: str | None = None


@dataclass(frozen=True)
class Learning(Reply):
    """How an interaction matrix was learned; `log_likelihood` is that of a held-out pattern, before and after each
    round.
    """

    patterns: int
    rounds: int
    best_round: int
    seconds: float
    log_likelihood: tuple[float, ...]


@dataclass(frozen=True)
class Negatives(Reply):
    """`boosting` known negatives are in the score; of the others that share is let in, and would be without these."""

    boosting: int
    log_background: float | None
    held_out: int
    accept_rate: float | None
    accept_rate_without: float | None


@dataclass(frozen=True)
class ModalityCalibration(Reply):
    """What the threshold of one modality rests on; `refused` says why there is none. `cues_from`: memories | caller."""

    PARTS: ClassVar[Parts] = {"learning": Learning, "negatives": Negatives}

    modality: str
    version: int
    rows: int
    cues: int
    corruptions: tuple[str, ...]
    first_share: float
    target_tpr: float
    gate_beta: float | None
    log_lambda: float | None
    stranger_accept_rate: float | None
    cues_from: str = "memories"
    when: str = "cue"
    learning: Learning | None = None
    negatives: Negatives | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Calibration(Reply):
    """`state` is none | pending | current | stale, and `why` says so in words: it is redone once more than
    `redone_over` memories have changed since the last one, over `rows_then`.
    """

    PARTS: ClassVar[Parts] = {"modalities": ModalityCalibration}

    state: str
    modalities: tuple[ModalityCalibration, ...]
    rows_then: int | None = None
    rows_now: int | None = None
    changed_rows: int | None = None
    redone_over: int | None = None
    why: str = ""
    choices: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class CollectionInfo(Reply):
    PARTS: ClassVar[Parts] = {"calibration": Calibration}

    name: str
    version: int
    count: int
    created_at: str
    spaces: dict[str, dict[str, Any]]
    recall: dict[str, Any]
    corruptions: tuple[str, ...]
    gate: dict[str, Any]
    calibration: Calibration
    indexing: bool
    bytes: dict[str, int]
    kernels: tuple[dict[str, str], ...] = ()
    duplicates: str | dict[str, list[str]] = "warn"

    @property
    def problem(self) -> Problem | None:
        """Why the encoder of a space cannot be used, of the first of such spaces."""
        found = (space["problem"] for space in self.spaces.values() if space.get("problem") is not None)
        return next(map(Problem.of, found), None)
