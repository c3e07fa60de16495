"""What each task feeds its model, what it reads from it, and what its own loss is.

causal-lm             tokens -> next tokens
image-text            tokens and images -> next tokens
image-classification  images -> classes
denoising             noisy images, time and class -> noise (diffusers)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
Batch = Mapping[str, Tensor]


class Task:
    """Language modelling, and the base of the others."""

    names: ClassVar[tuple[str, ...]] = ("causal-lm", "image-text")
    token_level: ClassVar[bool] = True

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is called with."""
        return {**{name: value for name, value in batch.items() if name != "labels"}, "use_cache": False}

    def prediction(self, outputs: Any) -> Tensor:
        """Logits `[B, T, V]` or `[B, classes]`, or the predicted noise."""
        return outputs.logits

    def count(self, batch: Batch) -> int | None:
        """Targets in a batch, which its losses are divided by."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def size(self, batch: Batch) -> int:
        """Tokens or images in a batch, without padding."""
        if not self.token_level:
            return len(next(iter(batch.values())))
        mask = batch.get("attention_mask")
        return batch["input_ids"].numel() if mask is None else int(mask.sum())

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """The sum over all targets of a batch."""
        labels = batch["labels"][:, 1:].flatten()
        logits = prediction[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")

    def targets(self, batch: Batch, on: str | int) -> Tensor | None:
        """`[B, T]`, True for the tokens whose predictions are distilled; None: everything."""
        if on == "labelled":
            return functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        real = batch.get("attention_mask")
        if isinstance(on, int):
            places = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
            chosen = (places >= len(places) - on).expand_as(batch["input_ids"])
            return chosen if real is None else chosen & real.bool()
        return None if real is None else real.bool()


class Classification(Task):
    names = ("image-classification",)
    token_level = False

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"]}

    def count(self, batch: Batch) -> int | None:
        return len(batch["labels"])

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(prediction.float(), batch["labels"], reduction="sum")

    def targets(self, batch: Batch, on: str | int) -> Tensor | None:
        return None


class Denoising(Task):
    """Noise prediction of a diffusers model; time steps and noise come with the data, so that they are repeatable."""

    names = ("denoising",)
    token_level = False

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def inputs(self, batch: Batch) -> dict[str, Any]:
        noisy = self.scheduler.add_noise(batch["sample"], batch["noise"], batch["timestep"])
        return {"hidden_states": noisy, "timestep": batch["timestep"], "class_labels": batch["class_labels"]}

    def prediction(self, outputs: Any) -> Tensor:
        return outputs.sample

    def count(self, batch: Batch) -> int | None:
        return batch["sample"].numel()

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        channels = batch["noise"].shape[1]  # a model may also predict the variance
        return (prediction[:, :channels].float() - batch["noise"].float()).square().sum()

    def targets(self, batch: Batch, on: str | int) -> Tensor | None:
        return None


def task_of(name: str, scheduler: Any = None) -> Task:
    if name in Denoising.names:
        return Denoising(scheduler)
    return Classification() if name in Classification.names else Task()
