"""`patchattn eval`: tasks of lm-eval on a model with a patch; `patchattn tasks`: the tasks and suites that ship;
`patchattn bench`: time and memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import FAILED, Json, examples, one_line, show

app = typer.Typer()


@app.command(
    "eval",
    epilog=examples(
        "patchattn eval lab-llama --suite quick --batch_size 8",
        "patchattn eval lab-llama -m duo_attention:sink=4,recent=128 --suite quick --output_path results",
        "patchattn eval Qwen/Qwen3-0.6B --patch my-patch --tasks hellaswag,piqa --limit 100",
        "patchattn eval my-model --patch my-patch --tasks hellaswag,piqa --data my-data",
        "accelerate launch -m patchattn eval my-model --patch my-patch --tasks wikitext",
    ),
)
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub repository of the model.", show_default=False)
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", "-t", help="Names of tasks or groups, with commas between; globs too.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="A shipped suite instead: see `patchattn tasks`.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="name or name:key=value,key=value. The first is the outermost."),
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Methods by layers, as JSON or a JSON file.")] = None,
    layers: Annotated[str | None, typer.Option("--layers", "-l", help="Which layers, for --method.")] = None,
    patch: Annotated[
        str | None, typer.Option(help="A saved patch: folder or repository. Or methods, as after patch= in lm_eval.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--model", "-M", help="lm-eval's name for the class of model. Default: as MODEL needs."),
    ] = None,
    model_args: Annotated[
        str | None, typer.Option("--model_args", "-a", help="key=value,key=value: dtype, max_length, revision, ...")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num_fewshot", "-f", help="Examples before a question.")] = None,
    batch_size: Annotated[str, typer.Option("--batch_size", "-b", help="A number, auto or auto:N.")] = "1",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")] = None,
    limit: Annotated[
        float | None, typer.Option("--limit", "-L", help="Samples of each task, or a share of them below 1.")
    ] = None,
    output_path: Annotated[
        str | None, typer.Option("--output_path", "-o", help="Folder or .json file for the results.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log_samples", "-s", help="Write what was asked and answered, too.")
    ] = False,
    include_path: Annotated[
        list[str] | None, typer.Option("--include_path", help="Folder with further tasks; may be given again.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of local files that stand in for the hub's data sets.")
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(help="Settings of tasks: key=value,key=value, such as lengths=[512,1024],samples=8.")
    ] = None,
    gen_kwargs: Annotated[str | None, typer.Option("--gen_kwargs", help="Settings of generation, likewise.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply_chat_template", help="Put prompts into the model's chat template.")
    ] = False,
    seed: Annotated[
        str, typer.Option(help="One, or four with commas between: of random, numpy, torch and the examples.")
    ] = "0,1234,1234,1234",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", "--trust-remote-code", help="Allow code from the model's repository.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run tasks of lm-eval on MODEL, patched or not. The options are called as they are in `lm_eval`."""
    from .evaluate.library import require_harness, suites

    arguments = {**_pairs(model_args, "--model_args"), **({"trust_remote_code": True} if trust_remote_code else {})}
    name = model if model is not None else arguments.pop("pretrained", None)
    if name is None:
        raise typer.BadParameter("name a model, or give --model_args pretrained=...", param_hint="MODEL")
    if (tasks is None) == (suite is None):
        raise typer.BadParameter("give either --tasks or --suite", param_hint="--tasks")
    if suite is not None and suite not in suites():
        raise typer.BadParameter(f"no suite is called {suite!r}; there are {', '.join(suites())}", param_hint="--suite")
    settings = _pairs(metadata, "--metadata")
    generation = _pairs(gen_kwargs, "--gen_kwargs")
    seeds = _seeds(seed)
    what = _patch(method, plan, layers, patch, arguments)
    require_harness()
    from .evaluate.run import evaluate as run

    results = run(
        name, f"suite_{suite}" if tasks is None else tasks, patch=what, layers=layers, kind=kind, model_args=arguments,
        data=data, metadata=settings, include_path=include_path, limit=limit, num_fewshot=num_fewshot,
        batch_size=batch_size, device=device, seed=seeds, apply_chat_template=apply_chat_template,
        gen_kwargs=generation or None, output_path=output_path, log_samples=log_samples,
    )  # fmt: skip
    if results is not None:
        show(results.to_dict(), as_json, results)


