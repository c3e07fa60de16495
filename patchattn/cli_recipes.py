"""`patchattn recipes`: the recipes there are, what one says in full, a copy to own, and a check before a long run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import FAILED, Json, examples, show, show_error

if TYPE_CHECKING:
    from .train.schema import DataSpec, Recipe, Source, Stage

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

Given = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of a shipped one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Other values, by their place in the recipe.")
]


@app.callback(
    epilog=examples(
        "patchattn recipes list",
        "patchattn recipes copy lab/lab-llama my-recipe.yaml",
        "patchattn recipes check my-recipe.yaml stages.0.steps=500",
    )
)
def start() -> None:
    """List, show, copy and check recipes, which `patchattn convert` runs."""


@app.command("list", epilog=examples("patchattn recipes list", "patchattn recipes list --json"))
def list_recipes(as_json: Json = False) -> None:
    """The recipes that ship with patchattn: what each makes, from which model, in which stages."""
    from .tables import add_row, table
    from .train import library

    found = [_entry(name) for name in library.names()]
    rows = table("recipe", "what it makes", "model", "stages")
    for entry in found:
        add_row(rows, entry["name"], entry["about"], entry["model"], ", ".join(entry["stages"]))
    show(found, as_json, rows)
    if not as_json:
        show(None, False, f"For many devices, to copy likewise: {', '.join(library.configs())}")


@app.command("show", epilog=examples("patchattn recipes show lab/lab-llama", "patchattn recipes show mine.yaml seed=1"))
def show_recipe(recipe: Given, overrides: Overrides = None, as_json: Json = False) -> None:
    """A recipe with every default filled in: exactly what would run."""
    from .train.recipe import load_recipe, resolved, to_yaml

    checked = load_recipe(recipe, overrides or ())
    show(resolved(checked), as_json, to_yaml(checked).rstrip())


@app.command(
    epilog=examples(
        "patchattn recipes copy lab/lab-llama my-recipe.yaml", "patchattn recipes copy accelerate/ddp settings/"
    )
)
def copy(
    name: Annotated[str, typer.Argument(help="The name of a shipped recipe.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="[DEST]", help="The file to write, or a folder.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a shipped recipe, comments and all, to a file of your own."""
    from .train import library

    source = library.find(name)
    target = destination if destination.suffix in (".yaml", ".yml") else destination / source.name
    if target.exists() and not force:
        raise FileExistsError(f"{target} is there already; name another file, or write over this one with --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    show({"file": str(target)}, as_json, f"wrote {target}")


@app.command(
    epilog=examples("patchattn recipes check my-recipe.yaml", "patchattn recipes check lab/lab-llama output=elsewhere")
)
def check(recipe: Given, overrides: Overrides = None, as_json: Json = False) -> None:
    """Everything that is wrong with a recipe, or else what it would do. Reads no data and no weights."""
    from .tables import add_row, table
    from .train.recipe import RecipeError, fingerprint, load_recipe, resolved

    try:
        checked = load_recipe(recipe, overrides or ())
    except RecipeError as error:
        if as_json:
            show({"recipe": recipe, "problems": error.problems}, True, None)
        else:
            show_error(error)
        raise typer.Exit(FAILED) from error
    rows = table("part", "what it would do")
    for part, text in _plan(checked):
        add_row(rows, part, text)
    values = {"recipe": recipe, "problems": [], "fingerprint": fingerprint(checked), "resolved": resolved(checked)}
    show(values, as_json, rows)


def _entry(name: str) -> dict[str, Any]:
    """A line of the list, from what the file says: checking them all would take a while."""
    from .train.recipe import read_plain

    values = read_plain(name)
    model, stages = values["model"], values["stages"]
    return {
        "name": name,
        "about": values.get("about", ""),
        "model": " + ".join(model[key] for key in ("name", "vision") if key in model) or "new",
        "patch": values.get("patch"),
        "stages": [stage["kind"] for stage in stages],
    }


def _plan(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe would do, part by part."""
    model, tokens = recipe.model, recipe.model.task in ("causal-lm", "image-text")
    name = " + ".join(part for part in (model.name, model.vision) if part)
    new = "" if model.config is None else f"new {model.config.get('model_type', model.config.get('_class_name'))}"
    rows = [("model", f"{name or new}, {model.task}, {model.dtype}"), ("patch", _patch_text(recipe.patch))]
    rows += _data_rows("data", recipe.data, recipe.data.length if tokens else None)
    for index, stage in enumerate(recipe.stages):
        rows.append((f"stage {index}", _stage_text(stage)))
        if stage.data is not None:
            length = stage.length or stage.data.length
            rows += _data_rows(f"stage {index} data", stage.data, length if tokens else None)
    limit = "" if recipe.budget.hours is None else f", stopping after {recipe.budget.hours:g} hours"
    return [*rows, ("output", recipe.output + limit)]


def _patch_text(what: Any) -> str:
    from .catalog import short_text
    from .method import as_methods, describe

    if what is None:
        return "none"
    plan = what if isinstance(what, dict) and "method" not in what else {"": what}
    texts = []
    for selector, item in plan.items():
        methods = " over ".join(short_text(describe(method)) for method in as_methods(item))
        texts.append(f"{methods} on {selector}" if selector else methods)
    return "; ".join(texts)


def _data_rows(part: str, data: DataSpec, length: int | None) -> list[tuple[str, str]]:
    total = sum(source.weight for source in data.train)
    shares = [f"{source.weight / total:.0%} " if len(data.train) > 1 else "" for source in data.train]
    texts = [share + _source_text(source) for share, source in zip(shares, data.train)]
    if length is not None:
        texts.append(f"samples of {length:,} tokens" + (", packed" if data.packing else ""))
    if isinstance(data.held_out, float):
        held_out = f"{data.held_out:.2%} of it" if data.held_out else "none"
    else:
        held_out = "; ".join(map(_source_text, data.held_out))
    return [(part, "; ".join(texts)), (f"{part} held out", held_out)]


def _source_text(source: Source) -> str:
    what = getattr(source, "generator", None) or getattr(source, "path", "")
    return f"{source.kind} {', '.join(what) if isinstance(what, list) else what}"


def _stage_text(stage: Stage) -> str:
    length = f"{stage.steps:,} steps" if stage.steps is not None else f"{stage.tokens:,} tokens"
    sample = "" if stage.length is None else f" of {stage.length:,} tokens"
    return f"{stage.kind}: {length}, {stage.batch_size} samples{sample} per step, learning rate {stage.learning_rate:g}"
