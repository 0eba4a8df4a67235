"""Calibration: make cues from stored memories by the declared corruptions; learn from them what to expect of real cues.

For each modality (the spaces a cue fills; a masked picture apart) one record holds the margin that auto β rests on
(math.md 6, U-Hop's and Ramsauer's error bounds) and the RecLag threshold log λ, set conformally (RecLag, Theorem 3;
split conformal prediction). Too few cues give a record that says why there is no threshold, never a guess.

The same cues with their own memory left out are strangers of the same kind: their accept rate is reported, not
tuned on.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.app.cues import CueBlocks, Parts, encode_cues, in_batches, stack, whole_state
from service.app.live import LiveCollection
from service.app.resources import Resources
from service.app.schemas import CalibrationRecord, PrototypesSpec
from service.bank import View
from service.core.beta import auto_beta
from service.core.gate import calibrate, log_mass, prototypes
from service.core.similarity import scores
from service.encoders.corruption import Corruption, Target, corrupt_picture, corrupt_text, corrupt_vectors
from service.encoders.picture import read_picture
from service.errors import CalibrationRefused, EngramError
from service.storage.jobs import Job

CUES_MAX = (
    400  # per modality: the threshold's binomial error is about one point there, and a photograph costs some 30 ms
)
SUPPORT = 64  # rows whose mass the gate sums, in calibration and in recall alike
MARGIN_SHARE = 0.95  # share of the declared cues whose own memory auto β must settle on
STORED_SAMPLE = 64  # patterns that the margin of an uncalibrated modality is estimated on
QUIET_S = 1.0  # calibration starts when no write has come for this long,
QUIET_WAIT_MAX_S = 30.0  # or after waiting this long for quiet
TARGET: dict[str, Target] = {"image": "image", "text": "text", "vectors": "vector"}
# Calibration repeats exactly on the same memories. Not a seed that data may have been made with: noise equal to the
# stored vectors is no noise.
SEED = 0xE17A_CA1B_0C3D


def gate_scores(live: LiveCollection, cue: Mapping[str, Tensor], nearest: Tensor, record: CalibrationRecord) -> Tensor:
    """log S per cue, (batch,), by the record's interaction matrix: its prototypes, or the nearest `SUPPORT` rows of
    the bank.
    """
    assert record.gate_beta is not None
    if record.prototypes is not None:
        matrix = torch.frombuffer(bytearray(record.prototypes), dtype=torch.float32).reshape(
            -1, sum(live.spaces[name].dimension for name in cue)
        )
        mass_over = _weighted(live, whole_state(live, cue)[0], tuple(cue)) @ matrix.T
    else:
        mass_over = nearest[:, :SUPPORT]
    return log_mass(mass_over, record.gate_beta)


def _weighted(live: LiveCollection, patterns: Tensor, spaces: tuple[str, ...]) -> Tensor:
    """The blocks of `spaces` out of (batch, d) normalised patterns, scaled so that a dot product of two rows is
    their score.
    """
    total = sum(live.spaces[name].weight for name in spaces)
    parts = zip(live.spaces.values(), torch.split(patterns, list(live.blocks.widths), dim=1), strict=True)
    return torch.cat([part * math.sqrt(s.weight / total) for s, part in parts if s.name in spaces], dim=1)


def margin_for(
    live: LiveCollection, view: View, modality: str, record: CalibrationRecord | None, spaces: tuple[str, ...]
) -> float | None:
    """The margin auto β rests on: the calibration's, else what stored patterns themselves show (clean cues: an
    upper bound).
    """
    if record is not None and record.margin is not None:
        return record.margin
    return stored_margin(live, view, spaces)


def stored_margin(live: LiveCollection, view: View, spaces: tuple[str, ...]) -> float | None:
    """The median margin of stored patterns as their own cues; None with fewer than two. Kept until the bank grows
    by a tenth.
    """
    kept = live.margins.get(spaces)
    if kept is not None and abs(kept[0] - view.count) <= 0.1 * kept[0]:
        return kept[1]
    margin = None
    if view.count > 1:
        rows = view.sample(STORED_SAMPLE, SEED)
        parts = torch.split(view.gather(rows[:, None])[:, 0], list(live.blocks.widths), dim=1)
        cue = {name: part for name, part in zip(live.spaces, parts, strict=True) if name in spaces}
        weights = {name: live.spaces[name].weight for name in spaces}
        scores = view.search(cue, weights, 2).scores
        margins = scores[:, 0] - scores[:, 1]
        margins = margins[margins.isfinite()]  # a memory that lacks these spaces finds nothing, itself included
        margin = float(margins.median()) if len(margins) else None
    live.margins[spaces] = (view.count, margin)
    return margin


def calibrate_collection(
    live: LiveCollection, resources: Resources, progress: Callable[[float], None]
) -> dict[str, CalibrationRecord]:
    """Calibrate every modality that cues can be made for. Returns the records; the caller keeps them."""
    view = live.bank.view()
    rows = view.sample(min(CUES_MAX, view.count), SEED)
    ids = [memory_id for line in view.ids(rows[:, None]) for memory_id in line if memory_id is not None]
    plans = list(_plans(live))
    records: dict[str, CalibrationRecord] = {}
    for done, plan in enumerate(plans):
        cues: list[CueBlocks] = []
        own: list[str] = []
        for batch in in_batches(_corrupted_cues(live, resources, ids, plan)):
            for (memory_id, _), cue in zip(batch, encode_cues(live, [parts for _, parts in batch], None), strict=True):
                if isinstance(cue, CueBlocks):  # else the corruption left nothing of it
                    cues.append(cue)
                    own.append(memory_id)
            progress((done + min(1.0, len(cues) / CUES_MAX)) / len(plans))
        by_modality: dict[str, list[int]] = {}
        for i, cue in enumerate(cues):
            by_modality.setdefault(cue.modality, []).append(i)
        for modality, members in by_modality.items():
            records[modality] = _calibrate_modality(
                live, view, modality, [cues[i] for i in members], [own[i] for i in members], plan.corruptions
            )
    return records


@dataclass(frozen=True)
class _Plan:
    """A kind of cue to make: from which sources, corrupted how; of the callers' own vectors, in which spaces."""

    sources: tuple[str, ...]
    corruptions: list[Corruption]
    spaces: frozenset[str] = frozenset()


