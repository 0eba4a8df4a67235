"""`vq`, `kl` and `tiny`: the latents of the diffusers library's autoencoders, loaded strictly.

- `vq` (VQModel; van den Oord et al. 2017, Esser et al. 2021): the continuous latent, before it is quantised, so that
  recall can move between memories; `decode` takes each cell to its nearest code, as the model was trained.
- `kl` (AutoencoderKL; Rombach et al. 2022): the mean of the posterior. Nothing is sampled, so a picture has one vector.
  It is not multiplied by the configuration's `scaling_factor` (0.18215 in Stable Diffusion 1), by which diffusion
  pipelines bring it to unit variance: who brings latents from there divides by it.
- `tiny` (AutoencoderTiny; Ollin Boer Bohan's TAESD): distilled from the autoencoder of a diffusion model, for a few per
  cent of its cost, in that model's scaled latents: other vectors than `kl` of the same family by that scale.

Rules:
- The class that a folder's config names must be the one that the encoder is for, and every tensor that this class has
  must be in the weights, in its shape, and no other: the library alone would make the missing ones up at random.
- The fingerprint is made from the tensors that were loaded and the configuration, without the library's version.
- Importing the library takes seconds and it is an extra: it is imported when an encoder is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from service.encoders.device import torch_dtype
from service.encoders.folder import model_folder, weights_file
from service.encoders.grid import GridEncoder, GridOptions
from service.encoders.weights import digest, said
from service.errors import WeightsMissing, WeightsRefused

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"

CLASSES = {"vq": "VQModel", "kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}
"""Encoder → the library's class."""

NAMED_MAX = 5
"""Tensors named in a message: enough to see what differs."""


class LatentOptions(GridOptions):
    subfolder: str | None = Field(
        None, pattern=r"^\w[\w-]*$", description="where the model lies in a pipeline's folder, such as vae or vqvae"
    )


class _Network:
    """A `Network` (grid.py): the library's models see in [-1, 1]."""

    def __init__(self, name: str, model: Any) -> None:
        self._name = name
        self._model = model

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        encoded = self._model.encode(pixels * 2 - 1)
        latents: torch.Tensor = encoded.latent_dist.mode() if self._name == "kl" else encoded.latents
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = (self._model.decode(latents).sample + 1) / 2
        return pixels


def make(name: str, options: LatentOptions, *, device: str) -> GridEncoder:
    """The encoder `name` of `CLASSES`.

    Raises `WeightsMissing` when the library or a file is not on this machine, `WeightsRefused` when the files are not
    what the name and their own configuration say, and `InvalidRequest` for a size that the model cannot take.
    """
    model, weights = _load(CLASSES[name], options, device)
    return GridEncoder(name, _Network(name, model), options, device=device, weights=weights)


def _load(class_name: str, options: LatentOptions, device: str) -> tuple[Any, str]:
    """The model, on `device` in its precision and ready to infer, and its digest."""
    try:
        import diffusers
    except ImportError as error:
        raise WeightsMissing(f"diffusers cannot be imported ({error}): pip install 'engram-memory[latents]'") from error
    prefix = f"{options.subfolder}/" if options.subfolder else ""
    names = (CONFIG, WEIGHTS, SHARDS, WEIGHTS.replace(".", "-*-of-*.", 1))
    folder = model_folder(options.model, [prefix + name for name in names]) / prefix
    config = _config(folder, class_name)
    weights_file(folder, (WEIGHTS, SHARDS))
    try:
        model, found = getattr(diffusers, class_name).from_pretrained(
            folder,
            torch_dtype=torch_dtype(options.precision),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # a shape that differs, a file that ends early, a value that the class does not take
        raise WeightsRefused(
            f"{folder} does not hold the {class_name} that its {CONFIG} describes: {said(error)}"
        ) from error
    _refuse_differences(folder, found)
    model.eval().requires_grad_(False).to(device)
    described = {name: value for name, value in sorted(config.items()) if not name.startswith("_")}
    return model, digest(model.state_dict(), class_name, json.dumps(described, sort_keys=True))


def _config(folder: Path, class_name: str) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsMissing(
            f"{file} cannot be read ({error.strerror}): the folder needs {CONFIG} and {WEIGHTS}, as save_pretrained "
            "writes them; `subfolder` names the part of a pipeline"
        ) from error
    except ValueError as error:
        raise WeightsRefused(f"{file} is not JSON: {error}") from error
    said = config.get("_class_name") if isinstance(config, dict) else None
    if said != class_name:
        fitting = [name for name, theirs in CLASSES.items() if theirs == said]
        other = f": use the encoder {fitting[0]!r}" if fitting else ""
        raise WeightsRefused(f"{file} describes a model of class {said}, not {class_name}{other}")
    return dict(config)


def _refuse_differences(folder: Path, found: dict[str, Any]) -> None:
    said = {"missing_keys": "lack", "unexpected_keys": "have besides", "mismatched_keys": "have in another shape"}
    for kind, verb in said.items():
        names = sorted(str(name) for name in found.get(kind, ()))
        if names:
            more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
            raise WeightsRefused(
                f"the weights in {folder} are of another architecture than its {CONFIG}: they {verb} "
                f"{', '.join(names[:NAMED_MAX])}{more}"
            )
