"""`sentence`: the meaning of texts alone. The packaged MiniLM, or any model of sentence-transformers.

Without options it is `minilm`: no hub, no network, 384 values. With `model` it is a hub id or a folder in the format of
sentence-transformers (modules.json), with the pooling, normalisation and prompt that the model's own files say.

Rules:
- Weights that the model has and the files lack are refused; the libraries would make them up at random. Exempt is
  BERT's pooler, which many of these models come without and none of them uses; it is left out of the fingerprint.
- The fingerprint is made from the tensors, the modules, the tokenizer and the prompts, wherever they came from.
- One text is encoded at a time per model: the tokenizers of the library must not be called by two threads at once.
- Importing the library takes seconds and it is an extra: it is imported when such a model is asked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.encoders import minilm
from service.encoders.device import Precision, check_finite, torch_dtype
from service.encoders.fit import text_warnings
from service.encoders.folder import model_folder, weights_file
from service.encoders.halving import run_batches
from service.encoders.protocol import DIMENSION_MAX, Encoded, Encoder, Picture, Source
from service.encoders.weights import architecture, digest, said, tokenizer_words
from service.errors import EmptyText, InvalidRequest, WeightsMissing, WeightsRefused

BATCH = 32
"""Texts in one run: of 512 tokens, a large BERT's attention takes half a gigabyte."""

MODULES = "modules.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")
"""What is fetched of a hub's repository: no pickle, no other framework's weights."""

LOADING = {"use_safetensors": True, "ignore_mismatched_sizes": True}
"""Shapes that differ are not ignored but told by `_made_up`, which names them; the library's own error does not."""


class SentenceOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None, min_length=1, description="a folder on this machine or a hub id; absent: the packaged MiniLM"
    )
    precision: Precision = Field("fp32", description="fp32, fp16 or bf16, with a model")

    @model_validator(mode="after")
    def _precision_goes_with_a_model(self) -> Self:
        if self.model is None and self.precision != "fp32":
            raise ValueError("`precision` goes with `model`: the packaged one has weights of 8 bits")
        return self


def sentence(options: SentenceOptions, *, threads: int, device: str) -> Encoder:
    """Raises `WeightsMissing`, `WeightsRefused`."""
    if options.model is None:
        return PackagedSentence(threads)
    return SentenceModel(options.model, options.precision, device=device)


class _TextsOnly:
    takes: frozenset[Source] = frozenset({"text"})
    name = "sentence"

    def encode_images(self, pictures: Sequence[Picture]) -> Encoded:
        """Raises `InvalidRequest`: texts only (`takes`)."""
        raise InvalidRequest("the encoder 'sentence' takes texts only")


class PackagedSentence(_TextsOnly):
    """An `Encoder` (protocol.py) of texts into 384 dimensions, on the processor. Thread-safe."""

    dimension = minilm.DIMENSION

    def __init__(self, threads: int) -> None:
        self._minilm = minilm.MiniLM(threads)
        parts = f"{minilm.WEIGHTS.sha256}|{minilm.TOKENS_MAX}"
        self.fingerprint = f"sentence/1:{hashlib.sha256(parts.encode()).hexdigest()[:32]}"

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """(batch) texts → (batch, 384) at unit length. Raises `EmptyText`."""
        return self._minilm.encode(texts)


