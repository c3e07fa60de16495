"""Which heads lab-llama spares best: every way to leave out a quarter of them, on text that the evaluation never reads.

    patchattn lab data lab-data
    python evals/moh_lists.py --output results.json

Each layer keeps one to four heads, chosen for each token by their queries, three quarters of all heads together;
nothing is trained. Ranked by bits per byte of the beginnings of the training books; `evals/moh.py` measures other
books, and its recall of pairs other samples than those that are shown here. The recipe has the first of those that
recall nine of ten values.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.timing import machine

import patchattn
from patchattn.lab.text import bits_per_byte, read_texts, recall
from patchattn.loading import load_model, load_tokenizer
from patchattn.train.synthetic import make

CHECKPOINT, HEADS, LAYERS = "lab-llama", 4, 4
SEED = 2_000_003  # of the pairs: neither those of training nor those of the evaluation


def lists(kept: int) -> list[dict[str, Any]]:
    """Settings of MoH for each way to keep `kept` heads in all, at least one a layer; a layer that keeps all shares
    them."""
    ways = itertools.product(range(1, HEADS + 1), repeat=LAYERS)
    return [{"shared": [on if on == HEADS else 0 for on in way], "top_k": [0 if on == HEADS else on for on in way]}
            for way in ways if sum(way) == kept]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="lab-data", help="what `patchattn lab data` wrote")
    parser.add_argument("--characters", type=int, default=2500, help="of each training book")
    parser.add_argument("--samples", type=int, default=8, help="of eight pairs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    given = parser.parse_args()
    model, tokenizer = load_model(CHECKPOINT, dtype="float32"), load_tokenizer(CHECKPOINT)
    texts = [text[: given.characters] for text in read_texts(Path(given.data, "books", "train"))]
    pairs = make("mqar", tokenizer, SEED, pairs=8)
    rows: list[dict[str, Any]] = []
    for way in lists(HEADS * LAYERS * 3 // 4):
        patchattn.patch(model, patchattn.MoH(**way))
        found = {
            "bits per byte": bits_per_byte(model, tokenizer, texts).bits_per_byte,
            "values of 8 pairs recalled": recall(model, pairs, length=512, samples=given.samples).tokens,
        }
        rows.append(way | found)
        patchattn.unpatch(model)
    rows.sort(key=lambda row: row["bits per byte"])
    print("| shared | top_k | bits per byte | values of 8 pairs recalled |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['shared']} | {row['top_k']} | {row['bits per byte']:.4f} | "
              f"{row['values of 8 pairs recalled']:.1%} |")  # fmt: skip
    if given.output is not None:
        report = {"checkpoint": CHECKPOINT, "characters": given.characters, "samples": given.samples,
                  "machine": machine(), "lists": rows}  # fmt: skip
        given.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
