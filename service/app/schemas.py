"""What callers send and get: the one contract shared by REST, the in-process client and, later, gRPC.

Rules:
- None in a recall option means "the collection's default"; the collection's own defaults are `RecallDefaults`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    Field,
    JsonValue,
    RootModel,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.functional_validators import SkipValidation

from service.app.fields import (
    BATCH_MAX,
    GROUP_SIZE_MAX,
    LIMIT_MAX,
    SPACES_MAX,
    STEPS_MAX,
    SUPPORT_MAX,
    WAIT_MAX_S,
    AtVersion,
    Base64,
    IdempotencyKey,
    MemoryId,
    Moment,
    Name,
    Payload,
    Reply,
    Request,
    Text,
    Vector,
)
from service.app.filter_schemas import IDS_MAX, FilterSpec, Key
from service.app.gate_schemas import CalibrationInfo, GateConfig, TargetTpr
from service.app.kernel_schemas import KernelInUse, TrainKernel
from service.core.names import ALPHA_MAX, Separation, Similarity, entmax
from service.encoders.cards import Card
from service.encoders.corruption import Corruption
from service.encoders.picture import PictureFormat
from service.encoders.protocol import DIMENSION_MAX, Source

# --- collections ------------------------------------------------------------------------------------------------------


SEPARATIONS_SERVED = (
    f'softmax, sparsemax, max, and {{"entmax": α}} with α from 1 (softmax) over 2 (sparsemax) to {ALPHA_MAX:g}'
)


class EntmaxSpec(Request):
    """α-entmax: softmax at α = 1, sparsemax at 2, towards max as α grows."""

    entmax: float = Field(ge=1, le=ALPHA_MAX)


def _named_separation(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """One sentence in place of a fault from every member of the union."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError(f"served are {SEPARATIONS_SERVED}, not {repr(value)[:60]}") from None


SeparationSpec = Annotated[Literal["softmax", "sparsemax", "max"] | EntmaxSpec, WrapValidator(_named_separation)]
Beta = Literal["auto"] | Annotated[float, Field(gt=0, le=1e6)]
KernelChoice = Annotated[str, Field(min_length=1, max_length=80, description="auto, none, or a kernel's id")]
Support = Literal["dense"] | Annotated[int, Field(ge=1, le=SUPPORT_MAX)]
Weight = Annotated[float, Field(gt=0, le=1e6)]


def separation_of(spec: SeparationSpec) -> Separation:
    return entmax(spec.entmax) if isinstance(spec, EntmaxSpec) else spec


class SpaceConfig(Request):
    """A named latent space: made by an encoder from the memory's image or text, or filled by the caller's own
    vectors.
    """

    encoder: str | None = Field(default=None, description="an encoder's name; absent: the caller sends vectors")
    options: dict[str, Any] = Field(default_factory=dict, description="the encoder's options")
    source: Source = Field(default="image", description="the part of a memory that the encoder reads")
    dimension: int | None = Field(default=None, ge=1, le=DIMENSION_MAX, description="needed without an encoder")
    similarity: Similarity = "cosine"
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.encoder is None and self.dimension is None:
            raise ValueError("a space needs an encoder, or a dimension for the caller's own vectors")
        if self.encoder is None and self.options:
            raise ValueError("options belong to an encoder, and this space has none")
        if self.encoder is not None and self.dimension is not None:
            raise ValueError("an encoder decides the dimension; leave it out")
        return self


class RecallDefaults(Request):
    """How a collection recalls unless the request says otherwise."""

    separation: SeparationSpec = "softmax"
    beta: Beta = "auto"
    support: Support = 64
    update_steps_max: int = Field(default=3, ge=0, le=STEPS_MAX)
    step_size: float = Field(default=1.0, gt=0, le=1)
    clamp_observed: bool = False
    kernel: Literal["auto", "none"] = Field(
        default="auto", description="auto: by the comparison that is most probably right, cue by cue, once trained"
    )


def default_spaces() -> dict[str, SpaceConfig]:
    return {
        "image": SpaceConfig(encoder="codec"),
        "joint": SpaceConfig(encoder="bridge"),
        "text": SpaceConfig(encoder="sentence", source="text"),
    }


class RefuseDuplicates(Request):
    """Spaces, one of which is enough to refuse a memory for: `["image"]` takes no photograph twice, whatever its
    caption.
    """

    refuse: list[Name] = Field(min_length=1, max_length=SPACES_MAX)


