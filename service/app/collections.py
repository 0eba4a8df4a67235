"""Collections: make them, load them from SQL into memory, say what they are, delete them."""

from __future__ import annotations

import structlog
import torch
from pydantic import ValidationError

from service.app.absent import AbsentEncoder, cannot_be_made, changed
from service.app.calibrate import ROUTE_PREFIX
from service.app.comparison import ActiveKernel
from service.app.encoding import run_once
from service.app.fields import faults
from service.app.gates import Gate
from service.app.kernel_schemas import KernelInUse
from service.app.live import Learned, LiveCollection, Space, make_space, make_spaces, rows_of
from service.app.resources import Resources
from service.app.routes import Route
from service.app.schemas import (
    CollectionConfig,
    CollectionInfo,
    Problem,
    SpaceInfo,
)
from service.core.similarity import Kernel
from service.encoders.protocol import Decoder
from service.errors import CollectionNotFound, EngramError, InvalidRequest, InvalidVector, StorageUnavailable
from service.storage.memories import Drafted
from service.storage.payload_indexes import indexed_keys
from service.storage.repository import Collection

log = structlog.get_logger()

DEVICE = "cpu"
REENCODED_AT = "reencoded_at"  # in a collection's row: its version when an encoder of it last changed


def create(resources: Resources, name: str, config: CollectionConfig) -> LiveCollection:
    """Raises `CollectionExists`, `UnknownEncoder`, `WeightsMissing`, `OutOfMemory`, `InvalidRequest`."""
    spaces = make_spaces(config, resources.make_encoder)
    if config.gate.interaction != "bank" and _similarity(config) == "neg_l2":
        raise InvalidRequest(
            "a gate over prototypes or a learned matrix scores by dot product; with neg_l2 use the bank"
        )
    if config.gate.when == "path" and _similarity(config) == "neg_l2":
        raise InvalidRequest("a gate along the path scores by dot product; with neg_l2 judge the cue")
    for encoder in {space.encoder: None for space in spaces.values() if space.encoder}:
        run_once(encoder)  # rather now than while the first memory or cue waits
    fingerprints = {name: space.encoder.fingerprint if space.encoder else None for name, space in spaces.items()}
    row = resources.repository.create_collection(
        name, {"config": config.model_dump(mode="json"), "fingerprints": fingerprints}
    )
    live = LiveCollection(row, config, spaces, DEVICE)
    resources.add(live)
    return live


def load(resources: Resources, row: Collection) -> LiveCollection:
    """Rebuild a collection from SQL; a space whose encoder is not what it was is marked. Raises `InvalidRequest`."""
    try:
        config = CollectionConfig.model_validate(row.config["config"])
    except ValidationError as error:
        raise InvalidRequest(f"its configuration is none that this version knows: {faults(error)}") from None
    live = LiveCollection(row, config, _load_spaces(resources, row, config), DEVICE)
    live.described = resources.repository.is_described(row.id)
    kernels = _add_kernels(resources, live)
    fill(resources, live)
    _learn(resources, live, row, kernels)
    while live.bank.seal_due() and live.bank.seal():
        pass
    live.index()
    return live


def relearn(resources: Resources, live: LiveCollection) -> bool:
    """Bring what another server has learned of a collection; False where its configuration is another one now, and it
    is to be loaded anew. Raises `CollectionNotFound`.
    """
    row = resources.repository.get_collection(live.name)
    if row.id != live.id:
        raise CollectionNotFound(f"there is no collection {live.name}")
    if row.config["config"] != live.config.model_dump(mode="json"):
        return False
    _learn(resources, live, row, _add_kernels(resources, live))
    live.indexed = indexed_keys(row.config)
    live.index()
    live.revision = row.revision
    return True


def _add_kernels(resources: Resources, live: LiveCollection) -> dict[str, ActiveKernel]:
    """The kernels in use by space, known to the bank; those that are in use here already are the same objects."""
    kernels = {}
    for kept in resources.repository.get_kernels(live.id):
        if kept.weight is None:
            continue
        before = live.learned.kernels.get(kept.space)
        if before is not None and before.number == kept.number:
            kernels[kept.space] = before
            continue
        kernels[kept.space] = ActiveKernel(kept.space, kept.number, Kernel(torch.from_numpy(kept.weight)))
        live.bank.add_kernel(kept.space, kernels[kept.space].kernel)
    return kernels


