"""Linear attention beside softmax attention: prompts of growing length, and one token after a short and a long context.

    python evals/benchmarks/linear.py [--tokens 1024 2048 4096] [--contexts 1024 32768] [--rounds 5]

Hedgehog's features alone and beside a softmax window, on the same queries, keys and values as torch's SDPA, all sides
in turn in one process; on a CPU in processor time, so that other programs count less. The state that a token is decoded
from is one that a prompt of that length has left; its time is that of many steps in a row. flash-linear-attention is
timed too where it can be imported and there is a GPU, on features that are ready. Exits 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from patchattn_kernels import FeatureMap, linear, linear_weights
from patchattn_kernels.check import relative
from patchattn_kernels.dispatch import recording
from patchattn_kernels.linear import features, window_tokens

STEPS = 50  # tokens that one timing decodes on a CPU
FORMS: dict[str, dict[str, Any]] = {"linear": {}, "hybrid": {"window": 64}}


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768] if gpu else [1024, 2048, 4096])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 32768])
    parser.add_argument("--heads", type=int, default=16 if gpu else 4)
    parser.add_argument("--head-dim", type=int, default=128 if gpu else 64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    verify(args, gpu)
    with torch.no_grad():
        rows = [prompt(args, tokens, gpu) for tokens in args.tokens]
        rows += decode(args, gpu)
    print(json.dumps({"machine": machine(), "settings": vars(args), "rows": rows}, indent=2))


def inputs(args: argparse.Namespace, tokens: int, gpu: bool) -> tuple[list[Tensor], dict[str, FeatureMap]]:
    torch.manual_seed(0)
    given: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16) if gpu else {}
    q, k, v = (torch.randn(1, args.heads, tokens, args.head_dim, **given) for _ in "qkv")
    shape = args.heads, args.head_dim, args.head_dim // 2
    maps = {f"{name}_map": FeatureMap(weight=torch.randn(*shape, **given) * args.head_dim**-0.5) for name in "qk"}
    return [q, k, v], maps


def verify(args: argparse.Namespace, gpu: bool) -> None:
    qkv, maps = inputs(args, 200, gpu)
    for name, form in FORMS.items():
        found, _ = linear(*qkv, **maps, **form)
        wanted = sum(linear_weights(*qkv, **maps, **form)) @ qkv[2].float()
        if (error := relative(found, wanted)) > 1e-2:
            sys.exit(f"{name} is off by {error:.1e} of its weights times the values")


def prompt(args: argparse.Namespace, tokens: int, gpu: bool) -> dict[str, Any]:
    (q, k, v), maps = inputs(args, tokens, gpu)
    sides: dict[str, Callable[[], Any]] = {
        "softmax": lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        "linear": lambda: linear(q, k, v, **maps),
        "hybrid": lambda: linear(q, k, v, **maps, **FORMS["hybrid"]),
    }
    if gpu and importlib.util.find_spec("fla") is not None:
        from fla.ops.linear_attn import chunk_linear_attn

        ready = [x.to(q.dtype).transpose(1, 2) for x in (features(q, maps["q_map"]), features(k, maps["k_map"]), v)]
        sides["fla, features ready"] = lambda: chunk_linear_attn(*ready, normalize=False)
    return {"part": "prompt", "tokens": tokens} | timed(args, sides, gpu, "softmax")


def decode(args: argparse.Namespace, gpu: bool) -> list[dict[str, Any]]:
    """All contexts in one run, so that they can be compared."""
    sides: dict[str, Callable[[], Any]] = {}
    held: dict[str, int] = {}
    for context in args.contexts:
        (q, k, v), maps = inputs(args, context, gpu)
        last = [x[:, :, -1:].contiguous() for x in (q, k, v)]
        sides[f"softmax {context}"] = lambda q=last[0], k=k, v=v: functional.scaled_dot_product_attention(q, k, v)
        held[f"softmax {context}"] = 2 * k.numel() * k.element_size()
        for name, form in FORMS.items():
            _, state = linear(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], **maps, **form)
            kept = window_tokens(**form) if form else 0
            near = [x[:, :, context - 1 - kept :].contiguous() for x in (k, v)]
            sides[f"{name} {context}"] = lambda q=last[0], near=near, form=form, state=state, maps=maps: linear(
                q, *near, **maps, **form, state=state
            )
            held[f"{name} {context}"] = state.numel() * 4 + 2 * near[0].numel() * near[0].element_size()
    if not gpu:
        sides = {name: lambda run=run: [run() for _ in range(STEPS)] for name, run in sides.items()}
    row = timed(args, sides, gpu, None)
    if not gpu:
        row["ms"] = {name: time / STEPS for name, time in row["ms"].items()}
    least, most = min(args.contexts), max(args.contexts)
    seconds = row.pop("seconds")
    for name in ("softmax", *FORMS):
        middle, low, high = ratio(seconds, f"{name} {most}", f"{name} {least}")
        row[f"{name}: {most} / {least} tokens"] = {"median": middle, "quartiles": [low, high]}
    return [{"part": "one token", "cache bytes": held} | row]


def timed(args: argparse.Namespace, sides: dict[str, Callable[[], Any]], gpu: bool, base: str | None) -> dict[str, Any]:
    ran: dict[str, str] = {}
    with recording(ran):
        for run in sides.values():
            run()
    if gpu:
        seconds = on_gpu(sides, args.rounds)
    else:
        seconds = paired(sides, args.rounds, warmup=1, clock=time.process_time)
    row: dict[str, Any] = {"ran": ran, "ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()}}
    if base is None:
        return row | {"seconds": seconds}
    for name in sides:
        if name != base:
            middle, low, high = ratio(seconds, name, base)
            row[f"{name} / {base}"] = {"median": middle, "quartiles": [low, high]}
    return row


if __name__ == "__main__":
    main()
