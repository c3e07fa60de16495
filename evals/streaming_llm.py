"""Does a model with cache positions run on past the length it was trained at? Perplexity by position in the text.

    python evals/streaming_llm.py --model FOLDER --text stories.txt --trained 256

Texts of `--times` times the trained length are read in chunks, as streams: by the model as it is, by streaming heads
with positions in the text, and by streaming heads with positions in the cache (StreamingLLM). What there is to reach
is the model as it is on the last tokens alone, read anew for every chunk. A line shows the perplexity of one stretch
of half the trained length after the other, over `--rows` texts.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from benchmarks.timing import machine

import patchattn
from patchattn.loading import load_model, load_tokenizer

CHUNK = 64  # tokens a call: past the trained length every call is a step of a stream


def rows_of(tokenizer: Any, text: str, length: int, rows: int) -> torch.Tensor:
    """`rows` stretches of the text, evenly spread over it, each after a BOS token: `[rows, length]`."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < length * rows:
        raise ValueError(f"the text has {len(ids)} tokens; {rows} rows of {length} need {rows * length}")
    starts = torch.linspace(0, len(ids) - length, rows).long().tolist()
    return torch.tensor([[tokenizer.bos_token_id, *ids[start : start + length - 1]] for start in starts])


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token after the first, in one stream: `[rows, length - 1]`."""
    cache, found = None, []
    for start in range(0, ids.shape[1] - 1, CHUNK):
        out = model(ids[:, start : start + CHUNK], past_key_values=cache, use_cache=True)
        cache, targets = out.past_key_values, ids[:, start + 1 : start + CHUNK + 1]
        logits = out.logits[:, : targets.shape[1]].transpose(1, 2)
        found.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(found, dim=1)


@torch.no_grad()
def losses_read_anew(model: Any, ids: torch.Tensor, window: int) -> torch.Tensor:
    """The same without a cache: each chunk is the end of the last `window` tokens, after a BOS token."""
    found = []
    for start in range(0, ids.shape[1], CHUNK):
        low, stop = max(1, start + CHUNK - window + 1), start + CHUNK
        part = torch.cat([ids[:, :1], ids[:, low:stop]], dim=1)
        loss = torch.nn.functional.cross_entropy(
            model(part).logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none"
        )
        found.append(loss[:, -CHUNK:])
    return torch.cat(found, dim=1)


def perplexities(loss: torch.Tensor, stretch: int) -> list[float]:
    """Perplexity of each `stretch` of positions, over all rows."""
    return [round(math.exp(part.mean().item()), 2) for part in loss.split(stretch, dim=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repository")
    parser.add_argument("--text", required=True, help="a .txt file")
    parser.add_argument("--trained", type=int, required=True, help="tokens the model saw at once in training")
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--output", metavar="FILE", help="write the numbers there as JSON")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, dtype="float32"), load_tokenizer(given.model)
    ids = rows_of(tokenizer, Path(given.text).read_text(encoding="utf-8"), given.times * given.trained, given.rows)
    recent = 3 * given.trained // 4 - given.sink
    sizes = dict(heads=0, recent=recent)
    patches = {
        "unpatched, read anew": None,
        "unpatched": None,
        "no sinks, cache positions": {**sizes, "sink": 0, "positions": "cache"},
        "sinks, text positions": {**sizes, "sink": given.sink},
        "sinks, cache positions": {**sizes, "sink": given.sink, "positions": "cache"},
    }
    stretch = given.trained // 2
    found = {}
    for name, fields in patches.items():
        if fields is not None:
            patchattn.patch(model, patchattn.DuoAttention(**fields))
        loss = losses_read_anew(model, ids, given.trained) if "anew" in name else losses(model, ids)
        found[name] = perplexities(loss, stretch)
        if fields is not None:
            patchattn.unpatch(model)
        print(f"{name:<28}" + "".join(f"{value:10.2f}" for value in found[name]), flush=True)
    if given.output:
        result = {"model": Path(given.model).name, "text": Path(given.text).name, "trained": given.trained,
                  "rows": given.rows, "sink": given.sink, "recent": recent, "stretch": stretch, "chunk": CHUNK,
                  "perplexity": found, "machine": machine()}  # fmt: skip
        Path(given.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
