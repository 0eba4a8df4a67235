"""DALL-E's dVAE: a small one of the published classes, pickled whole as the published ones are, converted and used."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from engram.cli import main
from service.encoders import registry
from service.encoders.conversion import convert_dvae, convert_weights
from service.encoders.dvae import DVAE, WEIGHTS, network_of, shown
from service.encoders.grid import GridEncoder
from service.encoders.protocol import Decoder, Encoder, Picture
from service.errors import InvalidRequest, NotWritable, WeightsMissing, WeightsRefused

HIDDEN, FIRST, CODES, BLOCKS = 8, 6, 32, 2
SIZE, CELLS = 32, 4


# --- the published classes, as their package lays them out -----------------------------------------------------------


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kw: int, use_float16: bool = True) -> None:
        super().__init__()
        self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, use_float16
        self.device, self.requires_grad = torch.device("cpu"), False
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) * 2 / (n_in * kw**2) ** 0.5, requires_grad=False)
        self.b = nn.Parameter(torch.randn(n_out) / 10, requires_grad=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(values, self.w, self.b, padding=(self.kw - 1) // 2)


class EncoderBlock(nn.Module):
    kernels = (3, 3, 3, 1)

    def __init__(self, n_in: int, n_out: int, n_layers: int) -> None:
        super().__init__()
        self.n_in, self.n_out, self.n_layers, self.n_hid = n_in, n_out, n_layers, n_out // 4
        self.post_gain = 1 / n_layers**2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        sizes = (n_in, self.n_hid, self.n_hid, self.n_hid, n_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(self.kernels):
            layers[f"relu_{i + 1}"] = nn.ReLU()
            layers[f"conv_{i + 1}"] = Conv2d(sizes[i], sizes[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = self.id_path(values) + self.post_gain * self.res_path(values)
        return summed


class DecoderBlock(EncoderBlock):
    kernels = (1, 3, 3, 3)


def groups(block: type[EncoderBlock], widths: list[int], last: tuple[str, Callable[[], nn.Module]]) -> Any:
    for i in range(4):
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for j in range(BLOCKS):
            parts[f"block_{j + 1}"] = block(widths[i] if j == 0 else widths[i + 1], widths[i + 1], 4 * BLOCKS)
        if i < 3:
            parts[last[0]] = last[1]()
        yield f"group_{i + 1}", nn.Sequential(parts)


class _Part(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.blocks(values)
        return found


class TheEncoder(_Part):
    group_count = 4

    def __init__(self) -> None:
        super().__init__()
        self.n_hid, self.n_blk_per_group, self.input_channels, self.vocab_size = HIDDEN, BLOCKS, 3, CODES
        self.device, self.requires_grad, self.use_mixed_precision = torch.device("cpu"), False, True
        widths = [HIDDEN, HIDDEN, 2 * HIDDEN, 4 * HIDDEN, 8 * HIDDEN]
        output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(8 * HIDDEN, CODES, 1, use_float16=False))
        self.blocks = nn.Sequential(
            OrderedDict([
                ("input", Conv2d(3, HIDDEN, 7)),
                *groups(EncoderBlock, widths, ("pool", lambda: nn.MaxPool2d(kernel_size=2))),
                ("output", nn.Sequential(output)),
            ])
        )  # fmt: skip


class TheDecoder(_Part):
    group_count = 4

    def __init__(self) -> None:
        super().__init__()
        self.n_init, self.n_hid, self.n_blk_per_group, self.output_channels = FIRST, HIDDEN, BLOCKS, 3
        self.vocab_size, self.device, self.requires_grad, self.use_mixed_precision = CODES, torch.device("cpu"), 0, 1
        widths = [FIRST, 8 * HIDDEN, 4 * HIDDEN, 2 * HIDDEN, HIDDEN]
        output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(HIDDEN, 6, 1))
        self.blocks = nn.Sequential(
            OrderedDict([
                ("input", Conv2d(CODES, FIRST, 1, use_float16=False)),
                *groups(DecoderBlock, widths, ("upsample", lambda: nn.Upsample(scale_factor=2, mode="nearest"))),
                ("output", nn.Sequential(output)),
            ])
        )  # fmt: skip


HOMES = {
    "dall_e": (),
    "dall_e.utils": (("Conv2d", Conv2d),),
    "dall_e.encoder": (("Encoder", TheEncoder), ("EncoderBlock", EncoderBlock)),
    "dall_e.decoder": (("Decoder", TheDecoder), ("DecoderBlock", DecoderBlock)),
}


@pytest.fixture(scope="module")
def published() -> Iterator[Callable[[nn.Module, Path], Path]]:
    """Pickles a module as if its classes were the package's, which is gone again before anything is read."""

    def save(module: nn.Module, file: Path) -> Path:
        named = {}
        for home, classes in HOMES.items():
            sys.modules[home] = types.ModuleType(home)
            for name, its in classes:
                named[its] = (its.__module__, its.__qualname__)
                its.__module__, its.__qualname__ = home, name
                setattr(sys.modules[home], name, its)
        try:
            torch.save(module, file)
        finally:
            for home in HOMES:
                del sys.modules[home]
            for its, (module_name, name) in named.items():
                its.__module__, its.__qualname__ = module_name, name
        return file

    return save


