"""How fast data comes: tokenizing and packing, reading packed rows, streaming, generated tasks; all on one core.

    python evals/benchmarks/data_pipeline.py [--text FILE_OR_FOLDER] [--tokenizer NAME] [--length 1024]

Without `--text` the sources of this repository are read, without `--tokenizer` one of 1024 tokens is trained on them.
The last line is a training step to set beside: forward and backward of a small Llama on the same rows.
"""

from __future__ import annotations

import os

os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before tokenizers and torch are loaded

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import machine
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from patchattn.train.data import Data, open_data
from patchattn.train.schema import DataSpec, Source, SyntheticSource, TextSource, TokenizerSpec
from patchattn.train.synthetic import GENERATORS
from patchattn.train.tokenizer import train_tokenizer, training_texts

ROOT = Path(__file__).parents[2]
SECONDS = 3.0  # each measurement takes about so long


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="txt, jsonl, json, csv or parquet file, or a folder of them")
    parser.add_argument("--tokenizer", help="name or folder of a tokenizer")
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        text = args.text or own_sources(Path(folder) / "text")
        source = TextSource(path=str(text))
        if args.tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        else:
            tokenizer = train_tokenizer(TokenizerSpec(), training_texts([source]))
        caches = iter(range(10**6))

        def opened(source: Source, fresh: bool = False) -> Data:
            cache = Path(folder) / (f"cache-{next(caches)}" if fresh else "cache")
            spec = DataSpec(train=[source], held_out=0.0, length=args.length)
            settings = dict(task="causal-lm", processor=tokenizer, length=args.length, seed=0, samples=10**6)
            return open_data(spec, cache=cache, **settings)

        title = f"rows of {args.length} tokens, vocabulary {len(tokenizer)}"
        table = Table("", "tokens/s", "MB/s of text", title=title)
        (said,) = opened(source).fingerprints["train"]
        characters = sum(len(part) for part in training_texts([source]))

        def line(what: str, speed: float, of_text: bool = False) -> None:
            table.add_row(what, f"{speed:,.0f}", f"{speed * characters / said['tokens'] / 1e6:.2f}" if of_text else "")

        line("tokenize and pack a corpus", rate(lambda: iter([opened(source, fresh=True)]), said["tokens"]), True)
        line("open it from the cache", rate(lambda: iter([opened(source)]), said["tokens"]), True)
        rows = opened(source).train
        line("read packed rows", rate(lambda: map(rows.__getitem__, range(1000)), args.length))
        batches = DataLoader(rows, batch_size=8, collate_fn=opened(source).collate)
        line("read them as batches of 8", rate(lambda: iter(batches), 8 * args.length))
        stream = opened(TextSource(path=str(text), streaming=True)).train
        line("stream: read, tokenize, pack", rate(lambda: islice(stream, said["rows"]), args.length), True)
        for name in GENERATORS:
            try:
                made = opened(SyntheticSource(generator=name)).train
            except ValueError as error:  # some need longer rows
                print(error)
                continue
            line(f"generate {name}", rate(lambda made=made: map(made.__getitem__, range(1000)), args.length))
        line("train a Llama of 0.9 M parameters, to compare", training(next(iter(batches)), len(tokenizer)))
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="; ")
    Console(width=100).print(table)
    return 0


def rate(run: Callable[[], Iterator[object]], tokens: int) -> float:
    """Tokens per second of processor time, which a busy machine does not change; each item of a run holds so many."""
    next(run())  # what is only done once
    items, started = 0, time.process_time()
    while (spent := time.process_time() - started) < SECONDS:
        items += sum(1 for _ in islice(run(), 1000))
    return items * tokens / spent


def training(batch: dict[str, torch.Tensor], vocabulary: int) -> float:
    sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=vocabulary, intermediate_size=384, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)

    def step() -> Iterator[object]:
        yield model(**batch, use_cache=False).loss.backward()

    return rate(step, batch["input_ids"].numel())


def own_sources(folder: Path) -> Path:
    folder.mkdir()
    files = [*sorted((ROOT / "patchattn").rglob("*.py")), *sorted((ROOT / "docs").rglob("*.md"))]
    for number, file in enumerate(files):
        (folder / f"{number}.txt").write_text(file.read_text(encoding="utf-8") or "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(main())
