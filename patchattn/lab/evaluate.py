"""What the lab checkpoints can do, in numbers, each beside its goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tables import Report, add_row, table
from . import facts, load, names, path, recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

RECALL = {512: 0.95, 1024: None}  # tokens of a text that asks for something, and the share of answers to be right
QUESTIONS = 64
DRAWINGS = 10  # of each class
JUDGE = "lab-vit"  # which says what was drawn
MOST_MEGABYTES = 10.0


@dataclass(frozen=True)
class Number:
    """One thing that was measured.

    Attributes:
        value: None if it could not be measured; `on` says why.
        goal: what it is to be, at least, or at most where `smaller` is better; None: it is shown for its own sake.
        on: what it was measured on.
    """

    checkpoint: str
    what: str
    value: float | None
    goal: float | None
    on: str
    smaller: bool = False

    @property
    def reached(self) -> bool | None:
        if self.value is None or self.goal is None:
            return None
        return self.value <= self.goal if self.smaller else self.value >= self.goal


@dataclass(frozen=True)
class LabReport(Report):
    """The numbers of some checkpoints, and their sizes."""

    checkpoints: list[dict[str, Any]]
    numbers: list[Number]

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for number, row in zip(self.numbers, values["numbers"]):
            row["reached"] = number.reached
        return values

    def parts(self) -> list[RenderableType]:
        measured = table("checkpoint", "what", "measured", "goal", "reached", "on")
        for number in self.numbers:
            bound = "at most" if number.smaller else "at least"
            goal = None if number.goal is None else f"{bound} {_text(number, number.goal)}"
            value = None if number.value is None else _text(number, number.value)
            add_row(measured, number.checkpoint, number.what, value, goal, number.reached, number.on)
        return [measured, sizes(self.checkpoints)]


def sizes(checkpoints: Sequence[dict[str, Any]]) -> RenderableType:
    """A table of the checkpoints' facts."""
    rows = table("checkpoint", "class", "tokens", "parameters", "MB", "recipe")
    for entry in checkpoints:
        add_row(rows, *(entry[key] for key in ("name", "class", "tokens", "parameters", "megabytes", "recipe")))
    return rows


def evaluate(
    checkpoints: Sequence[str] | None = None, data: str | None = None, say: Callable[[str], None] = lambda line: None
) -> LabReport:
    """Measure lab checkpoints; the same numbers each time.

    Args:
        checkpoints: their names; default: all.
        data: folder that `patchattn lab data` filled, for the numbers on text.
        say: called with a line for people before each checkpoint.
    """
    chosen = list(checkpoints or names())
    for name in chosen:
        path(name)  # says so if there is none of that name, before the others take their time
    numbers: list[Number] = []
    for name in chosen:
        say(f"measuring {name}")
        numbers += _MEASURES[_recipe(name).model.task](name, load(name), data)
    return LabReport([facts(name) for name in chosen], numbers)


def score(name: str, model: Any) -> Number:
    """What the lab checkpoint `name` is for, measured on `model`, which may be that checkpoint patched."""
    return _MEASURES[_recipe(name).model.task](name, model, None)[-1]


def _language(name: str, model: Any, data: str | None) -> list[Number]:
    from ..loading import load_tokenizer
    from ..train.synthetic import make
    from .sources import BOOKS
    from .text import TASK_SEED, bits_per_byte, head_facts, read_texts, recall

    tokenizer = load_tokenizer(name)
    what, goal = "bits per byte of text", 2.2
    if data is None:
        missing = "not measured: give --data FOLDER, which `patchattn lab data FOLDER` fills"
        numbers = [Number(name, what, None, goal, missing, smaller=True)]
    else:
        texts = read_texts(Path(data) / BOOKS.name / "held_out")
        score = bits_per_byte(model, tokenizer, texts)
        where = f"{len(texts)} held-out texts, {score.bytes:,} bytes"
        numbers = [Number(name, what, score.bits_per_byte, goal, where, smaller=True)]
        heads = head_facts(model, tokenizer, texts)
        seen = {"first token": heads.first, "last 16 tokens": heads.local, "value asked for": heads.retrieval}
        for place, layers in seen.items():
            most = max(max(layer) for layer in layers)
            numbers.append(Number(name, f"most attention of a head on the {place}", most, None, "rows of 512 tokens"))
    for length, share in RECALL.items():
        passkey = recall(model, make("passkey", tokenizer, TASK_SEED), length=length, samples=QUESTIONS)
        numbers.append(Number(name, "passkeys written", passkey.generated, share, _questions(length)))
        pairs = recall(model, make("mqar", tokenizer, TASK_SEED, pairs=8), length=length, samples=QUESTIONS)
        numbers.append(Number(name, "values of 8 pairs recalled", pairs.tokens, share, _questions(length)))
    return numbers


def _questions(length: int) -> str:
    return f"{QUESTIONS} generated texts of {length} tokens"


def _classifier(name: str, model: Any, data: str | None) -> list[Number]:
    from .images import classified

    reader = held_out(name, model)
    return [Number(name, "digits classified", classified(model, reader), 0.97, f"{reader.size} held-out images")]


def _diffusion(name: str, model: Any, data: str | None) -> list[Number]:
    import torch
    from diffusers import DDPMScheduler

    from .images import draw, recognised

    classes = torch.arange(model.config.num_embeds_ada_norm).repeat_interleave(DRAWINGS)
    images = draw(model, DDPMScheduler.from_pretrained(path(name) / "scheduler"), classes)
    where = f"{len(classes)} drawings, recognised by {JUDGE}"
    return [Number(name, "digits drawn as asked", recognised(images, classes, load(JUDGE)), 0.85, where)]


def _vision_language(name: str, model: Any, data: str | None) -> list[Number]:
    from transformers import AutoProcessor

    from .images import answered

    reader = held_out(name, model, AutoProcessor.from_pretrained(path(name)))
    where = f"{reader.size} held-out images, {reader.source.question!r}"
    return [Number(name, "questions answered", answered(model, reader), 0.9, where)]


_MEASURES: dict[str, Callable[[str, Any, str | None], list[Number]]] = {
    "causal-lm": _language,
    "image-classification": _classifier,
    "denoising": _diffusion,
    "image-text": _vision_language,
}


def _recipe(name: str) -> Any:
    from ..train.recipe import load_recipe

    return load_recipe(recipe(name))


def held_out(name: str, model: Any, processor: Any = None) -> Any:
    """The images of a checkpoint's recipe that it was not trained on."""
    from ..train.images import open_source

    values = _recipe(name)
    task, source = values.model.task, values.data.train[0]
    reader = open_source(source, task=task, processor=processor, model_config=model.config, seed=values.seed)
    return reader.split(values.data.held_out)[1]


def _text(number: Number, value: float) -> str:
    return f"{value:.2f}" if number.smaller else f"{value:.1%}"
