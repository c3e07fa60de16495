"""What the check asks of `sink_window` and `sink_window_decode`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..check import Case
from . import Tier, sink_window, sink_window_decode, visible
from .reference import EVERYTHING


@dataclass(frozen=True)
class Sizes:
    """One call; `padding` of each row, `past` tokens before the call, and what else is special."""

    batch: int
    heads: int
    full_heads: tuple[bool, ...]
    length: int
    size: int
    sink: int
    recent: int
    padding: tuple[int, ...] = ()
    past: int = 0
    full_ranks: bool = True
    chunked: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def label(self) -> str:
        said = {name: value for name, value in asdict(self).items() if name != "full_heads" and value not in ((), None)}
        if not self.past:
            del said["past"], said["full_ranks"]
        kinds = "".join("f" if full else "s" for full in self.full_heads)
        return f"{kinds} " + " ".join(f"{name}={value}" for name, value in said.items() if value is not False)

    @property
    def groups(self) -> int:
        return len(self.full_heads)

    def tensors(self, generator: torch.Generator) -> dict[str, Any]:
        """q, k, v of past and call together, ranks `[B, past + T]`, and sink logits."""
        device, total = generator.device, self.past + self.length
        shapes = {"q": (self.heads, total), "k": (self.groups, total), "v": (self.groups, total)}
        made: dict[str, Any] = {
            name: torch.randn(self.batch, heads, tokens, self.size, generator=generator, device=device)
            for name, (heads, tokens) in shapes.items()
        }
        pads = torch.tensor(self.padding or (0,) * self.batch, device=device)
        made["rank"] = (torch.arange(total, device=device)[None] - pads[:, None]).clamp(min=-1)
        made["sinks"] = torch.randn(self.heads, generator=generator, device=device) if self.sinks else None
        return made

    def formula(self, q: Tensor, k: Tensor, v: Tensor, rank: Tensor, sinks: Tensor | None) -> Tensor:
        """All tokens at once, spelled out; the rows of this call."""
        group = self.heads // self.groups
        reach = [(0, EVERYTHING) if full or self.chunked else (self.sink, self.recent) for full in self.full_heads]
        keep = torch.cat([visible(rank, rank, *one) for one in reach for _ in range(group)], dim=1)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.mT * (self.size**-0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        logits = torch.full((1, self.heads, 1, 1), float("-inf")).to(q) if sinks is None else sinks[None, :, None, None]
        scores = torch.cat([scores.masked_fill(~keep, float("-inf")), logits.expand(*scores.shape[:3], 1)], dim=-1)
        return (scores.softmax(dim=-1).nan_to_num(0.0)[..., :-1] @ v)[:, :, self.past :]

    def options(self) -> dict[str, Any]:
        return dict(sink=self.sink, recent=self.recent, full_heads=self.full_heads, scale=self.scale,
                    softcap=self.softcap)  # fmt: skip

    def tiers(self, k: Tensor, v: Tensor, rank: Tensor, seen: int) -> dict[bool, Tier | None]:
        """Full heads with every token; streaming ones with `seen` tokens less those that no query reads, disordered."""
        full, streaming = ([i for i, flag in enumerate(self.full_heads) if flag == kind] for kind in (True, False))
        needed = (rank[:, :seen] < self.sink) | (rank[:, :seen] >= rank[:, -1:] - self.length - self.recent)
        kept = (needed & (rank[:, :seen] >= 0)).any(dim=0).nonzero()[:, 0].flip(0)
        # A ring's empty places: no rank, and values that must not count.
        holes = torch.full((*k.shape[:2], 3, self.size), 7.0).to(k)
        ranks = torch.cat([rank[:, kept], rank.new_full((self.batch, 3), -1)], dim=1)
        keys, values = (torch.cat([x[:, :, kept], holes], dim=2)[:, streaming] for x in (k, v))
        ring = Tier(keys, values, ranks)
        return {True: Tier(k[:, full], v[:, full], rank if self.full_ranks else None) if full else None,
                False: ring if streaming else None}  # fmt: skip

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, rank: Tensor, sinks: Tensor | None) -> Tensor:
        cut = self.past
        options = self.options() | {"sinks": sinks, "chunked": self.chunked}
        if not cut:
            return sink_window(q, k, v, rank if self.padding else None, **options)
        tiers = self.tiers(k, v, rank, cut)
        if self.chunked:  # every earlier token counts, so every one is kept
            streaming = [index for index, flag in enumerate(self.full_heads) if not flag]
            tiers[False] = Tier(k[:, streaming, :cut], v[:, streaming, :cut], rank[:, :cut])
        return sink_window(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], rank[:, cut:], past=tiers[False],
                           full=tiers[True], **options)  # fmt: skip

    def decode(self, q: Tensor, k: Tensor, v: Tensor, rank: Tensor, sinks: Tensor | None) -> Tensor:
        tiers = self.tiers(k, v, rank, rank.shape[1])
        return sink_window_decode(q[:, :, self.past :], rank[:, self.past :], kept=tiers[False], full=tiers[True],
                                  sinks=sinks, **self.options())  # fmt: skip


STREAMING, BOTH = (False, False), (False, True)
PROMPTS = (
    Sizes(1, 2, STREAMING, 77, 16, sink=4, recent=16),
    Sizes(2, 4, BOTH, 67, 64, sink=3, recent=20, padding=(0, 29)),
    Sizes(1, 1, (True,), 70, 40, sink=1, recent=1, scale=0.3, softcap=2.0),
    Sizes(1, 3, (False,), 61, 32, sink=0, recent=7, padding=(5,), sinks=True),
    Sizes(1, 2, (False,), 45, 64, sink=9, recent=1),
    Sizes(3, 2, BOTH, 33, 48, sink=2, recent=64, padding=(0, 33, 7), softcap=5.0, sinks=True),
)
PARTS = (
    Sizes(2, 4, STREAMING, 1, 32, sink=4, recent=12, past=40),
    Sizes(1, 3, (*BOTH, False), 19, 32, sink=4, recent=12, past=23, full_ranks=False, sinks=True),
    Sizes(2, 4, BOTH, 37, 16, sink=4, recent=12, past=23, padding=(0, 11), softcap=3.0),
    Sizes(2, 2, BOTH, 37, 16, sink=4, recent=12, past=23, padding=(0, 30)),
    Sizes(1, 2, BOTH, 20, 16, sink=2, recent=4, past=23, chunked=True),
)
STEPS = (
    Sizes(2, 4, STREAMING, 1, 32, sink=4, recent=12, past=40, padding=(0, 9)),
    Sizes(1, 6, (*BOTH, False), 1, 64, sink=4, recent=12, past=150, full_ranks=False, scale=0.2, softcap=2.0),
    Sizes(2, 6, (*BOTH, False), 1, 40, sink=4, recent=12, past=80, padding=(0, 50), sinks=True),
    Sizes(2, 4, (True,), 1, 16, sink=1, recent=1, past=33, padding=(34, 0)),
)


def _case(name: str, sizes: Sizes, run: Any, gradients: tuple[str, ...] = ()) -> Case:
    if sizes.sinks and gradients:
        gradients = (*gradients, "sinks")
    return Case(f"{name} {sizes.label}", sizes.tensors, run, sizes.formula, gradients)


CASES = (
    *(_case("prompt", sizes, sizes.prefill, ("q", "k", "v")) for sizes in PROMPTS),
    *(_case("part", sizes, sizes.prefill) for sizes in PARTS),
    *(_case("step", sizes, sizes.decode) for sizes in STEPS),
)
