"""Every error a caller can meet, as one tree.

Rules:
- A failure the caller can do something about is an `EngramError` with a stable `code`; codes are part of the API
  and never reused.
- Foreign errors (Pillow, SQLAlchemy, the operating system) are translated where they are met, never shown.
- One mapping (`service/api/problems.py`) turns the tree into `application/problem+json`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ItemError:
    """What went wrong with one item of a batch; `item` is its position."""

    item: int
    code: str
    detail: str


class EngramError(Exception):
    """The root. `status` is the HTTP status, `code` the stable word, `title` the sentence that never varies."""

    status = 500
    code = "internal"
    title = "Something went wrong inside the server"

    def __init__(self, detail: str, *, errors: tuple[ItemError, ...] = (), retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.retry_after_s = retry_after_s


# --- the request is wrong ---------------------------------------------------------------------------------------------


class InvalidRequest(EngramError):
    status, code, title = 422, "invalid_request", "The request is not valid"


class MalformedBody(EngramError):
    status, code, title = 400, "malformed_body", "The body could not be parsed"


class BodyTooLarge(EngramError):
    status, code, title = 413, "body_too_large", "The body is larger than the server accepts"


class UnsupportedMediaType(EngramError):
    status, code, title = 415, "unsupported_media_type", "The body is of a media type that is not read here"


class MethodNotAllowed(InvalidRequest):
    status, code, title = 405, "method_not_allowed", "The path does not take this method"


class InvalidImage(InvalidRequest):
    code, title = "invalid_image", "The bytes are not an image this server can read"


class TruncatedImage(InvalidImage):
    code, title = "truncated_image", "The image ends before it should"


class ImageTooLarge(InvalidImage):
    code, title = "image_too_large", "The image has more pixels than the server accepts"


class UnsupportedImageFormat(InvalidImage):
    code, title = "unsupported_image_format", "The image format is not on the server's list"


class EmptyText(InvalidRequest):
    code, title = "empty_text", "The text is empty"


class InvalidVector(InvalidRequest):
    code, title = "invalid_vector", "The vector holds a NaN or an infinity, or is zero"


class WrongDimension(InvalidRequest):
    code, title = "wrong_dimension", "The vector has the wrong number of values"


class NothingObserved(InvalidRequest):
    code, title = "nothing_observed", "Nothing of the cue is observed"


class UnknownSpace(InvalidRequest):
    code, title = "unknown_space", "The collection has no such space"


class UnknownEncoder(InvalidRequest):
    code, title = "unknown_encoder", "There is no such encoder"


class NotDecodable(InvalidRequest):
    code, title = "not_decodable", "No space of this collection can be decoded"


class CalibrationRefused(InvalidRequest):
    code, title = "calibration_refused", "The gate cannot be calibrated"


class UnknownKernel(InvalidRequest):
    code, title = "unknown_kernel", "The collection has no such kernel in use"


class TrainingRefused(InvalidRequest):
    code, title = "training_refused", "The kernel cannot be trained"


class IdempotencyKeyReused(InvalidRequest):
    code, title = "idempotency_key_reused", "The key was used for another request before"


class VersionNotReached(InvalidRequest):
    code, title = "version_not_reached", "The collection has not come to this version"


class InvalidSnapshot(InvalidRequest):
    code, title = "invalid_snapshot", "The file is not a snapshot that can be restored here"


class SnapshotDamaged(InvalidSnapshot):
    code, title = "snapshot_damaged", "The snapshot is not what was written"


# --- who asks ---------------------------------------------------------------------------------------------------------


class Unauthorized(EngramError):
    status, code, title = 401, "unauthorized", "A valid API key is needed"


class Forbidden(EngramError):
    status, code, title = 403, "forbidden", "The API key does not allow this"


class CrossSite(EngramError):
    status, code, title = 403, "cross_site", "A web page of another site may not send this"


# --- the thing asked for ----------------------------------------------------------------------------------------------


class NotFound(EngramError):
    status, code, title = 404, "not_found", "There is no such thing"


class CollectionNotFound(NotFound):
    code, title = "collection_not_found", "There is no such collection"


class MemoryNotFound(NotFound):
    code, title = "memory_not_found", "There is no such memory"


class ContentNotFound(NotFound):
    code, title = "content_not_found", "The memory has no stored original"


class OperationNotFound(NotFound):
    code, title = "operation_not_found", "There is no such operation"


class KernelNotFound(NotFound):
    code, title = "kernel_not_found", "There is no such kernel in use"


class KeyNotFound(NotFound):
    code, title = "key_not_found", "There is no such API key"


class SnapshotNotFound(NotFound):
    code, title = "snapshot_not_found", "There is no such snapshot"


class ScheduleNotFound(NotFound):
    code, title = "schedule_not_found", "No snapshots of the collection are made at set times"


class Conflict(EngramError):
    status, code, title = 409, "conflict", "The request conflicts with what is stored"


class CollectionExists(Conflict):
    code, title = "collection_exists", "A collection of this name exists"


class CollectionNotEmpty(Conflict):
    code, title = "collection_not_empty", "A collection of this name holds memories"


class SnapshotExists(Conflict):
    code, title = "snapshot_exists", "There is another snapshot of this name"


class Duplicate(Conflict):
    code, title = "duplicate", "The collection holds nearly the same memory already, and refuses duplicates"


class EncoderMismatch(Conflict):
    code, title = "encoder_mismatch", "The collection's patterns were made by another encoder"


class EncodersChanged(Conflict):
    code, title = "encoders_changed", "An encoder of the collection has changed meanwhile"


class OriginalsMissing(Conflict):
    code, title = "originals_missing", "Memories cannot be encoded again: their originals are missing"


class AdminKeyNeeded(Conflict):
    code, title = "admin_key_needed", "Nobody would be left who may make keys"


class PreconditionFailed(EngramError):
    status, code, title = 412, "precondition_failed", "What is stored is not at the version that the request names"


class FolderInUse(Conflict):
    code, title = "folder_in_use", "Another process owns this data folder"


class LearnedElsewhere(Conflict):
    code, title = "learned_elsewhere", "Another server has learned of this collection meanwhile"


class OriginalsElsewhere(Conflict):
    code, title = "originals_elsewhere", "The originals of this database are kept somewhere else"


# --- the server cannot do it now --------------------------------------------------------------------------------------


class TooBusy(EngramError):
    status, code, title = 429, "too_busy", "The server's queue is full"


class RateLimited(EngramError):
    """`allowance`: what is allowed in a window, what is left of it, and in how many seconds there is more."""

    status, code, title = 429, "rate_limited", "More was asked than this key or address may ask"

    def __init__(
        self,
        detail: str,
        *,
        errors: tuple[ItemError, ...] = (),
        retry_after_s: int | None = None,
        allowance: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(detail, errors=errors, retry_after_s=retry_after_s)
        self.allowance = allowance


class Unavailable(EngramError):
    status, code, title = 503, "unavailable", "The server is not ready to answer"


class StorageFull(EngramError):
    status, code, title = 507, "storage_full", "There is no space left to store this"


class StorageUnavailable(Unavailable):
    code, title = "storage_unavailable", "The database or the data folder cannot be used"


class OutOfMemory(EngramError):
    status, code, title = 507, "out_of_memory", "There is not enough memory for the encoder"


class WeightsMissing(Unavailable):
    code, title = "weights_missing", "An encoder's weights are not on this machine"


class WeightsRefused(Unavailable):
    code, title = "weights_refused", "An encoder's weights are not what they are said to be"


class DeviceMissing(Unavailable):
    code, title = "device_missing", "The device that encoders shall run on is not there"


# --- met by a client --------------------------------------------------------------------------------------------------


class Unreachable(Unavailable):
    code, title = "unreachable", "No server answers"


class TimedOut(Unavailable):
    status, code, title = 504, "timed_out", "The answer took longer than was waited for"


# --- met on the command line ------------------------------------------------------------------------------------------


class NotWritable(EngramError):
    code, title = "not_writable", "The file cannot be written"


# --- the server is set up wrongly (met at start-up, on the command line) ----------------------------------------------


class InvalidSettings(EngramError):
    status, code, title = 500, "invalid_settings", "The settings are not valid"


def error_classes() -> dict[str, type[EngramError]]:
    """Every class of the error tree, by its code."""
    classes: list[type[EngramError]] = [EngramError]
    for error_class in classes:  # grows while it is walked: breadth first
        classes += error_class.__subclasses__()
    return {error_class.code: error_class for error_class in classes}
