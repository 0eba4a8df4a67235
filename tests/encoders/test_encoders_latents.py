"""diffusers' autoencoders: small ones, saved here in the library's own format and loaded as a user's would be."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from service.encoders import grid, registry
from service.encoders.grid import GridEncoder
from service.encoders.protocol import Decoder, Encoder, Picture
from service.errors import InvalidRequest, NothingObserved, OutOfMemory, WeightsMissing, WeightsRefused, WrongDimension

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the library's own imports say
    diffusers = pytest.importorskip("diffusers", reason="the `latents` extra is not installed")

CHANNELS = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4, "layers_per_block": 1}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
SIZE, CELLS = 32, 8
"""Pictures are shown at 32 x 32, and the models here shrink by 4."""

WEIGHTS = "diffusion_pytorch_model.safetensors"


def a_vq(**changes: Any) -> Any:
    return diffusers.VQModel(**CHANNELS, **BLOCKS, latent_channels=3, num_vq_embeddings=16, **changes)


def a_kl() -> Any:
    return diffusers.AutoencoderKL(**CHANNELS, **BLOCKS, latent_channels=4)


def a_tiny() -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), latent_channels=4,
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], Any], int]] = {"vq": (a_vq, 3), "kl": (a_kl, 4), "tiny": (a_tiny, 4)}
"""The encoder → how its model is made, and the channels of its latents."""

every = pytest.mark.parametrize("name", MODELS)


def saved(folder: Path, model: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.2)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    made = {}
    for name, (make, _) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = (folder, saved(folder, make()))
    return made


def made(name: str, folder: Path, **options: object) -> GridEncoder:
    encoder = registry.make(name, {"model": str(folder), "size": SIZE, **options})
    assert isinstance(encoder, GridEncoder)
    return encoder


def pictures(count: int, seed: int = 0) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [Picture(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in range(count)]


def as_input(of: list[Picture]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in of]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pixels(drawn: torch.Tensor) -> NDArray[np.uint8]:
    return ((drawn + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


@every
def test_it_encodes_and_draws_as_the_model_does(name: str, models: dict[str, tuple[Path, Any]]) -> None:
    folder, model = models[name]
    encoder = made(name, folder)
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder, Decoder)
    channels = MODELS[name][1]
    assert encoder.dimension == channels * CELLS**2
    some = pictures(5)
    found = encoder.encode_images(some)
    with torch.no_grad():
        encoded = model.encode(as_input(some))
        latents = encoded.latent_dist.mean if name == "kl" else encoded.latents
        drawn = model.decode(latents).sample  # the vector-quantised one quantises here
    expected = latents.permute(0, 2, 3, 1).reshape(5, -1).numpy()
    np.testing.assert_allclose(found.vectors, expected, atol=1e-4, rtol=1e-4)
    assert found.warnings == ((),) * 5
    pixels = np.stack(encoder.decode(found.vectors))
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - as_pixels(drawn)).max() <= 1
    assert pixels.std() > 0  # not clipped to one value: the comparison above compares something


@every
def test_a_row_does_not_depend_on_its_batch(
    name: str, models: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = made(name, models[name][0])
    some = pictures(5)
    together = encoder.encode_images(some).vectors
    np.testing.assert_allclose(encoder.encode_images(some[3:4]).vectors[0], together[3], atol=1e-4)
    monkeypatch.setattr(grid, "PIXELS_AT_ONCE", 2 * SIZE**2)
    np.testing.assert_allclose(encoder.encode_images(some).vectors, together, atol=1e-4)
    assert encoder.encode_images([]).vectors.shape == (0, encoder.dimension)
    assert encoder.decode(together[:0]) == []


@every
def test_hidden_pixels_have_no_influence_and_hidden_cells_say_nothing(
    name: str, models: dict[str, tuple[Path, Any]]
) -> None:
    encoder = made(name, models[name][0])
    picture, other = (picture.pixels for picture in pictures(2))
    observed = np.zeros((SIZE, SIZE), dtype=np.bool_)
    observed[:, : SIZE // 2 + 1] = True  # the fifth column of cells is a quarter observed
    changed = np.where(observed[..., None], picture, other)
    one, two = encoder.encode_images([Picture(picture, observed), Picture(changed, observed)]).vectors
    np.testing.assert_array_equal(one, two)
    cells = one.reshape(CELLS, CELLS, -1)
    assert not cells[:, CELLS // 2 :].any()
    assert np.abs(cells[:, : CELLS // 2]).min() > 0
    with pytest.raises(NothingObserved):
        encoder.encode_images([Picture(picture, np.zeros((SIZE, SIZE), dtype=np.bool_))])


@every
@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.01), ("bf16", 0.06)])
def test_half_precision_is_near_and_another_fingerprint(
    name: str, precision: str, error: float, models: dict[str, tuple[Path, Any]]
) -> None:
    full, half = made(name, models[name][0]), made(name, models[name][0], precision=precision)
    some = pictures(3)
    expected, found = full.encode_images(some).vectors, half.encode_images(some).vectors
    assert found.dtype == np.float32
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < error
    assert half.decode(found)[0].shape == (SIZE, SIZE, 3)
    assert half.fingerprint != full.fingerprint


def test_the_fingerprint_is_of_the_tensors_the_configuration_and_the_size(tmp_path: Path) -> None:
    prints = []
    for seed, folder in ((0, tmp_path / "a"), (0, tmp_path / "b"), (1, tmp_path / "c")):
        saved(folder, a_tiny(), seed)
        prints.append(made("tiny", folder).fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert made("tiny", tmp_path / "a", size=64).fingerprint != prints[0]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    for change in ({"_diffusers_version": "0.0.1"}, {"scaling_factor": 0.5}):
        shutil.copytree(tmp_path / "b", changed := tmp_path / next(iter(change)))
        (changed / "config.json").write_text(json.dumps({**config, **change}))
    assert made("tiny", tmp_path / "_diffusers_version").fingerprint == prints[0]
    assert made("tiny", tmp_path / "scaling_factor").fingerprint != prints[0]


def test_a_picture_is_stretched_and_it_is_said(models: dict[str, tuple[Path, Any]]) -> None:
    encoder = made("tiny", models["tiny"][0])
    wide = np.asarray(Image.fromarray(pictures(1)[0].pixels).resize((4 * SIZE, SIZE)))
    one_pixel = np.full((1, 1, 3), 200, dtype=np.uint8)
    encoded = encoder.encode_images([Picture(wide), Picture(one_pixel), pictures(1)[0]])
    assert encoded.warnings[0] == ("the picture is 128x32: it was stretched to the encoder's square",)
    assert "one pixel" in encoded.warnings[1][0]
    assert encoded.warnings[2] == ()
    flat = Picture(np.full((SIZE, SIZE, 3), 200, dtype=np.uint8))
    np.testing.assert_allclose(encoded.vectors[1], encoder.encode_images([flat]).vectors[0], atol=1e-4)


def test_a_part_of_a_pipeline_is_named_by_its_subfolder(tmp_path: Path) -> None:
    saved(tmp_path / "vae", a_kl())
    with pytest.raises(WeightsMissing, match="subfolder"):
        made("kl", tmp_path)
    assert made("kl", tmp_path, subfolder="vae").dimension == 4 * CELLS**2
    with pytest.raises(InvalidRequest, match="subfolder"):
        made("kl", tmp_path, subfolder="../vae")


def test_the_older_names_of_attention_are_taken_as_those_checkpoints_have_them(tmp_path: Path) -> None:
    saved(tmp_path, a_kl())
    expected = made("kl", tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        for now, then in older.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        tensors[name] = tensor
    assert any(".proj_attn." in name for name in tensors)
    shutil.copytree(tmp_path, old := tmp_path / "old")
    save_file(tensors, old / WEIGHTS, {"format": "pt"})
    assert made("kl", old).fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("size", "said"), [(30, "multiple of 4"), (2048, "at most 65,536: take a size of at most 588"), (4, "greater")]
)
def test_a_size_that_does_not_go_is_refused(size: int, said: str, models: dict[str, tuple[Path, Any]]) -> None:
    with pytest.raises(InvalidRequest, match=said):
        made("vq", models["vq"][0], size=size)


def test_latents_of_another_size_and_texts_are_refused(models: dict[str, tuple[Path, Any]]) -> None:
    encoder = made("vq", models["vq"][0])
    with pytest.raises(WrongDimension):
        encoder.decode(np.zeros((1, 7), dtype=np.float32))
    with pytest.raises(InvalidRequest, match="'vq' takes images only"):
        encoder.encode_texts(["a cat"])


# --- weights that are not what they are said to be --------------------------------------------------------------------


def test_a_model_of_another_class_names_its_encoder(models: dict[str, tuple[Path, Any]]) -> None:
    with pytest.raises(WeightsRefused, match="AutoencoderTiny, not VQModel: use the encoder 'tiny'"):
        made("vq", models["tiny"][0])


def test_tensors_of_another_shape_are_refused_with_both_shapes(tmp_path: Path) -> None:
    saved(tmp_path, a_vq())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_vq_embeddings": 32}))
    with pytest.raises(WeightsRefused, match=r"(?s)quantize\.embedding.*16.*32|quantize\.embedding.*32.*16"):
        made("vq", tmp_path)


def test_missing_tensors_are_never_made_up_and_more_than_the_model_has_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, a_kl())
    tensors = load_file(tmp_path / WEIGHTS)
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.conv_out")}
    save_file(fewer, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(WeightsRefused, match=r"lack decoder\.conv_out\.bias, decoder\.conv_out\.weight"):
        made("kl", tmp_path)
    save_file({**tensors, "more.weight": torch.zeros(1)}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(WeightsRefused, match=r"have besides more\.weight"):
        made("kl", tmp_path)


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = saved(tmp_path, a_tiny())
    (tmp_path / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsRefused, match=r"pickle.*engram convert-weights .*\.bin .*\.safetensors"):
        made("tiny", tmp_path)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, a_tiny())
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsRefused, match="does not hold the AutoencoderTiny"):
        made("tiny", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsRefused, match="not JSON"):
        made("tiny", tmp_path)


def test_what_is_not_there_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, tuple[Path, Any]]
) -> None:
    with pytest.raises(WeightsMissing, match=r"needs config\.json and diffusion_pytorch_model\.safetensors"):
        made("vq", tmp_path)
    shutil.copy(models["vq"][0] / "config.json", tmp_path)
    with pytest.raises(WeightsMissing, match=r"has no diffusion_pytorch_model\.safetensors"):
        made("vq", tmp_path)
    with pytest.raises(WeightsMissing, match="no folder /no/such/folder"):
        made("vq", Path("/no/such/folder"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"(?s)no-one/nothing is neither.*diffusion_pytorch_model\.safetensors"):
        made("vq", Path("no-one/nothing"))


# --- memory -----------------------------------------------------------------------------------------------------------


class Full:
    """A model that runs out of memory beyond some items at once."""

    def __init__(self, model: Any, fits: int) -> None:
        self._model, self._fits = model, fits
        self.runs: list[int] = []

    def _run(self, call: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        self.runs.append(len(batch))
        if len(batch) > self._fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return call(batch)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._run(self._model.encode, pixels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._run(self._model.decode, latents)


def test_a_batch_that_does_not_fit_is_halved(
    models: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = made("vq", models["vq"][0])
    some = pictures(9)
    expected = encoder.encode_images(some).vectors
    drawn = encoder.decode(expected)
    full = Full(encoder._network, fits=2)
    monkeypatch.setattr(encoder, "_network", full)
    np.testing.assert_allclose(encoder.encode_images(some).vectors, expected, atol=1e-4)
    assert full.runs == [9, 4, 2, 2, 2, 2, 1]
    assert np.abs(np.stack(encoder.decode(expected)).astype(int) - np.stack(drawn)).max() <= 1
    monkeypatch.setattr(encoder, "_network", Full(full._model, fits=0))
    with pytest.raises(OutOfMemory):
        encoder.encode_images(some)
