"""`engram import` and `engram export`: files of rows, and folders of pictures.

Rules:
- After each part of a file that is durable, how far it is is noted beside it (`.NAME.engram-import`), and the note is
  removed at the end. `--resume` goes on from there, if the file is the one that it was.
- A connection that is lost is waited for, for a minute; then the command ends, and `--resume` goes on.
- Refused rows go to the reason file, a line of JSON each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from engram import browse, storing
from engram.client import Client, Collection
from engram.opening import Data, Name, Url, calibrate, open_client
from engram.replies import CollectionInfo
from engram.rows import ROW_ENDINGS, open_rows
from engram.shown import AsJson, console, print_json, table
from engram.transfer import Imported, Refusal
from engram.transfer import Progress as Far
from service.errors import CollectionNotFound, InvalidRequest, NotFound, NotWritable

REFUSALS_SHOWN_MAX = 20  # of the rows that were refused: the reason file has all

out = Console()


def import_rows(
    source: Annotated[Path, typer.Argument(help="A file of rows (.ndjson, .parquet, .arrow, .feather), or pictures.")],
    collection: Name = "memories",
    captions: Annotated[
        Path | None, typer.Option(help="Of pictures: a CSV file of filename,caption.", show_default=False)
    ] = None,
    refused: Annotated[
        Path | None, typer.Option(help="Write refused rows here, as NDJSON: row, id, code, detail.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an import of this file was cut off.")] = False,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Import a file of rows, of any size, or a folder of pictures. Rows are stored again by their ids, so that nothing
    is doubled by importing twice.
    """
    if source.is_dir() or source.suffix.lower() not in ROW_ENDINGS:
        if refused is not None or resume:
            raise InvalidRequest("--refused and --resume are for a file of rows; of pictures those stored are replaced")
        storing.store([source], collection, captions, as_json, data, url)
        return
    if captions is not None:
        raise InvalidRequest("--captions are for pictures; a row brings its text")
    if not source.is_file():
        raise NotFound(f"there is no file {source}")
    told = console(as_json)
    note = _Note(source, collection)
    from_row = note.row() + 1 if resume else 1
    if from_row > 1:
        told.print(f"Going on at row {from_row:,}.")
    with open_client(data, url) as client:
        target = _made(told, client, collection, source)
        try:
            with _reasons(refused, resume) as write, _progress(told, "importing") as show:

                def progress(far: Far) -> None:
                    note.keep(far.imported.durable_row)
                    show(far.done, far.size, far.imported.rows)

                done = target.import_rows(source, from_row=from_row, progress=progress, refused=write)
        except KeyboardInterrupt:
            told.print("stopped; go on with --resume")
            raise typer.Exit(storing.INTERRUPTED) from None
        note.remove()
        if as_json:
            print_json(done)
        else:
            _report(collection, done, refused)
        if client.in_process:
            calibrate(told, target)
    if done.refused:
        raise typer.Exit(1)


def export_rows(
    file: Annotated[str, typer.Argument(help="FILE.ndjson, .parquet or .arrow; - is standard output, as NDJSON.")],
    collection: Name = "memories",
    only: browse.Filtered = None,
    no_vectors: Annotated[bool, typer.Option("--no-vectors", help="Without the vectors.")] = False,
    content: Annotated[bool, typer.Option("--content", help="With the originals' bytes.")] = False,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Export memories, all or those that a filter keeps, as they are at one moment."""
    options: dict[str, Any] = {
        "vectors": not no_vectors, "content": content, "filter": browse.read_filter(only),
    }  # fmt: skip
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        if file == "-":
            for chunk in target.iter_export(**options):
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            return
        size = target.export(file, **options)
    if as_json:
        print_json({"collection": collection, "file": file, "bytes": size})
    else:
        out.print(f"{escape(collection)}: {size:,} bytes in {escape(file)}")


class _Note:
    """How far an import of a file is, beside the file."""

    def __init__(self, source: Path, collection: str) -> None:
        found = source.stat()
        self._path = source.with_name(f".{source.name}.engram-import")
        self._of = {"collection": collection, "size": found.st_size, "modified_ns": found.st_mtime_ns}

    def row(self) -> int:
        """The last row that is durable; 0 where nothing is known. Raises `InvalidRequest` for another file."""
        try:
            kept: dict[str, Any] = orjson.loads(self._path.read_bytes())
        except FileNotFoundError:
            return 0
        except (OSError, orjson.JSONDecodeError) as error:
            raise InvalidRequest(f"{self._path} cannot be read: {error}; import without --resume") from None
        row = int(kept.pop("row"))
        if kept != self._of:
            raise InvalidRequest(
                f"{self._path} is of another import: the file has changed, or the collection is another; "
                "import without --resume"
            )
        return row

    def keep(self, row: int) -> None:
        written = self._path.with_name(self._path.name + ".new")
        try:
            written.write_bytes(orjson.dumps({**self._of, "row": row}))
            written.replace(self._path)
        except OSError:
            pass  # the folder cannot be written: the import goes on, and could only be begun anew

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def _reasons(path: Path | None, more: bool) -> Iterator[Callable[[Refusal], None]]:
    """What writes a refused row's reason, behind those that are there (`more`). Raises `NotWritable`."""
    if path is None:
        yield lambda _: None
        return
    try:
        file = path.open("ab" if more else "wb")
    except OSError as error:
        raise NotWritable(f"{path}: {error.strerror}") from None
    with file:

        def write(refusal: Refusal) -> None:
            row = {"row": refusal.row, "id": refusal.id, "code": refusal.code, "detail": refusal.detail}
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            file.flush()

        yield write


@contextmanager
def _progress(told: Console, doing: str) -> Iterator[Callable[[int, int, int], None]]:
    columns = (
        TextColumn(doing), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=told) as bar:
        task = bar.add_task(doing, total=None, rows=0)
        yield lambda done, size, rows: bar.update(task, completed=done, total=size or None, rows=rows)


def _made(told: Console, client: Client, name: str, source: Path) -> Collection:
    """The collection, made for the file's rows where there is none."""
    target = client.collection(name)
    try:
        target.info()
    except CollectionNotFound:
        with open_rows(source) as rows:
            config = rows.config
        client.create_collection(name, **(config or {}))
        told.print(f"Made the collection [bold]{escape(name)}[/] with {_spaces(target.info())}.")
    return target


def _spaces(info: CollectionInfo) -> str:
    return ", ".join(
        f"{escape(name)} ({space['dimension']} values by {escape(space['encoder'] or 'the rows')})"
        for name, space in info.spaces.items()
    )


def _report(collection: str, done: Imported, reasons: Path | None) -> None:
    words = [f"{done.stored:,} stored"]
    words += [f"{done.updated:,} replaced"] if done.updated else []
    words += [f"[red]{done.refused:,} refused[/]"] if done.refused else []
    out.print(f"{escape(collection)}: {', '.join(words)}")
    if not done.refused:
        return
    listed = table("row", "memory", "code", "what", title="Refused")
    for refusal in done.refusals[:REFUSALS_SHOWN_MAX]:
        listed.add_row(f"{refusal.row:,}", escape(refusal.id or ""), refusal.code, escape(refusal.detail))
    out.print(listed)
    if done.refused > REFUSALS_SHOWN_MAX:
        where = f"all are in {escape(str(reasons))}" if reasons else "--refused FILE keeps them all"
        out.print(f"and {done.refused - REFUSALS_SHOWN_MAX:,} more; {where}")
