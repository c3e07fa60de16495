"""Reports: plain data that prints as a table and turns into JSON."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

TEXT_WIDTH = 140  # columns, where no terminal says how wide it is


class Report:
    """Base of the dataclasses that `inspect` and `explain` return."""

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report, JSON-ready."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def parts(self) -> list[RenderableType]:
        """The tables and lines it prints as."""
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*self.parts())

    def __str__(self) -> str:
        return as_text(self)


def as_text(content: Any) -> str:
    """Anything rich can render, as plain text."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=TEXT_WIDTH, color_system=None, highlight=False).print(content)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the one style of all our tables."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    heads = [Column(name, overflow="fold", no_wrap=not index) for index, name in enumerate(columns)]
    return Table(*heads, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def add_row(to: Table, *cells: Any) -> None:
    """Add cells as they are: True and False as yes and no, None as a dash, whole numbers with commas."""
    to.add_row(*(_cell(cell) for cell in cells))


def _cell(value: Any) -> Text:
    from rich.text import Text

    if value is None:
        return Text("-")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    return Text(f"{value:,}" if isinstance(value, int) else str(value))


def note(text: str) -> Text:
    """A line that wants attention."""
    from rich.text import Text

    return Text(text, style="yellow")


def setting_text(method: dict[str, Any]) -> str:
    """A method as the command line writes it, `name:key=value,...`, with long values cut."""
    shown = [f"{key}={_cut(value)}" for key, value in method.items() if key != "method"]
    return method["method"] + (":" + ",".join(shown) if shown else "")


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def name_of(row: Any) -> str:
    """The `name` of a row, be it an object or a dict."""
    return row["name"] if isinstance(row, dict) else row.name


def grouped(rows: Sequence[Any], key: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """Rows with equal keys whose names differ in the first number only, as one: `layers.0-11.self_attn`."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in rows:
        before, _, after = _parted(name_of(row))
        groups.setdefault((before, after, repr(key(row))), []).append(row)
    for (before, after, _), members in groups.items():
        numbers = [int(number) for row in members if (number := _parted(name_of(row))[1])]
        yield before + _ranges(numbers) + after, members[0]


def names_text(rows: Sequence[Any]) -> str:
    """The names of rows in as few words as say them."""
    return ", ".join(names for names, _ in grouped(rows, lambda row: None))


def all_but_name(row: Any) -> Any:
    """The key that keeps apart rows that differ in anything but their place."""
    values = row if isinstance(row, dict) else vars(row)
    return [value for name, value in values.items() if name not in ("name", "layer")]


def _parted(name: str) -> tuple[str, str, str]:
    """A name before, in and after its first number."""
    match = re.search(r"\d+", name)
    return (name, "", "") if match is None else (name[: match.start()], match.group(), name[match.end() :])


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`; more than three in even steps as `0,2,..,8`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]},{numbers[1]},..,{numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
