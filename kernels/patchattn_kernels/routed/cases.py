"""What the check asks of `routed`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..check import Case
from . import routed


@dataclass(frozen=True)
class Sizes:
    """One call; `on` is the share of pairs that are computed, `past` the tokens before the queries."""

    batch: int
    heads: int
    groups: int
    length: int
    size: int
    on: float
    past: int = 0
    padding: tuple[int, ...] = ()
    causal: bool = True
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    heads_off: int = 0  # the first heads, which compute nothing

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value not in ((), None, False))

    def tensors(self, generator: torch.Generator) -> dict[str, Any]:
        def random(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=generator, device=generator.device)

        total = self.past + self.length
        chosen = torch.rand(self.batch, self.heads, self.length, generator=generator, device=generator.device) < self.on
        chosen[:, : self.heads_off] = False
        return {
            "q": random(self.heads, self.length, self.size),
            "k": random(self.groups, total, self.size),
            "v": random(self.groups, total, self.size),
            "weights": (0.5 + random(self.heads, self.length).abs()) * chosen,
            "starts": torch.tensor(self.padding, device=generator.device) if self.padding else None,
            "sinks": random(self.heads)[0] if self.sinks else None,
        }

    def run(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, **others: Any) -> Tensor:
        return routed(q, k, v, weights, causal=self.causal, scale=self.scale, softcap=self.softcap, **others)

    def formula(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, starts: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """Every pair, times its weight."""
        group = self.heads // self.groups
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        key = torch.arange(k.shape[2], device=q.device)
        place = key[self.past :, None]
        first = torch.zeros(self.batch, device=q.device) if starts is None else starts
        keep = (key >= first[:, None, None]) & (place >= first[:, None, None])
        keep = (keep & (key <= place) if self.causal else keep)[:, None]
        scores = q @ k.mT * (self.size**-0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        logits = torch.full((1, self.heads, 1, 1), float("-inf")).to(q) if sinks is None else sinks[None, :, None, None]
        scores = torch.cat([scores.masked_fill(~keep, float("-inf")), logits.expand(*scores.shape[:3], 1)], dim=-1)
        shares = scores.softmax(dim=-1).nan_to_num(0.0)[..., :-1]
        seen = (weights != 0) & keep.any(dim=-1)
        # 0 for what is not chosen, in the gradient of the weights too
        return shares @ v * weights.masked_fill(~seen, 0)[..., None]


PARTS = (
    Sizes(1, 2, 2, 77, 16, on=0.5),
    Sizes(2, 4, 2, 67, 64, on=0.3, padding=(0, 29)),
    Sizes(1, 3, 1, 70, 40, on=1.0, scale=0.3, softcap=2.0),
    Sizes(1, 4, 4, 45, 32, on=0.6, causal=False, heads_off=2),
    Sizes(2, 2, 1, 33, 32, on=0.5, padding=(33, 7), causal=False),
    Sizes(2, 4, 2, 19, 48, on=0.5, past=37, padding=(0, 40), sinks=True),
    Sizes(1, 2, 2, 40, 64, on=1.0, heads_off=1),
    Sizes(2, 4, 2, 1, 16, on=0.5, past=40),
)
STEPS = (
    Sizes(2, 8, 4, 1, 64, on=0.4, past=90, padding=(0, 50)),
    Sizes(1, 8, 2, 1, 40, on=0.6, past=300, softcap=3.0, sinks=True, heads_off=4),
    Sizes(2, 2, 2, 1, 32, on=1.0, past=17, padding=(18, 3), scale=0.4),
)


def _case(name: str, sizes: Sizes, gradients: tuple[str, ...]) -> Case:
    return Case(f"{name} {sizes.label}", sizes.tensors, sizes.run, sizes.formula, gradients)


CASES = (
    *(_case("part", sizes, ("q", "k", "v", "weights") + ("sinks",) * sizes.sinks) for sizes in PARTS),
    *(_case("step", sizes, ()) for sizes in STEPS),
)
