"""The folder that holds a model's files, from a hub id or from the name of a folder, and the weights in it.

Rules:
- Whatever was named, loading starts from files on this machine: only so can they be checked first.
- Weights are safetensors. A pickle runs code when it is loaded, so one that lies where weights are expected is
  `WeightsRefused` with the command that converts it.
- Without a network, what the hub client has in its cache is used; else `WeightsMissing` says which folder to make.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from service.encoders.weights import said
from service.errors import WeightsMissing, WeightsRefused

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_folder(model: str, patterns: Sequence[str]) -> Path:
    """A local folder, or that of a hub id ("organisation/repository"), of which the files that match are fetched.

    Raises `WeightsMissing`.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise WeightsMissing(f"{model} is a file; name the folder that holds the model's files")
    if not _HUB_ID.fullmatch(model):
        raise WeightsMissing(f"there is no folder {model}, and a hub id would read organisation/repository")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise WeightsMissing(f"the hub's client is missing ({error}): pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except Exception as error:  # of its own, of its HTTP client, of the disk: the way out is the same
        raise WeightsMissing(
            f"{model} is neither a folder here nor to be had from the hub ({said(error)}). With no network: copy the "
            f"model's files ({', '.join(patterns)}) into a folder on this machine and name that"
        ) from error


def weights_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of `names` that `folder` holds. Raises `WeightsMissing`, and `WeightsRefused` for pickles alone."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    refuse_pickles(folder, names[0])
    there = ", ".join(sorted(os.listdir(folder))[:20]) if folder.is_dir() else "no such folder"
    raise WeightsMissing(f"{folder} has no {names[0]} (it has: {there or 'nothing'})")


def refuse_pickles(folder: Path, name: str) -> None:
    """Raises `WeightsRefused` for the first pickle in `folder`; `name` is what should lie there."""
    found = sorted(file for file in folder.glob("*") if file.suffix in PICKLES)
    if found:
        refuse_pickle(found[0], folder / name)


def refuse_pickle(file: Path, instead: Path) -> None:
    """Raises `WeightsRefused`, with the command that makes `instead` of it."""
    raise WeightsRefused(
        f"{file} is a pickle, which runs code when it is loaded, and safetensors are expected. Convert it once: "
        f"engram convert-weights {file} {instead}"
    )
