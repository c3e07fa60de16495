"""Attention of chosen pairs beside dense attention: a part of the heads for each token.

    python evals/benchmarks/routed.py [--tokens 4096] [--on 0.5] [--rounds 5]
    python evals/benchmarks/routed.py --few --on 0.75 0.5 --tokens 128 256 512 1024 2048 4096 8192

Both sides in turn in one process; on a CPU in processor time, so that other programs count less. The routed side is
given its weights, and finds the pairs that are on by itself. `floor` is the share of the pairs that is on. Exits 1 if a
result is wrong.

`--few` asks from how many keys on it pays, for calls of all tokens, of 16, 8 and 1: what MoH's `least_keys` says. Dense
attention is weighted there, as MoH does where keys are fewer; where it pays is printed on stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import machine, on_gpu, paired, ratio
from torch import Tensor
from torch.nn import functional

from patchattn_kernels import routed
from patchattn_kernels.check import relative
from patchattn_kernels.dispatch import recording


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768] if gpu else [4096])
    parser.add_argument("--on", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--heads", type=int, default=32 if gpu else 4)
    parser.add_argument("--kv-heads", type=int, default=8 if gpu else 4)
    parser.add_argument("--head-dim", type=int, default=128 if gpu else 64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--few", action="store_true", help="from how many keys on it pays, by tokens of a call")
    args = parser.parse_args()
    rows = [row for tokens in args.tokens for row in (few if args.few else measure)(args, tokens, gpu)]
    if args.few:
        say_where_it_pays(rows)
    print(json.dumps({"machine": machine(), "settings": vars(args), "rows": rows}, indent=2))


def measure(args: argparse.Namespace, tokens: int, gpu: bool) -> list[dict[str, Any]]:
    q, k, v = tensors(args, tokens, gpu)
    rows: list[dict[str, Any]] = []
    for on in args.on:
        ran: dict[str, str] = {}
        weights = random_weights(q, on)
        for part, sides in steps(q, k, v, weights).items():
            ran = verify(sides, weights) if part != "forward and backward" else ran
            with torch.set_grad_enabled(part == "forward and backward"):
                found = timed(sides, args.rounds, gpu)
            rows.append({"tokens": tokens, "on": on, "part": part, "ran": ran, **found, "floor": on})
    return rows


@torch.no_grad()
def few(args: argparse.Namespace, tokens: int, gpu: bool) -> list[dict[str, Any]]:
    """The last tokens of so many keys, as MoH computes them by pairs and by weighting every head."""
    q, k, v = tensors(args, tokens, gpu)
    rows: list[dict[str, Any]] = []
    for on, queries in itertools.product(args.on, (tokens, 16, 8, 1)):
        last, weights = q[:, :, tokens - queries :], random_weights(q, on)[:, :, tokens - queries :]
        keep = None if queries in (1, tokens) else torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
        sides = {
            "routed": lambda q=last, w=weights: routed(q, k, v, w, causal=True),
            "dense": lambda q=last, w=weights, keep=keep: attention(q, k, v, keep).mul(w[..., None].to(q.dtype)),
        }
        ran = verify(sides, weights)
        rows.append({"keys": tokens, "queries": queries, "on": on, "ran": ran, **timed(sides, args.rounds, gpu)})
    return rows


def say_where_it_pays(rows: list[dict[str, Any]]) -> None:
    for on, queries in dict.fromkeys((row["on"], row["queries"]) for row in rows if row["queries"] < row["keys"]):
        say(on, f"{queries} tokens", [row for row in rows if (row["on"], row["queries"]) == (on, queries)])
    for on in dict.fromkeys(row["on"] for row in rows):
        say(on, "all tokens", [row for row in rows if row["on"] == on and row["queries"] == row["keys"]])


def say(on: float, which: str, rows: list[dict[str, Any]]) -> None:
    slower = [row["keys"] for row in rows if row["routed / dense"]["median"] >= 1]
    pays = [row["keys"] for row in rows if row["keys"] > max(slower, default=0)]
    what = f"pays from {min(pays)} keys on" if pays else f"does not pay up to {max(slower)} keys"
    print(f"{on:.0%} on, {which} at a time: {what}", file=sys.stderr)


def tensors(args: argparse.Namespace, tokens: int, gpu: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    given = dict(device="cuda", dtype=torch.bfloat16) if gpu else {}
    q = torch.randn(1, args.heads, tokens, args.head_dim, **given)
    return q, *(torch.randn(1, args.kv_heads, tokens, args.head_dim, **given) for _ in "kv")


def random_weights(q: Tensor, on: float) -> Tensor:
    """1 for a share of the heads of each token, else 0: `[B, H, T]`."""
    best = torch.rand(q.shape[:3], device=q.device).topk(round(on * q.shape[1]), dim=1).indices
    return torch.zeros(q.shape[:3], device=q.device).scatter_(1, best, 1.0)


def timed(sides: dict[str, Callable[[], Any]], rounds: int, gpu: bool) -> dict[str, Any]:
    if gpu:
        seconds = on_gpu(sides, rounds)
    else:
        seconds = paired(sides, rounds, warmup=1, clock=time.process_time)
    middle, low, high = ratio(seconds, "routed", "dense")
    return {"ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
            "routed / dense": {"median": middle, "quartiles": [low, high]}}  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Dense, causal; `keep` where there are fewer queries than keys, but more than one."""
    causal = keep is None and q.shape[2] > 1
    keep = None if keep is None else keep.to(q.device)
    return functional.scaled_dot_product_attention(q, k, v, keep, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def verify(sides: dict[str, Callable[[], Any]], weights: Tensor) -> dict[str, str]:
    """What ran, if its result is right."""
    ran: dict[str, str] = {}
    with torch.no_grad(), recording(ran):
        found, wanted = sides["routed"](), sides["dense"]()
    error = relative(found, wanted * weights[:, :, -found.shape[2] :, None])
    if error > 1e-2:
        sys.exit(f"routed is off by {error:.1e} of dense attention where it is on ({ran})")
    return ran


def steps(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> dict[str, dict[str, Callable[[], Any]]]:
    """The parts that are timed, each with its two sides."""

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed(q, k, v, weights[:, :, -q.shape[2] :], causal=True)

    def trained(run: Callable[..., Tensor]) -> Callable[[], Any]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        upstream = torch.ones_like(q)
        return lambda: torch.autograd.grad(run(*leaves), leaves, upstream)

    last = q[:, :, -1:].contiguous()
    return {
        "forward": {"routed": lambda: chosen(q, k, v), "dense": lambda: attention(q, k, v)},
        "forward and backward": {"routed": trained(chosen), "dense": trained(attention)},
        "one token": {"routed": lambda: chosen(last, k, v), "dense": lambda: attention(last, k, v)},
    }


if __name__ == "__main__":
    main()
