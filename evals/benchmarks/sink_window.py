"""Attention with a share of streaming heads beside dense attention: one token, and a prompt.

    python evals/benchmarks/sink_window.py [--context 16384] [--share 0.5] [--rounds 10]

"dense" is our own attention with every head full, "dense sdpa" torch's; every peer that is there runs in turn with them
in one process. A side whose result is wrong is not timed. `floor` is the share of the keys that is read: what cannot be
beaten where reading is all that counts. On a CPU the time is that of its processors, all threads together. Exits 1 if a
result is wrong, or over --limit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import machine, on_gpu, paired, ratio
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from patchattn_kernels import sink_window, sink_window_decode
from patchattn_kernels.check import relative
from patchattn_kernels.dispatch import recording

Sides = dict[str, Callable[[], torch.Tensor]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 32768, 131072] if gpu else [16384])
    parser.add_argument("--prompt", type=int, nargs="*", default=[8192, 32768] if gpu else [2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16] if gpu else [1])
    parser.add_argument("--heads", type=int, default=32 if gpu else 8)
    parser.add_argument("--kv-heads", type=int, default=8 if gpu else 4)
    parser.add_argument("--size", type=int, default=128 if gpu else 64, help="of a head")
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5] if gpu else [0.5], help="of full heads")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5 if gpu else 20)
    parser.add_argument("--limit", type=float, help="fail if a token takes more than this share of the fastest dense")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for share in args.share:
            for batch in args.batch:
                rows += [measure(args, share, "token", *token(args, share, batch, keys)) for keys in args.context]
            rows += [measure(args, share, "prompt", *prompt(args, share, length)) for length in args.prompt]
    print(json.dumps({"machine": machine(), "settings": vars(args), "rows": rows}, indent=2))
    ratios = [row["ours / fastest dense"]["median"] for row in rows if row["what"] == "token" and not row["wrong"]]
    return int(any(row["wrong"] for row in rows) or bool(args.limit and max(ratios) > args.limit))


def kinds(args: argparse.Namespace, share: float) -> list[bool]:
    """Full and streaming KV heads, mixed as in a real model."""
    full = round(share * args.kv_heads)
    return [index * full // args.kv_heads != (index + 1) * full // args.kv_heads for index in range(args.kv_heads)]


def tensors(args: argparse.Namespace, batch: int, queries: int, keys: int) -> list[torch.Tensor]:
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    shapes = [(args.heads, queries), (args.kv_heads, keys), (args.kv_heads, keys)]
    return [torch.randn(batch, heads, length, args.size, dtype=dtype, device=args.device) for heads, length in shapes]


def token(
    args: argparse.Namespace, share: float, batch: int, keys: int
) -> tuple[dict[str, Any], Sides, torch.Tensor, float]:
    """One token over a cache of `keys` tokens: settings, what to time, the truth, and the floor."""
    q, k, v = tensors(args, batch, 1, keys)
    full_heads = kinds(args, share)
    full, streaming = ([i for i, flag in enumerate(full_heads) if flag == kind] for kind in (True, False))
    places = torch.cat([torch.arange(args.sink), torch.arange(keys - args.recent, keys)]).to(args.device)
    kept = (k[:, streaming][:, :, places], v[:, streaming][:, :, places], places.expand(batch, -1).contiguous())
    whole = (k[:, full].contiguous(), v[:, full].contiguous())
    rank = torch.full((batch, 1), keys - 1, device=args.device)
    ours = functools.partial(sink_window_decode, q, rank, sink=args.sink, recent=args.recent, kept=kept, full=whole,
                             full_heads=full_heads)  # fmt: skip
    every = functools.partial(sink_window_decode, q, sink=0, recent=1, full=(k, v), full_heads=[True] * args.kv_heads)
    sides: Sides = {"ours": ours, "dense": every, **dense(q, k, v, causal=False),
                    **flash_sparse(args, q, k, v, full_heads)}  # fmt: skip
    floor = share + (1 - share) * min(1.0, (args.sink + args.recent) / keys)
    return {"batch": batch, "keys": keys}, sides, truth(args, q, k, v, full_heads), floor


def prompt(args: argparse.Namespace, share: float, length: int) -> tuple[dict[str, Any], Sides, torch.Tensor, float]:
    """A whole prompt of `length` tokens, causal."""
    q, k, v = tensors(args, 1, length, length)
    full_heads = kinds(args, share)
    ours = functools.partial(sink_window, q, k, v, sink=args.sink, recent=args.recent, full_heads=full_heads)
    every = functools.partial(sink_window, q, k, v, sink=0, recent=1, full_heads=[True] * args.kv_heads)
    sides: Sides = {"ours": ours, "dense": every, **dense(q, k, v, causal=True), **flex(args, q, k, v, full_heads),
                    **flash_sparse(args, q, k, v, full_heads)}  # fmt: skip
    window = min(args.sink + args.recent, length) * length
    floor = share + (1 - share) * min(1.0, window / (length * (length + 1) / 2))
    return {"batch": 1, "tokens": length}, sides, truth(args, q, k, v, full_heads), floor


def truth(args: argparse.Namespace, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, full_heads: list[bool]) -> Any:
    """In float32, by the torch reference; of the last queries alone where there are many."""
    from patchattn_kernels.sink_window.reference import Tier, decode_reference

    outs, last = [], min(q.shape[2], 64)
    full = [index for index, flag in enumerate(full_heads) if flag]
    streaming = [index for index, flag in enumerate(full_heads) if not flag]
    every = torch.arange(k.shape[2], device=q.device).expand(q.shape[0], -1)
    for place in range(q.shape[2] - last, q.shape[2]):
        end = k.shape[2] - q.shape[2] + place + 1
        tiers = [Tier(k[:, part, :end].float(), v[:, part, :end].float(), every[:, :end]) for part in (full, streaming)]
        outs.append(decode_reference(
            q[:, :, place : place + 1].float(), every[:, end - 1 : end], sink=args.sink, recent=args.recent,
            full=tiers[0] if full else None, kept=tiers[1] if streaming else None, full_heads=full_heads, scale=None,
            softcap=None, sinks=None, dropout=0.0,
        ))  # fmt: skip
    return torch.cat(outs, dim=2)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Sides:
    """Attention of every head over every key in torch; on a GPU with each backend that takes it."""

    def run(backend: SDPBackend | None) -> torch.Tensor:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    backends = {"sdpa": None}
    if q.is_cuda:
        backends |= {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
    return {f"dense {name}": functools.partial(run, backend) for name, backend in backends.items()}


def flex(args: argparse.Namespace, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, full_heads: list[bool]) -> Sides:
    """The same mask in compiled FlexAttention; its block mask is made outside the clock."""
    if not q.is_cuda:
        return {}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    group = args.heads // args.kv_heads
    whole = torch.tensor(full_heads, device=q.device).repeat_interleave(group)

    def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (whole[h] | (j < args.sink) | (i - j < args.recent))

    mask = create_block_mask(keep, None, args.heads, q.shape[2], k.shape[2], device=str(q.device))
    compiled = torch.compile(flex_attention)
    return {"flex": lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)}


def flash_sparse(
    args: argparse.Namespace, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, full_heads: list[bool]
) -> Sides:
    """flash-sparse-attn, which takes a window and sinks a head, over a cache that keeps every key."""
    if not q.is_cuda or importlib.util.find_spec("flash_sparse_attn") is None:
        return {}
    from flash_sparse_attn.ops.triton import interface

    near = [k.shape[2] if flag else args.recent for flag in full_heads]
    sizes = torch.tensor([[args.sink, 0, 0, size] for size in near], dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    if q.shape[1] == 1:
        step = interface.flash_dense_attn_with_kvcache_func
        return {"flash-sparse-attn": lambda: step(q[:, 0], k, v, window_sizes=sizes)[:, :, None]}
    whole = interface.flash_dense_attn_func
    return {"flash-sparse-attn": lambda: whole(q, k, v, is_causal=True, window_sizes=sizes).transpose(1, 2)}


def measure(
    args: argparse.Namespace, share: float, what: str, sizes: dict[str, Any], sides: Sides, wanted: torch.Tensor,
    floor: float,
) -> dict[str, Any]:  # fmt: skip
    """Check every side, then time those that are right."""
    ran: dict[str, str] = {}
    wrong, missing, errors = {}, {}, {}
    for name in list(sides):
        try:
            with recording(ran if name == "ours" else {}):
                out = sides[name]()
        except Exception as problem:  # a peer that cannot run here is left out, and said so
            if name in ("ours", "dense", "dense sdpa"):
                raise
            missing[name] = f"{type(problem).__name__}: {problem}"[:200]
            del sides[name]
            continue
        if not name.startswith("dense"):  # which reads other keys
            errors[name] = relative(out[:, :, -wanted.shape[2] :], wanted)
            if not errors[name] < (1e-2 if out.dtype != torch.float32 else 1e-5):
                wrong[name] = errors[name]
                del sides[name]
    row: dict[str, Any] = {"what": what, "share": share, **sizes, "ran": ran, "errors": errors, "wrong": wrong,
                           "missing": missing, "floor": floor}  # fmt: skip
    if "ours" not in sides:
        return row
    if args.device.startswith("cuda"):
        seconds = on_gpu(sides, args.rounds)
    else:
        seconds = paired(sides, args.rounds, clock=time.process_time)
    row["ms"] = {name: {"median": statistics.median(values) * 1e3, "range": [min(values) * 1e3, max(values) * 1e3]}
                 for name, values in seconds.items()}  # fmt: skip
    fastest = min((name for name in seconds if name.startswith("dense")), key=lambda name: row["ms"][name]["median"])
    for label, name in {**{name: name for name in seconds if name != "ours"}, "fastest dense": fastest}.items():
        middle, low, high = ratio(seconds, "ours", name)
        row[f"ours / {label}"] = {"median": middle, "quartiles": [low, high]}
    return row


if __name__ == "__main__":
    sys.exit(main())
