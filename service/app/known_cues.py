"""Known cues: made from stored memories by the declared corruptions, or supplied by a caller; and known negatives.

Rules:
- A draw repeats exactly on the same memories, and draws of another turn are independent of it.
- What a caller supplies is checked whole before it is accepted, kept as the items of a job until it is encoded, and
  with the gates from then on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from service.app.cues import CueBlocks, encode_cues, in_batches, read_parts, stack
from service.app.encoding import Parts
from service.app.gates import SEED, SuppliedCues
from service.app.live import LiveCollection
from service.app.resources import CALIBRATE_JOB, Resources
from service.app.schemas import Cue, TrainGate
from service.bank import View
from service.encoders.corruption import Corruption, Target, corrupt_picture, corrupt_text, corrupt_vectors
from service.encoders.picture import read_picture
from service.errors import EngramError, InvalidRequest, ItemError
from service.storage.jobs import Job, NewItem

SUPPLIED_VALUES_MAX = 4 * 2**20  # numbers in the cues supplied with one request: 16 MB, which stay in memory
TARGET: dict[str, Target] = {"image": "image", "text": "text", "vectors": "vector"}


@dataclass(frozen=True, eq=False)
class KnownCues:
    """Cues of one modality with the ids of their own memories, and by which corruptions they were made."""

    cues: Mapping[str, Tensor]
    owners: Sequence[str]
    corruptions: Sequence[Corruption] = ()

    def of(self, view: View) -> KnownCues:
        """Those whose memory the view still has."""
        there = [i for i, row in enumerate(view.rows_of(self.owners).tolist()) if row >= 0]
        return KnownCues({name: block[there] for name, block in self.cues.items()}, [self.owners[i] for i in there])


@dataclass(frozen=True)
class Plan:
    """A kind of cue to make: from which sources, corrupted how; of the callers' own vectors, in which spaces."""

    sources: tuple[str, ...]
    corruptions: list[Corruption]
    spaces: frozenset[str] = frozenset()


def plans(live: LiveCollection) -> Iterator[Plan]:
    """A plan of several sources fills all their spaces at once."""
    encoded = [space for space in live.spaces.values() if space.encoder is not None]
    own = [space.name for space in live.spaces.values() if space.encoder is None]
    pictures = [c for c in live.corruptions if "image" in c.applies_to]
    texts = [c for c in live.corruptions if "text" in c.applies_to]
    vectors = [c for c in live.corruptions if "vector" in c.applies_to]
    has_image = any(space.config.source == "image" for space in encoded)
    has_text = any("text" in space.encoder.takes for space in encoded if space.encoder is not None)
    for masked in (False, True):
        kinds = [c for c in pictures if c.hides == masked]
        if has_image and kinds:
            yield Plan(("image",), kinds)
            if has_text and texts:
                yield Plan(("image", "text"), kinds + texts)
    if has_text and texts:
        yield Plan(("text",), texts)
    if vectors:
        for filled in dict.fromkeys([frozenset(own), *(frozenset([name]) for name in own)]):
            if filled:
                yield Plan(("vectors",), vectors, filled)


def ids_at(view: View, rows: Tensor) -> list[str]:
    """The ids of rows (n,) that the view has."""
    return [memory_id for (memory_id,) in view.ids(rows[:, None]) if memory_id is not None]


def draw(
    live: LiveCollection, resources: Resources, ids: Sequence[str], plan: Plan, most: int, turn: int,
    progress: Callable[[float], None], chosen: Mapping[str, float] | None = None,
) -> dict[str, KnownCues]:  # fmt: skip
    """Corrupted cues by the modality they turn out to have; `turn` numbers independent draws, `chosen` are the spaces
    to fill (None: all).
    """
    made: dict[str, list[tuple[CueBlocks, str]]] = defaultdict(list)
    read = 0
    for batch in in_batches(_corrupted_cues(live, resources, ids, plan, most, turn)):
        for (memory_id, _), cue in zip(batch, encode_cues(live, [parts for _, parts in batch], chosen), strict=True):
            if isinstance(cue, CueBlocks):  # else the corruption left nothing of it
                made[cue.modality].append((cue, memory_id))
        read += len(batch)
        progress(min(1.0, read / most))
    return {
        modality: KnownCues(stack([cue for cue, _ in some]), [own for _, own in some], plan.corruptions)
        for modality, some in made.items()
    }


def _corrupted_cues(
    live: LiveCollection, resources: Resources, ids: Sequence[str], plan: Plan, most: int, turn: int
) -> Iterator[tuple[str, Parts]]:
    """Corrupted cues with the id of their own memory: every memory once per corruption, `most` at most.

    Left out: a memory that lacks what the cue is made from, that was deleted meanwhile or whose original cannot be
    read.
    """
    rng = np.random.default_rng([SEED, live.id, turn])
    first = [c for c in plan.corruptions if TARGET[plan.sources[0]] in c.applies_to]
    second = [c for c in plan.corruptions if TARGET[plan.sources[-1]] in c.applies_to]
    pairs = list(product(first, ids))
    if len(pairs) > most:
        pairs = [pairs[i] for i in np.sort(rng.choice(len(pairs), most, replace=False))]
    for position, (corruption, memory_id) in enumerate(pairs):
        try:
            parts = _corrupted(live, resources, memory_id, plan, corruption, second[position % len(second)], rng)
        except EngramError:
            continue
        if parts is not None:
            yield memory_id, parts


