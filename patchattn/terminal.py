"""What every group of commands shares: how help ends, how results are shown, how errors read."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

FAILED = 1

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def examples(*lines: str) -> str:
    """The end of a command's help: lines that can be copied."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(line.replace("[", r"\[") for line in lines)


def show(data: Any, as_json: bool, content: Any) -> None:
    """Data as JSON, or the same for people."""
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        _console().print(content, highlight=False, markup=False, soft_wrap=isinstance(content, str))


def one_line(error: Exception) -> str:
    """An error's text without line breaks; never empty."""
    text = " ".join(str(error).split())
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__}: {text}"


def show_error(error: Exception) -> None:
    """An error on stderr, in one line; one that lists several problems, such as a recipe's, in a line for each."""
    for problem in getattr(error, "problems", [one_line(error)]):
        print(f"error: {problem}", file=sys.stderr)


def _console() -> Any:
    from rich.console import Console

    from .tables import TEXT_WIDTH

    # A pipe has no width: take one that does not fold the tables.
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=TEXT_WIDTH if piped else None)
