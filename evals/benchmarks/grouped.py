"""VAR's attention beside ordinary attention: a prompt with an image, and one token after it.

    python evals/benchmarks/grouped.py [--prompt 640 2048 8192] [--rounds 10]

One process, in turn: `moved` (weight goes from sinks to the image), `plain` (the same without a rule), torch's
SDPA, and `eager`, which holds all weights and moves them as the published code does. A side whose result is wrong is
not timed. Peak memory is that of one `moved` call, beside what one tensor of all weights would take. Exits 1 if a
result is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import machine, paired, ratio
from torch.nn.functional import scaled_dot_product_attention

from patchattn_kernels import grouped
from patchattn_kernels.check import relative
from patchattn_kernels.dispatch import recording
from patchattn_kernels.grouped import IMAGE, IMAGE_SINK, TEXT_SINK, Rule, redistribute

RULE = Rule(recycle=0.6, non_sink_min=0.5, min_visual=0.2)
WRONG = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative; rows near a threshold may be decided otherwise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--prompt", type=int, nargs="+", default=[640, 2048, 8192] if gpu else [640, 1024])
    parser.add_argument("--heads", type=int, default=32 if gpu else 4)
    parser.add_argument("--kv-heads", type=int, default=32 if gpu else 4)
    parser.add_argument("--size", type=int, default=128 if gpu else 64, help="of a head")
    parser.add_argument("--image", type=int, default=576, help="tokens of the image")
    parser.add_argument("--sinks", type=int, default=8, help="of which three are outside the image")
    parser.add_argument("--rounds", type=int, default=20 if gpu else 5)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(args, what, length) for length in args.prompt for what in ("prompt", "token")]
    print(json.dumps({"machine": machine(), "settings": vars(args), "rows": rows}, indent=2))
    return int(any(row["wrong"] for row in rows))


def measure(args: argparse.Namespace, what: str, keys: int) -> dict[str, Any]:
    """Times of all sides for one length, and whether they are right."""
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    queries = keys if what == "prompt" else 1
    q = torch.randn(1, args.heads, queries, args.size, dtype=dtype, device=args.device)
    k, v = (torch.randn(1, args.kv_heads, keys, args.size, dtype=dtype, device=args.device) for _ in "kv")
    kinds = torch.zeros(1, keys, dtype=torch.int8, device=args.device)
    start, stop = 35, min(35 + args.image, keys - 8)
    kinds[:, start:stop] = IMAGE
    kinds[:, start : stop : (stop - start) // max(1, args.sinks - 3)] = IMAGE_SINK
    kinds[:, [0, 7, 20]] = TEXT_SINK
    place = torch.arange(keys - queries, keys, device=args.device)
    images = torch.where(place >= stop, stop - start, 0)[None]
    past = keys - queries
    sides: dict[str, Callable[[], torch.Tensor]] = {
        "moved": lambda: grouped(q, k, v, kinds, images, RULE, past=past)[0],
        "plain": lambda: grouped(q, k, v, past=past)[0],
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True),
        "eager": lambda: eager(q, k, v, kinds, images, past),
    }
    truth = {"moved": eager(*(x.float() for x in (q, k, v)), kinds, images, past), "plain": sides["sdpa"]().float()}
    truth |= {"eager": truth["moved"], "sdpa": truth["plain"]}
    errors, ran = {}, {}
    for name, run in sides.items():
        with recording(ran):
            errors[name] = relative(run(), truth[name])
    wrong = [name for name, error in errors.items() if not error <= WRONG[dtype]]
    row: dict[str, Any] = {"what": what, "keys": keys, "errors": errors, "wrong": wrong, "ran": ran}
    right = {name: run for name, run in sides.items() if name not in wrong}
    seconds = paired(right, args.rounds)
    row["ms"] = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    for base in ("plain", "sdpa", "eager"):
        if "moved" in right and base in right:
            middle, low, high = ratio(seconds, "moved", base)
            row[f"moved / {base}"] = {"median": middle, "quartiles": [low, high]}
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        sides["moved"]()
        row["peak bytes"] = torch.cuda.max_memory_allocated() - before
        row["bytes of all weights"] = args.heads * queries * keys * dtype.itemsize
    return row


def eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kinds: torch.Tensor, images: torch.Tensor, past: int
) -> torch.Tensor:
    """All weights at once, moved as the paper writes it."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    place = torch.arange(q.shape[2], device=q.device)[:, None] + past
    hidden = torch.arange(k.shape[2], device=q.device) > place
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return redistribute(weights, kinds, images, RULE)[0].to(v.dtype) @ v


if __name__ == "__main__":
    sys.exit(main())
