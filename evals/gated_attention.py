"""What trained gates did to a model: attention on the first token, gates, and quality, before and after.

    python evals/gated_attention.py before=lab-llama "with gates=lab-llama-gated" --data lab-data [--plot PICTURE]
    python evals/gated_attention.py before=lab-vit "with gates=lab-vit-gated"

Each model is a name for the table and a folder, or the name of a lab checkpoint: language models, or classifiers of
digits, whose first token is the class token. Prints a table for the documents, and draws the attention of each layer on
the first token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import patchattn
from patchattn import lab
from patchattn.gates import GateStats, gate_stats
from patchattn.lab.evaluate import held_out
from patchattn.lab.images import classified
from patchattn.lab.text import bits_per_byte, read_texts, recall
from patchattn.loading import load_model
from patchattn.record import patch_of
from patchattn.train import synthetic
from patchattn.train.images import collate

LENGTH, ROWS = 512, 16
SEED = 1_000_003  # of questions that no training saw


def opened(name: str) -> Any:
    model = load_model(name, dtype="float32")
    if patch_of(model) is None:
        patchattn.patch(model, patchattn.GatedAttention())  # the identity, so that the sink can be measured alike
    return model


def text_rows(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Rows that begin as the model's texts do, spread over the held-out text."""
    ids = tokenizer("\n".join(texts), add_special_tokens=False, return_tensors="pt").input_ids[0]
    starts = torch.linspace(0, len(ids) - LENGTH, ROWS).long()
    rows = torch.stack([ids[start : start + LENGTH - 1] for start in starts])
    return torch.cat([torch.full((ROWS, 1), tokenizer.bos_token_id), rows], dim=1)


def measure(name: str, data: str) -> tuple[GateStats, dict[str, str]]:
    """What the gates do, and the quality by name, as shown."""
    model = opened(name)
    if not hasattr(model, "generate"):
        reader = held_out("lab-vit", model)
        images = collate("image-classification")([reader.sample(index, 0) for index in range(reader.size)])
        stats = gate_stats(model, pixel_values=images["pixel_values"])
        return stats, {"digits classified": f"{classified(model, reader):.1%}"}
    texts, tokenizer = read_texts(Path(data, "books", "held_out")), AutoTokenizer.from_pretrained(lab.resolve(name))
    stats = gate_stats(model, input_ids=text_rows(tokenizer, texts))
    generator = synthetic.make("mqar", tokenizer, SEED, pairs=8)
    return stats, {
        "bits per byte": f"{bits_per_byte(model, tokenizer, texts).bits_per_byte:.3f}",
        f"MQAR at {LENGTH}": f"{recall(model, generator, length=LENGTH, samples=32).tokens:.1%}",
    }


def draw(found: dict[str, GateStats], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(found)
    for place, (name, stats) in enumerate(found.items()):
        layers = torch.arange(len(stats.sink)) + (place - (len(found) - 1) / 2) * width
        axes.bar(layers.tolist(), stats.sink.mean(dim=1).tolist(), width, label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("attention on the first token")
    axes.set_xticks(range(len(stats.sink)))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data", default="lab-data", help="what `patchattn lab data` wrote")
    parser.add_argument("--plot", type=Path, help="a picture to write")
    given = parser.parse_args()
    wrong = [model for model in given.models if "=" not in model]
    if wrong:
        parser.error(f"{wrong[0]} is no NAME=FOLDER")
    found: dict[str, GateStats] = {}
    for name, folder in (model.split("=", 1) for model in given.models):
        stats, quality = measure(folder, given.data)
        if not found:
            columns = ("", "attention on the first token", "what gates leave of it", "mean gate", *quality)
            print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
        found[name] = stats
        numbers = (f"{value.mean():.3f}" for value in (stats.sink, stats.gated_sink, stats.gate))
        print(f"| {' | '.join((name, *numbers, *quality.values()))} |", flush=True)
    if given.plot is not None:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
