"""Collections: make them, load them from SQL into memory, say what they are, delete them."""

from __future__ import annotations

import torch

from service.app.calibrate import ROUTE_PREFIX
from service.app.comparison import ActiveKernel
from service.app.gates import Gate
from service.app.kernel_schemas import KernelInUse
from service.app.live import Learned, LiveCollection, check_fingerprints, make_spaces
from service.app.resources import Resources
from service.app.routes import Route
from service.app.schemas import (
    CollectionConfig,
    CollectionInfo,
    SpaceInfo,
)
from service.bank import Rows
from service.core.similarity import Kernel
from service.encoders.protocol import Decoder
from service.errors import InvalidRequest
from service.storage.repository import Collection

DEVICE = "cpu"


def create(resources: Resources, name: str, config: CollectionConfig) -> LiveCollection:
    """Raises `CollectionExists`, `UnknownEncoder`, `WeightsMissing`, `InvalidRequest`."""
    spaces = make_spaces(config, resources.make_encoder)
    if config.gate.interaction != "bank" and _similarity(config) == "neg_l2":
        raise InvalidRequest(
            "a gate over prototypes or a learned matrix scores by dot product; with neg_l2 use the bank"
        )
    if config.gate.when == "path" and _similarity(config) == "neg_l2":
        raise InvalidRequest("a gate along the path scores by dot product; with neg_l2 judge the cue")
    fingerprints = {name: space.encoder.fingerprint if space.encoder else None for name, space in spaces.items()}
    row = resources.repository.create_collection(
        name, {"config": config.model_dump(mode="json"), "fingerprints": fingerprints}
    )
    live = LiveCollection(row, config, spaces, DEVICE)
    resources.add(live)
    return live


def load(resources: Resources, row: Collection) -> LiveCollection:
    """Rebuild a collection from SQL. Raises `EncoderMismatch` where its patterns were made by another encoder."""
    config = CollectionConfig.model_validate(row.config["config"])
    spaces = make_spaces(config, resources.make_encoder)
    check_fingerprints(row.name, spaces, row.config["fingerprints"])
    live = LiveCollection(row, config, spaces, DEVICE)
    live.described = resources.repository.is_described(row.id)
    kernels = {}
    for kept in resources.repository.get_kernels(row.id):
        if kept.weight is not None:
            kernels[kept.space] = ActiveKernel(kept.space, kept.number, Kernel(torch.from_numpy(kept.weight)))
            live.bank.add_kernel(kept.space, kernels[kept.space].kernel)
    layout = [(space.name, space.dimension) for space in spaces.values()]
    with resources.repository.iter_patterns(row.id, layout) as stream:
        for chunk in stream.chunks:
            live.bank.write(Rows(chunk.ids, chunk.vectors, chunk.payloads), [], stream.version)
    stored = {name: gate.record for name, gate in resources.repository.get_gates(row.id).items()}
    gates = {m: Gate.unpacked(live, record) for m, record in stored.items() if not m.startswith(ROUTE_PREFIX)}
    routes = {m.removeprefix(ROUTE_PREFIX): Route.unpacked(r) for m, r in stored.items() if m.startswith(ROUTE_PREFIX)}
    # A kernel may have been retired since: what was chosen under it goes with it.
    routes = {modality: route for modality, route in routes.items() if route.holds(kernels)}
    live.learned = Learned(kernels, gates, routes)
    if gates:
        made = next(iter(gates.values())).record
        gone = max(0, made.rows - live.bank.view().count)
        changed = gone + resources.repository.count_since(row.id, made.version)
        live.learn(Learned(kernels, gates, routes), made.rows, changed)
    while live.bank.seal_due() and live.bank.seal():
        pass
    return live


def delete(resources: Resources, name: str) -> None:
    """Raises `CollectionNotFound`. SQL first: a delete that fails leaves all as it was."""
    live = resources.lives.get(name)
    resources.repository.delete_collection(name)
    resources.broken.pop(name, None)
    if live is not None:
        resources.remove(live)


def info(live: LiveCollection) -> CollectionInfo:
    view = live.bank.view()
    spaces = {
        name: SpaceInfo(
            encoder=space.config.encoder, fingerprint=space.encoder.fingerprint if space.encoder else None,
            source=space.config.source if space.encoder else None, dimension=space.dimension,
            similarity=space.config.similarity, weight=space.weight, decodable=isinstance(space.encoder, Decoder),
        )
        for name, space in live.spaces.items()
    }  # fmt: skip
    return CollectionInfo(
        name=live.name, version=view.version, count=view.count, created_at=live.created_at.isoformat(), spaces=spaces,
        recall=live.config.recall, corruptions=[c.describe() for c in live.corruptions], gate=live.config.gate,
        calibration=live.calibration(),
        kernels=[KernelInUse(id=kernel.id, space=kernel.space) for kernel in live.learned.kernels.values()],
        indexing=live.sealing.locked() or live.bank.seal_due(), bytes=live.bank.sizes(),
    )  # fmt: skip


def _similarity(config: CollectionConfig) -> str:
    return next(iter(config.spaces.values())).similarity
