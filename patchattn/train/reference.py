"""The schema as the tables of docs/recipes.md; `python -m patchattn.train.reference docs/recipes.md` writes them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from . import schema
from .checks import RESERVED
from .typed import describe, options

START, END = "<!-- schema:start -->\n", "<!-- schema:end -->\n"
HEADINGS = {
    schema.Recipe: "The recipe", schema.ModelSpec: "`model`", schema.TokenizerSpec: "`model.tokenizer`",
    schema.DataSpec: "`data`", schema.Source: "Every source, in `data.train` and `data.held_out`",
    schema.Stage: "Every stage, in `stages`", schema.Trained: "`distill`, `tune` and `lora`",
    schema.Budget: "`budget`",
}  # fmt: skip
ORDER = (schema.Recipe, schema.ModelSpec, schema.TokenizerSpec, schema.DataSpec, schema.Source, *schema.SOURCES,
         schema.Stage, schema.AttentionTransfer, schema.Trained, schema.Distill, schema.Tune, schema.Lora,
         schema.IdentifyHeads, schema.Budget)  # fmt: skip


def markdown() -> str:
    """A table for each part of a recipe."""
    parts = [line for cls in ORDER for line in _section(cls)]
    reserved: dict[str, list[str]] = {}
    for name, instead in RESERVED.items():
        reserved.setdefault(instead, []).append(f"`{name}`")
    parts += [
        "### Fields of `trainer` that the engine sets itself",
        "",
        "| Field | Why, or what instead |",
        "| --- | --- |",
    ]
    parts += [f"| {', '.join(names)} | {instead} |" for instead, names in reserved.items()]
    return "\n".join(parts) + "\n"


def updated(document: str) -> str:
    """A document with the tables between its marks renewed."""
    before, _, rest = document.partition(START)
    return f"{before}{START}\n{markdown()}\n{END}{rest.partition(END)[2]}"


def _section(cls: type) -> Iterator[str]:
    kind = getattr(cls, "kind", "")
    yield f"### {HEADINGS.get(cls) or f'`kind: {kind}`'}"
    yield ""
    yield " ".join((inspect.getdoc(cls) or "").split())
    if cls in schema.SOURCES:
        yield f"For {', '.join(cls.tasks)}."
    if kind and issubclass(cls, schema.Trained):
        losses = ", ".join(f"{name} {weight:g}" for name, weight in cls.DEFAULT_LOSSES.items())
        yield f"Its losses by default: {losses}."
    rows = list(_rows(cls))
    if rows:
        yield from ("", "| Key | Value | Default | |", "| --- | --- | --- | --- |", *rows)
    yield ""


def _rows(cls: type) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    bases = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    for field in dataclasses.fields(cls):
        if field.name not in inherited:
            allowed = field.metadata["allowed"]
            value = ", ".join(f"`{word}`" for word in allowed) if allowed else ""
            value += " or null" if value and type(None) in options(hints[field.name]) else ""
            value = value or describe(hints[field.name], field.metadata)
            yield f"| `{field.name}` | {value} | {_default(field)} | {field.metadata['explain']} |"


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        return "must be given"
    if dataclasses.is_dataclass(default):
        return "none"
    return f"`{json.dumps(default)}`"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
