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

With `--decode N` the gate of SeerAttentionDecode is measured in the same way, where one is among the gates: the last N
tokens of every row, and the end of every question with its answer, come one at a time after a prompt that reads all,
with a budget of the given share of `length` tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import machine
from torch import Tensor
from transformers import DynamicCache

import patchattn
from patchattn import losses
from patchattn.lab.text import read_texts
from patchattn.living import watching
from patchattn.loading import load_model, load_tokenizer
from patchattn.methods.seer_attention import SeerAttention
from patchattn.methods.seer_attention_decode import SeerAttentionDecode
from patchattn.record import attachment_of, record_of
from patchattn.train.synthetic import make

SEED = 1_000_003  # of the questions, which no training saw
QUESTION = 16  # tokens before an answer that come one at a time, too
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


class BestDecode(SeerAttentionDecode):
    """The blocks that really hold the largest weights for the group."""

    def scores(self, ctx: Any, known: Tensor, at: Tensor) -> Tensor:
        keys, _, _ = ctx.cache.read()
        q = ctx.rotate(ctx.q, at).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B, G, heads, D]
        weights = (q @ keys.mT * ctx.scaling).softmax(dim=-1)
        missing = known.shape[2] * self.config.block - keys.shape[2]
        weights = torch.nn.functional.pad(weights, (0, max(0, missing)))[..., : known.shape[2] * self.config.block]
        return weights.unflatten(3, (known.shape[2], -1)).amax(dim=(2, 4))[:, :, None]


class WindowDecode(SeerAttentionDecode):
    """The first block and the latest."""

    def scores(self, ctx: Any, known: Tensor, at: Tensor) -> Tensor:
        return torch.arange(known.shape[2]).float().expand(*known.shape[:2], at.shape[-1], -1)


DECODE: dict[str, type[SeerAttentionDecode]] = {
    "gate": SeerAttentionDecode, "best": BestDecode, "untrained": SeerAttentionDecode, "window": WindowDecode,
}  # fmt: skip
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


@torch.no_grad()
def decoded(model: Any, texts: list[tuple[list[int], int]], single: int, budgets: list[int]) -> list[dict[str, float]]:
    """For each budget, of the last tokens of texts: the perplexity, and the share of texts where all are the likeliest.

    Args:
        texts: the tokens of each, and how many at its end are judged.
        single: how many tokens before those come one at a time, too.
    """
    loss, right, count = [0.0] * len(budgets), [0] * len(budgets), sum(judged for _, judged in texts)
    for ids, judged in texts:
        start = len(ids) - judged - single - 1
        prompt = DynamicCache(config=model.config)
        model(torch.tensor([ids[:start]]), past_key_values=prompt, logits_to_keep=1)
        for index, budget in enumerate(budgets):
            cache, certain = copy.deepcopy(prompt), True
            with patchattn.settings(model, token_budget=budget):
                for place in range(start, len(ids) - 1):
                    logits = model(torch.tensor([[ids[place]]]), past_key_values=cache).logits[0, -1].float()
                    if place >= len(ids) - judged - 1:
                        loss[index] -= logits.log_softmax(dim=-1)[ids[place + 1]].item()
                        certain = certain and int(logits.argmax()) == ids[place + 1]
            right[index] += certain
    return [{"perplexity": math.exp(a / count), "answered": b / len(texts)} for a, b in zip(loss, right, strict=True)]