def _plans(live: LiveCollection) -> Iterator[_Plan]:
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
            yield _Plan(("image",), kinds)
            if has_text and texts:
                yield _Plan(("image", "text"), kinds + texts)
    if has_text and texts:
        yield _Plan(("text",), texts)
    if vectors:
        for filled in dict.fromkeys([frozenset(own), *(frozenset([name]) for name in own)]):
            if filled:
                yield _Plan(("vectors",), vectors, filled)


def _corrupted_cues(
    live: LiveCollection, resources: Resources, ids: Sequence[str], plan: _Plan
) -> Iterator[tuple[str, Parts]]:
    """Corrupted cues with the id of their own memory: every memory once per corruption, at most `CUES_MAX`.

    Left out: a memory that lacks what the cue is made from, that was deleted meanwhile or whose original cannot be
    read.
    """
    rng = np.random.default_rng([SEED, live.id])
    first = [c for c in plan.corruptions if TARGET[plan.sources[0]] in c.applies_to]
    second = [c for c in plan.corruptions if TARGET[plan.sources[-1]] in c.applies_to]
    pairs = list(product(first, ids))
    if len(pairs) > CUES_MAX:
        pairs = [pairs[i] for i in np.sort(rng.choice(len(pairs), CUES_MAX, replace=False))]
    for turn, (corruption, memory_id) in enumerate(pairs):
        try:
            parts = _corrupted(live, resources, memory_id, plan, corruption, second[turn % len(second)], rng)
        except EngramError:
            continue
        if parts is not None:
            yield memory_id, parts


