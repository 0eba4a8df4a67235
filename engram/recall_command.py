"""`engram recall`: by a sentence, a picture, or what is like a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engram import browse, recalled
from engram.collections_command import names
from engram.completion import complete_kernel
from engram.files import ENDINGS
from engram.opening import Data, Name, Url, calibrate, open_client
from engram.shown import AsJson, console, print_json
from service.errors import CollectionNotFound, NotFound

out = Console()


def recall(
    cue: Annotated[str | None, typer.Argument(help="A sentence, or a picture's file.", show_default=False)] = None,
    like: Annotated[str | None, typer.Option(help="In place of a cue: more like this memory.", metavar="ID")] = None,
    collection: Name = "memories",
    limit: Annotated[int, typer.Option(help="How many matches, or groups of them, to list.")] = 5,
    offset: Annotated[int, typer.Option(help="How many to pass over.")] = 0,
    group_by: Annotated[str | None, typer.Option(help="List by the values of this key of the payload.")] = None,
    group_size: Annotated[int, typer.Option(help="How many matches of each group to list.")] = 1,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave this memory out.", metavar="ID")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="The least similarity of a match.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture, white where the cue's is missing.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Open the recalled picture beside its original.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the recalled picture to this file (.png or .webp).")] = None,
    original: Annotated[Path | None, typer.Option(help="Write the first match's original to this file.")] = None,
    kernel: Annotated[
        str,
        typer.Option(help="auto, none, or the id of one in use (engram kernels).", autocompletion=complete_kernel),
    ] = "auto",
    only: browse.Filtered = None,
    as_json: AsJson = False,
    data: Data = None,
    url: Url = None,
) -> None:
    """Recall by a sentence, by a picture, or what is like a memory."""
    if (cue is None) == (like is None):
        raise typer.BadParameter("give a sentence or a picture, or --like")
    options: dict[str, Any] = {"limit": limit, "offset": offset, "exclude": exclude or [], "kernel": kernel}
    given = {"filter": browse.read_filter(only), "score_threshold": score_threshold, "group_by": group_by, "id": like}
    options |= {name: value for name, value in given.items() if value is not None}
    if group_by is not None:
        options["group_size"] = group_size
    if cue is None:
        pass
    elif Path(cue).is_file():
        options["image"] = Path(cue)
    elif Path(cue).suffix.lower() in ENDINGS:
        raise NotFound(f"{cue} looks like a picture, and there is no such file")
    else:
        options["text"] = cue
    if mask is not None:
        options["mask"] = mask
    told = console(as_json)
    with open_client(data, url, must_exist=True) as client:
        target = client.collection(collection)
        try:
            if client.in_process:
                calibrate(told, target)
            decodable = any(space["decodable"] for space in target.info().spaces.values()) if show else False
            if save is not None or decodable:
                options["reconstruct"] = recalled.drawing_of(save)
            answer = target.recall(**options)
        except CollectionNotFound as error:
            raise CollectionNotFound(f"{error.detail}; {names(client)}") from None
        if as_json:
            print_json(answer)
        else:
            recalled.print_answer(out, answer)
        if save is not None:
            recalled.save_recalled(told, answer, save)
        if original is not None:
            recalled.save_original(told, target, answer, original)
        if show:
            recalled.show(told, target, answer, options.get("image"), mask)
