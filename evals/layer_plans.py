"""Does it matter which layers stay softmax? Every choice of as many layers, beside the one that a profile proposes.

    patchattn convert hedgehog/lab-llama 'stages=[{kind: attention_transfer, tokens: 200_000, learning_rate: 1e-2}]' \\
        output=lab-llama-transfer
    python evals/layer_plans.py --patch lab-llama-transfer --output results.json

The profile is measured on training text and on questions that are not asked again; perplexity on held-out text, pairs
recalled and passkeys found are then measured for every choice of layers, at each budget. Without `--patch` the profile
is of the method untrained. `--trained NAME=FOLDER` measures whole conversions likewise. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import machine

import patchattn
from patchattn.lab.text import read_texts
from patchattn.loading import load_model, load_tokenizer
from patchattn.profiling import Profile, profile, task_rows, text_rows

CHECKPOINT = "lab-llama"
PROFILE_SEED = 2_000_003  # of the profile's questions
TASKS: dict[str, dict[str, Any]] = {"passkey": {}, "mqar": {"pairs": 8}}


def profiled(model: Any, what: Any, given: argparse.Namespace) -> Profile:
    tokenizer = load_tokenizer(CHECKPOINT)
    rows = {"text": text_rows(tokenizer, read_texts(Path(given.data, "books", "train"))[:8], length=given.length)}
    for name, options in TASKS.items():
        rows[name] = task_rows(tokenizer, name, length=given.length, seed=PROFILE_SEED, **options)
    return profile(model, what, rows, file=given.profile)


@torch.no_grad()
def measured(model: Any, given: argparse.Namespace) -> dict[str, float]:
    """Perplexity on held-out text, and the share of answers' tokens that are the likeliest."""
    tokenizer = load_tokenizer(CHECKPOINT)
    texts = read_texts(Path(given.data, "books", "held_out"))
    rows = {"text": text_rows(tokenizer, texts, length=given.length, rows=given.rows)}
    for name, options in TASKS.items():
        rows[name] = task_rows(tokenizer, name, length=given.length, rows=given.rows, **options)
    found = {}
    for name, batches in rows.items():
        loss = right = count = 0.0
        for batch in batches:
            logits, labels = model(batch["input_ids"], use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
            logits, labels = logits[labels != -100], labels[labels != -100]
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right, count = right + int((logits.argmax(dim=-1) == labels).sum()), count + len(labels)
        found |= {"perplexity": math.exp(loss / count)} if name == "text" else {name: right / count}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", metavar="FOLDER", help="a trained patch of lab-llama")
    parser.add_argument("--method", default="hedgehog:window=32,feature_dim=32", help="where there is no patch")
    parser.add_argument("--data", default="lab-data", help="what `patchattn lab data` wrote")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5], help="shares of layers that stay")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32, help="of held-out text, and of each task")
    parser.add_argument("--profile", metavar="FILE", help="JSON of the profile, to go on with")
    parser.add_argument("--trained", nargs="*", default=[], metavar="NAME=FOLDER", help="whole conversions")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    given = parser.parse_args()
    model = load_model(CHECKPOINT, dtype="float32")
    if given.patch is not None:
        patchattn.load(model, given.patch)
        found = profiled(model, None, given)
    else:
        found = profiled(model, given.method, given)
        patchattn.patch(model, given.method)
    print(f"{found}\n\n| layers that stay | chosen | perplexity | passkeys | pairs |\n| --- | --- | --- | --- | --- |")
    layers, results = range(len(found.layers)), []

    def note(stay: list[int] | None, chosen: str, values: dict[str, float]) -> None:
        results.append({"stay": stay, "chosen": chosen, **values})
        shown = "" if stay is None else ", ".join(map(str, stay)) or "none"
        perplexity, passkey, pairs = values["perplexity"], values["passkey"], values["mqar"]
        print(f"| {shown} | {chosen} | {perplexity:.1f} | {passkey:.1%} | {pairs:.1%} |", flush=True)

    with patchattn.disabled(model):
        note(list(layers), "unpatched", measured(model, given))
    note([], "all patched", measured(model, given))
    for budget in given.budgets:
        kept = {layer.name for layer in found.kept(budget)}
        proposed = [place for place in layers if found.layers[place].name in kept]
        uniform = list(layers)[:: len(layers) // len(proposed)]
        for stay in itertools.combinations(layers, len(proposed)):
            chosen = [name for name, one in (("by profile", proposed), ("uniform", uniform)) if list(stay) == one]
            with patchattn.only(model, [found.layers[place].name for place in layers if place not in stay]):
                note(list(stay), ", ".join(chosen), measured(model, given))
    for name, _, folder in (text.partition("=") for text in given.trained):
        note(None, name, measured(load_model(folder, dtype="float32"), given))
    if given.output is not None:
        hidden = ("output", "data", "trained", "patch", "profile")
        settings = {key: value for key, value in vars(given).items() if key not in hidden}
        settings["patch"] = "trained" if given.patch else "untrained"
        result = {"checkpoint": CHECKPOINT, **settings, "profile": found.to_dict(), "plans": results}
        given.output.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
