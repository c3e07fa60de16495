"""How fast the recall generators make samples: tokens per second on one core, beside what a training run eats.

python evals/benchmarks/synthetic_data.py [tokenizer, default: lab-llama]
"""

from __future__ import annotations

import sys
import time

from patchattn.loading import load_tokenizer
from patchattn.train.synthetic import make

CASES = {
    "passkey": {}, "needle": {"keys": 4}, "mqar": {}, "copy": {}, "lookup": {},
    "multi_passkey": {"passkeys": 3, "words_each": 4},
}  # fmt: skip


def main(name: str = "lab-llama", length: int = 1024, samples: int = 500) -> None:
    tokenizer = load_tokenizer(name)
    for task, options in CASES.items():
        generator = make(task, tokenizer, **options)
        generator.sample(0, length)  # reads the vocabulary and the haystack
        started = time.perf_counter()
        tokens = sum(len(generator.sample(index, length)["input_ids"]) for index in range(samples))
        print(f"{task:14} {tokens / (time.perf_counter() - started):>12,.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
