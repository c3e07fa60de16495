"""The command line: parses, calls the library, prints. torch is imported only by the commands that need it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, cli_eval, cli_lab, cli_recipes
from .terminal import FAILED, Json, examples, one_line, show, show_error

if TYPE_CHECKING:
    from torch import nn

BUDGET_SPENT = 3
DTYPES = ("auto", "float32", "bfloat16", "float16")

app = typer.Typer(
    name="patchattn",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_recipes.app, name="recipes")
app.add_typer(cli_lab.app, name="lab")
app.add_typer(cli_eval.app)


def main() -> None:
    """Run the command line, with `--debug` allowed anywhere on it."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    try:
        app(arguments, prog_name="patchattn")
    except Exception as error:
        if "--debug" in arguments:
            raise
        show_error(error)
        sys.exit(FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(
    epilog=examples(
        "patchattn demo",
        "patchattn methods",
        "patchattn inspect Qwen/Qwen3-0.6B",
        "patchattn patch Qwen/Qwen3-0.6B --method duo_attention:sink=64,recent=256 -o my-patch",
    )
)
def start(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Swap the attention of pretrained models for published alternatives.

    MODEL is a folder or a repository of the Hugging Face hub.

    Exit codes: 0 all is well, 1 it failed, 2 the command was used wrongly.
    """


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub repository of the model.", show_default=False)
]
Layers = Annotated[
    str | None,
    typer.Option("--layers", "-l", help="Which layers: 0-11, 0,3,8-, even, odd, or a glob over module names."),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method", "-m", help="name or name:key=value,key=value. Given more than once, the first is the outermost.",
        show_default=False,
    ),
]  # fmt: skip
Plan = Annotated[
    str | None,
    typer.Option(
        "--plan", help='Methods by layers, as JSON or a JSON file: {"even": "duo_attention", "odd": "dense"}.'
    ),
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto, which spreads a large model.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's repository.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")]


# ---- commands ----------------------------------------------------------------------------------------------


@app.command(
    "methods", epilog=examples("patchattn methods", "patchattn methods duo_attention", "patchattn methods --json")
)
def list_methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A method, to see its settings.", show_default=False)
    ] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """The methods there are: what each is for, whether it needs training, what it fits, its paper."""
    from . import catalog
    from .method import method_class

    if name is not None:
        with _wrong_usage("NAME"):
            method_class(name)
        entry = next(entry for entry in catalog.catalog() if entry["name"] == method_class(name).name)
        show(entry, as_json, catalog.explain_settings(name))
    elif markdown:
        typer.echo(catalog.markdown())
    else:
        from .tables import add_row, table

        rows = table("method", "what it is for", "trained", "fits", "paper")
        for entry in catalog.catalog():
            add_row(rows, entry["name"], entry["for"], entry["trained"], ", ".join(entry["fits"]), entry["paper"])
        show(catalog.catalog(), as_json, rows)


@app.command(
    epilog=examples(
        "patchattn inspect Qwen/Qwen3-0.6B", "patchattn inspect my-model -m gated_attention:kind=elementwise"
    )
)
def inspect(
    model: Model,
    method: Methods = None,
    as_json: Json = False,
    revision: Revision = None,
    trust_remote_code: Remote = False,
) -> None:
    """What could be patched in MODEL, by which methods, and why not what could not. Downloads no weights."""
    what = _what(method, None, None)
    from . import inspect as inspect_model

    report = inspect_model(_load_shell(model, revision, trust_remote_code), what)
    show(report.to_dict(), as_json, report)


@app.command(
    epilog=examples(
        "patchattn explain HuggingFaceTB/SmolLM2-135M-Instruct -m duo_attention:sink=4,recent=16",
        'patchattn explain my-model -m gated_attention -m duo_attention --layers 4- --prompt "Once upon a time"',
        "patchattn explain my-model --patch my-patch --json",
    )
)
def explain(
    model: Model,
    method: Methods = None,
    plan: Plan = None,
    layers: Layers = None,
    saved: Annotated[
        str | None, typer.Option("--patch", help="Folder or repository of a saved patch, instead of methods.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to generate from; default: 64 tokens at random.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to generate.")] = 32,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Patch MODEL in memory, run it once, and say what really happened: calls, kernels, cache bytes."""
    what = _what(method, plan, layers)
    if saved is not None and what is not None:
        raise typer.BadParameter("give either methods or a saved patch", param_hint="--patch")
    if layers is not None and what is None:
        raise typer.BadParameter("name a method for these layers", param_hint="--layers")
    from . import explain as explain_model
    from . import load as load_patch
    from . import patch as patch_model
    from .record import patch_of
    from .trial import run

    loaded = _load(model, dtype, device, revision, trust_remote_code)
    if what is not None:
        patch_model(loaded, what, layers)
    elif saved is not None:
        load_patch(loaded, saved)
    elif patch_of(loaded) is None:
        raise typer.BadParameter("name a method, a saved patch, or a model that is patched", param_hint="--method")
    from .loading import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code, revision)
    outcome = run(loaded, tokenizer, prompt, tokens)
    report = explain_model(loaded)
    if as_json:
        show({**report.to_dict(), "input": outcome.given, "output": outcome.answer}, True, None)
    else:
        show(None, False, f"input: {outcome.given}\noutput: {outcome.answer}\n")
        show(None, False, report)


@app.command(
    epilog=examples(
        "patchattn patch Qwen/Qwen3-0.6B -m duo_attention:heads=pattern.tsv,share=0.5 -o my-patch",
        "patchattn patch my-model -m gated_attention -m duo_attention --layers 4- -o my-patch --dry-run",
        'patchattn patch my-model --plan \'{"even": "duo_attention", "odd": "gated_attention"}\' -o whole --full',
    )
)
def patch(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    method: Methods = None,
    plan: Plan = None,
    layers: Layers = None,
    full: Annotated[
        bool, typer.Option("--full", help="Write a whole checkpoint, not the patch alone (a few MB or less).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: Remote = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Patch MODEL and write the patch, or with --full the whole patched model, to a folder."""
    what = _what(method, plan, layers)
    if what is None:
        raise typer.BadParameter("name at least one method, or a plan", param_hint="--method")
    _check_output(output, force)
    from . import patch as patch_model
    from .living import patch_parameters, plan_of

    if dry_run:
        loaded = _load_shell(model, revision, trust_remote_code)
    else:
        loaded = _load(model, dtype, device, revision, trust_remote_code)
    patch_model(loaded, what, layers)
    parameters = sum(parameter.numel() for parameter in patch_parameters(loaded).values())
    if not dry_run:
        _write(loaded, model, output, full, trust_remote_code, revision)
    files = [] if dry_run else _files(output)
    result = {
        "folder": str(output),
        "written": not dry_run,
        "whole_model": full,
        "parameters": parameters,
        "plan": plan_of(loaded),
        "files": files,
    }
    show(result, as_json, _patch_text(result))


@app.command(
    epilog=examples(
        "patchattn profile my-model -m hedgehog:window=32 --data text.txt --task passkey -o profile.json",
        "patchattn profile my-conversion --task mqar:pairs=8 --length 1024 -o profile.json",
        "patchattn profile my-model --patch my-patch --data texts/ -o profile.json --json",
    )
)
def profile(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The JSON file to write; what stands there already is kept.", show_default=False
        ),
    ],
    method: Methods = None,
    plan: Plan = None,
    layers: Layers = None,
    saved: Annotated[
        str | None, typer.Option("--patch", help="Folder or repository of a saved patch, instead of methods.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text to measure on: a file, a folder of .txt files, or a glob.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Generated task to measure on, as passkey or mqar:pairs=8; may be repeated."),
    ] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a row.")] = 512,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the text, and of each task.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 4,
    way: Annotated[
        list[str] | None, typer.Option(help="alone (patch each layer alone) or without (all but it); default: both.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model whose predictions count; default: MODEL without its patch.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Measure what patching each layer of MODEL costs, on text and on tasks of recall. The same command goes on."""
    what = _what(method, plan, layers)
    if saved is not None and what is not None:
        raise typer.BadParameter("give either methods or a saved patch", param_hint="--patch")
    if not data and not task:
        raise typer.BadParameter("name a text with --data or a task with --task", param_hint="--data")
    from . import load as load_patch
    from . import profiling
    from .lab.text import read_texts
    from .loading import load_tokenizer

    loaded = _load(model, dtype, device, revision, trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code, revision)
    if tokenizer is None:
        raise FileNotFoundError(f"there is no tokenizer at {model!r}, which text is to be read with")
    chosen: dict[str, Any] = {}
    with _wrong_usage("--task"):
        for text in task or ():
            name, options = _generator(text)
            chosen[text] = profiling.task_rows(tokenizer, name, length=length, rows=rows, batch=batch, **options)
    if data:
        texts = read_texts(data)
        chosen["text"] = profiling.text_rows(tokenizer, texts, length=length, rows=rows, batch=batch)
    if saved is not None:
        load_patch(loaded, saved)
    found = profiling.profile(
        loaded, what, chosen, layers=layers, ways=way or profiling.WAYS, file=output,
        reference=None if reference is None else _load(reference, dtype, device, None, trust_remote_code),
        say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    show(found.to_dict(), as_json, found)


@app.command(
    "plan",
    epilog=examples(
        "patchattn plan profile.json --budget 0.5",
        "patchattn plan profile.json --budget 0.3 --of cache --on passkey -o plan.json",
        "patchattn patch my-model --plan plan.json -o my-patch",
    ),
)
def make_plan(
    file: Annotated[Path, typer.Argument(metavar="PROFILE", help="What `profile` wrote.", show_default=False)],
    budget: Annotated[float, typer.Option(help="Share that may stay as it was, from 0 to 1.", show_default=False)],
    of: Annotated[str, typer.Option(help="Of what: layers, or cache (the unpatched model's bytes).")] = "layers",
    by: Annotated[str, typer.Option(help="What is to be kept: divergence, loss or right (answers).")] = "divergence",
    on: Annotated[list[str] | None, typer.Option(help="Which rows of the profile count; default: all.")] = None,
    way: Annotated[str | None, typer.Option(help="alone or without; default: both.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan there, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Propose which layers stay as they were within a budget, and which are patched."""
    from .profiling import load_profile

    found = load_profile(file)
    with _wrong_usage("--budget"):
        options: dict[str, Any] = dict(of=of, by=by, on=on or None, way=way)
        kept, plan = [layer.name for layer in found.kept(budget, **options)], found.plan(budget, **options)
    if output is not None:
        output.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    lines = [f"stays as it was: {', '.join(kept) or 'no layer'}", json.dumps(plan)]
    show({"kept": kept, "plan": plan}, as_json, "\n".join(lines))


@app.command(
    epilog=examples("patchattn push my-patch me/my-patch --dry-run", "patchattn push my-patch me/my-patch --private")
)
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `patch` wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="name/repository on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="What the commit says.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Upload a patch, or a whole patched model, to the Hugging Face hub."""
    from . import hub

    hub.read_description(folder)  # says why, if this is no such folder
    files = _files(folder)
    result: dict[str, Any] = {"repository": repository, "pushed": not dry_run, "files": files, "url": None}
    if not dry_run:
        result["url"] = hub.push_folder(folder, repository, private or None, message)
    verb = "would push" if dry_run else "pushed"
    lines = [f"{verb} {len(files)} files to {result['url'] or repository}", *(_file_line(file) for file in files)]
    show(result, as_json, "\n".join(lines))


@app.command(epilog=examples("patchattn env", "patchattn env --json"))
def env(as_json: Json = False) -> None:
    """What is installed and on which machine: paste it into a bug report."""
    from .environment import environment

    found = environment()
    if as_json:
        show(found, True, None)
        return
    from .tables import add_row, table

    rows = table("patchattn env", "")
    for name, value in found.items():
        shown = ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, dict) else value
        add_row(rows, name, shown if not isinstance(value, list) else ", ".join(map(str, value)) or None)
    show(None, False, rows)


@app.command(
    epilog=examples(
        "patchattn convert gated_attention/smollm2-135m output=my-conversion",
        "patchattn convert my-recipe.yaml model=Qwen/Qwen3-0.6B stages.0.steps=500",
        "accelerate launch --config_file fsdp2.yaml -m patchattn convert my-recipe.yaml",
    )
)
def convert(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a shipped one.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Other values, by their place in the recipe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: patch, train, save. The same command again goes on where a run stopped.

    Exit codes: 130 or 143 after SIGINT or SIGTERM, 3 when the recipe's budget of hours is spent.
    """
    try:
        from .train.recipe import load_recipe

        checked = load_recipe(recipe, overrides or ())
        from .train.convert import Stopped
        from .train.convert import convert as run

        try:
            outcome = run(checked, say=lambda line: print(line, file=sys.stderr))
        except Stopped as stopped:
            print(f"stopped: {stopped}", file=sys.stderr)
            raise typer.Exit(BUDGET_SPENT if stopped.signal is None else 128 + stopped.signal) from stopped
    except KeyboardInterrupt as interrupt:  # while libraries are read, before the run listens to signals
        print("stopped: interrupted by SIGINT before anything was done; the same command starts again", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from interrupt
    from accelerate import PartialState

    from .train.convert import summary

    if PartialState().is_main_process:
        show(outcome.report, as_json, summary(outcome))


@app.command(
    epilog=examples("patchattn demo", "patchattn demo --model HuggingFaceTB/SmolLM2-135M-Instruct --tokens 512")
)
def demo(
    model: Annotated[str | None, typer.Option(help="A decoder model of your own instead of lab-llama.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=64, help="Tokens in the cache that is measured.")] = 1024,
    as_json: Json = False,
) -> None:
    """Patch lab-llama with every method, compare, generate, save, reload, unpatch, and show what happened."""
    from .demo import run

    report = run(None if model is None else _load(model, "float32", "cpu", None, False), tokens)
    show(report.to_dict(), as_json, report)
    if not report.passed:
        raise typer.Exit(FAILED)


# ---- what the commands share -------------------------------------------------------------------------------


@contextlib.contextmanager
def _wrong_usage(hint: str) -> Iterator[None]:
    """What the library finds wrong in here was wrong on the command line: exit code 2."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(one_line(error), param_hint=hint) from error


def _what(method: list[str] | None, plan: str | None, layers: str | None) -> Any:
    """The methods of the command line as `patch` takes them, checked; None if none were named."""
    from .method import as_methods

    if method and plan:
        raise typer.BadParameter("give either --method or --plan", param_hint="--plan")
    if plan is None:
        with _wrong_usage("--method"):
            return as_methods(method) if method else None
    if layers is not None:
        raise typer.BadParameter("a plan names its layers by itself", param_hint="--layers")
    with _wrong_usage("--plan"):
        text = plan if plan.lstrip().startswith("{") else Path(plan).read_text(encoding="utf-8")
        values = json.loads(text)
        if not isinstance(values, dict) or not values:
            raise ValueError('a plan is an object such as {"even": "duo_attention", "odd": "gated_attention"}')
        return {selector: as_methods(item) for selector, item in values.items()}


def _generator(text: str) -> tuple[str, dict[str, Any]]:
    """A generated task and its options, from `name:key=value,key=value`."""
    name, _, rest = text.partition(":")
    options = {}
    for part in re.split(r",(?=\s*\w+=)", rest) if rest else []:
        key, equals, value = part.strip().partition("=")
        if not equals:
            raise ValueError(f"task {text!r}: {part!r} is no option; write name:key=value,key=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def _load(name: str, dtype: str, device: str, revision: str | None, trust_remote_code: bool) -> nn.Module:
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    with _opening(name):
        from .loading import load_model

        return load_model(name, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)


def _load_shell(name: str, revision: str | None, trust_remote_code: bool) -> nn.Module:
    with _opening(name):
        from .loading import load_shell

        return load_shell(name, revision=revision, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _opening(name: str) -> Iterator[None]:
    """Errors in here say which model could not be opened; transformers keeps its progress bars to itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"cannot open {name!r}: {one_line(error)}") from error


def _check_output(folder: Path, force: bool) -> None:
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise FileExistsError(f"{folder} is not empty; name another folder, or write into this one with --force")


def _write(
    model: nn.Module, name: str, folder: Path, full: bool, trust_remote_code: bool, revision: str | None
) -> None:
    if not full:
        from . import save

        save(model, folder)
        return
    from .loading import load_tokenizer

    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer = load_tokenizer(name, trust_remote_code, revision)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _files(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [{"name": str(path.relative_to(folder)), "bytes": path.stat().st_size} for path in files]


def _file_line(file: dict[str, Any]) -> str:
    return f"  {file['name']}  {file['bytes']:,} bytes"


def _patch_text(result: dict[str, Any]) -> str:
    from .catalog import short_text

    what = "the whole model" if result["whole_model"] else "the patch"
    lines = [f"{'wrote' if result['written'] else 'would write'} {what} to {result['folder']}"]
    for entry in result["plan"]:
        methods = " over ".join(short_text(method) for method in entry["methods"])
        lines.append(f"  {methods} on {len(entry['layers'])} layers, {entry['layers'][0]} to {entry['layers'][-1]}")
    lines.append(f"  new parameters: {result['parameters']:,}")
    return "\n".join([*lines, *(_file_line(file) for file in result["files"])])