class SentenceModel(_TextsOnly):
    """An `Encoder` (protocol.py) of texts. Thread-safe."""

    def __init__(self, model: str, precision: Precision, *, device: str) -> None:
        try:
            import sentence_transformers
            import transformers
        except ImportError as error:
            raise WeightsMissing(
                f"sentence-transformers cannot be imported ({error}): pip install 'engram-memory[sentences]'"
            ) from error
        folder = model_folder(model, PATTERNS)
        first = _first_module(folder)
        if (first / "config.json").is_file():
            weights_file(first, WEIGHTS)
        transformers.utils.logging.disable_progress_bar()
        try:
            self._model = sentence_transformers.SentenceTransformer(
                str(folder), device="cpu", local_files_only=True, model_kwargs=LOADING
            )
        except Exception as error:  # the library's, transformers', the tokenizers', torch's for a shape that differs
            raise WeightsRefused(f"{folder} could not be loaded: {said(error)}") from error
        without = _made_up(self._model, first)
        self._model.eval().requires_grad_(False).to(device, torch_dtype(precision))
        self._precision = precision
        self._lock = threading.Lock()
        length = self._model.max_seq_length
        self._length = DIMENSION_MAX if length is None else int(min(length, DIMENSION_MAX))
        self._prompt = (self._model.prompts or {}).get(self._model.default_prompt_name or "", "")
        tensors = {name: tensor for name, tensor in self._model.state_dict().items() if not _of_pooler(name, without)}
        parts = (architecture(self._model), tokenizer_words(self._model.tokenizer), self._prompt, self._length)
        self.fingerprint = f"sentence/1:{digest(tensors, *parts)}"
        self.dimension = 0
        self.dimension = self._probe(model, device)

    def encode_texts(self, texts: Sequence[str]) -> Encoded:
        """(batch) texts → (batch, dimension), with a warning for each text of which something was lost.

        Raises `EmptyText`, `OutOfMemory`, `InvalidVector`.
        """
        for text in texts:
            if not text.strip():
                raise EmptyText("the text has no words")
        with self._lock:
            warnings = tuple(self._lost(text) for text in texts)
            vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
            by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding within a batch

            def run(part: slice) -> None:
                vectors[by_length[part]] = self._embed([texts[i] for i in by_length[part]])

            run_batches(len(texts), BATCH, run)
        check_finite(vectors, self._precision)
        return Encoded(vectors, warnings)

    def _embed(self, texts: Sequence[str]) -> Any:
        rows = self._model.encode(
            list(texts), batch_size=len(texts), show_progress_bar=False, convert_to_numpy=False, convert_to_tensor=True
        )
        return rows.float().cpu().numpy()

    def _probe(self, model: str, device: str) -> int:
        try:
            with self._lock:
                return int(self._embed(["a"]).shape[1])
        except (RuntimeError, NotImplementedError) as error:
            raise WeightsRefused(f"{model} does not run in {self._precision} on {device}: {said(error)}") from error

    def _lost(self, text: str) -> tuple[str, ...]:
        tokenizer = self._model.tokenizer
        if not callable(tokenizer):  # a table of words (StaticEmbedding) takes any length
            return ()
        ids = tokenizer(self._prompt + text, truncation=False, verbose=False)["input_ids"]  # we tell it
        unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        return text_warnings(len(ids), self._length, unknown)


def _first_module(folder: Path) -> Path:
    """The folder of the module that reads the text. Raises `WeightsMissing` for a folder of another kind."""
    file = folder / MODULES
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        return folder / str(modules[0]["path"])
    except OSError as error:
        raise WeightsMissing(
            f"{file} cannot be read ({error.strerror}): the folder needs what sentence-transformers saves, {MODULES}, "
            f"{WEIGHTS[0]}, config.json and the tokenizer's files among it"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise WeightsRefused(f"{file} does not list the modules of a model: {said(error)}") from error


def _made_up(model: Any, folder: Path) -> set[str]:
    """The tensors of the pooler where the files lack them. Raises `WeightsRefused` for any other, or of another shape.

    The library loads without telling what it made up, so the files are read once more.
    """
    network = model.transformers_model
    if network is None:
        return set()
    _, found = type(network).from_pretrained(folder, local_files_only=True, output_loading_info=True, **LOADING)
    for name, stored, built in sorted(found["mismatched_keys"]):
        raise WeightsRefused(
            f"the weights in {folder} are of another architecture than its config.json: {name} is {tuple(stored)}, and "
            f"{tuple(built)} is described"
        )
    missing = set(map(str, found["missing_keys"]))
    refused = sorted(name for name in missing if not name.startswith("pooler."))
    if refused:
        raise WeightsRefused(f"the weights in {folder} lack {', '.join(refused[:5])} of what its config.json describes")
    return missing


def _of_pooler(name: str, missing: set[str]) -> bool:
    return any(name.endswith(f".{lacking}") for lacking in missing)
