"""Collections: make them, load them from SQL into memory, say what they are, delete them."""

from __future__ import annotations

from service.app.live import LiveCollection, check_fingerprints, make_spaces
from service.app.resources import Resources
from service.app.schemas import (
    CalibrationInfo,
    CalibrationRecord,
    CollectionConfig,
    CollectionInfo,
    PrototypesSpec,
    SpaceInfo,
)
from service.bank import Rows
from service.encoders.protocol import Decoder
from service.errors import InvalidRequest
from service.storage.repository import Collection

DEVICE = "cpu"


def create(resources: Resources, name: str, config: CollectionConfig) -> LiveCollection:
    """Raises `CollectionExists`, `UnknownEncoder`, `WeightsMissing`, `InvalidRequest`."""
    spaces = make_spaces(config, resources.make_encoder)
    if isinstance(config.gate.interaction, PrototypesSpec) and spaces and _similarity(config) == "neg_l2":
        raise InvalidRequest("a gate over prototypes scores by dot product; with neg_l2 use the bank")
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
    layout = [(space.name, space.dimension) for space in spaces.values()]
    with resources.repository.iter_patterns(row.id, layout) as stream:
        for chunk in stream.chunks:
            live.bank.write(Rows(chunk.ids, chunk.vectors, chunk.payloads), [], stream.version)
    while live.bank.seal_due() and live.bank.seal():
        pass
    gates = resources.repository.get_gates(row.id)
    records = {modality: CalibrationRecord.model_validate(gate.record) for modality, gate in gates.items()}
    if records:
        made = next(iter(records.values()))
        gone = max(0, made.rows - live.bank.view().count)
        live.set_records(records, made.rows, gone + resources.repository.count_since(row.id, made.version))
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
        calibration=CalibrationInfo(state=live.calibration_state(), modalities=list(live.records.values())),
        indexing=live.sealing.locked() or live.bank.seal_due(), bytes=live.bank.sizes(),
    )  # fmt: skip


def _similarity(config: CollectionConfig) -> str:
    return next(iter(config.spaces.values())).similarity
