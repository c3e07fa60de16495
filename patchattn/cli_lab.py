"""`patchattn lab`: the trained checkpoints that ship with patchattn, what they can do, and their training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import Json, examples, show

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.callback(epilog=examples("patchattn lab list", "patchattn lab evaluate lab-vit", "patchattn inspect lab-llama"))
def start() -> None:
    """Small trained checkpoints that ship with patchattn. Their names stand wherever MODEL may stand."""


@app.command("list", epilog=examples("patchattn lab list", "patchattn lab list --json"))
def list_checkpoints(as_json: Json = False) -> None:
    """The checkpoints there are, and how large they are."""
    from . import lab
    from .lab.evaluate import sizes

    found = [lab.facts(name) for name in lab.names()]
    show(found, as_json, sizes(found))


@app.command("path", epilog=examples("patchattn lab path lab-llama"))
def print_path(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A lab checkpoint.", show_default=False)],
    as_json: Json = False,
) -> None:
    """The folder of a checkpoint: an ordinary Hugging Face folder."""
    folder = str(_folder(name))
    show({"name": name, "folder": folder}, as_json, folder)


@app.command(
    epilog=examples(
        "patchattn lab evaluate", "patchattn lab evaluate lab-llama --data lab-data", "patchattn lab evaluate --json"
    )
)
def evaluate(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which checkpoints; default: all.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder that `patchattn lab data` filled, for the numbers on text.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what the checkpoints can do, beside what they are to do. Under two minutes on one core."""
    from transformers.utils import logging

    from .lab.evaluate import evaluate as measure

    for name in names or ():
        _folder(name)
    logging.disable_progress_bar()
    report = measure(names, data, lambda line: typer.echo(line, err=True))
    show(report.to_dict(), as_json, report)


@app.command(epilog=examples("patchattn lab data lab-data"))
def data(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where it goes.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Download the text that lab-llama was trained on. What is there already is kept."""
    from .lab.sources import ARCHIVES, fetch

    places = {name: str(place) for name, place in fetch(folder).items()}
    lines = [f"{places[one.name]}: {one.about}; licence: {one.licence}; {one.page}" for one in ARCHIVES]
    show(places, as_json, "\n".join(lines))


def _folder(name: str) -> Path:
    """A wrong name was wrong on the command line: exit code 2."""
    from . import lab

    try:
        return lab.path(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
