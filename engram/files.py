"""What `engram store` finds on disk: pictures and their captions.

Rules:
- A folder is searched whole for the endings of formats that are read; a file that is named is taken whatever its
  ending.
- A memory's id is its path below the folder that was named, with `/`; a file that was named is its own name.
- A caption is the CSV's, whose first line is `filename,caption` (by id, else by bare name), else the text of a
  `.txt` file beside the picture with its name.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from service.errors import InvalidRequest, NotFound

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
HEADING = ["filename", "caption"]
SHOWN_MAX = 80  # characters of a first line that is no heading: enough to know it again


def find_pictures(paths: Sequence[Path]) -> dict[str, Path]:
    """Pictures by id, in the order of their names. Raises `NotFound`; `InvalidRequest` where two would have one id."""
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise NotFound(f"{path} is neither a file nor a folder")
        for memory_id, file in _below(path):
            if memory_id in found and not file.samefile(found[memory_id]):
                raise InvalidRequest(
                    f"{found[memory_id]} and {file} would both be {memory_id!r}; store them one by one"
                )
            found[memory_id] = file
    return found


def _below(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield path.name, path
        return
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in ENDINGS and file.is_file():
            yield file.relative_to(path).as_posix(), file


def read_captions(file: Path) -> dict[str, str]:
    """A CSV's rows below its heading, `filename,caption`. Raises `NotFound`, `InvalidRequest`."""
    captions: dict[str, str] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines)
            _check_heading(file, next(rows, []))
            for number, row in enumerate(rows, start=2):
                if not row:
                    continue
                if len(row) != 2:
                    raise InvalidRequest(f"{file}, line {number}: {len(row)} values where filename,caption are two")
                captions[row[0].strip()] = row[1].strip()
    except OSError as error:
        raise NotFound(f"{file}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"{file} is not a CSV file in UTF-8: {error}") from None
    return captions


def _check_heading(file: Path, row: list[str]) -> None:
    if [cell.strip().lower() for cell in row] == HEADING:
        return
    found = ",".join(row)
    if [cell.strip().lower() for cell in found.split(";")] == HEADING:
        raise InvalidRequest(f"{file} is separated by semicolons; separate its values by commas: {','.join(HEADING)}")
    raise InvalidRequest(f"{file}: the first line must be {','.join(HEADING)}, and is {found[:SHOWN_MAX]!r}")


def caption_of(memory_id: str, file: Path, captions: Mapping[str, str]) -> str | None:
    """Raises `InvalidRequest` where the picture's text file cannot be read."""
    caption = captions.get(memory_id) or captions.get(file.name)
    beside = file.with_suffix(".txt")
    if caption or not beside.is_file():
        return caption
    try:
        return beside.read_text(encoding="utf-8-sig").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{beside} cannot be read as text in UTF-8: {error}") from None
