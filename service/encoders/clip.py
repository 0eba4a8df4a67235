"""`open_clip`: any model of the open_clip library, by name and pretrained tag, hub id or local folder.

Strategy: the library makes the model, its preprocessing and its tokenizer; this module bounds what it may do silently.
`model` is one of
- a name of the library ("ViT-B-32"), with `pretrained` a tag ("laion2b_s34b_b79k") or the path of a weights file,
- "hf-hub:organisation/repository", or
- "local-dir:/folder" holding open_clip_config.json, the weights, and the tokenizer's files where the configuration
  names one (SigLIP): this loads with no network.

Rules:
- Random weights are never served: the library only warns of them, here they are `WeightsMissing`.
- The file is found before the library opens it: a pickle is refused, and tensors that the library would resize to fit
  the configuration are refused.
- The fingerprint is made from the tensors that were loaded, the architecture as built, the preprocessing and the
  tokenizer, wherever they came from.
- A tokenizer of the Hugging Face libraries must not be called by two threads at once.
- Half precision is the library's: weights of matrices and convolutions in half, norms in float32.
- Importing the library takes seconds and it is an extra: it is imported when an encoder is made.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.encoders.device import Precision, check_finite, torch_dtype
from service.encoders.fit import Fit, fit_warnings, text_warnings
from service.encoders.folder import PICKLES, model_folder, refuse_pickle, weights_file
from service.encoders.halving import is_out_of_memory, run_batches
from service.encoders.protocol import Encoded, Picture, Source
from service.encoders.visible import visible_part
from service.encoders.weights import architecture, digest, said, tokenizer_words
from service.errors import EmptyText, WeightsMissing, WeightsRefused

BATCH = 16
"""Items in one run of the model: keeps a ViT-L/14's activations under 1 GB."""

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
"""The names that the library looks for first, whatever else a folder holds."""

_HUB, _LOCAL = "hf-hub:", "local-dir:"

_FITS: dict[str, Fit] = {"shortest": "cropped", "squash": "stretched", "longest": "padded"}
"""The library's `resize_mode` → what it does to a picture."""


class OpenClipOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="a model's name, hf-hub:organisation/repository or local-dir:/folder")
    pretrained: str | None = Field(
        None, min_length=1, description="with a model's name: a tag, or the path of a weights file"
    )
    precision: Precision = Field("fp32", description="fp32, fp16 or bf16")

    @model_validator(mode="after")
    def _weights_are_named_once(self) -> Self:
        if self.model.startswith((_HUB, _LOCAL)) == (self.pretrained is not None):
            raise ValueError(
                "`pretrained` goes with a model's name, and with that alone: the other two forms carry their weights"
            )
        return self


