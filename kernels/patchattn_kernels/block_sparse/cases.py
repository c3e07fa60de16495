"""What the check asks of `block_sparse`, `block_sparse_decode` and `block_maxima`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..check import Case
from . import BlockLists, block_maxima, block_sparse, block_sparse_decode, list_rows


@dataclass(frozen=True)
class Sizes:
    """One call; `owners` lists of heads, `padding` before each row and `unfilled` keys behind it."""

    batch: int
    heads: int
    groups: int
    owners: int
    queries: int
    keys: int
    size: int
    block: tuple[int, int]
    causal: bool = True
    padding: tuple[int, ...] = ()
    unfilled: tuple[int, ...] = ()
    density: float = 0.5
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    shared: bool = False

    @property
    def label(self) -> str:
        said = {name: value for name, value in asdict(self).items() if value not in ((), None)}
        return " ".join(f"{name}={value}" for name, value in said.items() if value is not False)

    @property
    def rows(self) -> int:
        return list_rows(self.queries, self.keys, self.block[0], moved=bool(self.padding), cut=bool(self.unfilled))

    def tensors(self, generator: torch.Generator) -> dict[str, Any]:
        """q, k, v, lists of random blocks, and where rows start and end."""
        device, shapes = generator.device, {"q": (self.heads, self.queries), "k": (self.groups, self.keys)}
        shapes["v"] = shapes["k"]
        made: dict[str, Any] = {
            name: torch.randn(self.batch, *shape, self.size, generator=generator, device=device)
            for name, shape in shapes.items()
        }
        shape = (self.batch, self.owners, self.rows, -(-self.keys // self.block[1]))
        mask = torch.rand(shape, generator=generator, device=device) < self.density
        mask[:, :, 1:2] = False  # lists that name nothing
        made["lists"] = BlockLists.from_mask(mask)
        made["starts"] = torch.tensor(self.padding, device=device) if self.padding else None
        made["ends"] = self.keys - torch.tensor(self.unfilled, device=device) if self.unfilled else None
        made["sinks"] = torch.randn(self.heads, generator=generator, device=device) if self.sinks else None
        return made

    def ranks(self, starts: Tensor | None, ends: Tensor | None, device: torch.device) -> tuple[Tensor, ...]:
        """Of queries `[B, 1, T, 1]` and keys `[B, 1, 1, S]`, and which keys are real."""
        start = torch.zeros(self.batch, dtype=torch.long, device=device) if starts is None else starts
        end = torch.full_like(start, self.keys) if ends is None else ends
        query = torch.arange(self.queries, device=device) + (end - start - self.queries)[:, None]
        key = torch.arange(self.keys, device=device) - start[:, None]
        real = (key >= 0) & (key < (end - start)[:, None])
        return query[:, None, :, None], key[:, None, None, :], real[:, None, None, :]

    def keep(self, query: Tensor, key: Tensor, real: Tensor) -> Tensor:
        return (query >= 0) & real & ((key <= query) if self.causal else torch.tensor(True))

    def weights(self, q: Tensor, k: Tensor, keep: Tensor, sinks: Tensor | None) -> Tensor:
        """All of them, spelled out."""
        scores = q @ k.repeat_interleave(self.heads // self.groups, 1).mT
        scores = scores * (self.size**-0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        logits = torch.full((1, self.heads, 1, 1), float("-inf")).to(q) if sinks is None else sinks[None, :, None, None]
        scores = torch.cat([scores.masked_fill(~keep, float("-inf")), logits.expand(*scores.shape[:3], 1)], dim=-1)
        return scores.softmax(dim=-1).nan_to_num(0.0)[..., :-1]

    def formula(
        self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, starts: Tensor | None, ends: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        query, key, real = self.ranks(starts, ends, q.device)
        keep = self.keep(query, key, real)
        mask = lists.mask(-(-self.keys // self.block[1])).expand(self.batch, -1, -1, -1)
        mask = mask.repeat_interleave(self.heads // mask.shape[1], dim=1)  # [B, H, N, M]
        block_q, block_k = self.block
        first = query[:, :, :1].clamp(min=0) // block_q
        row = (query.clamp(min=0) // block_q - first).clamp(max=mask.shape[2] - 1)
        column = (key // block_k).clamp(0, mask.shape[3] - 1)
        listed = mask.gather(2, row.expand(-1, self.heads, -1, mask.shape[3]))
        listed = listed.gather(3, column.expand(-1, self.heads, self.queries, -1))
        weights = self.weights(q, k, keep & listed, sinks)
        return weights @ v.repeat_interleave(self.heads // self.groups, 1)

    def options(self) -> dict[str, Any]:
        return dict(scale=self.scale, softcap=self.softcap)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **places: Any) -> Tensor:
        return block_sparse(q, k, v, lists, block=self.block, causal=self.causal, **self.options(), **places)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **places: Any) -> Tensor:
        return block_sparse_decode(q, k, v, lists, block=self.block[1], **self.options(), **places)

    def maxima(self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **places: Any) -> Tensor:
        return block_maxima(q, k, block=self.block, causal=self.causal, shared=self.shared, **self.options(), **places)

    def maxima_formula(
        self, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, starts: Tensor | None, ends: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        query, key, real = self.ranks(starts, ends, q.device)
        weights = self.weights(q, k, self.keep(query, key, real), sinks)
        block_q, block_k = self.block
        found = weights.new_zeros(self.batch, self.heads, self.rows, -(-self.keys // block_k))
        first = query[:, :, :1].clamp(min=0) // block_q
        for row in range(found.shape[2]):
            for column in range(found.shape[3]):
                inside = (query.clamp(min=-1) // block_q - first == row) & (query >= 0) & (key // block_k == column)
                found[:, :, row, column] = weights.masked_fill(~inside, 0.0).amax(dim=(2, 3))
        if self.shared:
            found = found.unflatten(1, (self.groups, -1)).amax(dim=2)
        return found


PROMPTS = (
    Sizes(1, 2, 2, 2, 77, 77, 16, (16, 16)),
    Sizes(2, 2, 1, 2, 49, 49, 32, (32, 16), padding=(0, 29)),
    Sizes(2, 4, 2, 2, 40, 40, 40, (16, 32), padding=(5, 0), scale=0.3, softcap=2.0),
    Sizes(1, 6, 2, 1, 45, 45, 16, (16, 16), sinks=True),
    Sizes(1, 2, 2, 1, 75, 75, 16, (32, 32), causal=False, density=0.8),
    Sizes(2, 3, 3, 3, 20, 45, 16, (16, 16), causal=False, padding=(14, 0), sinks=True, softcap=5.0),
    Sizes(1, 2, 1, 1, 37, 91, 16, (16, 16)),
    Sizes(3, 2, 1, 1, 20, 40, 16, (16, 16), padding=(0, 22, 40), unfilled=(0, 3, 0)),
    Sizes(1, 1, 1, 1, 130, 130, 64, (64, 64)),
    Sizes(1, 1, 1, 1, 150, 150, 32, (128, 128), density=0.8),
)
STEPS = (
    Sizes(2, 4, 2, 2, 1, 83, 32, (1, 16)),
    Sizes(2, 6, 2, 2, 3, 90, 40, (1, 16), padding=(0, 40), unfilled=(7, 2), sinks=True),
    Sizes(1, 4, 1, 4, 2, 150, 16, (1, 64), softcap=2.0, scale=0.2),
    Sizes(2, 4, 4, 1, 1, 200, 64, (1, 32), padding=(150, 3)),
)
MAPS = (
    Sizes(1, 2, 2, 2, 77, 77, 16, (16, 16)),
    Sizes(2, 2, 1, 1, 49, 49, 32, (16, 32), padding=(0, 29), shared=True),
    Sizes(1, 3, 1, 1, 40, 61, 16, (1, 16), shared=True, sinks=True),
    Sizes(2, 2, 1, 1, 33, 45, 40, (16, 32), causal=False, padding=(14, 0), softcap=2.0),
    Sizes(2, 2, 1, 1, 33, 64, 16, (16, 16), padding=(0, 30), unfilled=(5, 0)),
    Sizes(1, 1, 1, 1, 20, 150, 16, (16, 128)),
)


def _trained(sizes: Sizes) -> tuple[str, ...]:
    return ("q", "k", "v", "sinks") if sizes.sinks else ("q", "k", "v")


CASES = (
    *(Case(f"prompt {case.label}", case.tensors, case.attend, case.formula, _trained(case)) for case in PROMPTS),
    *(Case(f"step {case.label}", case.tensors, case.decode, case.formula) for case in STEPS),
    *(Case(f"maxima {case.label}", case.tensors, case.maxima, case.maxima_formula) for case in MAPS),
)
