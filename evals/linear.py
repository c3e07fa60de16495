"""What linear attention leaves of lab-llama: perplexity, and recall from before the window.

    patchattn convert hedgehog/lab-llama
    python evals/linear.py hedgehog=lab-llama-hedgehog --output results.json

Of lab-llama as it is and of each conversion: perplexity on held-out text (`patchattn lab data lab-data`), values of
pairs recalled, passkeys found at several lengths, bytes that a cache holds. A conversion stands there patched but
untrained too, and, where it has a window, with that alone (`use_linear=False`), beside the share of attention that
goes to what lies before it. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import machine
from torch import Tensor
from transformers import DynamicCache

import patchattn
from patchattn.attach import apply_plan
from patchattn.lab.text import TASK_SEED, bits_per_byte, read_texts, recall
from patchattn.living import methods_on, plan_of, watching
from patchattn.loading import load_model, load_tokenizer
from patchattn.record import patch_of
from patchattn.train.synthetic import make

CHECKPOINT = "lab-llama"


def measured(model: Any, given: argparse.Namespace) -> dict[str, float]:
    tokenizer = load_tokenizer(CHECKPOINT)
    texts = [text[: given.characters] for text in read_texts(Path(given.data, "books", "held_out"))]
    found = {}
    for length in given.text_lengths:
        score = bits_per_byte(model, tokenizer, texts, length=length)
        found[f"perplexity at {length}"] = math.exp(score.nats_per_token)
    pairs = make("mqar", tokenizer, TASK_SEED, pairs=8)
    found["pairs"] = recall(model, pairs, length=256, samples=given.samples).tokens
    for length in given.lengths:
        hidden = make("passkey", tokenizer, TASK_SEED)
        found[f"passkey at {length}"] = recall(model, hidden, length=length, samples=given.samples, batch=8).tokens
    return {**found, "cache bytes": cache_bytes(model, max(given.lengths))}


@torch.no_grad()
def cache_bytes(model: Any, length: int) -> int:
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
    return patchattn.cache_bytes(cache)


@torch.no_grad()
def linear_share(model: Any, given: argparse.Namespace) -> list[float]:
    """The share of attention on what lies before the window, layer by layer, on one held-out text."""
    text = read_texts(Path(given.data, "books", "held_out"))[0][: given.characters]
    ids = load_tokenizer(CHECKPOINT)(text, return_tensors="pt")["input_ids"][:, : given.text_lengths[0]]
    shares: list[float] = []

    def note(ctx: Any) -> Tensor:
        shares.append(ctx.attachment.methods[0].diagnostics(ctx)["linear share"].item())
        return ctx.attend()

    with watching(model, note):
        model(ids, use_cache=False)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="conversions of lab-llama")
    parser.add_argument("--data", default="lab-data", help="what `patchattn lab data` wrote")
    parser.add_argument("--characters", type=int, default=6000, help="of each held-out text")
    parser.add_argument(
        "--text-lengths", type=int, nargs="+", default=[256, 512], help="tokens that a model sees at once"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512], help="of texts with a passkey")
    parser.add_argument("--samples", type=int, default=16, help="of each recall task")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {"as it is": measured(load_model(CHECKPOINT, dtype="float32"), given)}
    described: dict[str, Any] = {}
    for name, _, folder in (text.partition("=") for text in given.models):
        model = load_model(folder, dtype="float32")
        assert patch_of(model) is not None, f"{folder} is not patched"
        described[name] = {"patch": plan_of(model)[0]["methods"]}
        found[f"{name}, untrained"] = measured(
            apply_plan(load_model(CHECKPOINT, dtype="float32"), plan_of(model)), given
        )
        found[name] = measured(model, given)
        first: Any = methods_on(model)[0]
        if "use_linear" in first.config.runtime_fields() and first.config.window:
            described[name]["linear share by layer"] = [round(share, 4) for share in linear_share(model, given)]
            with patchattn.settings(model, use_linear=False):
                found[f"{name}, its window alone"] = measured(model, given)
    columns = list(found["as it is"])
    print("\n".join([f"| {CHECKPOINT} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]))
    for name, values in found.items():
        shown = [
            f"{value:.1%}" if what == "pairs" or what.startswith("passkey") else f"{value:,}" if isinstance(value, int)
            else f"{value:.3f}" for what, value in values.items()
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(shown)} |")
    if given.output is not None:
        settings = {name: value for name, value in vars(given).items() if name not in ("output", "data", "models")}
        result = {"checkpoint": CHECKPOINT, **settings, "conversions": described, "models": found}
        given.output.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