@pytest.fixture(scope="module")
def parts() -> tuple[TheEncoder, TheDecoder]:
    torch.manual_seed(0)
    return TheEncoder().eval(), TheDecoder().eval()


@pytest.fixture(scope="module")
def pickles(
    parts: tuple[TheEncoder, TheDecoder],
    published: Callable[[nn.Module, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pickles")
    return published(parts[0], folder / "encoder.pkl"), published(parts[1], folder / "decoder.pkl")


@pytest.fixture(scope="module")
def folder(pickles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("dvae")
    assert convert_dvae(*pickles, to) == to / WEIGHTS
    return to


def made(folder: Path, **options: object) -> GridEncoder:
    encoder = registry.make("dvae", {"model": str(folder), "size": SIZE, **options})
    assert isinstance(encoder, GridEncoder)
    return encoder


def pictures(count: int) -> list[Picture]:
    """Of one colour in each cell, so that cells have codes of their own."""
    colours = np.random.default_rng(0).integers(0, 256, (count, CELLS, CELLS, 3), dtype=np.uint8)
    return [Picture(np.kron(each, np.ones((8, 8, 1), dtype=np.uint8))) for each in colours]


# --- conversion -------------------------------------------------------------------------------------------------------


def test_the_pickles_name_the_packages_classes_and_it_is_not_there(pickles: tuple[Path, Path]) -> None:
    assert b"dall_e.encoder\nEncoderBlock" in pickles[0].read_bytes()
    assert not [name for name in sys.modules if name.startswith("dall_e")]
    with pytest.raises(ModuleNotFoundError):
        torch.load(pickles[0], weights_only=False)


def test_the_converted_network_is_the_published_one(folder: Path, parts: tuple[TheEncoder, TheDecoder]) -> None:
    network = network_of(load_file(folder / WEIGHTS))
    pixels = torch.rand(2, 3, SIZE, SIZE)
    mixture = torch.rand(2, CODES, CELLS, CELLS).softmax(dim=1)
    with torch.no_grad():
        torch.testing.assert_close(network.encoder(pixels), parts[0](pixels))
        torch.testing.assert_close(network.decoder(mixture), parts[1](mixture))


def test_the_command_converts(pickles: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert-dvae", *map(str, pickles), str(tmp_path / "made" / "here")])
    assert ended.value.code == 0
    assert (tmp_path / "made" / "here" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


class Bomb:
    """What a pickle may do to whoever loads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.target), "x")


class Imports:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("true",)


def test_a_pickle_that_does_more_is_refused_by_name_and_nothing_of_it_runs(
    parts: tuple[TheEncoder, TheDecoder],
    pickles: tuple[Path, Path],
    published: Callable[[nn.Module, Path], Path],
    tmp_path: Path,
) -> None:
    mark = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Bomb(mark))).close()
    assert mark.exists()  # so the trap works
    mark.unlink()
    for trap, said in ((Bomb(mark), "open"), (Imports(), r"(posix|nt)\.system")):
        bad = TheEncoder()
        bad.n_hid = trap  # type: ignore[assignment]
        file = published(bad, tmp_path / "encoder.pkl")
        with pytest.raises(WeightsRefused, match=f"refers to .*{said}"):
            convert_dvae(file, pickles[1], tmp_path)
    assert not mark.exists()
    assert not (tmp_path / WEIGHTS).exists()


def test_what_is_no_dvae_is_refused(pickles: tuple[Path, Path], tmp_path: Path) -> None:
    encoder, decoder = pickles
    with pytest.raises(WeightsRefused, match="do not hold the two parts"):
        convert_dvae(decoder, encoder, tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pkl")
    with pytest.raises(WeightsRefused, match="holds dict where a module"):
        convert_dvae(tmp_path / "state.pkl", decoder, tmp_path)
    (tmp_path / "torn.pkl").write_bytes(encoder.read_bytes()[:5000])
    with pytest.raises(WeightsRefused, match=r"torn\.pkl is not"):
        convert_dvae(tmp_path / "torn.pkl", decoder, tmp_path)
    with pytest.raises(WeightsMissing, match=r"no file .*absent\.pkl"):
        convert_dvae(tmp_path / "absent.pkl", decoder, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritable):
        convert_dvae(encoder, decoder, tmp_path / "file")


def test_a_module_that_holds_itself_ends(
    pickles: tuple[Path, Path], published: Callable[[nn.Module, Path], Path], tmp_path: Path
) -> None:
    endless = TheEncoder()
    endless.blocks._modules["again"] = endless.blocks
    with pytest.raises(WeightsRefused, match="where a module of the dVAE is expected"):
        convert_dvae(published(endless, tmp_path / "encoder.pkl"), pickles[1], tmp_path)


def test_a_pickled_state_dict_becomes_safetensors(tmp_path: Path) -> None:
    one = torch.randn(3, 4)
    torch.save({"state_dict": {"a": one, "tied": one, "b": one.T}}, tmp_path / "model.ckpt")
    written = load_file(convert_weights(tmp_path / "model.ckpt", tmp_path / "new" / "model.safetensors"))
    assert sorted(written) == ["a", "b", "tied"]
    torch.testing.assert_close(written["b"], one.T)
    with pytest.raises(NotWritable, match=r"ends in \.safetensors"):
        convert_weights(tmp_path / "model.ckpt", tmp_path / "model.bin")
    torch.save({"a": one, "epoch": 3}, tmp_path / "other.bin")
    with pytest.raises(WeightsRefused, match="something else"):
        convert_weights(tmp_path / "other.bin", tmp_path / "x.safetensors")
    torch.save({"a": Imports()}, tmp_path / "bad.bin")
    with pytest.raises(WeightsRefused, match=r"refers to \w+\.system"):
        convert_weights(tmp_path / "bad.bin", tmp_path / "x.safetensors")


# --- the encoder ------------------------------------------------------------------------------------------------------


def test_it_encodes_and_draws_as_the_published_one_does(folder: Path, parts: tuple[TheEncoder, TheDecoder]) -> None:
    encoder = made(folder)
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder, Decoder)
    assert encoder.dimension == FIRST * CELLS**2
    some = pictures(4)
    vectors = encoder.encode_images(some).vectors
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in some])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        codes = parts[0](0.8 * pixels + 0.1).argmax(dim=1)
        assert len(codes.unique()) > 2
        drawn = parts[1](functional.one_hot(codes, CODES).permute(0, 3, 1, 2).float())
    expected = ((torch.sigmoid(drawn[:, :3]) - 0.1) / 0.8).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    rows = parts[1].blocks[0].w[:, :, 0, 0].T.numpy()
    np.testing.assert_array_equal(vectors.reshape(4, CELLS, CELLS, FIRST), rows[codes.numpy()])
    assert np.abs(np.stack(encoder.decode(vectors)) - expected).max() <= 0.51
    assert expected.std() > 5


def test_a_mixture_of_vectors_draws_the_mixture_of_one_hots(folder: Path, parts: tuple[TheEncoder, TheDecoder]) -> None:
    network = network_of(load_file(folder / WEIGHTS)).eval()
    pixels = torch.rand(2, 3, SIZE, SIZE)
    share = torch.tensor([0.3, 0.7])[:, None, None, None]
    with torch.no_grad():
        one_hot = functional.one_hot(network.codes(pixels), CODES).permute(0, 3, 1, 2).float()
        assert not torch.equal(one_hot[0], one_hot[1])
        expected = shown(parts[1]((share * one_hot).sum(dim=0, keepdim=True)))
        found = network.decode((share * network.encode(pixels)).sum(dim=0, keepdim=True))
    torch.testing.assert_close(found, expected)


def test_hidden_pixels_have_no_influence_and_hidden_cells_say_nothing(folder: Path) -> None:
    encoder = made(folder)
    picture, other = (picture.pixels for picture in pictures(2))
    observed = np.zeros((SIZE, SIZE), dtype=np.bool_)
    observed[: SIZE // 2] = True
    changed = np.where(observed[..., None], picture, other)
    one, two = encoder.encode_images([Picture(picture, observed), Picture(changed, observed)]).vectors
    np.testing.assert_array_equal(one, two)
    cells = one.reshape(CELLS, CELLS, FIRST)
    assert not cells[CELLS // 2 :].any()
    assert cells[: CELLS // 2].all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_most_codes_and_is_another_fingerprint(folder: Path, precision: str) -> None:
    full, half = made(folder), made(folder, precision=precision)
    some = pictures(4)
    expected, found = (e.encode_images(some).vectors.reshape(-1, FIRST) for e in (full, half))
    same = np.abs(found - expected).max(axis=1) < 0.05
    assert same.mean() > 0.7
    assert half.decode(half.encode_images(some).vectors)[0].shape == (SIZE, SIZE, 3)
    assert half.fingerprint != full.fingerprint


def test_the_sizes_of_the_published_network_are_taken() -> None:
    """The real one's sizes, without its 100 million numbers: the default size gives 8,192 values."""
    with torch.device("meta"):
        network = DVAE(hidden=256, first=128, codes=8192, blocks=2)
        latents = network.encode(torch.empty(1, 3, 64, 64))
    assert latents.shape == (1, 128, 8, 8)
    assert network.encoder.output.weight.shape == (8192, 2048, 1, 1)
    assert network.decoder.input.weight.shape == (128, 8192, 1, 1)


def test_weights_that_are_not_a_dvaes_are_refused(folder: Path, pickles: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsRefused, match=r"engram convert-dvae .*encoder\.pkl .*decoder\.pkl"):
        made(pickles[0].parent)
    with pytest.raises(WeightsMissing, match=r"no dvae\.safetensors"):
        made(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    lacking = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.output")}
    wrong = {**tensors, "decoder.output.weight": torch.zeros(6, HIDDEN + 1, 1, 1)}
    for change, said in ((lacking, "Missing key"), (wrong, "size mismatch"), ({"x": torch.zeros(1)}, "no encoder")):
        save_file(change, tmp_path / WEIGHTS)
        with pytest.raises(WeightsRefused, match=said):
            made(tmp_path)
    with pytest.raises(InvalidRequest, match="multiple of 8"):
        made(folder, size=36)
