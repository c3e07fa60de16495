"""What short conversions to linear attention leave of a real model: perplexity, and recall from before the window.

    patchattn convert hedgehog/smollm2-135m
    patchattn convert lawcat/smollm2-135m
    python evals/linear_real.py smollm2-135m-hedgehog smollm2-135m-lawcat --output results.json

Perplexity is measured on rows of the text that the conversions' own recipes held out, passkeys and values of pairs on
generated questions. Beside each conversion stand the model as it is, the patch untrained, and, where there is a window,
that alone (`use_linear=False`), with the share of attention that goes to what lies before it. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import machine
from torch import Tensor

import patchattn
from patchattn.attach import apply_plan
from patchattn.lab.text import TASK_SEED
from patchattn.living import methods_on, plan_of, watching
from patchattn.loading import load_model, load_tokenizer
from patchattn.train.data import open_data
from patchattn.train.recipe import load_recipe
from patchattn.train.schema import Recipe, TextSource
from patchattn.train.synthetic import make

TASKS: dict[str, dict[str, Any]] = {"passkey": {}, "mqar": {"pairs": 8}}


def held_out(recipe: Recipe, tokenizer: Any, rows: int) -> list[Tensor]:
    """Rows of text that the recipe kept from its training."""
    sources = [source for source in recipe.data.train if isinstance(source, TextSource)]
    spec = recipe.data.__class__(train=sources, held_out=recipe.data.held_out, length=recipe.data.length,
                                 packing=False, held_out_samples=rows)  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        data = open_data(spec, task="causal-lm", processor=tokenizer, length=spec.length, seed=recipe.seed, samples=1,
                         cache=Path(cache))  # fmt: skip
        assert data.held_out is not None
        found = [torch.tensor(data.held_out[index]["input_ids"]).long()[None] for index in range(len(data.held_out))]
    return [row for row in found if row.shape[1] > 2]


@torch.no_grad()
def measured(model: Any, tokenizer: Any, texts: list[Tensor], given: argparse.Namespace) -> dict[str, float]:
    total = count = 0.0
    for row in texts:
        total += model(row, labels=row, use_cache=False).loss.item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    found = {"perplexity": math.exp(total / count)}
    for task, options in TASKS.items():
        for length in given.lengths:
            right = asked = 0
            for sample in questions(task, options, tokenizer, length, given.samples):
                logits = model(sample["input_ids"], use_cache=False).logits[:, :-1]
                chosen = sample["labels"][:, 1:] != -100
                right += int((logits.argmax(dim=-1) == sample["labels"][:, 1:])[chosen].sum())
                asked += int(chosen.sum())
            found[f"{task} at {length}"] = right / asked
    return found


def questions(task: str, options: dict[str, Any], tokenizer: Any, length: int, samples: int) -> Iterator[Any]:
    generator = make(task, tokenizer, TASK_SEED, **options)
    for index in range(samples):
        yield {key: torch.tensor([value]) for key, value in generator.sample(index, length).items()}


@torch.no_grad()
def linear_share(model: Any, row: Tensor) -> list[float]:
    shares: list[float] = []

    def note(ctx: Any) -> Tensor:
        shares.append(ctx.attachment.methods[0].diagnostics(ctx)["linear share"].item())
        return ctx.attend()

    with watching(model, note):
        model(row, use_cache=False)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="conversions of one model")
    parser.add_argument("--rows", type=int, default=16, help="of held-out text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512], help="of questions, in tokens")
    parser.add_argument("--samples", type=int, default=8, help="questions of each kind and length")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON; what stands there is not run again")
    given = parser.parse_args()
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "folders")}
    result: dict[str, Any] = {"settings": settings, "conversions": {}, "models": {}, "machine": machine()}
    if given.output is not None and given.output.is_file():
        result = json.loads(given.output.read_text(encoding="utf-8"))
        if result["settings"] != settings:
            raise SystemExit(f"{given.output} holds a run with other settings; name another file")

    def note(name: str, model: Any, tokenizer: Any, texts: list[Tensor]) -> None:
        if name not in result["models"]:
            result["models"][name] = measured(model, tokenizer, texts, given)
            heads = list(result["models"][name])
            if len(result["models"]) == 1:
                print(f"| | {' | '.join(heads)} |\n{'| --- ' * (len(heads) + 1)}|")
            if given.output is not None:
                given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        shown = [f"{value:.1f}" if what == "perplexity" else f"{value:.1%}"
                 for what, value in result["models"][name].items()]  # fmt: skip
        print(f"| {name} | {' | '.join(shown)} |", flush=True)

    for folder in given.folders:
        recipe = load_recipe(str(Path(folder, "recipe.yaml")))
        name, length = Path(folder).name, recipe.data.length
        model, base = load_model(folder, dtype="float32"), load_model(recipe.model.name, dtype="float32")
        tokenizer = load_tokenizer(recipe.model.name)
        texts = held_out(recipe, tokenizer, given.rows)
        tokens = sum(row.shape[1] - 1 for row in texts)
        conversion = {"patch": plan_of(model)[0]["methods"], "text": f"{tokens} held-out tokens in rows of {length}"}
        note(f"as it is, rows of {length}", base, tokenizer, texts)
        note(f"{name}, untrained", apply_plan(base, plan_of(model)), tokenizer, texts)
        del base
        note(name, model, tokenizer, texts)
        first: Any = methods_on(model)[0]
        if "use_linear" in first.config.runtime_fields() and first.config.window:
            conversion["linear share by layer"] = [round(share, 4) for share in linear_share(model, texts[0])]
            with patchattn.settings(model, use_linear=False):
                note(f"{name}, its window alone", model, tokenizer, texts)
        result["conversions"][name] = conversion
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
