"""What the models of images learned, on held-out images: classes, drawings, answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..train.images import ImageReader, collate, fit, image_shape
from ..train.packing import IGNORED
from .text import evaluating

BATCH = 64


@torch.no_grad()
def classified(model: Any, reader: ImageReader) -> float:
    """Share of the reader's images whose class a classifier finds."""
    right = 0
    with evaluating(model):
        for batch in _batches(reader, "image-classification"):
            right += int((model(pixel_values=batch["pixel_values"]).logits.argmax(dim=-1) == batch["labels"]).sum())
    return right / reader.size


@torch.no_grad()
def draw(
    model: Any, schedule: Any, classes: Tensor, *, steps: int = 25, guidance: float = 2.0, seed: int = 0
) -> Tensor:
    """Images of these classes, `[N, channels, height, width]` from 0 to 1, by a class-conditional diffusion model.

    Args:
        schedule: the noise schedule that the model was trained with.
        steps: of DPM-Solver++ (Lu et al., 2022, arXiv 2211.01095).
        guidance: how far to go beyond the image without a class (Ho and Salimans, 2022, arXiv 2207.12598); 1: not.
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(schedule.config)
    scheduler.set_timesteps(steps)
    config = model.config
    shape = (len(classes), config.in_channels, config.sample_size, config.sample_size)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    none = torch.full_like(classes, config.num_embeds_ada_norm)
    with evaluating(model):
        for step in scheduler.timesteps:
            both = {"timestep": step.expand(2 * len(classes)), "class_labels": torch.cat([classes, none])}
            noise = model(torch.cat([image, image]), **both).sample[:, : config.in_channels]
            asked, unasked = noise.chunk(2)
            image = scheduler.step(unasked + guidance * (asked - unasked), step, image).prev_sample
    return (image.clamp(-1, 1) + 1) / 2


@torch.no_grad()
def recognised(images: Tensor, classes: Tensor, classifier: Any) -> float:
    """Share of images, from 0 to 1, that a classifier of real images assigns to these classes."""
    shape = image_shape(classifier.config)
    with evaluating(classifier):
        seen = classifier(pixel_values=torch.stack([fit(image, shape) for image in images]) * 2 - 1)
    return float((seen.logits.argmax(dim=-1) == classes).float().mean())


@torch.no_grad()
def answered(model: Any, reader: ImageReader) -> float:
    """Share of the reader's images about which a vision-language model writes the right answer, and ends there."""
    right = 0
    with evaluating(model):
        for batch in _batches(reader, "image-text"):
            right += int(_answers(model, batch).sum())
    return right / reader.size


def _answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """For each row, whether greedy decoding writes the labelled tokens. The question is the same in every row."""
    start = int((batch["labels"][0] == IGNORED).sum())
    wanted = batch["labels"][:, start:]
    prompt = batch["input_ids"][:, :start]
    written = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=batch["pixel_values"], do_sample=False,
        max_new_tokens=wanted.shape[1],
    )[:, start:]  # fmt: skip
    written = functional.pad(written, (0, wanted.shape[1] - written.shape[1]), value=IGNORED)  # all may end early
    return ((written == wanted) | (wanted == IGNORED)).all(dim=1)


def _batches(reader: ImageReader, task: str) -> Iterator[dict[str, Tensor]]:
    for first in range(0, reader.size, BATCH):
        yield collate(task)([reader.sample(index, 0) for index in range(first, min(first + BATCH, reader.size))])
