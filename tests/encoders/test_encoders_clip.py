"""open_clip on a small model made here and loaded again as a user's local folder would be."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from service.encoders.clip import BATCH, OpenClip, OpenClipOptions
from service.encoders.protocol import Encoder, Picture
from service.errors import EmptyText, WeightsMissing

open_clip = pytest.importorskip("open_clip", reason="the `clip` extra is not installed")

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}


def save_model(folder: Path, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return save_model(folder, seed=0)


@pytest.fixture(scope="module")
def encoder(folder: Path, model: torch.nn.Module) -> OpenClip:
    return OpenClip(OpenClipOptions(model=f"local-dir:{folder}"), device="cpu")


def pictures(count: int) -> list[Picture]:
    rng = np.random.default_rng(0)
    return [Picture(rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)) for i in range(count)]


def test_its_rows_are_the_models_own(encoder: OpenClip, model: torch.nn.Module) -> None:
    assert isinstance(encoder, Encoder)
    assert encoder.dimension == 24
    some = pictures(BATCH + 3)
    transform = open_clip.image_transform(32, is_train=False, mean=PREPROCESS["mean"], std=PREPROCESS["std"])
    texts = ["a cat", "two dogs on a beach"] * 10
    with torch.inference_mode():
        images = model.encode_image(torch.stack([transform(Image.fromarray(p.pixels)) for p in some]))
        sentences = model.encode_text(open_clip.SimpleTokenizer(context_length=16)(texts))
    np.testing.assert_allclose(encoder.encode_images(some).vectors, images.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts).vectors, sentences.numpy(), atol=1e-5)


def test_a_long_text_is_cut_and_said(encoder: OpenClip) -> None:
    encoded = encoder.encode_texts(["cat " * 20, "cat"])
    assert encoded.warnings == (("text cut to the model's length: 16 of 22 tokens kept",), ())
    with pytest.raises(EmptyText):
        encoder.encode_texts([" "])


def test_no_items_give_no_rows(encoder: OpenClip) -> None:
    assert encoder.encode_images([]).vectors.shape == (0, 24)
    assert encoder.encode_texts([]).vectors.shape == (0, 24)


def test_hidden_pixels_have_no_influence(encoder: OpenClip) -> None:
    pixels = pictures(1)[0].pixels
    observed = np.zeros(pixels.shape[:2], dtype=np.bool_)
    observed[5:25, 10:40] = True
    changed = np.where(observed[..., None], pixels, np.uint8(7))
    own, other = encoder.encode_images([Picture(pixels, observed), Picture(changed, observed)]).vectors
    np.testing.assert_array_equal(own, other)


def test_the_fingerprint_names_weights_and_preprocessing(
    encoder: OpenClip, model: torch.nn.Module, tmp_path: Path
) -> None:
    save_model(tmp_path, seed=0)
    options = OpenClipOptions(model=f"local-dir:{tmp_path}")
    assert OpenClip(options, device="cpu").fingerprint == encoder.fingerprint
    changed = {"model_cfg": CONFIG, "preprocess_cfg": {**PREPROCESS, "mean": [0.4, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(changed))
    assert OpenClip(options, device="cpu").fingerprint != encoder.fingerprint
    save_model(tmp_path, seed=1)
    assert OpenClip(options, device="cpu").fingerprint != encoder.fingerprint


def test_a_named_model_takes_a_weights_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-of-the-tests.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "configs")
    model = save_model(tmp_path, seed=3)
    options = OpenClipOptions(model="tiny-of-the-tests", pretrained=str(tmp_path / "open_clip_model.safetensors"))
    with caplog.at_level(logging.ERROR):
        found = OpenClip(options, device="cpu").encode_texts(["a cat"]).vectors
    with torch.inference_mode():
        expected = model.encode_text(open_clip.SimpleTokenizer(context_length=16)(["a cat"]))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_weights_that_are_not_there_are_missing_never_random(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(WeightsMissing, match=r"open_clip_model\.safetensors"):
        OpenClip(OpenClipOptions(model=f"local-dir:{tmp_path}"), device="cpu")
    with pytest.raises(WeightsMissing, match="local-dir:"):
        OpenClip(OpenClipOptions(model="ViT-B-32", pretrained="no-such-tag"), device="cpu")
    with pytest.raises(WeightsMissing, match="no-such-folder"):
        OpenClip(OpenClipOptions(model="local-dir:/no-such-folder"), device="cpu")


def test_weights_are_named_exactly_once() -> None:
    for options in ({"model": "ViT-B-32"}, {"model": "local-dir:/x", "pretrained": "y"}):
        with pytest.raises(ValidationError, match="pretrained"):
            OpenClipOptions.model_validate(options)
