"""`open_clip`: any model of the open_clip library, by name and pretrained tag, hub id or local folder.

Strategy: the library makes the model, its preprocessing and its tokenizer; this module bounds what it may do silently.
`model` is one of
- a name of the library ("ViT-B-32"), with `pretrained` a tag ("laion2b_s34b_b79k") or the path of a weights file,
- "hf-hub:organisation/repository", or
- "local-dir:/folder" holding open_clip_config.json and the weights: this loads with no network.

Rules:
- Random weights are never served: the library only warns of them, here they are `WeightsMissing`.
- The fingerprint is made from the tensors that were loaded, the architecture as built and the preprocessing, wherever
  they came from.
- Precision is fp32 on every device, so that a pattern made on a GPU compares with one made on a CPU.
- Importing the library takes seconds and it is an extra: it is imported when an encoder is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.encoders.protocol import Encoded, Picture, Source
from service.encoders.visible import visible_part
from service.encoders.weights import digest
from service.errors import EmptyText, WeightsMissing

BATCH = 16
"""Items in one run of the model: keeps a ViT-L/14's activations under 1 GB."""

_SCHEMAS = ("hf-hub:", "local-dir:")


class OpenClipOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="a model's name, hf-hub:organisation/repository or local-dir:/folder")
    pretrained: str | None = Field(
        None, min_length=1, description="with a model's name: a tag, or the path of a weights file"
    )

    @model_validator(mode="after")
    def _weights_are_named_once(self) -> Self:
        if self.model.startswith(_SCHEMAS) == (self.pretrained is not None):
            raise ValueError(
                "`pretrained` goes with a model's name, and with that alone: the other two forms carry their weights"
            )
        return self


class OpenClip:
    """An `Encoder` (protocol.py) of images and texts."""

    name = "open_clip"
    takes: frozenset[Source] = frozenset({"image", "text"})

    def __init__(self, options: OpenClipOptions, *, device: str) -> None:
        """Raises `WeightsMissing` when the library or the weights are not on this machine."""
        try:
            import open_clip
        except ImportError as error:
            raise WeightsMissing(
                f"open_clip cannot be imported ({error}): pip install 'engram-memory[clip]'"
            ) from error
        try:
            self._model, _, self._preprocess = open_clip.create_model_and_transforms(
                options.model,
                pretrained=options.pretrained,
                precision="fp32",
                device=device,
                require_pretrained=True,
                pretrained_text=False,  # else a missing checkpoint sends the library to the hub for a base text tower
            )
            self._tokenizer = open_clip.get_tokenizer(options.model)
        except Exception as error:  # whatever the library, its hub client or torch raises, the way out is the same
            raise WeightsMissing(f"open_clip could not load {options.model}: {error}. {_way_out(options)}") from error
        self._model.eval()
        self._device = torch.device(device)
        self._context_length = int(self._tokenizer.context_length)
        self.dimension = int(self.encode_texts(["a"]).vectors.shape[1])
        weights = digest(self._model.state_dict(), self._model, self._preprocess, self._context_length)
        self.fingerprint = f"open_clip/1:{weights}"

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """(batch) pictures → (batch, dimension). Raises `NothingObserved`."""
        vectors = np.empty((len(pictures), self.dimension), dtype=np.float32)
        for start in range(0, len(pictures), BATCH):
            images = [Image.fromarray(visible_part(picture)) for picture in pictures[start : start + BATCH]]
            with torch.inference_mode():
                batch = torch.stack([self._preprocess(image) for image in images]).to(self._device)
                vectors[start : start + BATCH] = self._model.encode_image(batch).float().cpu().numpy()
        return Encoded(vectors, ((),) * len(pictures))

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """(batch) texts → (batch, dimension), with a warning for each text that was cut. Raises `EmptyText`."""
        rows, warnings = [], []
        for text in texts:
            if not text.strip():
                raise EmptyText("the text has no words")
            count = self._count_tokens(text)
            kept = self._context_length
            cut = f"text cut to the model's length: {kept} of {count} tokens kept"
            warnings.append((cut,) if count > kept else ())
        for start in range(0, len(texts), BATCH):
            with torch.inference_mode():
                tokens = self._tokenizer(list(texts[start : start + BATCH])).to(self._device)
                rows.append(self._model.encode_text(tokens).float().cpu().numpy())
        vectors = np.concatenate(rows) if rows else np.empty((0, self.dimension), dtype=np.float32)
        return Encoded(vectors, tuple(warnings))

    def _count_tokens(self, text: str) -> int:
        """Tokens of the whole text with the two marks at its ends: the library cuts without telling."""
        if hasattr(self._tokenizer, "encode"):
            return len(self._tokenizer.encode(text)) + 2
        return len(self._tokenizer.tokenizer(text)["input_ids"])


def _way_out(options: OpenClipOptions) -> str:
    if options.model.startswith("local-dir:"):
        return "The folder needs open_clip_config.json and open_clip_model.safetensors (or open_clip_pytorch_model.bin)"
    return "With no network: put the model's folder on this machine and name it as local-dir:/folder"
