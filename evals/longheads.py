"""Passkeys in texts far beyond the trained length: a model as it is, and with LongHeads.

    python evals/longheads.py [--model lab-llama] [--chunk 16 64] [--window 512] [--lengths 1024 8192]

Each text hides a number of five digits and ends with the question for it. Counted are texts with every token of the
answer the likeliest one, given the right tokens before it, and single tokens of the answers. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import torch
from transformers import AutoTokenizer

import patchattn
from patchattn import lab
from patchattn.loading import load_model
from patchattn.train import synthetic
from patchattn.train.synthetic import IGNORED


@torch.inference_mode()
def answered(model: Any, generator: Any, length: int, samples: int) -> tuple[float, float]:
    """Shares of whole answers and of single tokens that are right; only the answer meets the vocabulary."""
    whole = right = asked = 0
    for index in range(samples):
        sample = generator.sample(index, length)
        ids, labels = (torch.tensor([sample[name]], device=model.device) for name in ("input_ids", "labels"))
        places = labels[0, 1:] != IGNORED
        states = model.base_model(ids, use_cache=False).last_hidden_state[0, :-1][places]
        hits = model.get_output_embeddings()(states).argmax(dim=-1) == labels[0, 1:][places]
        whole, right, asked = whole + bool(hits.all()), right + int(hits.sum()), asked + len(hits)
    return whole / samples, right / asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab-llama")
    parser.add_argument("--chunk", type=int, nargs="+", default=[16])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--chunk-key", nargs="+", default=["attention", "bounds"], choices=["attention", "bounds"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    settings = [
        patchattn.LongHeads(chunk=chunk, window=args.window, chunk_key=key)
        for chunk, key in itertools.product(args.chunk, args.chunk_key)
    ]
    folder = lab.resolve(args.model)
    model = load_model(folder, dtype="float32").eval()
    generator = synthetic.make("passkey", AutoTokenizer.from_pretrained(folder), 1)
    print(
        "| tokens | model | answers | tokens of answers | seconds a text |\n| --- | --- | --- | --- | --- |", flush=True
    )
    for length in args.lengths:
        for method in (None, *settings):
            name = "as it is"
            if method is not None:
                name = f"chunks of {method.config.chunk}, by {method.config.chunk_key}"
                patchattn.patch(model, method)
            started = time.perf_counter()
            whole, single = answered(model, generator, length, args.samples)
            seconds = (time.perf_counter() - started) / args.samples
            print(f"| {length} | {name} | {whole:.0%} | {single:.0%} | {seconds:.1f} |", flush=True)
            if method is not None:
                patchattn.unpatch(model)


if __name__ == "__main__":
    main()
