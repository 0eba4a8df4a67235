"""What encoders there are, told without loading any: what each takes and gives, and whether its weights are here.

Rules:
- A size is measured on the files that are here, never typed in; a dimension is there where no option decides it.
- A licence is that of the weights, as their own card or package states it. Where nobody has looked, it says to.
- The hub is not asked: a model of it is here when its client has it in the cache.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, Field

from service.encoders.protocol import Source
from service.encoders.weights import PackagedFile
from service.errors import WeightsMissing

CHECK = "see its card"


class KnownModel(BaseModel):
    """A published model that an encoder takes: one of many."""

    options: dict[str, str] = Field(description="the encoder's options that name it")
    licence: str
    here: bool
    size_bytes: int | None = Field(description="of its weights, where they are here")


class Card(BaseModel):
    name: str
    about: str
    takes: list[Source]
    decodes: bool = Field(description="whether what is recalled can be drawn")
    dimension: int | None = Field(description="null where it depends on the model or its options")
    licence: str | None = Field(description="of the weights; null where there are none or they are your choice")
    size_bytes: int | None = Field(description="of the weights on disk, where they are part of the installation")
    here: bool = Field(description="whether it works now, without a model named")
    needs: str | None = Field(description="what to do first, where it does not")
    models: list[KnownModel] = Field(description="published models to begin with")
    page: str = Field(description="its documentation in the repository")


def cards() -> list[Card]:
    """Of every encoder, in the order of the registry."""
    from service.encoders import bridge, codec, minilm
    from service.encoders.pixels import PixelsOptions

    cells = PixelsOptions.model_fields["size"].default ** 2
    clip = (
        _hub("open_clip_model.safetensors", "MIT", model="hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        _hub("open_clip_model.safetensors", "Apache-2.0", model="hf-hub:timm/ViT-B-16-SigLIP"),
        _hub(
            "open_clip_model.safetensors", "apple-amlr: research only, see its card",
            model="hf-hub:apple/MobileCLIP-S1-OpenCLIP",
        ),
    )  # fmt: skip
    file = "diffusion_pytorch_model.safetensors"
    vq = (
        _hub(file, CHECK, model="CompVis/ldm-super-resolution-4x-openimages", subfolder="vqvae"),
        _hub(file, "Apache-2.0", model="kandinsky-community/kandinsky-2-2-decoder", subfolder="movq"),
        _hub(file, CHECK, model="amused/amused-512", subfolder="vqvae"),
    )
    sentences = (
        _hub("model.safetensors", "Apache-2.0", model="sentence-transformers/all-mpnet-base-v2"),
        _hub("model.safetensors", "Apache-2.0", model="sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"),
    )
    return [
        _packaged(
            "codec", "Pictures of 64 x 64, small, and drawn again; trained by this project.", ["image"],
            decodes=True, dimension=codec.CHANNELS * (codec.SIZE // codec.CELL) ** 2, licence="Apache-2.0",
            files=_files(codec),
        ),
        _card(
            "pixels", "The thumbnail itself: nothing is learned.", ["image"],
            decodes=True, dimension=3 * cells,
        ),
        _packaged(
            "bridge", "Basic semantics of pictures and English sentences in one space.", ["image", "text"],
            decodes=False, dimension=bridge.Bridge.dimension, licence="Apache-2.0",
            files=[*_files(bridge), minilm.WEIGHTS],
        ),
        _yours("open_clip", "Any model of open_clip: pictures and sentences in one space.", ["image", "text"],
               library=("open_clip", "clip"), models=clip),
        _yours("vq", "Any VQModel of diffusers: pictures as codes, drawn well.", ["image"],
               library=("diffusers", "latents"), models=vq),
        _yours("kl", "Any AutoencoderKL of diffusers: the first stage of Stable Diffusion.", ["image"],
               library=("diffusers", "latents"), models=(_hub(file, "MIT", model="stabilityai/sd-vae-ft-mse"),)),
        _yours("tiny", "Any AutoencoderTiny of diffusers: the same at a few per cent of the cost.", ["image"],
               library=("diffusers", "latents"), models=(_hub(file, "MIT", model="madebyollin/taesd"),)),
        _card(
            "dvae", "DALL-E's discrete VAE.", ["image"], decodes=True, licence="modified MIT (openai/DALL-E)",
            needs="convert it first: engram convert-dvae",
        ),
        _packaged(
            "sentence", "The meaning of English texts alone; or any model of sentence-transformers.", ["text"],
            decodes=False, dimension=minilm.DIMENSION, licence="Apache-2.0", files=[minilm.WEIGHTS], models=sentences,
        ),
        _card("pixel_text", "A text as the picture of its hash, through any image encoder.", ["text"], decodes=False),
    ]  # fmt: skip


def _card(
    name: str,
    about: str,
    takes: list[Source],
    *,
    decodes: bool,
    dimension: int | None = None,
    licence: str | None = None,
    size_bytes: int | None = None,
    needs: str | None = None,
    models: tuple[KnownModel, ...] = (),
) -> Card:
    return Card(
        name=name, about=about, takes=takes, decodes=decodes, dimension=dimension, licence=licence,
        size_bytes=size_bytes, here=needs is None, needs=needs, models=list(models), page=f"docs/encoders/{name}.md",
    )  # fmt: skip


def _packaged(
    name: str,
    about: str,
    takes: list[Source],
    *,
    decodes: bool,
    dimension: int,
    licence: str,
    files: list[PackagedFile],
    models: tuple[KnownModel, ...] = (),
) -> Card:
    size = 0
    needs = None
    for file in files:
        try:
            size += file.find().stat().st_size
        except (WeightsMissing, OSError):
            needs = f"pip install {file.requirement}"
    return _card(
        name, about, takes, decodes=decodes, dimension=dimension, licence=licence,
        size_bytes=size if needs is None else None, needs=needs, models=models,
    )  # fmt: skip


def _yours(
    name: str, about: str, takes: list[Source], *, library: tuple[str, str], models: tuple[KnownModel, ...]
) -> Card:
    module, extra = library
    install = f"pip install 'engram-memory[{extra}]', then " if find_spec(module) is None else ""
    needs = f"{install}name a model"
    return _card(name, about, takes, decodes=takes == ["image"], needs=needs, models=models)


def _hub(file: str, licence: str, **options: str) -> KnownModel:
    found = _cached(
        options["model"].removeprefix("hf-hub:"), "/".join([*filter(None, [options.get("subfolder")]), file])
    )
    size = found.stat().st_size if found is not None else None
    return KnownModel(options=options, licence=licence, here=found is not None, size_bytes=size)


def _cached(repository: str, file: str) -> Path | None:
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def _files(module: object) -> list[PackagedFile]:
    return [value for value in vars(module).values() if isinstance(value, PackagedFile)]
