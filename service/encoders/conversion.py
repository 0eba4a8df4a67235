"""Pickled weights made into safetensors, once, at the user's word: the only place that opens a pickle of the user's.

Strategy: torch's own restricted unpickler (weights_only), which rebuilds tensors and containers and calls nothing else.
For the published dVAE, pickles of whole modules, it is told of inert classes under the names of the modules' classes:
they have no code, and what the pickle says of them lands in their `__dict__`, from where the tensors are taken. The
package dall_e is neither needed nor looked at.

Rules:
- A pickle that refers to anything else is refused, and the message names it.
- What is written has been loaded into the network first, so a file that is there is one that will load.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from service.encoders.dvae import WEIGHTS, network_of
from service.encoders.weights import said
from service.errors import NotWritable, WeightsMissing, WeightsRefused

INERT = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
"""The classes of which the published encoder and decoder are made."""

DEPTH_MAX = 16
"""Modules within modules; the published ones have five. A pickle may hold a module that holds itself."""

_REFUSED = re.compile(r"GLOBAL (\S+)")

_RENAMED = (
    (re.compile(r"^blocks\."), ""),
    (re.compile(r"^output\.conv\."), "output."),
    (re.compile(r"^group_(\d+)\.block_(\d+)\."), lambda found: f"groups.{int(found[1]) - 1}.{int(found[2]) - 1}."),
    (re.compile(r"\.id_path\."), ".shortcut."),
    (re.compile(r"\.res_path\.conv_(\d+)\."), lambda found: f".convs.{int(found[1]) - 1}."),
    (re.compile(r"\.w$"), ".weight"),
    (re.compile(r"\.b$"), ".bias"),
)


def convert_dvae(encoder: Path, decoder: Path, folder: Path) -> Path:
    """Write `dvae.safetensors` into `folder` from the two published pickles.

    Raises `WeightsMissing`, `WeightsRefused`, `NotWritable`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for part, file in (("encoder", encoder), ("decoder", decoder)):
        module = _unpickled(file, [_inert(name) for name in INERT])
        found: dict[str, torch.Tensor] = {}
        _collect(module, "", found, 0)
        tensors |= {f"{part}.{_renamed(name)}": tensor for name, tensor in found.items()}
    try:
        network_of(tensors)
    except ValueError as error:
        raise WeightsRefused(f"{encoder} and {decoder} do not hold the two parts of a dVAE: {error}") from error
    return _write(tensors, folder / WEIGHTS)


def convert_weights(file: Path, to: Path) -> Path:
    """Write the tensors of a pickled state dict (.bin, .pt, .pth, .ckpt) to the safetensors file `to`.

    Raises `WeightsMissing`, `WeightsRefused`, `NotWritable`.
    """
    if to.suffix != ".safetensors":
        raise NotWritable(f"{to}: the name of the file to write ends in .safetensors")
    found = _unpickled(file, [])
    while isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise WeightsRefused(f"{file} holds something else than a model's tensors by name")
    return _write({str(name): tensor for name, tensor in found.items()}, to)


def _unpickled(file: Path, allowed: Sequence[type]) -> Any:
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsMissing(f"there is no file {file}") from error
    except pickle.UnpicklingError as error:
        named = _REFUSED.search(str(error))
        why = f"it refers to {named[1]}, which is no part of a model's weights" if named else said(error)
        raise WeightsRefused(f"{file} is not loaded: {why}") from error
    except Exception as error:  # a torn archive, a stream that makes no sense
        raise WeightsRefused(f"{file} is not a file of torch.save: {said(error)}") from error


def _inert(name: str) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (), {"__module__": module, "__qualname__": short})


def _collect(module: object, prefix: str, found: dict[str, torch.Tensor], depth: int) -> None:
    """The parameters of an inert module and of those within it, by their names with dots."""
    state = vars(module) if hasattr(module, "__dict__") else {}
    parameters, modules = state.get("_parameters"), state.get("_modules")
    if depth > DEPTH_MAX or not isinstance(parameters, Mapping) or not isinstance(modules, Mapping):
        raise WeightsRefused(f"the pickle holds {type(module).__name__} where a module of the dVAE is expected")
    for name, tensor in parameters.items():
        if isinstance(tensor, torch.Tensor):
            found[f"{prefix}{name}"] = tensor
    for name, inner in modules.items():
        _collect(inner, f"{prefix}{name}.", found, depth + 1)


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _write(tensors: Mapping[str, torch.Tensor], to: Path) -> Path:
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}  # tied ones get their own
    partial = to.with_name(f"{to.name}.part")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, partial, {"format": "pt"})  # the mark that transformers and diffusers ask for
        partial.replace(to)
    except OSError as error:
        raise NotWritable(f"{to}: {error.strerror or error}") from error
    return to