@app.command("tasks", epilog=examples("patchattn tasks", "lm_eval --include_path $(patchattn tasks --path) ..."))
def list_tasks(
    path: Annotated[bool, typer.Option("--path", help="Print their folder, for lm_eval's --include_path.")] = False,
    as_json: Json = False,
) -> None:
    """The tasks and suites that ship with patchattn, beside those of lm-eval."""
    from .evaluate import library
    from .tables import add_row, table

    folder = str(library.folder())
    if path:
        show({"folder": folder}, as_json, folder)
        return
    rows = table("task", "what it is")
    for name, text in library.tasks().items():
        add_row(rows, name, text)
    suites = table("suite", "what it is")
    for name, text in library.suites().items():
        add_row(suites, name, text)
    if as_json:
        show({"folder": folder, "tasks": library.tasks(), "suites": library.suites()}, True, None)
        return
    show(None, False, rows)
    show(None, False, suites)


@app.command(
    epilog=examples(
        "patchattn bench lab-llama --patch 'duo_attention:heads=0;recent=124' --patch dense",
        "patchattn bench Qwen/Qwen3-0.6B --patch my-patch --lengths 4096,16384 --batches 1,4 --output bench.json",
    )
)
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub repository.", show_default=False)],
    patch: Annotated[
        list[str],
        typer.Option(help="Folder, repository, or name:key=value;key=value. May be given again.", show_default=False),
    ],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, with commas between.")] = "512,2048",
    batches: Annotated[str, typer.Option(help="Rows of the prompts, likewise.")] = "1",
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens decoded after each prompt.")] = 16,
    rounds: Annotated[int, typer.Option(min=2, help="How often each side is timed.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, help="How often it runs before.")] = 2,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write the numbers there as JSON.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's repository.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", "--trust-remote-code", help="Allow code from the model's repository.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time and memory of MODEL as it is and with each patch: prompts, single tokens, cache, peak; checked first.

    All are timed in one process, in turn; × base is the median of the ratios round by round, with quartiles.
    """
    import sys

    from .cli import _load
    from .evaluate.patches import read_patch

    sizes = {"--lengths": _numbers(lengths, "--lengths"), "--batches": _numbers(batches, "--batches")}
    for given in patch:
        try:
            read_patch(given)
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(one_line(error), param_hint="--patch") from error
    from .environment import default_device
    from .evaluate.speed import bench as run

    loaded = _load(model, dtype, device or default_device(), revision, trust_remote_code)
    report = run(loaded, patch, lengths=sizes["--lengths"], batches=sizes["--batches"], tokens=tokens, rounds=rounds,
                 warmup=warmup, say=lambda line: print(line, file=sys.stderr))  # fmt: skip
    if output is not None:
        Path(output).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    show(report.to_dict(), as_json, report)
    if not report.passed:
        raise typer.Exit(FAILED)


def _numbers(text: str, hint: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r} is not numbers of at least 1 with commas between", param_hint=hint)
    return found


def _patch(
    method: list[str] | None, plan: str | None, layers: str | None, patch: str | None, arguments: dict[str, Any]
) -> Any:
    """The one patch of the command line, checked; None for none."""
    from .evaluate.patches import read_patch
    from .method import as_methods

    given = {"--method": method, "--plan": plan, "--patch": patch, "--model_args": arguments.pop("patch", None)}
    named = [hint for hint, value in given.items() if value]
    if len(named) > 1:
        raise typer.BadParameter(f"give only one of {' and '.join(named)}", param_hint=named[-1])
    if not named:
        if layers is not None:
            raise typer.BadParameter("name a method for these layers", param_hint="--layers")
        return None
    (hint,) = named
    try:
        what = as_methods(method) if method else plan or patch or given["--model_args"]
        read_patch(what, layers)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(one_line(error), param_hint=hint) from error
    return what


def _pairs(text: str | None, hint: str) -> dict[str, Any]:
    """`key=value,key=value` as a dictionary; JSON does as well."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is no JSON: {error}", param_hint=hint) from error
    found = {}
    for part in re.split(r",(?=\s*[A-Za-z_]\w*=)", text):
        key, equals, value = part.strip().partition("=")
        if not equals:
            raise typer.BadParameter(f"{part!r} is not key=value", param_hint=hint)
        try:
            found[key] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except ValueError:
            found[key] = value
    return found


def _seeds(text: str) -> list[int | None]:
    """One seed for all, or one each."""
    try:
        seeds = [None if part.strip().lower() == "none" else int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if len(seeds) not in (1, 4):
        raise typer.BadParameter(f"{text!r} is neither one number nor four", param_hint="--seed")
    return seeds if len(seeds) == 4 else seeds * 4
