"""Encoders by name: one table, and one instance of each (name, options) in a process.

Rules:
- Options are checked by the encoder's own model; an option that it does not know is refused, naming those it does.
- A model library is imported when an encoder that needs it is asked for, not before.
- An encoder is loaded once: who asks while it loads waits for it, and each has a lock of its own so that nobody else
  does.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

from service.encoders.device import check_device
from service.encoders.halving import is_out_of_memory
from service.encoders.protocol import Encoder
from service.errors import InvalidRequest, OutOfMemory, UnknownEncoder

INSTANCES_MAX = 16
"""Encoders kept ready; the one asked for longest ago is let go first. A server has a handful, and a network is up to
gigabytes.
"""

_Build = Callable[[Any, int, str], Encoder]
"""Options (of the encoder's own model), threads, device → the encoder, loaded."""


def _pixels() -> tuple[type[BaseModel], _Build]:
    from service.encoders.pixels import Pixels, PixelsOptions

    return PixelsOptions, lambda options, threads, device: Pixels(options)


def _codec() -> tuple[type[BaseModel], _Build]:
    from service.encoders import codec

    return codec.CodecOptions, lambda options, threads, device: codec.make(options, device=device)


def _bridge() -> tuple[type[BaseModel], _Build]:
    from service.encoders.bridge import Bridge, BridgeOptions

    return BridgeOptions, lambda options, threads, device: Bridge(options, threads=threads, device=device)


def _latents(name: str) -> tuple[type[BaseModel], _Build]:
    from service.encoders import latents

    return latents.LatentOptions, lambda options, threads, device: latents.make(name, options, device=device)


def _dvae() -> tuple[type[BaseModel], _Build]:
    from service.encoders.dvae import DVAEOptions, dvae

    return DVAEOptions, lambda options, threads, device: dvae(options, device=device)


def _sentence() -> tuple[type[BaseModel], _Build]:
    from service.encoders.sentence import SentenceOptions, sentence

    return SentenceOptions, lambda options, threads, device: sentence(options, threads=threads, device=device)


def _pixel_text() -> tuple[type[BaseModel], _Build]:
    from service.encoders.pixel_text import PixelText, PixelTextOptions

    def build(options: PixelTextOptions, threads: int, device: str) -> Encoder:
        return PixelText(make(options.encoder, options.options, threads=threads, device=device))

    return PixelTextOptions, build


def _open_clip() -> tuple[type[BaseModel], _Build]:
    from service.encoders.clip import OpenClip, OpenClipOptions

    return OpenClipOptions, lambda options, threads, device: OpenClip(options, device=device)


_TABLE: dict[str, Callable[[], tuple[type[BaseModel], _Build]]] = {
    "codec": _codec,
    "pixels": _pixels,
    "bridge": _bridge,
    "open_clip": _open_clip,
    "vq": partial(_latents, "vq"),
    "kl": partial(_latents, "kl"),
    "tiny": partial(_latents, "tiny"),
    "dvae": _dvae,
    "sentence": _sentence,
    "pixel_text": _pixel_text,
}


@dataclass
class _Slot:
    lock: threading.Lock = field(default_factory=threading.Lock)
    encoder: Encoder | None = None


_slots: OrderedDict[tuple[str, str, int, str], _Slot] = OrderedDict()
_slots_lock = threading.Lock()


def names() -> tuple[str, ...]:
    """The encoders there are."""
    return tuple(_TABLE)


def make(name: str, options: Mapping[str, object], *, threads: int = 1, device: str = "cpu") -> Encoder:
    """The encoder of that name with those options, loaded; the same instance for the same arguments.

    `threads` bounds the inference sessions that have threads of their own; torch's are the process's. Raises
    `UnknownEncoder`, `InvalidRequest` for options the encoder does not take, `DeviceMissing`, `WeightsMissing`,
    `WeightsRefused`, and `OutOfMemory` when the model does not fit.
    """
    if name not in _TABLE:
        raise UnknownEncoder(f"there is no encoder {name!r}; there are {', '.join(names())}")
    model, build = _TABLE[name]()
    try:
        checked = model.model_validate(dict(options))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'options'}: {item['msg']}" for item in error.errors())
        accepted = ", ".join(model.model_fields) or "none"
        raise InvalidRequest(f"options of the encoder {name!r}: {wrong} (it takes: {accepted})") from error
    key = (name, checked.model_dump_json(), threads, device)
    with _slots_lock:
        slot = _slots.setdefault(key, _Slot())
        _slots.move_to_end(key)
        if len(_slots) > INSTANCES_MAX:
            _slots.popitem(last=False)
    with slot.lock:
        if slot.encoder is None:
            slot.encoder = _built(name, build, checked, threads, check_device(device))
        return slot.encoder


def _built(name: str, build: _Build, options: BaseModel, threads: int, device: str) -> Encoder:
    try:
        return build(options, threads, device)
    except Exception as error:
        if is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__)):
            raise OutOfMemory(f"the encoder {name!r} does not fit in the memory of {device}") from error
        raise