class OpenClip:
    """An `Encoder` (protocol.py) of images and texts."""

    name = "open_clip"
    takes: frozenset[Source] = frozenset({"image", "text"})

    def __init__(self, options: OpenClipOptions, *, device: str) -> None:
        """Raises `WeightsMissing` when the library or the weights are not on this machine, `WeightsRefused` when they
        are not what their configuration says.
        """
        try:
            import open_clip
        except ImportError as error:
            raise WeightsMissing(
                f"open_clip cannot be imported ({error}): pip install 'engram-memory[clip]'"
            ) from error
        self._precision, self._device = options.precision, torch.device(device)
        self._tokenizing = threading.Lock()
        weights = _weights(options)
        try:
            self._model, _, self._preprocess = open_clip.create_model_and_transforms(
                options.model,
                pretrained=options.pretrained,
                precision=options.precision,
                device=device,
                require_pretrained=True,
                pretrained_text=False,  # else a missing checkpoint sends the library to the hub for a base text tower
            )
        except Exception as error:  # the library's, torch's, the hub client's for what a configuration refers to
            kind = WeightsMissing if isinstance(error, OSError) else WeightsRefused
            raise kind(f"open_clip could not load {options.model}: {said(error)}. {_way_out(options)}") from error
        try:
            self._tokenizer = open_clip.get_tokenizer(options.model)
        except Exception as error:  # the library's, its tokenizers', the hub client's
            raise WeightsMissing(
                f"open_clip could not load the tokenizer of {options.model}: {said(error)}. {_way_out(options)}"
            ) from error
        _refuse_resized(weights, self._model)
        self._model.eval().requires_grad_(False)
        self._fit = _FITS[open_clip.get_model_preprocess_cfg(self._model).get("resize_mode", "shortest")]
        self._context_length = int(self._tokenizer.context_length)
        self.dimension = self._probe(options)
        words = tokenizer_words(self._tokenizer.tokenizer) if hasattr(self._tokenizer, "tokenizer") else ""
        parts = (architecture(self._model), self._preprocess, self._context_length, words)
        self.fingerprint = f"open_clip/2:{digest(self._model.state_dict(), *parts)}"

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """(batch) pictures → (batch, dimension). Raises `NothingObserved`, `OutOfMemory`, `InvalidVector`."""
        shown = [visible_part(picture) for picture in pictures]
        vectors = np.empty((len(pictures), self.dimension), dtype=np.float32)

        def run(part: slice) -> None:
            vectors[part] = self._embed_images(shown[part])

        run_batches(len(pictures), BATCH, run)
        check_finite(vectors, self._precision)
        return Encoded(vectors, tuple(fit_warnings(len(pixels), len(pixels[0]), self._fit) for pixels in shown))

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """(batch) texts → (batch, dimension), with a warning for each text of which something was lost. Raises
        `EmptyText`, `OutOfMemory`, `InvalidVector`.
        """
        warnings = []
        for text in texts:
            if not text.strip():
                raise EmptyText("the text has no words")
            count, unknown = self._count_tokens(text)
            warnings.append(text_warnings(count, self._context_length, unknown))
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)

        def run(part: slice) -> None:
            vectors[part] = self._embed_texts(texts[part])

        run_batches(len(texts), BATCH, run)
        check_finite(vectors, self._precision)
        return Encoded(vectors, tuple(warnings))

    def _embed_images(self, shown: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        with torch.inference_mode():
            batch = torch.stack([self._preprocess(Image.fromarray(pixels)) for pixels in shown])
            batch = batch.to(self._device, torch_dtype(self._precision))
            rows: NDArray[np.float32] = self._model.encode_image(batch).float().cpu().numpy()
            return rows

    def _embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._tokenizing:
            tokens = self._tokenizer(list(texts)).to(self._device)
        with torch.inference_mode():
            rows: NDArray[np.float32] = self._model.encode_text(tokens).float().cpu().numpy()
            return rows

    def _probe(self, options: OpenClipOptions) -> int:
        """The dimension; what the model cannot do on its device in its precision is met here, not at the first item."""
        try:
            text = self._embed_texts(["a"]).shape[1]
            image = self._embed_images([np.full((8, 8, 3), 127, dtype=np.uint8)]).shape[1]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise WeightsRefused(
                f"{options.model} does not run in {options.precision} on {self._device}: {said(error)}"
            ) from error
        if image != text:
            raise WeightsRefused(f"{options.model} has pictures of {image} values and texts of {text}: no joint space")
        return int(text)

    def _count_tokens(self, text: str) -> tuple[int, int]:
        """Tokens of the whole text with the marks at its ends, and how many of them are unknown: the library cuts
        without telling. Its own tokenizer goes down to bytes and knows everything.
        """
        if hasattr(self._tokenizer, "encode"):
            return len(self._tokenizer.encode(text)) + 2, 0
        tokenizer = self._tokenizer.tokenizer
        with self._tokenizing:
            ids = tokenizer(self._tokenizer.clean_fn(text), verbose=False)["input_ids"]  # we tell it
        return len(ids), ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0


def _weights(options: OpenClipOptions) -> Path:
    """The file that the library will read, here by now. Raises `WeightsMissing`, `WeightsRefused` for a pickle."""
    import open_clip

    if options.pretrained is None:
        local = options.model.startswith(_LOCAL)
        name = options.model.removeprefix(_LOCAL if local else _HUB)
        folder = Path(name) if local else model_folder(name, (CONFIG, *WEIGHTS))
        if not (folder / CONFIG).is_file():
            raise WeightsMissing(f"there is no {folder / CONFIG}. {_way_out(options)}")
        return weights_file(folder, WEIGHTS)
    tag = open_clip.get_pretrained_cfg(options.model.replace("/", "-"), options.pretrained)
    try:
        file = Path(open_clip.download_pretrained(tag) if tag else options.pretrained)
    except Exception as error:  # the library's and the hub client's
        raise WeightsMissing(
            f"{options.model} with {options.pretrained} is not on this machine nor to be had from the hub "
            f"({said(error)}). {_way_out(options)}"
        ) from error
    if not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(options.model)) or "none"
        raise WeightsMissing(
            f"{options.pretrained} is neither a weights file nor a tag of {options.model} (tags: {tags}). "
            f"{_way_out(options)}"
        )
    if file.suffix in PICKLES:
        refuse_pickle(file, file.with_suffix(".safetensors"))
    return file


def _refuse_resized(weights: Path, model: torch.nn.Module) -> None:
    """Position embeddings of another length are interpolated by the library: the configuration is of another model."""
    from safetensors import safe_open

    if weights.suffix != ".safetensors":
        return
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(weights, "pt") as file:
        for name in built.keys() & set(file.keys()):
            shape = tuple(file.get_slice(name).get_shape())
            if np.prod(built[name]) != np.prod(shape):
                raise WeightsRefused(
                    f"{weights} has {name} of {shape}, and the model that its configuration describes {built[name]}"
                )


def _way_out(options: OpenClipOptions) -> str:
    if options.model.startswith(_LOCAL):
        return f"The folder needs {CONFIG}, {WEIGHTS[0]} and, where the configuration names one, its tokenizer's files"
    return f"With no network: put the model's folder on this machine and name it as {_LOCAL}/folder"
