"""From which length on SeerAttention is faster: a whole attention layer of a prompt, with and without its gate.

    python evals/benchmarks/seer_attention.py [--length 512 1024 2048 4096] [--density 0.5 0.3 0.1] [--rounds 10]

One layer of a Llama with random weights, projections and rotary included, patched and not, in turn in one process: the
gate's pools, scores, choice and lists are all part of it. With everything read the patched layer has to give what the
unpatched one gives, else nothing is timed. Prints for each density the first length from which on the patched layer
takes less; the default of `dense_below` on a CPU is that of the lowest density, below which no density gains anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from timing import machine, on_gpu, paired, ratio
from transformers import LlamaConfig, LlamaModel

import patchattn


def layer(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    width = args.heads * args.size
    config = LlamaConfig(hidden_size=width, intermediate_size=width, num_hidden_layers=1, vocab_size=16,
                         num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.size,
                         max_position_embeddings=2 * max(args.length))  # fmt: skip
    return LlamaModel(config).eval().to(args.device, dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--length", type=int, nargs="+",
                        default=[4096, 8192, 16384, 32768] if gpu else [512, 1024, 2048, 4096])  # fmt: skip
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.3, 0.1])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--heads", type=int, default=32 if gpu else 8)
    parser.add_argument("--kv-heads", type=int, default=8 if gpu else 4)
    parser.add_argument("--size", type=int, default=128 if gpu else 64, help="of a head")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    dense, sparse = layer(args, dtype), layer(args, dtype)
    patchattn.patch(sparse, patchattn.SeerAttention(block=args.block, init="mean", dense_below=0))
    rows, first = [], dict.fromkeys(args.density)
    with torch.inference_mode():
        for length in args.length:
            states = torch.randn(1, length, dense.config.hidden_size, dtype=dtype, device=args.device)
            place = torch.arange(length, device=args.device)[None]

            def run(model: Any, states: torch.Tensor = states, place: torch.Tensor = place) -> torch.Tensor:
                attention = model.layers[0].self_attn
                out, _ = attention(states, position_embeddings=model.rotary_emb(states, place), attention_mask=None,
                                   position_ids=place)  # fmt: skip
                return out

            for density in args.density:
                with patchattn.settings(sparse, density=1.0):
                    error = (run(sparse) - run(dense)).abs().max() / run(dense).abs().max()
                if error > (1e-4 if dtype == torch.float32 else 3e-2):
                    print(f"wrong at {length} tokens: {error}", file=sys.stderr)
                    return 1
                with patchattn.settings(sparse, density=density):
                    sides = {"patched": lambda: run(sparse), "unpatched": lambda: run(dense)}
                    seconds = on_gpu(sides, args.rounds) if gpu else paired(sides, args.rounds, clock=time.process_time)
                    read = patchattn.explain(sparse).layers[0].report["seer_attention"]["blocks read"]
                middle, low, high = ratio(seconds, "patched", "unpatched")
                rows.append({"length": length, "density": density, "blocks read": read.partition(" ")[0],
                             "ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
                             "patched / unpatched": {"median": middle, "quartiles": [low, high]}})  # fmt: skip
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for density in args.density:
        slower = [row["length"] for row in rows
                  if row["density"] == density and row["patched / unpatched"]["median"] >= 1]  # fmt: skip
        longer = [length for length in args.length if length > max(slower, default=0)]
        first[density] = min(longer, default=None)
    print(json.dumps({"machine": machine(), "settings": vars(args) | {"dtype": str(dtype)}, "rows": rows,
                      "faster from": first}, indent=1))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