def _named_duplicates(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """As `_named_separation`."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError(f'is warn, refuse or {{"refuse": [spaces]}}, not {repr(value)[:60]}') from None


Duplicates = Annotated[Literal["warn", "refuse"] | RefuseDuplicates, WrapValidator(_named_duplicates)]


class CollectionConfig(Request):
    """PUT /v1/collections/{c}. With no spaces it gets the default ones: `image`, `joint`, `text`."""

    spaces: dict[Name, SpaceConfig] = Field(default_factory=default_spaces, min_length=1, max_length=SPACES_MAX)
    recall: RecallDefaults = Field(default_factory=RecallDefaults)
    corruptions: list[Corruption] | None = Field(
        default=None, min_length=1, max_length=32, description="how cues differ from memories; absent: mild ones"
    )
    gate: GateConfig = Field(default_factory=GateConfig)
    duplicates: Duplicates = Field(
        default="warn",
        description="warn: a memory nearly the same as another, in some of its spaces or in all, is stored with a "
        "warning; refuse: one that is nearly the same in all of them is not stored (its error is `duplicate`); "
        "{refuse: [spaces]}: nor one that is so in any of these. To refuse, callers' own vectors are searched for as "
        "they are stored, which takes longer than storing them",
    )

    @model_validator(mode="after")
    def _duplicates_of_spaces(self) -> Self:
        if self.duplicates == "warn":
            return self
        if any(space.similarity == "dot" for space in self.spaces.values()):
            raise ValueError("duplicates cannot be refused under dot: the largest product is not the nearest vector")
        named = [] if self.duplicates == "refuse" else self.duplicates.refuse
        if unknown := [name for name in named if name not in self.spaces]:
            raise ValueError(f"duplicates names {', '.join(unknown)}; the spaces are {', '.join(self.spaces)}")
        return self

    @model_validator(mode="after")
    def _one_similarity(self) -> Self:
        kinds = {space.similarity for space in self.spaces.values()}
        if kinds != {"cosine"} and len(self.spaces) > 1:
            raise ValueError("dot and neg_l2 see raw values, so a collection that uses one of them has one space")
        return self


class EncoderList(Reply):
    encoders: list[Card]


class Problem(Reply):
    code: str
    detail: str


class SpaceInfo(Reply):
    encoder: str | None
    fingerprint: str | None
    source: Source | None
    dimension: int
    similarity: Similarity
    weight: float
    decodable: bool
    problem: Problem | None = Field(
        default=None, description="why its encoder cannot be used; what needs the space is refused until it can"
    )


class CollectionInfo(Reply):
    name: str
    version: int
    count: int
    created_at: str
    spaces: dict[str, SpaceInfo]
    recall: RecallDefaults
    corruptions: list[str]
    gate: GateConfig
    duplicates: Duplicates
    calibration: CalibrationInfo
    kernels: list[KernelInUse]
    indexing: bool = Field(description="graphs are due or being built: answers are as right meanwhile, only slower")
    bytes: dict[str, int] = Field(description="memory held by the bank, by kind")


class CollectionList(Reply):
    collections: list[CollectionInfo]


# --- store ------------------------------------------------------------------------------------------------------------


class ImageInput(Request):
    base64: Base64 = Field(description="the file's bytes: PNG, JPEG, WebP, GIF, BMP or TIFF")


class MemoryInput(Request):
    id: MemoryId | None = Field(default=None, description="yours; absent: one is made. Storing an id again replaces it")
    image: ImageInput | None = None
    text: Text | None = None
    vectors: dict[Name, Vector] | None = None
    payload: Payload | None = None
    expires_at: Moment | None = Field(default=None, description="from then on it is not there any more")
    if_version: int | None = Field(
        default=None, ge=0, description="store it only if the memory is at this version; 0: only if there is none"
    )


MEMORY_REF: dict[str, JsonValue] = {"$ref": "#/components/schemas/MemoryInput"}  # documented, and checked item by item


class StoreRequest(Request):
    """Items are checked one by one: a bad one is reported under its position and the rest are stored."""

    memories: list[SkipValidation[Any]] = Field(
        min_length=1, max_length=BATCH_MAX, json_schema_extra={"items": MEMORY_REF}
    )
    wait: bool = True
    timeout_s: float = Field(default=30, gt=0, le=WAIT_MAX_S)
    idempotency_key: IdempotencyKey | None = None


class ItemProblem(Reply):
    """What is wrong with one item of a batch; `item` is its position."""

    item: int
    code: str
    detail: str


class ProblemDetails(Reply):
    """application/problem+json (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[ItemProblem] = Field(default=[], description="of a batch: what is wrong with which item")


class StoredItem(Reply):
    id: str | None
    status: Literal["stored", "updated", "queued", "error"]
    warnings: list[str] = Field(default=[])
    error: Problem | None = None


class StoreReply(Reply):
    version: int | None
    results: list[StoredItem]
    operation_id: str | None = None


class Operation(Reply):
    id: str
    kind: str
    collection: str | None
    status: Literal["queued", "running", "done", "failed", "cancelled", "dead"]
    progress: float
    result: dict[str, Any] | None = None
    error: Problem | None = None


class OperationList(Reply):
    operations: list[Operation]


# --- recall -----------------------------------------------------------------------------------------------------------


class Cue(Request):
    """What is remembered of a memory: any of a text, an image (with a mask of what is missing) and vectors."""

    text: Text | None = None
    image: ImageInput | None = None
    mask: ImageInput | None = Field(default=None, description="an image, white where the cue's image is missing")
    vectors: dict[Name, Vector] | None = None

    @model_validator(mode="after")
    def _mask_needs_image(self) -> Self:
        if self.mask is not None and self.image is None:
            raise ValueError("a mask needs an image")
        return self


class KnownCue(Request):
    """A cue and the memory that it is a cue of."""

    cue: Cue
    id: MemoryId


class TrainGate(Request):
    """Calibrate again. What is supplied stays in use, also when the calibration is redone by itself; a list that is
    absent keeps what was supplied before, and an empty one forgets it.
    """

    what: Literal["gate"]
    cues: list[KnownCue] | None = Field(
        default=None,
        max_length=BATCH_MAX,
        description="known cues: they set the thresholds of the modalities that they fill, in place of made ones",
    )
    negatives: list[Cue] | None = Field(
        default=None,
        max_length=BATCH_MAX,
        description="cues of what was never stored: one half joins the score, the other says how many are let in",
    )
    target_tpr: TargetTpr | None = Field(default=None, description="absent: what it was")


class TrainRequest(RootModel[Annotated[TrainGate | TrainKernel, Field(discriminator="what")]]):
    """What to train; by `what` one of two requests."""


class DrawingSpec(Request):
    """How a state is drawn: at the codec's size, without further loss (WebP is its lossless kind)."""

    format: PictureFormat = "png"


def _named_format(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """As `_named_separation`."""
    try:
        return check(value)
    except ValidationError:
        formats = " or ".join(get_args(PictureFormat))
        raise ValueError(f'is true, false or {{"format": {formats}}}, not {repr(value)[:60]}') from None


Draw = Annotated[bool | DrawingSpec, WrapValidator(_named_format)]


def format_of(draw: bool | DrawingSpec) -> PictureFormat | None:
    """None: nothing is drawn."""
    return draw.format if isinstance(draw, DrawingSpec) else "png" if draw else None


class RecallOptions(Request):
    limit: int = Field(default=5, ge=1, le=LIMIT_MAX)
    offset: int = Field(default=0, ge=0, description="matches to pass over, of those in the same order")
    filter: FilterSpec | None = Field(default=None, description="recall among the memories that it keeps alone")
    exclude: list[MemoryId] = Field(default_factory=list, max_length=IDS_MAX, description="ids that are left out")
    score_threshold: float | None = Field(
        default=None, description="the least similarity (before any step) of a match that is listed"
    )
    group_by: Key | None = Field(
        default=None,
        description="a payload's key, as in filters: `limit` and `offset` then count groups of memories with one "
        "value, and each match says its `group`. Groups come by their best match. A memory without the key is in no "
        "group and not listed; one with an array there is in the group of each of its elements. min(limit, groups "
        "there are) come back: memories beyond the support by their similarity, with the weight 0. Weights are of "
        "memories, not of groups, as they are without groups",
    )
    group_size: int = Field(
        default=1, ge=1, le=GROUP_SIZE_MAX, description="memories of a group that are listed, the best ones"
    )
    exclude_self: bool = Field(
        default=True, description="of a cue that is a stored memory: leave that one out, as if it were in `exclude`"
    )
    spaces: dict[Name, Weight] | None = Field(default=None, description="use these spaces only, with these weights")
    support: Support | None = None
    exact: bool = False
    separation: SeparationSpec | None = None
    beta: Beta | None = None
    update_steps_max: int | None = Field(default=None, ge=0, le=STEPS_MAX)
    step_size: float | None = Field(default=None, gt=0, le=1)
    clamp_observed: bool | None = None
    kernel: KernelChoice | None = None
    gate: bool = True
    certify: bool = False
    reconstruct: Draw = Field(
        default=False, description='decode the settled state: true (PNG), or {"format": "png" | "webp"}'
    )
    with_payload: bool = True
    with_text: bool = Field(default=True, description="the captions, and the address of the original")
    with_vectors: bool = Field(default=False, description="the matches' vectors, and the settled state's")
    trace: Draw = Field(
        default=False, description="decode the state before the first and after every step; true, or as `reconstruct`"
    )

    @model_validator(mode="after")
    def _within_reach(self) -> Self:
        if self.offset + self.limit > SUPPORT_MAX:
            raise ValueError(f"offset and limit are at most {SUPPORT_MAX} together; a scroll goes on without end")
        if self.group_by is None and "group_size" in self.model_fields_set:
            raise ValueError("group_size goes with group_by")
        if self.limit * self.group_size > LIMIT_MAX:
            raise ValueError(f"limit times group_size, the matches of one answer, is at most {LIMIT_MAX}")
        return self


class RecallCue(Cue):
    """As a cue, or a memory that is stored: then the cue is its own patterns, which nothing needs to encode."""

    id: MemoryId | None = Field(
        default=None,
        description="more like this memory, by its own patterns in the spaces that are searched. The verdict is on its "
        "nearest other memory: known, that one is so like it as to pass for its origin; unknown (the usual), none is",
    )

    @model_validator(mode="after")
    def _id_alone(self) -> Self:
        if self.id is not None and len(self.model_fields_set) > 1:
            raise ValueError("an id is a cue by itself, without text, image, mask and vectors")
        return self


class RecallRequest(RecallOptions, AtVersion):
    cue: RecallCue | None = None
    cues: list[RecallCue] | None = Field(default=None, min_length=1, max_length=BATCH_MAX)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.cue is None) == (self.cues is None):
            raise ValueError("send either cue or cues")
        return self
