"""Recipes: read from YAML, checked to the last value, written back with every default filled in.

recipe = load_recipe("my-recipe.yaml", ["model=Qwen/Qwen3-0.6B", "stages.0.steps=500"])
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from . import library, schema
from .checks import conflicts
from .located import COMMAND_LINE, Located, Place, Problems, dump, override, parse
from .schema import Recipe
from .typed import Converter

KINDS: dict[type, tuple[type, ...]] = {schema.Source: schema.SOURCES, schema.Stage: schema.STAGES}
# What belongs to one model and not to the next: `model=NAME` drops it.
OF_THE_MODEL = ("config", "tokenizer", "revision", "trust_remote_code", "scheduler")
# Fields of TrainingArguments that change what is told, not what is learned.
TOLD = ("log_*", "logging_*", "report_to", "run_name", "project", "trackio_*", "disable_tqdm", "skip_memory_metrics",
        "save_total_limit")  # fmt: skip


class RecipeError(ValueError):
    """A recipe that cannot be run; `problems` has a line for everything that is wrong with it."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the shipped one of that name.

    Args:
        path_or_name: a YAML file, or a name that `patchattn recipes list` shows.
        overrides: `key=value` texts that replace or add values: `stages.0.steps=500`, `model=Qwen/Qwen3-0.6B`.

    Raises:
        RecipeError: with a line for each mistake: file, line, key, value, and what is allowed.
    """
    problems = Problems()
    root = _tree(path_or_name, problems)
    if root is not None:
        for text in overrides:
            _override(root, text, problems)
    recipe = None if root is None else _recipe(root, problems)
    if problems.found or recipe is None:
        raise RecipeError(problems.lines())
    return recipe


def read_plain(path_or_name: str | Path) -> dict[str, Any]:
    """What a recipe's file says, as plain values: read, but not checked."""
    problems = Problems()
    root = _tree(path_or_name, problems)
    if root is None or problems.found:
        raise RecipeError(problems.lines())
    values: dict[str, Any] = root.plain()
    return values


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The exact recipe as plain values, with every default filled in."""
    values: dict[str, Any] = _plain(recipe)
    return values


def to_yaml(recipe: Recipe) -> str:
    """The exact recipe as YAML that `load_recipe` reads back as an equal one."""
    return dump(resolved(recipe))


def fingerprint(recipe: Recipe) -> str:
    """A hash of all that determines the result: not the output folder, the budget, or what is logged."""
    values = resolved(recipe)
    for name in ("about", "output", "budget"):
        del values[name]
    for part in (values, *values["stages"]):
        part["trainer"] = {
            name: value for name, value in part["trainer"].items() if not any(fnmatch(name, glob) for glob in TOLD)
        }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _tree(path_or_name: str | Path, problems: Problems) -> Located | None:
    """The file as a tree of located values; None if it is no mapping."""
    path = Path(path_or_name)
    if not path.is_file():
        path = library.find(str(path_or_name), configurations=False)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError([f"{shown}: this is no text in UTF-8: {error.reason} at byte {error.start}"]) from error
    root = parse(text, lambda line: Place(line, f"{shown}:{line}"), problems)
    if root is None:
        return None
    if not isinstance(root.value, dict):
        problems.add(root.place, "", f"a recipe is a mapping, `version: {schema.VERSION}` and so on; this is not one")
        return None
    _spell_out(root)
    return root


def _spell_out(root: Located) -> None:
    """Short forms as what they stand for, so that overrides find the long ones: a model's name, a list of one."""
    model = root.value.get("model")
    if model is not None and isinstance(model.value, str):
        root.value["model"] = Located({"name": model}, model.place)
    _wrap(root, "stages")
    stages = root.value.get("stages")
    for part in (root, *(stages.value if stages is not None and isinstance(stages.value, list) else ())):
        data = part.value.get("data") if isinstance(part.value, dict) else None
        for name in ("train", "held_out"):
            _wrap(data, name)


def _wrap(parent: Located | None, name: str) -> None:
    child = parent.value.get(name) if parent is not None and isinstance(parent.value, dict) else None
    if child is not None and isinstance(child.value, dict):
        child.value = [Located(child.value, child.place)]


def _override(root: Located, text: str, problems: Problems) -> None:
    """Put one `key=value` of the command line into the tree."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        problems.add(COMMAND_LINE, "", f"{text!r} is no override; write key=value, such as stages.0.steps=500")
        return
    given = parse(value, lambda line: COMMAND_LINE, problems, path)
    if given is None:
        return
    if path == "model" and isinstance(given.value, str):
        model = root.value.get("model")
        before = model.value if model is not None and isinstance(model.value, dict) else {}
        kept = {key: child for key, child in before.items() if key not in OF_THE_MODEL}
        given = Located({**kept, "name": given}, COMMAND_LINE)
    override(root, path, given, problems)


def _recipe(root: Located, problems: Problems) -> Recipe | None:
    version = root.value.get("version")
    if version is not None and isinstance(version.value, int) and version.value > schema.VERSION:
        problems.add(version.place, "version", f"{version.value} is of a newer patchattn; this one reads "
                     f"{schema.VERSION}: upgrade patchattn")  # fmt: skip
        return None
    converter = Converter(KINDS, problems)
    recipe = converter.read(root, Recipe, "")
    for path, text in conflicts(recipe):
        problems.add(converter.place(path), path, text)
    return recipe if isinstance(recipe, Recipe) else None


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    kind = getattr(value, "kind", None)  # of a source or a stage
    return {
        **({"kind": kind} if kind else {}),
        **{field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)},
    }