def _corrupted(
    live: LiveCollection, resources: Resources, memory_id: str, plan: _Plan, first: Corruption, second: Corruption,
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


def _calibrate_modality(
    live: LiveCollection, view: View, modality: str, cues: Sequence[CueBlocks], owners: Sequence[str],
    corruptions: Sequence[Corruption],
) -> CalibrationRecord:  # fmt: skip
    cue = stack(cues)
    weights = {name: live.spaces[name].weight for name in cue}
    own = view.rows_of(owners)
    found = view.search(cue, weights, SUPPORT)
    without = view.search(cue, weights, SUPPORT, exclude=own)
    state, observed = whole_state(live, cue)
    own_scores = scores(live.blocks, view.gather(own[:, None]), state, observed)[:, 0]
    margins = own_scores - without.scores[:, 0]
    record = CalibrationRecord(
        modality=modality, version=view.version, rows=view.count, cues=len(cues),
        corruptions=[c.describe() for c in corruptions], margin=None, share=MARGIN_SHARE,
        first_share=float((margins > 0).double().mean()), target_tpr=live.config.gate.target_tpr, gate_beta=None,
        log_lambda=None, stranger_accept_rate=None,
    )  # fmt: skip
    if view.count > 1:
        norm_max = math.sqrt(len(live.spaces)) if live.similarity == "cosine" else view.norm_max
        beta = auto_beta(margins.double(), separation="softmax", norm_max=norm_max, support=SUPPORT, share=MARGIN_SHARE)
        record.margin, record.share, record.gate_beta = beta.margin, beta.share, beta.beta
    else:
        record.gate_beta = 1.0
    interaction_rows = view.count
    interaction = live.config.gate.interaction
    if isinstance(interaction, PrototypesSpec):
        matrix = _weighted(live, view.matrix()[0], tuple(cue))
        if matrix.shape[0] < interaction.prototypes:
            record.refused = f"{interaction.prototypes} prototypes need as many memories; there are {matrix.shape[0]}"
            return record
        record.prototypes = prototypes(matrix, interaction.prototypes, SEED).float().numpy().tobytes()
        interaction_rows = interaction.prototypes
    known = gate_scores(live, cue, found.scores, record)
    try:
        threshold = calibrate(known.double(), live.config.gate.target_tpr, interaction_rows)
    except CalibrationRefused as refusal:
        record.refused = refusal.detail
        return record
    record.log_lambda = threshold.log_lambda
    strangers = gate_scores(live, cue, without.scores, record)
    record.stranger_accept_rate = float((strangers > threshold.log_lambda).double().mean())
    return record


def run_calibrate_job(resources: Resources, job: Job, beat: Callable[[float], None]) -> dict[str, Any]:
    """Calibrate a collection once writes pause; another round follows by itself if it has drifted meanwhile."""
    assert job.collection_id is not None
    live = resources.live_by_id(job.collection_id)
    waiting_since = time.monotonic()
    while (now := time.monotonic()) - live.last_write_s < QUIET_S and now - waiting_since < QUIET_WAIT_MAX_S:
        time.sleep(0.05)
    live.calibration_job = None  # what is written from here on may ask for another
    rows, changed = live.bank.view().count, live.changed_rows
    records = calibrate_collection(live, resources, beat)
    dumped = {}
    for modality, record in records.items():
        packed = None if record.prototypes is None else base64.b64encode(record.prototypes).decode()
        dumped[modality] = {**record.model_dump(mode="json"), "prototypes": packed}
    resources.repository.put_gates(live.id, dumped)
    live.set_records(records, rows, live.changed_rows - changed)
    resources.calibrate_if_due(live)
    return {"modalities": [record.model_dump(mode="json") for record in records.values()]}
