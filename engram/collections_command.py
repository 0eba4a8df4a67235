"""The commands about collections: make one, list them, say what one is, forget it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from engram.client import Client
from engram.completion import complete_collection
from engram.opening import Data, Url, open_client
from engram.replies import CollectionInfo
from engram.shown import AsJson, minute, print_json, table
from service.errors import InvalidRequest

NAMES_SHOWN_MAX = 50  # of a list within a sentence

Named = Annotated[str, typer.Argument(help="The collection.", autocompletion=complete_collection)]

out = Console()


def create(
    collection: Annotated[str, typer.Argument(help="Its name.")],
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=ENCODER, NAME=DIMENSION for vectors of your own, or NAME=JSON; may be given several times. "
            "Default: image, joint and text.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="The rest of the API's configuration as JSON, or @FILE.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Make a collection."""
    given = {} if config is None else _document("--config", config)
    if space:
        given["spaces"] = {**given.get("spaces", {}), **dict(map(_space_of, space))}
    with open_client(data, url) as client:
        info = client.create_collection(collection, **given).info()
    if as_json:
        print_json(info)
    else:
        out.print(f"Made the collection [bold]{escape(info.name)}[/] with {_spaces(info)}.")


def collections(as_json: AsJson = False, data: Data = None, url: Url = None) -> None:
    """List the collections."""
    with open_client(data, url, must_exist=True) as client:
        found = client.collections()
    if as_json:
        print_json(found)
        return
    if not found:
        out.print("There are no collections yet; make one with: engram store PATH")
        return
    listed = table("collection", "memories", "spaces", "gate", "made")
    for info in found:
        listed.add_row(escape(info.name), f"{info.count:,}", _spaces(info), gate(info), minute(info.created_at))
    out.print(listed)


def info(collection: Named = "memories", as_json: AsJson = False, data: Data = None, url: Url = None) -> None:
    """Say what a collection is: its spaces, its settings, its calibration."""
    with open_client(data, url, must_exist=True) as client:
        found = client.collection(collection).info()
    if as_json:
        print_json(found)
        return
    out.print(
        f"[bold]{escape(found.name)}[/]: {found.count:,} memories at version {found.version:,}, "
        f"made {minute(found.created_at)}"
    )
    spaces = table("space", "encoder", "values", "similarity", "weight", "draws")
    for name, space in found.spaces.items():
        spaces.add_row(
            escape(name), escape(space["encoder"] or "your vectors"), f"{space['dimension']:,}", space["similarity"],
            f"{space['weight']:g}", "yes" if space["decodable"] else "no",
        )  # fmt: skip
    out.print(spaces)
    if found.problem is not None:
        out.print(f"[yellow]{escape(found.problem.detail)} ({found.problem.code})[/]")
    defaults = ", ".join(f"{name} {_value(value)}" for name, value in found.recall.items())
    out.print(f"recalls by: {escape(defaults)}", soft_wrap=True)
    out.print(f"calibration: {gate(found)}; {escape(found.calibration.why)}", soft_wrap=True)
    held = sum(found.bytes.values()) / 2**20
    out.print(f"{held:,.1f} MB in memory" + ("; graphs are being built" if found.indexing else ""))


def drop(
    collection: Named,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Forget a collection with all that it holds."""
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        held = target.count()
        if not yes:
            typer.confirm(f"Forget {collection} and its {held:,} memories?", abort=True, err=as_json)
        client.delete_collection(collection)
    if as_json:
        print_json({"name": collection, "count": held})
    else:
        out.print(f"{escape(collection)} is forgotten.")


def register(app: typer.Typer) -> None:
    for command in (create, collections, info, drop):
        app.command()(command)


def names(client: Client) -> str:
    """Which collections there are, in words."""
    found = [info.name for info in client.collections()]
    if not found:
        return "there is none yet"
    more = f" and {len(found) - NAMES_SHOWN_MAX:,} more" if len(found) > NAMES_SHOWN_MAX else ""
    return f"there {'is' if len(found) == 1 else 'are'} {', '.join(found[:NAMES_SHOWN_MAX])}{more}"


def gate(info: CollectionInfo) -> str:
    if info.calibration.state != "current":
        return {"none": "nothing stored", "pending": "being calibrated"}.get(
            info.calibration.state, "being recalibrated"
        )
    refused = [record.refused is not None for record in info.calibration.modalities]
    return "too few" if all(refused) else "partly" if any(refused) else "calibrated"


def _spaces(info: CollectionInfo) -> str:
    return ", ".join(_space(name, space) for name, space in info.spaces.items())


def _space(name: str, space: dict[str, Any]) -> str:
    by = escape(space["encoder"] or "your vectors")
    return f"{name} ({by})" if space.get("problem") is None else f"{name} ({by}, [yellow]{space['problem']['code']}[/])"


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _space_of(given: str) -> tuple[str, Any]:
    """`v=784`, `image=pixels`, `image={"encoder": "pixels", "options": {"size": 16}}`."""
    name, equals, value = given.partition("=")
    if not equals or not name or not value:
        raise InvalidRequest(f"a space is NAME=ENCODER, NAME=DIMENSION or NAME=JSON, not {given}")
    if value.startswith("{"):
        return name, _document("--space", value)
    return name, {"dimension": int(value)} if value.isascii() and value.isdigit() else {"encoder": value}


def _document(option: str, text: str) -> dict[str, Any]:
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeError) as error:
            raise InvalidRequest(f"{option}: {text[1:]} cannot be read: {error}") from None
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{option} takes JSON, and this is none: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"{option} takes a JSON object, not {text[:60]}")
    return document
