"""What SeerAttention's gates catch, and what a text costs at every density: the gate, the best choice, and others.

    patchattn convert seer_attention/lab-llama
    python evals/seer_attention.py --model lab-llama --gates lab-llama-seer --text lab-data/books/held_out \
        --length 1024 --output results.json

Of the largest attention weights of all blocks, the share that lies in the blocks a choice takes first; then the
perplexity of the text, read in rows of `length` tokens, with that share of all blocks read in every layer and head.
Every choice reads its own block and the first one, which count (`--free-first`: only where it chooses to, which matters
where a row reads two or three blocks); "window" reads both in any case, and the blocks just before.
"pooled" goes by mean queries times mean keys before rotary, "untrained" by the same after the gate's rotary: by a gate
with `init="mean"` before its training. With `--passkeys N` every choice is asked for keys hidden in sentences, too: an
answer counts if greedy decoding writes it. The last blocks of a text get no exception (`last_block_dense=False`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import machine
from torch import Tensor

import patchattn
from patchattn import losses
from patchattn.lab.text import read_texts
from patchattn.living import watching
from patchattn.loading import load_model, load_tokenizer
from patchattn.methods.seer_attention import SeerAttention
from patchattn.record import attachment_of, record_of
from patchattn.train.synthetic import make

SEED = 1_000_003  # of the questions, which no training saw
CAUGHT = (0.5, 0.3, 0.2, 0.1)


class Best(SeerAttention):
    """The blocks that really hold the largest weights."""

    def scores(self, ctx: Any, known: Tensor, row: Tensor) -> Tensor:
        return losses.block_target(ctx, self.config.block, ctx.q.shape[1], row.shape[1])


class Pooled(SeerAttention):
    """Mean queries times mean keys: what needs no training."""

    def scores(self, ctx: Any, known: Tensor, row: Tensor) -> Tensor:
        return self.pooled_scores(ctx, row.shape[1])


class Window(SeerAttention):
    """The first block and the latest."""

    def scores(self, ctx: Any, known: Tensor, row: Tensor) -> Tensor:
        place = torch.arange(known.shape[2]).float()
        place[0] = torch.inf  # the first block, if it may be chosen
        return place.expand(*ctx.q.shape[:2], row.shape[1], -1)


class Chance(SeerAttention):
    """Any blocks."""

    def scores(self, ctx: Any, known: Tensor, row: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.rand(*ctx.q.shape[:2], row.shape[1], known.shape[2], generator=generator)


CHOICES: dict[str, type[SeerAttention]] = {
    "gate": SeerAttention, "best": Best, "untrained": SeerAttention, "pooled": Pooled, "window": Window,
    "chance": Chance,
}  # fmt: skip


def text_rows(tokenizer: Any, texts: list[str], length: int, count: int) -> Tensor:
    """Rows spread over the texts, each after the token that texts begin with."""
    ids = tokenizer("\n".join(texts), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    starts = torch.linspace(0, len(ids) - length, count).long()
    rows = torch.stack([ids[start : start + length - 1] for start in starts])
    return torch.cat([torch.full((count, 1), first), rows], dim=1)


@torch.no_grad()
def caught(model: Any, rows: Tensor) -> dict[str, float]:
    """The mean over layers of what `diagnostics` says."""
    noted: dict[str, list[Tensor]] = {}

    def around(ctx: Any) -> Tensor:
        for name, value in ctx.attachment.methods[0].diagnostics(ctx, CAUGHT).items():
            noted.setdefault(name, []).append(value)
        return ctx.base()

    with watching(model, around):
        for row in rows:
            model(row[None], use_cache=False, logits_to_keep=1)
    return {name: torch.stack(values).mean().item() for name, values in noted.items()}


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    total = 0.0
    for row in rows:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[1:]).item()
    return math.exp(total / len(rows))


@torch.no_grad()
def answered(model: Any, questions: list[tuple[list[int], list[int]]]) -> float:
    right = 0
    for prompt, answer in questions:
        ids = torch.tensor([[*prompt, *answer]])
        best = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].argmax(dim=-1)
        right += best.tolist() == answer
    return right / len(questions)


def read(model: Any) -> float:
    """The share of blocks that were read in the last call."""
    kept = [attachment_of(site.module).methods[0].kept for site in record_of(model).patched]
    return float(sum(mask.sum() for mask, _ in kept) / sum(there.sum() for _, there in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gates", required=True, help="what `patchattn convert` or `patchattn.save` wrote")
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--free-first", action="store_true", help="the first block is not always read")
    parser.add_argument("--passkeys", type=int, default=0, help="questions to ask")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    started = time.perf_counter()
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    model = model.float().eval()
    texts = read_texts(given.text)
    rows = text_rows(tokenizer, texts, given.length, given.rows)
    found: dict[str, Any] = {"model": given.model, "length": given.length, "rows": given.rows,
                             "machine": machine()}  # fmt: skip
    dense: dict[str, Callable[[], float]] = {"perplexity": lambda: perplexity(model, rows)}
    if given.passkeys:
        generator = make("passkey", tokenizer, SEED)
        questions = [generator.question(index, given.length) for index in range(given.passkeys)]
        dense["passkeys"] = lambda: answered(model, questions)
    found["dense"] = {name: measure() for name, measure in dense.items()}
    print(f"dense: {found['dense']}", flush=True)
    patchattn.load(model, given.gates)
    gate = attachment_of(record_of(model).patched[0].module).methods[0]
    config = gate.config.replace(threshold=None, top_k_blocks=None, density=None, last_block_dense=False,
                                 keep_first=not given.free_first)  # fmt: skip
    some = rows[: max(1, given.rows // 2)]
    found |= {"block": config.block, "free_first": given.free_first, "caught": caught(model, some)}
    weights = {site.name: attachment_of(site.module).methods[0].state_dict() for site in record_of(model).patched}
    patchattn.unpatch(model)
    patchattn.patch(model, SeerAttention(config.replace(init="mean")))
    untrained = caught(model, some)
    found["caught"] |= {key.replace("_gate_", "_untrained_"): untrained[key] for key in untrained if "_gate_" in key}
    print("| caught at density | " + " | ".join(map(str, CAUGHT)) + " |")
    for name in dict.fromkeys(key.rpartition("_")[0] for key in found["caught"]):
        print(f"| {name} | " + " | ".join(f"{found['caught'][f'{name}_{d}']:.1%}" for d in CAUGHT) + " |")
    found["choices"] = []
    for name in given.choices:
        patchattn.unpatch(model)
        patchattn.patch(model, CHOICES[name](config.replace(init="mean")))
        if name == "gate":
            for site in record_of(model).patched:
                attachment_of(site.module).methods[0].load_state_dict(weights[site.name])
        for density in given.densities:
            with patchattn.settings(model, density=density):
                line = {"choice": name, "density": density, **{what: measure() for what, measure in dense.items()}}
            line["ratio"] = line["perplexity"] / found["dense"]["perplexity"]
            line["read"] = read(model)
            found["choices"].append(line)
            print(json.dumps(line), flush=True)
            if given.output is not None:  # what is done is kept
                found["seconds"] = round(time.perf_counter() - started)
                given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
