"""open_clip on a small model made here and loaded again as a user's local folder would be."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from service.encoders import registry
from service.encoders.clip import BATCH, OpenClip, OpenClipOptions
from service.encoders.protocol import Encoder, Picture
from service.errors import EmptyText, WeightsMissing, WeightsRefused

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


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.01), ("bf16", 0.05)])
def test_half_precision_is_near_and_another_fingerprint(
    encoder: OpenClip, folder: Path, precision: str, error: float
) -> None:
    half = registry.make("open_clip", {"model": f"local-dir:{folder}", "precision": precision})
    some, texts = pictures(3), ["a cat", "two dogs"]
    for found, expected in (
        (half.encode_images(some).vectors, encoder.encode_images(some).vectors),
        (half.encode_texts(texts).vectors, encoder.encode_texts(texts).vectors),
    ):
        assert found.dtype == np.float32
        assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < error
    assert half.fingerprint != encoder.fingerprint


def test_how_an_odd_picture_was_fitted_is_told(encoder: OpenClip, model: torch.nn.Module, tmp_path: Path) -> None:
    odd = [Picture(np.full(shape, 9, dtype=np.uint8)) for shape in ((40, 90, 3), (1, 1, 3), (40, 60, 3))]
    assert encoder.encode_images(odd).warnings == (
        ("the picture is 90x40: it was cropped to its middle square, the rest is lost",),
        ("the picture is one pixel: all that is encoded is its colour",),
        (),
    )
    save_model(tmp_path, seed=0)
    changed = {"model_cfg": CONFIG, "preprocess_cfg": {**PREPROCESS, "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(changed))
    squashing = OpenClip(OpenClipOptions(model=f"local-dir:{tmp_path}"), device="cpu")
    assert "stretched" in squashing.encode_images(odd[:1]).warnings[0][0]


def test_a_batch_that_does_not_fit_is_halved(encoder: OpenClip, monkeypatch: pytest.MonkeyPatch) -> None:
    some, texts = pictures(6), ["a cat", "two dogs", "three"]
    images, sentences = encoder.encode_images(some).vectors, encoder.encode_texts(texts).vectors
    runs = []

    def full(call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(batch: torch.Tensor) -> torch.Tensor:
            runs.append(len(batch))
            if len(batch) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return call(batch)

        return run

    monkeypatch.setattr(encoder._model, "encode_image", full(encoder._model.encode_image))
    monkeypatch.setattr(encoder._model, "encode_text", full(encoder._model.encode_text))
    np.testing.assert_allclose(encoder.encode_images(some).vectors, images, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts).vectors, sentences, atol=1e-5)
    assert runs == [6, 3, 1, 1, 1, 1, 1, 1, 3, 1, 1, 1]


def save_siglip(folder: Path) -> torch.nn.Module:
    """A model as SigLIP's are in the library: a timm tower without a class token, a tokenizer of its own, a bias."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "dog": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    config = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 6, "vocab_size": 6, "hf_tokenizer_name": "timm/a-siglip", "width": 64, "heads": 2,
            "layers": 1, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "tokenizer_kwargs": {"clean": "canonicalize"}, "norm_kwargs": {"eps": 1e-6},
        },
    }  # fmt: skip
    return save_custom(folder, config, {**PREPROCESS, "resize_mode": "squash"})


def save_custom(folder: Path, config: dict[str, Any], preprocess: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    built = {name: value for name, value in config.items() if name != "custom_text"}
    model: torch.nn.Module = open_clip.CustomTextCLIP(**built)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model.eval()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_siglip_loads_from_its_folder_with_its_tokenizer(tmp_path: Path, precision: str) -> None:
    model = save_siglip(tmp_path)
    encoder = registry.make("open_clip", {"model": f"local-dir:{tmp_path}", "precision": precision})
    encoded = encoder.encode_texts(["a cat", "a dog and a cat and a dog"])
    assert encoded.warnings == (
        (),
        (
            "text cut to the model's length: 6 of 8 tokens kept",
            "2 of 8 tokens are unknown to the model: it was not trained on such text",
        ),
    )
    some = [Picture(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8))]
    with torch.inference_mode():
        texts = model.encode_text(torch.tensor([[3, 4, 0, 0, 0, 0], [3, 5, 2, 3, 4, 2]]))
        pixels = torch.from_numpy(some[0].pixels).permute(2, 0, 1)[None] / 255
        images = model.encode_image((pixels - 0.5) / 0.25)
    error = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.05}[precision]
    for found, expected in ((encoded.vectors, texts.numpy()), (encoder.encode_images(some).vectors, images.numpy())):
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < error