def _corrupted(
    live: LiveCollection, resources: Resources, memory_id: str, plan: Plan, first: Corruption, second: Corruption,
    rng: np.random.Generator,
) -> Parts | None:  # fmt: skip
    """One memory as a corrupted cue; None where it lacks what the cue is made from."""
    parts = Parts()
    if plan.spaces:
        stored = resources.repository.get_vectors(live.id, memory_id)
        if not plan.spaces <= stored.keys():
            return None
        parts.vectors = {name: corrupt_vectors(stored[name][None], first, rng)[0] for name in plan.spaces}
        return parts
    memory = resources.repository.get_memory(live.id, memory_id)
    if "image" in plan.sources:
        if memory.blob_hash is None:
            return None
        content = resources.blobs.get(memory.blob_hash)
        picture = read_picture(content, pixels_max=resources.settings.image_pixels_max)
        parts.picture = corrupt_picture(picture, first, rng)
    if "text" in plan.sources:
        if memory.text is None:
            return None
        parts.text = corrupt_text(memory.text, second, rng)
    return parts


# --- supplied by a caller ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Supplied:
    """What callers have supplied, by modality: known cues with their memories' ids, and negatives. `targets`: the
    shares that the modalities had; `target_tpr`: the one asked for now, for all.
    """

    known: Mapping[str, SuppliedCues] = field(default_factory=dict)
    negatives: Mapping[str, SuppliedCues] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    target_tpr: float | None = None

    @classmethod
    def before(cls, live: LiveCollection) -> Supplied:
        """What the gates of now were calibrated with."""
        return cls(
            {modality: gate.known for modality, gate in live.gates.items() if gate.known is not None},
            {modality: gate.negatives for modality, gate in live.gates.items() if gate.negatives is not None},
            {modality: gate.record.target_tpr for modality, gate in live.gates.items()},
        )


def enqueue_training(resources: Resources, live: LiveCollection, request: TrainGate) -> str:
    """Check what is supplied and commit the job that calibrates with it; its id.

    Raises InvalidRequest, naming each cue that is wrong by its position.
    """
    cues, negatives = request.cues or [], request.negatives or []
    most = SUPPLIED_VALUES_MAX // live.layout.dimension
    if len(cues) + len(negatives) > most:
        raise InvalidRequest(
            f"{len(cues)} cues and {len(negatives)} negatives of {live.layout.dimension} values each are too many to "
            f"keep; send at most {most} together"
        )
    if negatives and live.similarity == "neg_l2":
        raise InvalidRequest("negatives are scored by dot product; a collection compared by neg_l2 cannot use them")
    errors: list[ItemError] = []
    there = live.view().rows_of([known.id for known in cues]).tolist()
    for position, known in enumerate(cues):
        if there[position] < 0:
            errors.append(ItemError(position, "memory_not_found", f"cues.{position}: there is no memory {known.id}"))
    every = [(f"cues.{i}", i, known.cue) for i, known in enumerate(cues)]
    every += [(f"negatives.{i}", i, cue) for i, cue in enumerate(negatives)]
    for where, position, cue in every:
        try:
            read_parts(cue, live, resources.settings.image_pixels_max)
        except EngramError as error:
            errors.append(ItemError(position, error.code, f"{where}: {error.detail}"))
    if errors:
        raise InvalidRequest("; ".join(error.detail for error in errors[:10]), errors=tuple(errors))
    items = [NewItem({"known": known.id, "cue": _plain(known.cue)}) for known in cues]
    items += [NewItem({"known": None, "cue": _plain(cue)}) for cue in negatives]
    training = {
        "cues": request.cues is not None,
        "negatives": request.negatives is not None,
        "target_tpr": request.target_tpr,
    }
    return resources.enqueue(CALIBRATE_JOB, live.id, items, {"training": training})[0]


def _plain(cue: Cue) -> dict[str, Any]:
    """A cue as JSON."""
    body = cue.model_dump(mode="json", exclude={"vectors"}, exclude_none=True)
    return {**body, "vectors": {name: vector.tolist() for name, vector in (cue.vectors or {}).items()}}


def supplied_with(live: LiveCollection, resources: Resources, job: Job) -> tuple[Supplied, list[dict[str, Any]]]:
    """What the job was sent with, over what was supplied before; and the cues that nothing could be made of."""
    before = Supplied.before(live)
    training = job.payload.get("training")
    if training is None:
        return before, []
    items = resources.repository.pending_items(job.id, job.payload["items"])
    known: dict[str, list[tuple[CueBlocks, str]]] = defaultdict(list)
    negatives: dict[str, list[CueBlocks]] = defaultdict(list)
    skipped: list[dict[str, Any]] = []

    def read() -> Iterator[tuple[tuple[int, str | None], Parts]]:
        for item in items:
            cue = Cue.model_validate(item.body["cue"])
            yield (item.position, item.body["known"]), read_parts(cue, live, resources.settings.image_pixels_max)

    for batch in in_batches(read()):
        encoded = encode_cues(live, [parts for _, parts in batch], None)
        for ((position, own), _), cue in zip(batch, encoded, strict=True):
            if isinstance(cue, EngramError):
                skipped.append({"position": position, "code": cue.code, "detail": cue.detail})
            elif own is None:
                negatives[cue.modality].append(cue)
            else:
                known[cue.modality].append((cue, own))
    # Which half of the negatives joins the score must not depend on the order in which they were sent.
    rng = np.random.default_rng(SEED)
    shuffled = {modality: [some[i] for i in rng.permutation(len(some))] for modality, some in negatives.items()}
    new_known = {
        modality: SuppliedCues.of([cue for cue, _ in some], [own for _, own in some])
        for modality, some in known.items()
    }
    new_negatives = {modality: SuppliedCues.of(some) for modality, some in shuffled.items()}
    return Supplied(
        new_known if training["cues"] else before.known,
        new_negatives if training["negatives"] else before.negatives,
        before.targets,
        training["target_tpr"],
    ), skipped
