"""What patchattn's own path costs: decode of a Dense-patched Llama against the unpatched one.

    python evals/benchmarks/dispatch_overhead.py [--limit 1.05]

Both models share their weights and decode in turn in one process. Exits 1 if the median ratio is over the limit.
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
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache before the timed steps")
    parser.add_argument("--steps", type=int, default=16, help="decode steps in one timed run")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=None, help="fail if the median ratio is over this")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=8,
                         num_key_value_heads=4, intermediate_size=4 * args.hidden, vocab_size=8192)  # fmt: skip
    base = LlamaForCausalLM(config).eval().to(args.device)
    patched = LlamaForCausalLM(config).eval().to(args.device)
    patched.load_state_dict(base.state_dict(), assign=True)
    patchattn.patch(patched, "dense")
    prompt = torch.randint(8192, (1, args.context), device=args.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=args.device)
    mask = torch.ones(1, args.context + args.steps, dtype=torch.long, device=args.device)

    def decode(model: LlamaForCausalLM) -> torch.Tensor:
        cache = caches[id(model)]
        cache.crop(args.context - cache.get_seq_length())  # the same context in every round
        with torch.inference_mode():
            for step in range(args.steps):
                out = model(token, attention_mask=mask[:, : args.context + step + 1], past_key_values=cache)
            return out.logits

    caches = {}
    for model in (base, patched):
        caches[id(model)] = DynamicCache(config=config)
        with torch.inference_mode():
            model(prompt, past_key_values=caches[id(model)])
    if not torch.equal(decode(base), decode(patched)):
        print("the two models disagree; nothing was timed", file=sys.stderr)
        return 1
    seconds = paired({"unpatched": lambda: decode(base), "patched": lambda: decode(patched)}, args.rounds)
    middle, low, high = ratio(seconds, "patched", "unpatched")
    per_step = {name: statistics.median(values) / args.steps * 1e3 for name, values in seconds.items()}
    print(json.dumps({"machine": machine(), "settings": vars(args), "ms per token": per_step,
                      "ratio": {"median": middle, "quartiles": [low, high]}}, indent=2))  # fmt: skip
    return int(args.limit is not None and middle > args.limit)


if __name__ == "__main__":
    sys.exit(main())