def test_many_threads_get_the_rows_of_one(tmp_path: Path) -> None:
    save_siglip(tmp_path)
    encoder = OpenClip(OpenClipOptions(model=f"local-dir:{tmp_path}"), device="cpu")
    texts = ["a cat", "a dog and a cat", "dog", "cat " * 9]
    expected = [encoder.encode_texts([text]) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: encoder.encode_texts([texts[i % 4]]), range(64)))
    for i, encoded in enumerate(found):
        assert encoded.warnings == expected[i % 4].warnings
        np.testing.assert_allclose(encoded.vectors, expected[i % 4].vectors, atol=1e-5)


def test_a_siglip_without_its_tokenizer_says_what_the_folder_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_siglip(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(WeightsMissing, match="its tokenizer's files"):
        OpenClip(OpenClipOptions(model=f"local-dir:{tmp_path}"), device="cpu")


def test_a_mobileclip_loads_from_its_folder(tmp_path: Path) -> None:
    config = {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 64, "timm_model_name": "fastvit_mci0", "timm_model_pretrained": False, "timm_pool": "avg",
            "timm_proj": None, "timm_drop": 0.0, "timm_drop_path": 0.0,
        },
        "text_cfg": {**CONFIG["text_cfg"], "no_causal_mask": True},
    }  # fmt: skip
    model = save_custom(tmp_path, config, PREPROCESS)
    encoder = OpenClip(OpenClipOptions(model=f"local-dir:{tmp_path}"), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = model.encode_image((torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25)
    np.testing.assert_allclose(encoder.encode_images([Picture(pixels)]).vectors, expected.numpy(), atol=1e-4)
    assert encoder.encode_texts(["a cat"]).vectors.shape == (1, 24)


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


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vision_cfg", {"image_size": 64}, "visual.positional_embedding of .5, 64., and the model .* .17, 64."),
        ("text_cfg", {"context_length": 20}, "positional_embedding of .16, 32., and the model .* .20, 32."),
        ("text_cfg", {"layers": 2}, r"Missing key.*resblocks\.1"),
        ("text_cfg", {"width": 64}, "could not load .*width"),
    ],
)
def test_tensors_of_another_architecture_are_refused(
    tmp_path: Path, part: str, change: dict[str, int], said: str
) -> None:
    save_model(tmp_path, seed=0)
    config = {**CONFIG, part: {**CONFIG[part], **change}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    with pytest.raises(WeightsRefused, match=f"(?s){said}"):
        OpenClip(OpenClipOptions(model=f"local-dir:{tmp_path}"), device="cpu")


def test_a_pickle_is_refused_whether_it_lies_in_a_folder_or_is_named(tmp_path: Path) -> None:
    model = save_model(tmp_path, seed=0)
    (tmp_path / "open_clip_model.safetensors").unlink()
    pickled = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(model.state_dict(), pickled)
    for options in (
        OpenClipOptions(model=f"local-dir:{tmp_path}"),
        OpenClipOptions(model="ViT-B-32", pretrained=str(pickled)),
    ):
        with pytest.raises(WeightsRefused, match=r"pickle.*engram convert-weights .*\.bin .*\.safetensors"):
            OpenClip(options, device="cpu")


def test_weights_are_named_exactly_once() -> None:
    for options in ({"model": "ViT-B-32"}, {"model": "local-dir:/x", "pretrained": "y"}):
        with pytest.raises(ValidationError, match="pretrained"):
            OpenClipOptions.model_validate(options)
