"""DuoAttention at a long context: cache bytes and time per decoded token, beside the dense model.

    python evals/benchmarks/duo_decode.py [--context 16384] [--share 0.5]

One Llama with random weights, dense and with a share of its KV heads streaming, decoding in turn in one process.
Exits 1 if the cache does not hold the bytes that the formula says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import torch
from timing import machine, paired, ratio
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--share", type=float, default=0.5, help="share of the KV heads that stay full")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="decode steps in one timed run")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32

    torch.manual_seed(0)
    heads, kv_heads, head_dim = 8, 4, 64
    config = LlamaConfig(hidden_size=heads * head_dim, num_hidden_layers=args.layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, intermediate_size=1024, vocab_size=1024,
                         max_position_embeddings=2 * args.context)  # fmt: skip
    dense = LlamaForCausalLM(config).eval().to(args.device, dtype)
    duo = LlamaForCausalLM(config).eval().to(args.device, dtype)
    duo.load_state_dict(dense.state_dict(), assign=True)
    patchattn.patch(duo, patchattn.DuoAttention(heads=args.share, sink=args.sink, recent=args.recent))
    prompt = torch.randint(config.vocab_size, (1, args.context), device=args.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=args.device)

    caches = {}
    with torch.inference_mode():
        for name, model in (("dense", dense), ("duo", duo)):
            caches[name] = DynamicCache(config=config)
            for chunk in prompt.split(2048, dim=1):
                model.model(chunk, past_key_values=caches[name])
    found = {name: patchattn.cache_bytes(cache) for name, cache in caches.items()}
    said = {
        "dense": formula(args, config, 1.0, dtype.itemsize),
        "duo": formula(args, config, args.share, dtype.itemsize),
    }

    def decode(name: str, model: LlamaForCausalLM) -> None:
        with torch.inference_mode():
            for _ in range(args.steps):
                model(token, past_key_values=caches[name])

    seconds = paired({"dense": lambda: decode("dense", dense), "duo": lambda: decode("duo", duo)}, args.rounds)
    middle, low, high = ratio(seconds, "duo", "dense")
    print(json.dumps({
        "machine": machine(),
        "settings": vars(args) | {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": str(dtype)},
        "cache bytes": {"found": found, "formula": said, "duo / dense": found["duo"] / found["dense"]},
        "ms per token": {k: statistics.median(v) / args.steps * 1e3 for k, v in seconds.items()},
        "duo / dense": {"median": middle, "quartiles": [low, high]},
    }, indent=2))  # fmt: skip
    return int(found != said)


def formula(args: argparse.Namespace, config: LlamaConfig, share: float, itemsize: int) -> int:
    """Bytes of keys and values, and 8 for each streaming layer's count of tokens."""
    total = config.num_hidden_layers * config.num_key_value_heads
    full = round(total * share)
    kept = full * args.context + (total - full) * (args.sink + args.recent)
    streaming_layers = config.num_hidden_layers if 0 < share < 1 else 0
    return 2 * itemsize * config.head_dim * kept + 8 * streaming_layers


if __name__ == "__main__":
    sys.exit(main())
