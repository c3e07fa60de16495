"""What `python -m patchattn_kernels.check` checks of `grouped`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..check import Case
from . import IMAGE, IMAGE_SINK, PADDING, REST, TEXT_SINK, Rule, grouped, redistribute


@dataclass(frozen=True)
class Sizes:
    """A call: an image that is a third of the keys, with a few sinks in it and others outside.

    Attributes:
        queries: the last of `keys` tokens.
        images: how many there are, side by side.
        padding: of each row, on the left.
        gate: a factor "a head" or "an element", or none.
        rule: when and how much is moved; None: nothing.
    """

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    size: int
    images: int = 1
    padding: tuple[int, ...] = ()
    gate: str | None = None
    rule: Rule | None = None
    causal: bool = True
    static: bool = False

    @property
    def label(self) -> str:
        shape = f"B{self.batch} H{self.heads}/{self.groups} T{self.queries} S{self.keys} D{self.size}"
        more = [f"{self.images} images" if self.rule else "plain"]
        more += [f"padding {self.padding}"] if self.padding else []
        more += [f"a gate {self.gate}"] if self.gate else []
        more += ["static"] if self.static else []
        return ", ".join([shape, *more] + ([] if self.causal else ["not causal"]))

    def tensors(self, generator: torch.Generator) -> dict[str, Any]:
        device = generator.device

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        made: dict[str, Any] = {"q": random(self.batch, self.heads, self.queries, self.size)}
        made |= {name: random(self.batch, self.groups, self.keys, self.size) for name in "kv"}
        kinds = torch.full((self.batch, self.keys), REST, dtype=torch.int8)
        width = self.keys // (3 * self.images)
        for index in range(self.images):
            start = self.keys // 6 + index * (width + 3)
            kinds[:, start : start + width] = IMAGE
            kinds[:, start + index : start + width : 7] = IMAGE_SINK
        kinds[:, [0, self.keys // 8, -2]] = TEXT_SINK
        kinds[-1, self.keys // 6 + 1] = TEXT_SINK  # rows differ
        for row, pads in enumerate(self.padding):
            kinds[row, :pads] = PADDING
        image = (kinds == IMAGE) | (kinds == IMAGE_SINK)
        counts = image.cumsum(dim=1).where(~image, 0)[:, self.keys - self.queries :]
        made |= {"kinds": kinds.to(device), "images": counts.to(device)}
        if self.gate is not None:
            made["gate"] = random(self.batch, self.heads, self.queries, self.size if self.gate == "an element" else 1)
        return made

    def run(self, q: Tensor, k: Tensor, v: Tensor, kinds: Tensor, images: Tensor, gate: Tensor | None = None) -> Tensor:
        past: Any = self.keys - self.queries
        if self.static:  # places that are not written yet
            past = torch.tensor(past, device=q.device)
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 9), value=7.0) for x in (k, v))
            kinds = torch.nn.functional.pad(kinds, (0, 9))
        known: dict[str, Any] = dict(images=images, rule=self.rule) if self.rule else {}
        given = kinds if self.rule or self.padding else None
        return grouped(q, k, v, given, **known, past=past, causal=self.causal, gate=gate)[0]

    def formula(
        self, q: Tensor, k: Tensor, v: Tensor, kinds: Tensor, images: Tensor, gate: Tensor | None = None
    ) -> Tensor:
        group = self.heads // self.groups
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        place = torch.arange(self.queries, device=q.device)[:, None] + self.keys - self.queries
        keep = (
            (kinds != PADDING)[:, None, None]
            if self.rule or self.padding
            else torch.ones_like(kinds[:, None, None]) > 0
        )
        if self.causal:
            keep = keep & (torch.arange(self.keys, device=q.device) <= place)
        weights = (q @ k.mT * self.size**-0.5).masked_fill(~keep, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
        if self.rule:
            # Which rows are changed is decided in wide numbers: near a threshold rounding would.
            sure = weights.double() if q.dtype == torch.float64 else _wide(q, k, keep, self.size)
            factor = redistribute(sure, kinds, images, self.rule)[0] / sure
            weights = weights * factor.nan_to_num(0.0).to(weights.dtype)
        out = weights @ v
        return out if gate is None else out * gate


def _wide(q: Tensor, k: Tensor, keep: Tensor, size: int) -> Tensor:
    scores = q.double() @ k.double().mT * size**-0.5
    return scores.masked_fill(~keep, float("-inf")).softmax(dim=-1).nan_to_num(0.0)


RULE, ALL = Rule(recycle=0.6, non_sink_min=0.5, min_visual=0.15), Rule(recycle=1.0, non_sink_min=0.0, min_visual=0.0)
PROMPTS = (
    Sizes(1, 2, 2, 45, 45, 16, rule=RULE),
    Sizes(2, 4, 2, 67, 67, 32, images=2, padding=(0, 9), rule=RULE),
    Sizes(2, 2, 1, 37, 75, 40, padding=(31, 0), rule=ALL),
    Sizes(1, 3, 1, 61, 61, 64),
    Sizes(2, 2, 2, 33, 50, 48, padding=(0, 20)),
    Sizes(1, 2, 1, 29, 29, 16, causal=False),
)
GATED = (
    Sizes(1, 2, 1, 37, 37, 32, gate="a head"),
    Sizes(2, 2, 1, 21, 40, 24, padding=(0, 7), gate="an element", rule=RULE),
)
STEPS = (
    Sizes(2, 4, 2, 1, 90, 32, images=2, rule=RULE),
    Sizes(1, 6, 1, 1, 150, 64, padding=(11,), rule=ALL, gate="a head"),
    Sizes(2, 2, 2, 1, 33, 40),
    Sizes(1, 4, 2, 1, 70, 16, rule=RULE, static=True),
)


def _case(name: str, sizes: Sizes, gradients: tuple[str, ...] = ()) -> Case:
    return Case(f"{name} {sizes.label}", sizes.tensors, sizes.run, sizes.formula, gradients)


CASES = (
    *(_case("prompt", sizes, ("q", "k", "v")) for sizes in PROMPTS),
    *(_case("gate", sizes) for sizes in GATED),
    *(_case("gate", sizes, ("q", "k", "v", "gate")) for sizes in GATED[:1]),
    *(_case("step", sizes) for sizes in STEPS),
)
