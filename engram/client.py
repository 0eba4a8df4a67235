"""The client: collections, stored and recalled, over HTTP or in process.

Rules:
- Both ways give the same replies and raise the same errors; only `Client(...)` differs.
- An image is a path, the file's bytes, a Pillow image of any mode, or a uint8 or boolean array of
  (height, width[, channels]).
- A mask is an image, white (or True) where the cue's image is missing.
- A batch reports per item: a picture that cannot be read does not stop the others from being stored.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from engram.replies import CollectionInfo, EncoderInfo, Memory, Operation, Problem, Recall, StoredItem, StoreReply
from engram.reports import Diagnostics
from engram.sending import Request, answered
from engram.transport import WAIT_MAX_S, Body, HttpTransport, Transport
from service.errors import EngramError, InvalidImage, InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike = str | Path | bytes | Image | NDArray[np.uint8] | NDArray[np.bool_]

DEFAULT_URL = "http://127.0.0.1:8000"
BATCH = 64  # memories a request: an encoder's batch or two, so that progress shows and one request stays short
BATCH_BYTES_MAX = 24 * 2**20  # pictures in one request: well under what a server accepts by default (64 MiB)
CONVERTED = {
    "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "La": "LA", "PA": "RGBA", "RGBa": "RGBA",
}  # colour modes of Pillow's that PNG does not have  # fmt: skip
WIDE_MODES = ("I", "F", "I;16L")  # nor these: they go as TIFF, and the engine scales them to 8 bits as in any file
PAGE = 256  # memories of a scroll's page: some hundred kilobytes of payloads and texts
POLL_S = 0.2  # between two looks at a calibration, which takes seconds


class Client:
    """`Client()` talks to a server; `Client(path="./memories")` runs the same engine in this process, on that folder.

    Raises `FolderInUse`, naming the owner's pid and address, when another process owns the folder.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        path: str | Path | None = None,
        api_key: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        if path is not None and (url is not None or api_key is not None):
            raise InvalidRequest(
                "path opens a folder in this process; url and api_key belong to a server: give one or the other"
            )
        if not 0 < timeout_s <= WAIT_MAX_S:
            raise InvalidRequest(f"timeout_s is {timeout_s:g}, and must be above 0 and at most {WAIT_MAX_S:g}")
        self.in_process = path is not None
        self._timeout_s = timeout_s
        self._transport: Transport
        if path is None:
            self._transport = HttpTransport(url or DEFAULT_URL, api_key, timeout_s)
        else:
            from engram.local import LocalTransport  # brings torch, which a client of a server does without

            self._transport = LocalTransport(Path(path))

    def create_collection(self, name: str, spaces: Mapping[str, Any] | None = None, **config: Any) -> Collection:
        """Make a collection. `spaces` absent: the default ones; `config`: the API's `corruptions`, `recall`, `gate`,
        `duplicates`.
        """
        given = {"spaces": spaces, **config}
        self._transport.call("create_collection", {"collection": name}, _given(**given))
        return self.collection(name)

    def collection(self, name: str) -> Collection:
        """A handle; nothing is asked of the engine until it is used."""
        return Collection(name, self._transport, self._timeout_s)

    def collections(self) -> list[CollectionInfo]:
        return [CollectionInfo.of(body) for body in self._transport.call("list_collections", {})["collections"]]

    def encoders(self) -> list[EncoderInfo]:
        """The encoders there are, and whether their weights are where the engine runs."""
        return [EncoderInfo.of(body) for body in self._transport.call("list_encoders", {})["encoders"]]

    def delete_collection(self, name: str) -> None:
        self._transport.call("delete_collection", {"collection": name})

    def operation(self, operation_id: str) -> Operation:
        return Operation.of(self._transport.call("get_operation", {"id": operation_id}))

    def cancel(self, operation_id: str) -> Operation:
        """End an operation that is queued or running; what it has done so far is kept. Raises `Conflict`."""
        return Operation.of(self._transport.call("cancel_operation", {"id": operation_id}))

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Collection:
    """One collection of a client; made by `Client.collection`."""

    def __init__(self, name: str, transport: Transport, timeout_s: float) -> None:
        self.name = name
        self._transport = transport
        self._timeout_s = timeout_s

    def store(
        self,
        memories: Iterable[Mapping[str, Any]],
        *,
        batch: int = BATCH,
        wait: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> StoreReply:
        """Store memories: `{"id"?, "image"?, "text"?, "vectors"?, "payload"?}`; an id stored again is replaced.

        Sent in requests of `batch` memories, a few of which are under way at once; `progress` is called with the number
        of memories of each request, in their order, once it is answered. With `wait` a memory is recallable when its
        result is there; one still being encoded after the client's `timeout_s` is "queued", and its operation is in
        the reply.
        """
        results: list[StoredItem] = []
        operations: list[str] = []
        version: int | None = None

        def send(sent: list[Body]) -> Body:
            return self._call("store", {"memories": sent, "wait": wait, "timeout_s": self._timeout_s})

        for request, reply in answered(_requests(memories, batch), send):
            answers: Iterator[StoredItem] = iter(())
            if reply is not None:
                answers = map(StoredItem.of, reply["results"])
                version = max((v for v in (version, reply["version"]) if v is not None), default=None)
                operations += [reply["operation_id"]] if reply.get("operation_id") else []
            results += [next(answers) if isinstance(memory, dict) else memory for memory in request]
            if progress is not None:
                progress(len(request))
        return StoreReply(version, tuple(results), tuple(operations))

    def recall(
        self,
        text: str | None = None,
        image: ImageLike | None = None,
        mask: ImageLike | None = None,
        vectors: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Recall:
        """Recall by any of a text, an image and vectors; `options` as in the API (`limit`, `beta`, `reconstruct`)."""
        request = {"cue": _cue({"text": text, "image": image, "mask": mask, "vectors": vectors}), **options}
        return self._recalls(request)[0]

    def recall_batch(self, cues: Iterable[Mapping[str, Any]], **options: Any) -> list[Recall]:
        """Recall by several cues, each `{"text"?, "image"?, "mask"?, "vectors"?}`, in one request; answers in order."""
        return self._recalls({"cues": [_cue(cue) for cue in cues], **options})

    def train(
        self,
        what: str = "gate",
        *,
        cues: Iterable[Mapping[str, Any]] | None = None,
        negatives: Iterable[Mapping[str, Any]] | None = None,
        target_tpr: float | None = None,
        **options: Any,
    ) -> Operation:
        """Calibrate the gate again, or train a kernel (`what="kernel"`), as an operation: see `Client.operation` for
        how far it is. `options`: a kernel's, as in the API (`space`, `objective`, `time_limit_s`).

        cues: known cues, `{"id": their memory's, "text"?, "image"?, "mask"?, "vectors"?}`; they set the thresholds of
        the modalities they fill. negatives: cues of what was never stored. None keeps what was supplied, an empty
        list forgets it.
        """
        request: Body = {"what": what, **options}
        if cues is not None:
            request["cues"] = [_known(cue) for cue in cues]
        if negatives is not None:
            request["negatives"] = [_cue(cue) for cue in negatives]
        if target_tpr is not None:
            request["target_tpr"] = target_tpr
        return Operation.of(self._call("train", request))

    def reencode(
        self,
        space: str,
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        drop_without_original: bool = False,
        wait: bool = True,
    ) -> Operation:
        """Encode a space again from the kept originals, by another encoder or (None) by the configured one as it is
        now. Until it ends, recalls and stores go by the former.

        With `wait` it has ended at return, and its failure raises: `OriginalsMissing` where originals cannot be read,
        unless `drop_without_original` lets their memories lose the space.
        """
        given = _given(encoder=encoder, options=None if options is None else dict(options))
        request = given | {"drop_without_original": drop_without_original}
        operation = Operation.of(self._call("reencode", request, space=space))
        while wait and operation.status in ("queued", "running"):
            time.sleep(POLL_S)
            operation = Operation.of(self._transport.call("get_operation", {"id": operation.id}))
        if wait:
            operation.check()
        return operation

    def get(self, memory_id: str) -> Memory:
        """Raises `MemoryNotFound`."""
        return Memory.of(self._call("get_memory", id=memory_id))

    def get_many(self, ids: Iterable[str]) -> list[Memory]:
        """Those of `ids` that exist, in the order asked for."""
        wanted = list(ids)
        found: list[Memory] = []
        for start in range(0, len(wanted), PAGE):
            reply = self._call("get_memories", {"ids": wanted[start : start + PAGE]})
            found += map(Memory.of, reply["memories"])
        return found

    def scroll(self, filter: Mapping[str, Any] | None = None, *, batch: int = PAGE) -> Iterator[Memory]:
        """Every memory, or those that a filter keeps, in the order in which they were first stored.

        Asked for `batch` at a time, while the iterator is read.
        """
        request: Body = _given(filter=filter, limit=batch)
        while True:
            reply = self._call("scroll", request)
            yield from map(Memory.of, reply["memories"])
            if reply["next_cursor"] is None:
                return
            request["cursor"] = reply["next_cursor"]

    def content(self, memory_id: str) -> bytes:
        """The stored original, byte for byte."""
        return self._transport.content(self.name, memory_id)

    def delete(
        self,
        ids: str | Sequence[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        dry_run: bool = False,
    ) -> list[str]:
        """Forget memories, by their ids or all that a filter keeps; the ids that were there, the first 10,000 of them.

        `dry_run`: say which it would be, and forget nothing.
        """
        asked = [ids] if isinstance(ids, str) else None if ids is None else list(ids)
        request = _given(ids=asked, filter=filter, dry_run=dry_run)
        deleted: list[str] = self._call("delete_memories", request)["deleted"]
        return deleted

    def count(self, filter: Mapping[str, Any] | None = None) -> int:
        """How many memories there are, or a filter keeps."""
        return int(self._call("count", _given(filter=filter))["count"])

    def info(self) -> CollectionInfo:
        return CollectionInfo.of(self._call("get_collection"))

    def kernels(self) -> list[dict[str, Any]]:
        """The kernels that were trained, with their training records."""
        kernels: list[dict[str, Any]] = self._call("list_kernels")["kernels"]
        return kernels

    def retire_kernel(self, kernel_id: str) -> None:
        """Go on without a kernel that is in use."""
        self._call("retire_kernel", kernel=kernel_id)

    def diagnostics(self) -> Diagnostics:
        """Margins, fixed points, rank, capacity, near-duplicates, β and memory: how well its memories are told apart.

        Takes seconds for a large collection.
        """
        return Diagnostics.of(self._call("get_diagnostics"))

    def wait_until_calibrated(self, timeout_s: float = 300.0) -> CollectionInfo:
        """Wait until the automatic calibration covers what is stored.

        Raises `Unavailable` after `timeout_s`, and at once why a space's encoder cannot be used: none before.
        """
        deadline = time.monotonic() + timeout_s
        while (info := self.info()).calibration.state != "current":
            if info.problem is not None:
                raise info.problem.as_error()
            if time.monotonic() >= deadline:
                raise Unavailable(f"{self.name}: its calibration is {info.calibration.state} after {timeout_s:g} s")
            time.sleep(POLL_S)
        return info

    def _call(self, operation: str, body: Body | None = None, **path: str) -> Body:
        return self._transport.call(operation, {"collection": self.name, **path}, body)

    def _recalls(self, request: Body) -> list[Recall]:
        reply = self._call("recall", request)
        shared = {"version": reply["version"], "timings_ms": reply["timings_ms"]}
        return [Recall.of({**result, **shared}) for result in reply["results"]]


def _requests(memories: Iterable[Mapping[str, Any]], count_max: int) -> Iterator[Request]:
    """Memories with their pictures read, in bounded lists; one whose picture cannot be read is its own answer."""
    if count_max < 1:
        raise InvalidRequest(f"batch is {count_max}, and must be at least 1")
    request: Request = []
    size_bytes = 0
    for memory in memories:
        item: Body | StoredItem
        image_bytes = 0
        try:
            item = {key: value for key, value in memory.items() if value is not None}
            if "image" in item:
                item["image"] = _image(item["image"])
                image_bytes = len(item["image"]["base64"])
        except EngramError as error:
            item = StoredItem(memory.get("id"), "error", error=Problem(error.code, error.detail))
        if request and (len(request) == count_max or size_bytes + image_bytes > BATCH_BYTES_MAX):
            yield request
            request, size_bytes = [], 0
        request.append(item)
        size_bytes += image_bytes
    if request:
        yield request


def _given(**fields: Any) -> Body:
    return {name: value for name, value in fields.items() if value is not None}


def _cue(cue: Mapping[str, Any]) -> Body:
    given = {key: value for key, value in cue.items() if value is not None}
    return {key: _image(value) if key in ("image", "mask") else value for key, value in given.items()}


def _known(cue: Mapping[str, Any]) -> Body:
    if "id" not in cue:
        raise InvalidRequest("a known cue names its memory: give it an id")
    return {"id": cue["id"], "cue": _cue({key: value for key, value in cue.items() if key != "id"})}


def _image(image: ImageLike) -> Body:
    if isinstance(image, bytes):
        return {"base64": image}
    if isinstance(image, str | Path):
        try:
            return {"base64": Path(image).read_bytes()}
        except FileNotFoundError:
            raise NotFound(f"there is no file {image}") from None
        except OSError as error:
            raise InvalidImage(f"{image}: {error.strerror}") from None
    from PIL import Image  # only pictures that are not files need it

    if isinstance(image, np.ndarray):
        drawn = Image.fromarray(_pixels(image))
    elif isinstance(image, Image.Image):
        drawn = image
    else:
        raise InvalidImage(f"an image is a path, bytes, a Pillow image or an array, not {type(image).__name__}")
    file = io.BytesIO()
    try:
        if drawn.mode in CONVERTED:
            drawn = drawn.convert(CONVERTED[drawn.mode])
        drawn.save(file, "TIFF" if drawn.mode in WIDE_MODES else "PNG")
    except Exception as error:  # Pillow may read the picture's file only now, and raises nearly anything on a bad one
        what = f"a Pillow image, {drawn.mode} of {drawn.width}x{drawn.height}"
        raise InvalidImage(f"{what}, cannot be made a file: {error}") from error
    return {"base64": file.getvalue()}


def _pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 2, 3, 4))
    if array.dtype not in (np.uint8, np.bool_) or not shaped or not array.size:
        raise InvalidImage(
            f"an array of {array.dtype} and shape {array.shape} is not a picture: uint8 or bool, and (height, width) "
            "or (height, width, 1 to 4 channels), none of them 0, is one"
        )
    pixels = array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
    return pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
