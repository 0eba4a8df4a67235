"""`engram snapshot` and `engram push`: copies of whole collections, kept, moved and brought back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from engram import training
from engram.client import Client
from engram.opening import Data, Name, Url, open_client
from engram.replies import Operation
from engram.shown import AsJson, console, minute, print_json, table
from engram.snapshots import Restored, Snapshot, SnapshotSchedule, collection_of
from service.errors import InvalidRequest, ScheduleNotFound

Id = Annotated[str, typer.Argument(help="The snapshot's name.")]
Into = Annotated[str | None, typer.Option(help="The collection to be; default: the one it is kept under.")]
Replace = Annotated[bool, typer.Option("--replace", help="It may take the place of a collection that holds memories.")]

UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

out = Console()
app = typer.Typer(no_args_is_help=True, help="Copies of whole collections: one file each, checksummed.")


@app.command()
def create(collection: Name = "memories", as_json: AsJson = False, data: Data = None, url: Url = None) -> None:
    """Make a snapshot of a collection, while it answers."""
    with open_client(data, url, must_exist=True) as client:
        done = _followed(client, client.collection(collection).start_snapshot(), f"copying {collection}", as_json)
        _show([Snapshot.of(done.result or {})], as_json)


@app.command("list")
def list_snapshots(collection: Name = "memories", as_json: AsJson = False, data: Data = None, url: Url = None) -> None:
    """List the snapshots that are kept of a collection."""
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        _show(target.snapshots(), as_json)
        if not as_json:
            for id_, why in target.damaged_snapshots().items():
                out.print(f"[red]{escape(id_)}[/]: {escape(why.detail)} ({why.code})", soft_wrap=True)


@app.command()
def info(
    snapshot: Id, collection: Name = "memories", as_json: AsJson = False, data: Data = None, url: Url = None
) -> None:
    """Say what a snapshot holds."""
    with open_client(data, url, must_exist=True) as client:
        _show([client.collection(collection).snapshot_info(snapshot)], as_json)


@app.command()
def download(
    snapshot: Id,
    path: Annotated[Path, typer.Argument(help="The file, or the folder, to write.")] = Path(),
    collection: Name = "memories",
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Write a snapshot to a file."""
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        with _moving("downloading", target.snapshot_info(snapshot).size_bytes, as_json) as progress:
            written = target.download_snapshot(snapshot, path, progress=progress)
    size = written.stat().st_size
    if as_json:
        print_json({"path": str(written), "size_bytes": size})
    else:
        out.print(f"{escape(str(written))}: {size:,} bytes", soft_wrap=True)


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(help="A snapshot's file.")],
    collection: Annotated[
        str | None,
        typer.Option("--collection", "-c", help="Whose it shall be; default: the one it was made of."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The snapshot's name; default: the file's.")] = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Bring a snapshot's file to where snapshots are kept; it is checked to its end first."""
    with open_client(data, url) as client:
        _show([_upload(client, path, collection or collection_of(path), as_json, name)], as_json)


@app.command()
def delete(
    snapshot: Id, collection: Name = "memories", as_json: AsJson = False, data: Data = None, url: Url = None
) -> None:
    """Delete a snapshot."""
    with open_client(data, url, must_exist=True) as client:
        client.collection(collection).delete_snapshot(snapshot)
    if as_json:
        print_json({"id": snapshot, "deleted": True})
    else:
        out.print(f"{escape(snapshot)} is deleted.")


@app.command()
def restore(
    snapshot: Annotated[str, typer.Argument(help="The snapshot's name, or a snapshot's file.")],
    collection: Annotated[
        str | None,
        typer.Option("--collection", "-c", help="The collection that it is kept under; default: memories."),
    ] = None,
    into: Into = None,
    replace: Replace = False,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Make a collection of a snapshot, under its former name or another one."""
    file = Path(snapshot)
    with open_client(data, url) as client:
        if file.is_file():
            name = into or collection or collection_of(file)
            begun = client.collection(name).start_restore(_upload(client, file, name, as_json).id, replace=replace)
        else:
            begun = client.collection(collection or "memories").start_restore(snapshot, into, replace=replace)
        done = _followed(client, begun, "restoring", as_json)
    _restored([done], as_json)


@app.command()
def schedule(
    collection: Name = "memories",
    every: Annotated[
        str | None, typer.Option(help="Make one so often: 90s, 30m, 6h, 1d; a minute at least.", metavar="TIME")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(help="Keep so many of those it makes, the newest; default: 7.", show_default=False)
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Make no more; what was made stays.")] = False,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Have snapshots made at set times, the first one at once; or say when the next is due."""
    if off and (every is not None or keep is not None):
        raise InvalidRequest("--off goes alone")
    every_s = None if every is None else _seconds(every)
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        if off:
            target.unschedule_snapshots()
        try:
            found = target.snapshot_schedule()
        except ScheduleNotFound:
            found = None
        if every_s is not None:
            found = target.schedule_snapshots(every_s, keep or (7 if found is None else found.keep))
        elif keep is not None:
            if found is None:
                raise InvalidRequest("there is no schedule yet: give --every, too")
            found = target.schedule_snapshots(found.every_s, keep)
    if as_json:
        print_json(found)
    elif found is None:
        out.print(f"No snapshots of {escape(collection)} are made at set times; see --every.")
    else:
        _scheduled(collection, found)


def push(
    url: Annotated[str, typer.Argument(help="The server to push to.")],
    collection: Annotated[
        list[str] | None, typer.Option("--collection", "-c", help="Only this one; may be given several times.")
    ] = None,
    replace: Replace = False,
    as_json: AsJson = False,
    data: Data = None,
) -> None:
    """Move to a server: bring collections of a folder there, whole, with what was learned of them.

    The folder keeps them. A key for the server is read from ENGRAM_API_KEY.
    """
    with open_client(data, None, must_exist=True) as here, open_client(None, url) as there:
        names = collection or [info.name for info in here.collections()]
        if not names:
            raise InvalidRequest("the folder holds no collection")
        restored = []
        for name in names:
            source = here.collection(name)
            done = _followed(here, source.start_snapshot(), f"copying {name}", as_json)
            made = Snapshot.of(done.result or {})
            target = there.collection(name)
            with ExitStack() as left:  # neither side keeps what was only made for the move
                left.callback(source.delete_snapshot, made.id)
                with tempfile.TemporaryDirectory() as folder:
                    _upload(there, source.download_snapshot(made.id, folder), name, as_json, made.id)
                left.callback(target.delete_snapshot, made.id)
                begun = target.start_restore(made.id, replace=replace)
                restored.append(_followed(there, begun, f"restoring {name}", as_json))
    _restored(restored, as_json)


def register(engram: typer.Typer) -> None:
    engram.add_typer(app, name="snapshot")
    engram.command()(push)


def _upload(client: Client, path: Path, collection: str, as_json: bool, name: str | None = None) -> Snapshot:
    size = path.stat().st_size if path.is_file() else 0
    with _moving("uploading", size, as_json) as progress:
        return client.collection(collection).upload_snapshot(path, name, progress=progress)


def _followed(client: Client, operation: Operation, doing: str, as_json: bool) -> Operation:
    operation = training.follow(console(as_json), client, operation, doing)
    operation.check()
    return operation


@contextmanager
def _moving(doing: str, size_bytes: int, as_json: bool) -> Iterator[Any]:
    columns = TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console(as_json)) as progress:
        task = progress.add_task(doing, total=size_bytes)
        yield lambda moved: progress.update(task, completed=moved)


def _restored(operations: Sequence[Operation], as_json: bool) -> None:
    for operation in operations:
        done = Restored.of(operation.result or {})
        if as_json:
            print_json(done, line=True)
            continue
        out.print(
            f"[bold]{escape(done.collection)}[/]: {done.memories:,} memories and {done.originals:,} originals restored "
            f"in {done.seconds:.1f} s, at version {done.version:,}"
        )
        if done.originals_missing:
            out.print(f"[yellow]{done.originals_missing:,} originals were missing already when it was made[/]")
        for space, why in done.problems.items():
            out.print(f"[yellow]{escape(space)}[/]: {escape(why['detail'])} ({why['code']})", soft_wrap=True)


def _seconds(time: str) -> int:
    """`6h` in seconds. Raises `InvalidRequest`."""
    matched = re.fullmatch(r"([0-9]{1,9})([smhd]?)", time)
    if matched is None:
        raise InvalidRequest(f"--every takes a number of s, m, h or d, as 6h, not {time}")
    return int(matched[1]) * UNITS_S[matched[2] or "s"]


def _scheduled(collection: str, found: SnapshotSchedule) -> None:
    unit = next(unit for unit in "dhms" if found.every_s % UNITS_S[unit] == 0)
    every = f"{found.every_s // UNITS_S[unit]}{unit}"
    made = (
        "" if found.made_at is None else f"; last {minute(found.made_at)} ({escape(found.snapshot or 'none is kept')})"
    )
    under_way = "" if found.operation is None else f"; the operation {found.operation} makes one now"
    out.print(
        f"[bold]{escape(collection)}[/]: every {every}, the newest {found.keep} are kept; "
        f"next {minute(found.next_at)} UTC{made}{under_way}",
        soft_wrap=True,
    )
    if found.error is not None:
        failed = minute(found.failed_at or "")
        out.print(f"[red]failed {failed}[/]: {escape(found.error.detail)} ({found.error.code})", soft_wrap=True)


def _show(found: Sequence[Snapshot], as_json: bool) -> None:
    if as_json:
        for snapshot in found:
            print_json(snapshot, line=True)
        return
    shown = table("snapshot", "of", "made", "version", "memories", "originals", "bytes")
    shown.columns[0].no_wrap = True
    for snapshot in found:
        missing = f" ({snapshot.originals_missing:,} missing)" if snapshot.originals_missing else ""
        shown.add_row(
            escape(snapshot.id), escape(snapshot.made_of), minute(snapshot.made_at), f"{snapshot.version:,}",
            f"{snapshot.memories:,}", f"{snapshot.originals:,}{missing}", f"{snapshot.size_bytes:,}",
        )  # fmt: skip
    out.print(shown if found else "No snapshots.")