def decode_choices(
    model: Any, config: Any, weights: dict[str, Any], texts: dict[str, list[tuple[list[int], int]]],
    given: argparse.Namespace,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """What every choice of the blocks that single tokens read costs, beside reading everything."""
    budgets = [round(density * given.length / config.block) * config.block for density in given.densities]
    dense: dict[str, float] = {}
    for name in ("dense", *(name for name in given.choices if name in DECODE)):
        patchattn.unpatch(model)
        patchattn.patch(model, DECODE.get(name, SeerAttentionDecode)(config.replace(init="mean")))
        if name == "gate":
            for site in record_of(model).patched:
                attachment_of(site.module).methods[0].load_state_dict(weights[site.name])
        lines: list[dict[str, Any]] = [{"choice": name, "density": 1.0}]
        if name != "dense":
            lines = [{"choice": name, "density": density, "budget": budget}
                     for density, budget in zip(given.densities, budgets, strict=True)]  # fmt: skip
        asked = [1 << 30] if name == "dense" else budgets
        for what, single in (("text", 0), ("passkeys", QUESTION)):
            if texts.get(what):
                for line, found in zip(lines, decoded(model, texts[what], single, asked), strict=True):
                    if what == "text":
                        line["perplexity"] = found["perplexity"]
                        line["ratio"] = found["perplexity"] / dense.setdefault("perplexity", found["perplexity"])
                    else:
                        line["passkeys"] = found["answered"]
        yield from lines


def read(model: Any) -> float:
    """The share of blocks that were read in the last call."""
    kept = [attachment_of(site.module).methods[0].kept for site in record_of(model).patched]
    return float(sum(mask.sum() for mask, _ in kept) / sum(there.sum() for _, there in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="of the model in the results; default: as --model says")
    parser.add_argument("--gates", required=True, help="what `patchattn convert` or `patchattn.save` wrote")
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--free-first", action="store_true", help="the first block is not always read")
    parser.add_argument("--passkeys", type=int, default=0, help="questions to ask")
    parser.add_argument("--decode", type=int, default=0, help="tokens at the end of each row that come one at a time")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    started = time.perf_counter()
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    model = model.float().eval()
    rows = text_rows(tokenizer, read_texts(given.text), given.length, given.rows)
    found: dict[str, Any] = {"model": given.name or given.model, "length": given.length, "rows": given.rows,
                             "machine": machine()}  # fmt: skip

    def note(where: str, line: dict[str, Any]) -> None:
        found.setdefault(where, []).append(line)
        print(json.dumps(line), flush=True)
        if given.output is not None:  # what is done is kept
            found["seconds"] = round(time.perf_counter() - started)
            given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    dense: dict[str, Callable[[], float]] = {"perplexity": lambda: perplexity(model, rows)}
    questions = []
    if given.passkeys:
        generator = make("passkey", tokenizer, SEED)
        questions = [generator.question(index, given.length) for index in range(given.passkeys)]
        dense["passkeys"] = lambda: answered(model, questions)
    found["dense"] = {name: measure() for name, measure in dense.items()}
    print(f"dense: {found['dense']}", flush=True)
    patchattn.load(model, given.gates)
    gates = {type(method): method for method in attachment_of(record_of(model).patched[0].module).methods}
    weights = {kind: {site.name: attachment_of(site.module).methods[place].state_dict()
                      for site in record_of(model).patched} for place, kind in enumerate(gates)}  # fmt: skip
    config = gates[SeerAttention].config.replace(threshold=None, top_k_blocks=None, density=None, dense_below=0,
                                                 last_block_dense=False, keep_first=not given.free_first)  # fmt: skip
    some = rows[: max(1, given.rows // 2)]
    found |= {"block": config.block, "free_first": given.free_first, "caught": caught(model, some)}
    patchattn.unpatch(model)
    patchattn.patch(model, SeerAttention(config.replace(init="mean")))
    untrained = caught(model, some)
    found["caught"] |= {key.replace("_gate_", "_untrained_"): untrained[key] for key in untrained if "_gate_" in key}
    print("| caught at density | " + " | ".join(map(str, CAUGHT)) + " |")
    for name in dict.fromkeys(key.rpartition("_")[0] for key in found["caught"]):
        print(f"| {name} | " + " | ".join(f"{found['caught'][f'{name}_{d}']:.1%}" for d in CAUGHT) + " |")
    for name in given.choices:
        patchattn.unpatch(model)
        patchattn.patch(model, CHOICES[name](config.replace(init="mean")))
        if name == "gate":
            for site in record_of(model).patched:
                attachment_of(site.module).methods[0].load_state_dict(weights[SeerAttention][site.name])
        for density in given.densities:
            with patchattn.settings(model, density=density):
                line = {"choice": name, "density": density, **{what: measure() for what, measure in dense.items()}}
            line["ratio"] = line["perplexity"] / found["dense"]["perplexity"]
            note("choices", {**line, "read": read(model)})
    if given.decode:
        if SeerAttentionDecode not in gates:
            raise SystemExit(f"--decode {given.decode}: {given.gates} has no gate of SeerAttentionDecode")
        texts = {"text": [(row.tolist(), given.decode) for row in rows],
                 "passkeys": [([*prompt, *answer], len(answer)) for prompt, answer in questions]}  # fmt: skip
        decode = gates[SeerAttentionDecode].config.replace(threshold=None)
        for line in decode_choices(model, decode, weights[SeerAttentionDecode], texts, given):
            note("decode", line)


if __name__ == "__main__":
    main()
