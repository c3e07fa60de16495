"""Attention of chosen pairs beside dense attention: a part of the heads for each token.

    python evals/benchmarks/routed.py [--tokens 4096] [--on 0.5] [--rounds 5]

Both sides in turn in one process; on a CPU in processor time, so that other programs count less. The routed side is
given its weights, and finds the pairs that are on by itself. `floor` is the share of the pairs that is on. Exits 1 if a
result is wrong.
"""

from __future__ import annotations

import argparse
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
    args = parser.parse_args()
    rows = [row for tokens in args.tokens for row in measure(args, tokens, gpu)]
    print(json.dumps({"machine": machine(), "settings": vars(args), "rows": rows}, indent=2))


def measure(args: argparse.Namespace, tokens: int, gpu: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    given = dict(device="cuda", dtype=torch.bfloat16) if gpu else {}
    q = torch.randn(1, args.heads, tokens, args.head_dim, **given)
    k, v = (torch.randn(1, args.kv_heads, tokens, args.head_dim, **given) for _ in "kv")
    rows: list[dict[str, Any]] = []
    for on in args.on:
        ran: dict[str, str] = {}
        best = torch.rand(q.shape[:3], device=q.device).topk(round(on * args.heads), dim=1).indices
        weights = torch.zeros(q.shape[:3], device=q.device).scatter_(1, best, 1.0)
        for part, sides in steps(q, k, v, weights).items():
            ran = verify(sides, weights) if part != "forward and backward" else ran
            with torch.set_grad_enabled(part == "forward and backward"):
                if gpu:
                    seconds = on_gpu(sides, args.rounds)
                else:
                    seconds = paired(sides, args.rounds, warmup=1, clock=time.process_time)
            middle, low, high = ratio(seconds, "routed", "dense")
            rows.append({
                "tokens": tokens, "on": on, "part": part, "ran": ran,
                "ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
                "routed / dense": {"median": middle, "quartiles": [low, high]}, "floor": on,
            })  # fmt: skip
    return rows


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

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = q.shape[1] != k.shape[1]
        causal = q.shape[2] > 1
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed(q, k, v, weights[:, :, -q.shape[2] :], causal=True)

    def trained(run: Callable[..., Tensor]) -> Callable[[], Any]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        upstream = torch.ones_like(q)
        return lambda: torch.autograd.grad(run(*leaves), leaves, upstream)

    last = q[:, :, -1:].contiguous()
    return {
        "forward": {"routed": lambda: chosen(q, k, v), "dense": lambda: dense(q, k, v)},
        "forward and backward": {"routed": trained(chosen), "dense": trained(dense)},
        "one token": {"routed": lambda: chosen(last, k, v), "dense": lambda: dense(last, k, v)},
    }


if __name__ == "__main__":
    main()
