"""Spaces whose patterns were made by an encoder that is not there: it has changed, or cannot be made.

Such a space is loaded all the same, with its patterns and with this in its encoder's place. Requests that need the
space are refused with what to do; the rest of the collection works, and the space can be encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.encoders.protocol import Encoded, Encoder, Picture, Source
from service.errors import EncoderMismatch, EngramError


@dataclass(eq=False)
class AbsentEncoder:
    """An `Encoder` that encodes nothing. `fingerprint` and `dimension` are those of the patterns there are."""

    name: str
    fingerprint: str
    dimension: int
    takes: frozenset[Source]
    fault: EngramError

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """Raises the fault."""
        raise self.refusal()

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """Raises the fault."""
        raise self.refusal()

    def refusal(self) -> EngramError:
        """The fault as an exception of its own: one that is raised twice would carry both tracebacks."""
        return type(self.fault)(self.fault.detail)


def changed(collection: str, space: str, stored: str, encoder: Encoder) -> EncoderMismatch:
    """The patterns were made by another encoder than the one there is now."""
    return EncoderMismatch(
        f"space {space} of {collection} holds patterns of {stored}, but its encoder is now {encoder.fingerprint}. "
        f"Encode its memories again from their originals: {_command(collection, space)}, or "
        f"{_call(collection, space)}; or bring the former encoder back and restart"
    )


def cannot_be_made(collection: str, space: str, error: EngramError) -> EngramError:
    """The space's encoder cannot be made, with why."""
    return type(error)(
        f"space {space} of {collection} has no encoder: {error.detail}. Mend that and restart, or encode its memories "
        f"again by another encoder: {_command(collection, space)} --encoder NAME, or "
        f'{_call(collection, space)} {{"encoder": "NAME"}}'
    )


def _command(collection: str, space: str) -> str:
    return f"engram reencode {collection} {space}"


def _call(collection: str, space: str) -> str:
    return f"POST /v1/collections/{collection}/spaces/{space}/reencode"
