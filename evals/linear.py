"""What linear attention leaves of a language model: perplexity, and recall from before the window.

    patchattn convert hedgehog/lab-llama
    python evals/linear.py hedgehog=lab-llama-hedgehog --output results.json

Of the model as it is and of each conversion of it: perplexity on held-out text (`patchattn lab data lab-data`), and, at
every length, the share of 8 pairs' values that it recalls and of passkeys that it finds, among those that stand further
back than `--beyond` tokens, by more than any window here. A passkey counts if every digit of it is the likeliest one;
of the values those are counted apart, too, that stand further back than half of the text. A conversion stands there
patched but untrained as well and, where it has a window, with that alone (`use_linear=False`), beside the share of
attention that goes to what lies before it, in text and where a value is asked for.

Other models than lab-llama take `--checkpoint FOLDER --text FILE`, and `--samples 0` where they recall nothing anyway.
Prints a table. What the output file holds already is not measured again, so that models can be added to it.
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
from patchattn.lab.text import TASK_SEED, bits_per_byte, evaluating, read_texts
from patchattn.living import methods_on, plan_of, watching
from patchattn.loading import load_model, load_tokenizer
from patchattn.record import patch_of
from patchattn.train.synthetic import IGNORED, make

ROWS = 8  # of text that the share of attention before the window is read from
LEAST_CACHE = 1024  # tokens that a cache holds when its bytes are counted


def measured(model: Any, tokenizer: Any, texts: list[str], given: argparse.Namespace) -> dict[str, float]:
    found: dict[str, float] = {}
    for length in given.text_lengths:
        score = bits_per_byte(model, tokenizer, texts, length=length)
        found[f"perplexity at {length}"] = math.exp(score.nats_per_token)
    for length in given.lengths if given.samples else ():
        found |= recalled(model, tokenizer, length, given)
    return found | {"cache bytes": cache_bytes(model, LEAST_CACHE)}


@torch.no_grad()
def recalled(model: Any, tokenizer: Any, length: int, given: argparse.Namespace) -> dict[str, float]:
    """The share of right answers among values of pairs, and whole passkeys, that stand further back than `--beyond`."""
    pairs = make("mqar", tokenizer, TASK_SEED, pairs=8)
    hits, back = answers(model, [pairs.sample(index, length) for index in range(given.samples)], given.batch)
    found = {f"pairs at {length}": share(hits[back > given.beyond])}
    found[f"pairs further than {length // 2}"] = share(hits[back > length // 2])
    depth = (0.0, 1 - (given.beyond + 60) / length)  # the question and the key's own line take some tokens, too
    keys = make("passkey", tokenizer, TASK_SEED, depth=depth)
    samples = [keys.sample(index, length) for index in range(given.samples)]
    whole = [bool(answers(model, [sample], 1)[0].all()) for sample in samples]
    return found | {f"passkeys at {length}": sum(whole) / len(whole)}


def answers(model: Any, samples: list[Any], batch: int) -> tuple[Tensor, Tensor]:
    """Of every token of an answer whether it is the likeliest, and how far back the text has it last."""
    hits, back = [], []
    with evaluating(model):
        for first in range(0, len(samples), batch):
            some = samples[first : first + batch]
            ids, labels = (torch.tensor([sample[name] for sample in some]) for name in ("input_ids", "labels"))
            best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(dim=-1)
            row, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
            hits.append(best[row, place] == ids[row, place + 1])
            earlier = (ids[row] == ids[row, place + 1, None]) & (torch.arange(ids.shape[1]) <= place[:, None])
            back.append(place + 1 - (earlier * torch.arange(ids.shape[1])).amax(dim=1))
    return torch.cat(hits), torch.cat(back)


def share(hits: Tensor) -> float:
    return hits.float().mean().item()


@torch.no_grad()
def cache_bytes(model: Any, length: int) -> int:
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
    return patchattn.cache_bytes(cache)


@torch.no_grad()
def linear_share(model: Any, ids: Tensor, asked: Tensor | None = None) -> list[float]:
    """The share of attention on what lies before the window, layer by layer; of the tokens before answers alone."""
    shares: list[float] = []

    def note(ctx: Any) -> Tensor:
        found = ctx.attachment.methods[0].linear_share(ctx)  # [B, T]
        shares.append((found if asked is None else found[asked]).mean().item())
        return ctx.attend()

    with watching(model, note):
        model(ids, use_cache=False)
    return [round(share, 4) for share in shares]


def shares(model: Any, tokenizer: Any, texts: list[str], given: argparse.Namespace) -> dict[str, list[float]]:
    length = given.text_lengths[0]
    rows = [tokenizer(text, verbose=False)["input_ids"][:length] for text in texts]
    ids = torch.tensor([row for row in rows if len(row) == length][:ROWS])
    found = {"linear share by layer": linear_share(model, ids)}
    if given.samples:
        pairs = make("mqar", tokenizer, TASK_SEED, pairs=8, queries=16)
        samples = [pairs.sample(index, length) for index in range(ROWS)]
        asked = torch.tensor([sample["labels"] for sample in samples]).roll(-1, dims=1) != IGNORED
        found["and where a value is asked for"] = linear_share(
            model, torch.tensor([sample["input_ids"] for sample in samples]), asked
        )
    return found


def opened(folder: str, checkpoint: str) -> Any:
    """The model in a folder, which may hold the patch alone, as after a transfer."""
    if Path(folder, "config.json").is_file():
        return load_model(folder, dtype="float32")
    model = load_model(checkpoint, dtype="float32")
    patchattn.load(model, folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="conversions of the checkpoint")
    parser.add_argument("--checkpoint", default="lab-llama", help="what they are conversions of")
    parser.add_argument("--text", default="lab-data/books/held_out", help="what no training saw: file, folder or glob")
    parser.add_argument("--characters", type=int, default=6000, help="of each text")
    parser.add_argument(
        "--text-lengths", type=int, nargs="+", default=[256, 512], help="tokens that a model sees at once"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024], help="of texts to recall from")
    parser.add_argument("--beyond", type=int, default=64, help="tokens back from which on recall counts")
    parser.add_argument("--samples", type=int, default=16, help="of each recall task")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--untrained", action="store_true", help="patched but untrained, too")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.checkpoint)
    texts = [text[: given.characters] for text in read_texts(given.text)]
    settings = {
        name: value for name, value in vars(given).items() if name not in ("output", "models", "text", "untrained")
    }
    result: dict[str, Any] = {**settings, "checkpoint": Path(given.checkpoint).name, "conversions": {}, "models": {}}
    if given.output is not None and given.output.is_file():
        held = json.loads(given.output.read_text(encoding="utf-8"))
        differing = [name for name in result if name not in ("conversions", "models") and held[name] != result[name]]
        if differing:
            raise SystemExit(f"{given.output} was measured with another {differing[0]}: {held[differing[0]]}")
        result |= {name: held[name] for name in ("conversions", "models")}
    found: dict[str, dict[str, float]] = result["models"]
    described: dict[str, Any] = result["conversions"]

    def add(name: str, model: Any) -> None:
        if name not in found:
            found[name] = measured(model, tokenizer, texts, given)
            print(name, {what: round(value, 4) for what, value in found[name].items()}, flush=True)
            if given.output is not None:
                result["machine"] = machine()
                given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    add("as it is", load_model(given.checkpoint, dtype="float32"))
    for name, _, folder in (text.partition("=") for text in given.models):
        model = opened(folder, given.checkpoint)
        if patch_of(model) is None:  # a control
            add(name, model)
            continue
        described[name] = {"patch": plan_of(model)[0]["methods"]}
        first: Any = methods_on(model)[0]
        windowed = "use_linear" in first.config.runtime_fields() and first.config.window
        if windowed:
            described[name] |= shares(model, tokenizer, texts, given)
        if given.untrained:
            add(f"{name}, untrained", apply_plan(load_model(given.checkpoint, dtype="float32"), plan_of(model)))
        add(name, model)
        if windowed:
            with patchattn.settings(model, use_linear=False):
                add(f"{name}, its window alone", model)
    columns = list(found["as it is"])
    print("\n".join([f"| {given.checkpoint} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]))
    for name, values in found.items():
        shown = [
            f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if what.startswith("perplexity")
            else f"{value:.1%}" for what, value in values.items()
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
