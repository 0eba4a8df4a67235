"""Encoders by name: what is made, once, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pydantic import BaseModel

from service.encoders import registry
from service.encoders.pixels import PixelsOptions
from service.encoders.protocol import Encoder
from service.errors import DeviceMissing, InvalidRequest, OutOfMemory, UnknownEncoder, WeightsMissing


def test_names_are_what_there_is() -> None:
    assert registry.names() == (
        "codec", "pixels", "bridge", "open_clip", "vq", "kl", "tiny", "dvae", "sentence", "pixel_text",
    )  # fmt: skip


def test_an_encoder_is_made_once_for_the_same_options() -> None:
    made = registry.make("pixels", {"size": 12})
    assert isinstance(made, Encoder)
    assert made.dimension == 12 * 12 * 3
    assert registry.make("pixels", {"size": 12, "centre": True}) is made
    assert registry.make("pixels", {"size": 12, "centre": False}) is not made


def test_many_threads_get_one_instance() -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: registry.make("bridge", {}), range(32)))
    assert len({id(encoder) for encoder in made}) == 1
    assert made[0].dimension == 768


def test_the_instances_kept_are_bounded() -> None:
    first = registry.make("pixels", {"size": 50})
    for size in range(51, 51 + registry.INSTANCES_MAX):
        registry.make("pixels", {"size": size})
    again = registry.make("pixels", {"size": 50})
    assert again is not first
    assert again.fingerprint == first.fingerprint


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UnknownEncoder, match="'clip'; there are codec, pixels, bridge"):
        registry.make("clip", {})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pixels", {"sise": 32}, r"sise: .*it takes: size, colour, centre"),
        ("pixels", {"size": 3}, r"size: .*greater than or equal to 4"),
        ("pixels", {"size": 129}, r"size: .*less than or equal to 128"),
        ("codec", {"size": 32}, r"size: .*it takes: centre"),
        ("bridge", {"model": "x"}, r"model: .*it takes: none"),
        ("open_clip", {}, r"model: .*it takes: model, pretrained"),
        ("vq", {"model": "x", "precision": "int8"}, r"precision: .*'fp32', 'fp16' or 'bf16'"),
        ("open_clip", {"model": "ViT-B-32"}, r"options: .*pretrained"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        registry.make(name, options)


def test_a_device_that_is_not_there_is_said_before_anything_is_loaded() -> None:
    for name, options in (("kl", {"model": "/no/such/folder"}), ("pixels", {"size": 7})):
        with pytest.raises(DeviceMissing, match=r"no device 'cuda:99'.*there is cpu"):
            registry.make(name, options, device="cuda:99")
    with pytest.raises(WeightsMissing, match="no folder"):
        registry.make("kl", {"model": "/no/such/folder"}, device="cpu")
    for device in ("gpu", "meta"):  # no such word, and one that keeps no numbers
        with pytest.raises(DeviceMissing):
            registry.make("pixels", {}, device=device)


def test_a_model_that_does_not_fit_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(options: BaseModel, threads: int, device: str) -> Encoder:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(registry._TABLE, "large", lambda: (PixelsOptions, build))
    with pytest.raises(OutOfMemory, match="'large' does not fit in the memory of cpu"):
        registry.make("large", {})


def test_pixels_imports_no_model_library() -> None:
    code = (
        "import sys; from service.encoders.registry import make; make('pixels', {}); "
        "print([m for m in ('torch', 'onnxruntime', 'open_clip', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
