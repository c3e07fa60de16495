"""LongHeads at a long context: the attention of one decoded token, beside dense attention over the same keys.

    python evals/benchmarks/longheads_decode.py [--context 32768] [--chunk 256] [--window 4096]

Both sides read one layer's cache that is filled beforehand, in turn in one process. LongHeads' side is the whole of it:
scores of all chunk keys, the choice, turning the query, reading the chosen chunks.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from timing import machine, paired, ratio
from torch.nn import functional

from patchattn_kernels.chunk_select import chunk_attention, select_chunks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32

    torch.manual_seed(0)
    given = dict(device=args.device, dtype=dtype)
    chunks = args.window // args.chunk
    q, turned = (torch.randn(1, args.heads, 1, args.head_dim, **given) for _ in "qt")
    k, v = (torch.randn(1, args.kv_heads, args.context, args.head_dim, **given) for _ in "kv")
    chunk_keys = torch.randn(1, args.heads, args.context // args.chunk, args.head_dim, **given)
    cos, sin = (torch.rand(chunks, args.head_dim, device=args.device) for _ in "cs")
    current = torch.tensor([[args.context // args.chunk - 1]], device=args.device)
    opened = torch.full_like(current, args.chunk // 2)

    def longheads() -> torch.Tensor:
        chosen = select_chunks(q, chunk_keys, current, chunks=chunks)
        return chunk_attention(q, turned, k, v, cos, sin, chosen, opened, chunk=args.chunk)

    def dense() -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=args.kv_heads != args.heads)

    with torch.inference_mode():
        seconds = paired({"longheads": longheads, "dense": dense}, args.rounds)
    middle, low, high = ratio(seconds, "dense", "longheads")
    print(json.dumps({
        "machine": machine(),
        "settings": vars(args) | {"dtype": str(dtype)},
        "ms per token and layer": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
        "dense / longheads": {"median": middle, "quartiles": [low, high]},
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
