"""The pictures that shipped weights are trained on: which are taken, what they are called, which only judge."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.papers.data import MissingData
from benchmarks.weights import data

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title>
 <dc:subject><rdf:Bag><rdf:li>animal</rdf:li><rdf:li>hash(0x8a)</rdf:li><rdf:li>11</rdf:li></rdf:Bag></dc:subject>
 <cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata></svg>"""
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"


def png(colour: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def draw(folder: Path, name: str, title: str, licence: str = PUBLIC_DOMAIN) -> None:
    for kind in ("svg", "png"):
        (folder / kind).mkdir(exist_ok=True)
    (folder / "svg" / f"{name}.svg").write_text(SVG.format(title=title, licence=licence))
    (folder / "png" / f"{name}.png").write_bytes(png((255, 0, 0, 255)))


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_drawings_in_the_public_domain_with_a_title_of_their_own_are_taken(tmp_path: Path) -> None:
    draw(tmp_path, "a", "  Bored_Dog 02")
    draw(tmp_path, "b", "Clipart by Somebody - antenna")
    draw(tmp_path, "c", "A tie", licence="http://creativecommons.org/licenses/GPL/2.0/")
    draw(tmp_path, "d", "No licence", licence="")
    draw(tmp_path, "e", "12")
    for i in range(data.COLLECTION + 1):
        draw(tmp_path, f"icon{i}", "Lemon SVG theme")
    draw(tmp_path, "z", "No picture")
    (tmp_path / "png" / "z.png").unlink()
    draw(tmp_path, "y", "Far too large")
    with Image.new("1", (data.PIXELS_MAX // 1000 + 1, 1000)) as large:
        large.save(tmp_path / "png" / "y.png")
    found = data.openclipart(tmp_path)
    assert [(each.title, each.keywords) for each in found] == [("bored dog", ("animal",)), ("antenna", ("animal",))]
    assert found[0].picture().getpixel((0, 0)) == (255, 0, 0)


def test_emoji_have_emojilibs_words_and_lie_over_white(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    listed = [
        {"image": "1f436.png", "unified": "1F436", "name": "DOG FACE", "has_img_google": True},
        {"image": "2600-fe0f.png", "unified": "2600-FE0F", "name": "BLACK SUN WITH RAYS", "has_img_google": True},
        {"image": "1f9ff.png", "unified": "1F9FF", "name": "NAZAR AMULET", "has_img_google": True},
        {"image": "1f5a4.png", "unified": "1F5A4", "name": "NOT DRAWN", "has_img_google": False},
    ]
    words = {"🐶": ["dog_face", "animal", ":)", "animal"], "☀": ["sun", "weather"]}
    names = ("1f436", "1f9ff", "2600-fe0f")
    pictures = {f"package/img/google/64/{name}.png": png((0, 0, 255, 0)) for name in names}
    pack(tmp_path / "emoji-datasource-google-1.tgz", pictures | {"package/emoji.json": json.dumps(listed).encode()})
    pack(tmp_path / "emojilib-1.tgz", {"package/dist/emoji-en-US.json": json.dumps(words).encode()})
    pack(tmp_path / "lobehub-fluent-emoji-3d-1.tgz", {"package/assets/1f436.webp": png((0, 0, 0, 255))})
    found = data.noto()
    assert [each.title for each in found] == ["dog face", "nazar amulet", "sun"]
    assert found[0].keywords == ("animal",)
    assert found[0].picture().getpixel((0, 0)) == (255, 255, 255)
    assert [each.title for each in data.fluent()] == ["dog face"]


def test_what_is_missing_is_said_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    with pytest.raises(MissingData, match="apt install openclipart-svg openclipart-png"):
        data.openclipart(tmp_path)
    for read in (data.noto, data.fluent):
        with pytest.raises(MissingData, match="make weights-data"):
            read()


def test_a_tenth_of_the_titles_judges_and_always_the_same() -> None:
    chosen = [data.held_out(f"thing {i}") for i in range(4000)]
    assert 0.08 < sum(chosen) / len(chosen) < 0.12
    assert [name for name in ("cat", "rocket", "bus", "ring", "clock") if data.held_out(name)] == HELD_OUT


HELD_OUT = ["bus", "ring"]
"""Pinned: another rule would let what is shipped be judged on what it was trained on."""