def _learn(resources: Resources, live: LiveCollection, row: Collection, kernels: dict[str, ActiveKernel]) -> None:
    """Let recalls go by the kernels, and by the calibration records that are stored."""
    stored = {name: gate.record for name, gate in resources.repository.get_gates(row.id).items()}
    gates = {m: Gate.unpacked(live, record) for m, record in stored.items() if not m.startswith(ROUTE_PREFIX)}
    routes = {m.removeprefix(ROUTE_PREFIX): Route.unpacked(r) for m, r in stored.items() if m.startswith(ROUTE_PREFIX)}
    # A kernel may have been retired since: what was chosen under it goes with it.
    routes = {modality: route for modality, route in routes.items() if route.holds(kernels)}
    made = next(iter(gates.values())).record if gates else None
    # Of before a re-encoding: what it left is of the other spaces, and the calibration is still to be done again.
    if made is not None and made.version >= row.config.get(REENCODED_AT, 0):
        gone = max(0, made.rows - live.view().count)
        changed = gone + resources.repository.count_since(row.id, made.version)
        live.learn(Learned(kernels, gates, routes), made.rows, changed)
    else:
        live.adopt(Learned(kernels, gates, routes))


def fill(resources: Resources, live: LiveCollection, drafted: Drafted | None = None) -> None:
    """Bring what is stored to an empty bank; of one space, if told so, a job's drafts. Raises `StorageUnavailable` for
    damaged rows.
    """
    layout = [(space.name, space.dimension) for space in live.spaces.values()]
    try:
        with resources.repository.iter_patterns(live.id, layout, drafted=drafted) as stream:
            for chunk in stream.chunks:
                live.bank.write(rows_of(chunk), [], stream.version)
    except (ValueError, InvalidVector):
        raise StorageUnavailable(f"a pattern of {live.name} is damaged: engram fsck says which, and more") from None


def _load_spaces(resources: Resources, row: Collection, config: CollectionConfig) -> dict[str, Space]:
    """The spaces as they were when their patterns were made, or marked with why they are not (`AbsentEncoder`)."""
    spaces = {}
    for name, space in config.spaces.items():
        stored = row.config["fingerprints"].get(name)
        made: Space | None = None
        try:
            made = make_space(name, space, resources.make_encoder)
        except EngramError as error:
            fault = cannot_be_made(row.name, name, error)
        else:
            if made.encoder is None or made.encoder.fingerprint == stored:
                spaces[name] = made
                continue
            fault = changed(row.name, name, stored, made.encoder)
        log.error("a space cannot be used", collection=row.name, space=name, code=fault.code, detail=fault.detail)
        dimension = resources.repository.pattern_dimension(row.id, name) or (made.dimension if made is not None else 1)
        takes = made.encoder.takes if made is not None and made.encoder is not None else frozenset({space.source})
        absent = AbsentEncoder(space.encoder or "", stored, dimension, takes, fault)
        spaces[name] = Space(name, space, dimension, absent)
    return spaces


def delete(resources: Resources, name: str) -> None:
    """Raises `CollectionNotFound`. SQL first: a delete that fails leaves all as it was."""
    live = resources.lives.get(name)
    resources.repository.delete_collection(name)
    resources.broken.pop(name, None)
    if live is not None:
        resources.remove(live)
    resources.tell(False)


def info(live: LiveCollection) -> CollectionInfo:
    view = live.view()
    spaces = {
        name: SpaceInfo(
            encoder=space.config.encoder, fingerprint=space.encoder.fingerprint if space.encoder else None,
            source=space.config.source if space.encoder else None, dimension=space.dimension,
            similarity=space.config.similarity, weight=space.weight, decodable=isinstance(space.encoder, Decoder),
            problem=None if (fault := space.fault) is None else Problem(code=fault.code, detail=fault.detail),
        )
        for name, space in live.spaces.items()
    }  # fmt: skip
    return CollectionInfo(
        name=live.name, version=view.version, count=view.count, created_at=live.created_at.isoformat(), spaces=spaces,
        recall=live.config.recall, corruptions=[c.describe() for c in live.corruptions], gate=live.config.gate,
        duplicates=live.config.duplicates,
        calibration=live.calibration(),
        kernels=[KernelInUse(id=kernel.id, space=kernel.space) for kernel in live.learned.kernels.values()],
        indexing=live.sealing.locked() or live.bank.seal_due(), bytes=live.bank.sizes(),
    )  # fmt: skip


def _similarity(config: CollectionConfig) -> str:
    return next(iter(config.spaces.values())).similarity
