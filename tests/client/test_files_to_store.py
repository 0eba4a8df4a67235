"""Which files `engram store` takes, under which ids, with which captions."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram.files import caption_of, find_pictures, read_captions
from service.errors import InvalidRequest, NotFound


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tiff", "notes.txt", "sub/e.pdf"):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    return tmp_path / "pictures"


def test_a_folder_is_searched_whole_and_ids_are_paths_below_it(folder: Path) -> None:
    assert list(find_pictures([folder])) == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tiff"]


def test_a_file_that_is_named_is_taken_whatever_its_ending(folder: Path) -> None:
    assert find_pictures([folder / "sub" / "e.pdf"]) == {"e.pdf": folder / "sub" / "e.pdf"}
    assert list(find_pictures([folder, folder / "b.png"])) == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tiff"]


def test_two_files_of_one_id_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.png").write_bytes(b"")
    with pytest.raises(InvalidRequest, match=r"b\.png"):
        find_pictures([folder, tmp_path / "other"])


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        find_pictures([tmp_path / "nowhere"])


def test_captions_by_path_by_name_and_from_the_text_beside(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text('\ufefffilename,caption\nsub/c.webp,"a cat, asleep"\nd.tiff,a dog\n\n', encoding="utf-8")
    captions = read_captions(table)
    assert captions == {"sub/c.webp": "a cat, asleep", "d.tiff": "a dog"}
    (folder / "sub" / "c.txt").write_text("not this one")
    (folder / "b.txt").write_text("  a bird \n")
    (folder / "a.txt").write_text(" \n")
    found = {memory_id: caption_of(memory_id, file, captions) for memory_id, file in find_pictures([folder]).items()}
    assert found == {"a.JPG": None, "b.png": "a bird", "sub/c.webp": "a cat, asleep", "sub/deep/d.tiff": "a dog"}


@pytest.mark.parametrize(
    "content", [b"filename,caption\nonly one\n", b"filename,caption\none,two,three\n", b"\xff\xfe\x00,x\n"]
)
def test_a_table_of_captions_that_is_none(tmp_path: Path, content: bytes) -> None:
    table = tmp_path / "captions.csv"
    table.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"captions\.csv"):
        read_captions(table)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "must be filename,caption, and is ''"),
        ("a.png,a cat\n", "must be filename,caption, and is 'a.png,a cat'"),
        ("file,text\na.png,a cat\n", "must be filename,caption, and is 'file,text'"),
        ("Filename;Caption\na.png;a cat\n", "separated by semicolons; separate its values by commas"),
    ],
)
def test_a_table_of_captions_without_its_heading(tmp_path: Path, content: str, told: str) -> None:
    table = tmp_path / "captions.csv"
    table.write_text(content)
    with pytest.raises(InvalidRequest) as raised:
        read_captions(table)
    assert told in raised.value.detail


def test_a_text_beside_that_cannot_be_read(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InvalidRequest, match=r"b\.txt"):
        caption_of("b.png", folder / "b.png", {})
