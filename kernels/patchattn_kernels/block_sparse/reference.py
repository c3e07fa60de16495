"""Attention to listed blocks of keys in torch: the specification, and the path every device can run.

Tokens are addressed by *rank*, their place among the real tokens of their row: blocks are cut by rank, so that padding
changes nothing. A list belongs to one block of queries of one head. All lists are taken together, those of like length
side by side, and the keys they name are gathered: what no list names is never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ELEMENTS = 1 << 20  # scores held at a time, unless one list has more


@dataclass(frozen=True)
class Grid:
    """Where the tokens of a call stand in blocks. `[B or 1]` each, or a number that is the same for all rows.

    Attributes:
        starts: the first real key.
        real: how many real keys there are.
        first: the rank of the call's first query; negative for padding.
        first_block: the block of the call's first real query.
    """

    starts: Tensor
    real: Tensor
    first: Tensor
    first_block: Tensor
    block: tuple[int, int]
    queries: int
    keys: int
    rows: int  # blocks of queries
    columns: int  # blocks of keys

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, rows: int, starts: Tensor | None, ends: Tensor | None, block: tuple[int, int]
    ) -> Grid:
        queries, keys = q.shape[2], k.shape[2]
        start = torch.zeros(1, dtype=torch.long, device=q.device) if starts is None else starts.long()
        real = (torch.full_like(start, keys) if ends is None else ends.long()) - start
        first = real - queries
        return cls(start, real, first, first.clamp(min=0) // block[0], block, queries, keys, rows, -(-keys // block[1]))

    def cut_queries(self, x: Tensor) -> Tensor:
        """`[B, H, T, D]` to `[B, H, N * block, D]`, zeros where there is no token."""
        return _shifted(x, self.first_block * self.block[0] - self.first, self.rows * self.block[0])

    def joined_queries(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The way back; `fill` for padding."""
        return _shifted(x, self.first - self.first_block * self.block[0], self.queries, fill=fill)

    def cut_keys(self, x: Tensor) -> Tensor:
        """`[B, G, S, D]` to `[B, G, (M + 1) * block, D]`; the last block is empty, for what lists do not fill."""
        return _shifted(x, self.starts, (self.columns + 1) * self.block[1], self.real)

    def joined_keys(self, x: Tensor) -> Tensor:
        return _shifted(x, -self.starts, self.keys)


def _shifted(x: Tensor, shift: Tensor, length: int, stop: Tensor | None = None, fill: float = 0.0) -> Tensor:
    """`x[b, :, place + shift[b]]` for `length` places, `fill` where there is no such token or from `stop` on."""
    place = torch.arange(length, device=x.device)
    source = place + shift[:, None]  # [B or 1, length]
    there = (source >= 0) & (source < x.shape[2])
    if stop is not None:
        there = there & (place < stop[:, None])
    if len(source) == 1:
        moved = x.index_select(2, source[0].clamp(0, x.shape[2] - 1))
    else:
        index = source.clamp(0, x.shape[2] - 1)[:, None, :, None]
        moved = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
    return moved.masked_fill_(~there[:, None, :, None], fill)


@dataclass(frozen=True)
class Chunk:
    """Lists that are computed together: n of them with c places for key blocks.

    Attributes:
        lists: `[n]`, which ones, among all of the call.
        blocks: `[n * c]`, the key blocks they name, among all of the call.
        keep: `[n, 1, queries or 1, c * block]`, True where a query reads a key.
        heads: `[n, heads of a list]`, the query heads they belong to.
    """

    lists: Tensor
    blocks: Tensor
    keep: Tensor
    heads: Tensor


class Lists:
    """All lists of a call in one row, batch by batch, head by head, block by block of queries."""

    def __init__(self, q: Tensor, k: Tensor, counts: Tensor, indices: Tensor, grid: Grid, causal: bool) -> None:
        batch, heads, groups = q.shape[0], q.shape[1], k.shape[1]
        self.grid, self.causal, self.batch = grid, causal, batch
        self.owners = heads if counts.shape[1] == heads else groups  # each with lists of its own
        self.members = heads // self.owners  # query heads that share a list
        self.group = self.owners // groups
        shape = (batch, self.owners, grid.rows)
        self.counts = counts.expand(shape).flatten()
        self.indices = indices.expand(*shape, -1).flatten(0, 2)

    def queries(self, x: Tensor) -> Tensor:
        """`[B, H, T, D]` by list: `[lists, members * block, D]`."""
        cut = self.grid.cut_queries(x).unflatten(2, (-1, self.grid.block[0])).unflatten(1, (-1, self.members))
        return cut.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def joined_queries(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The way back."""
        cut = x.unflatten(0, (self.batch, self.owners, -1)).unflatten(3, (self.members, -1))
        return self.grid.joined_queries(cut.transpose(2, 3).flatten(3, 4).flatten(1, 2), fill)

    def keys(self, x: Tensor) -> Tensor:
        """`[B, G, S, D]` by block: `[blocks, block, D]`."""
        return self.grid.cut_keys(x).unflatten(2, (-1, self.grid.block[1])).flatten(0, 2)

    def joined_keys(self, x: Tensor) -> Tensor:
        return self.grid.joined_keys(x.unflatten(0, (self.batch, -1, self.grid.columns + 1)).flatten(2, 3))

    def chunks(self) -> Iterator[Chunk]:
        """The lists that name something, the longest first."""
        grid, (block_q, block_k) = self.grid, self.grid.block
        place, inside = (
            torch.arange(block_q, device=self.counts.device),
            torch.arange(block_k, device=self.counts.device),
        )
        order = self.counts.argsort(descending=True)
        lengths, taken = self.counts[order].tolist(), 0
        while taken < len(lengths) and lengths[taken]:
            most = lengths[taken]
            stop = taken + max(1, ELEMENTS // (self.members * block_q * most * block_k))
            lists = order[taken:stop]
            taken = stop
            owner, row = lists // grid.rows, lists % grid.rows
            batch, head = owner // self.owners, owner % self.owners
            named = torch.arange(most, device=lists.device) < self.counts[lists, None]
            index = self.indices[lists, :most].long()  # [n, c]
            index = index.where(named & (index < grid.columns), grid.columns)
            key_rank = (index[:, :, None] * block_k + inside).flatten(1)[:, None, None]
            keep = key_rank < _of(grid.real, batch)
            if self.causal:
                query_rank = (_of(grid.first_block, batch) + row[:, None, None, None]) * block_q + place[:, None]
                keep = keep & (key_rank <= query_rank)
            kv_head = batch * (self.owners // self.group) + head // self.group
            blocks = (kv_head[:, None] * (grid.columns + 1) + index).flatten()
            heads = head[:, None] * self.members + torch.arange(self.members, device=lists.device)
            yield Chunk(lists, blocks, keep, heads)


def _of(values: Tensor, batch: Tensor) -> Tensor:
    """Each list's own of `[B or 1]` values."""
    return (values[batch] if len(values) > 1 else values)[:, None, None, None]


def _scores(q: Tensor, k: Tensor, members: int, keep: Tensor, scale: float, softcap: float | None) -> Tensor:
    """`[n, members, queries, keys]`, -inf where masked."""
    scores = (q * scale @ k.mT).unflatten(1, (members, -1))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill_(~keep, float("-inf"))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def block_sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    sinks: Tensor | None,
    block: tuple[int, int],
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each row's sum of weights; +inf where nothing was read."""
    grid = Grid.of(q, k, counts.shape[2], starts, ends, block)
    lists = Lists(q, k, counts, indices, grid, causal)
    queries, keys, values = lists.queries(q), lists.keys(k), lists.keys(v)
    out = queries.new_zeros(*queries.shape[:2], v.shape[3])
    lse = queries.new_full(queries.shape[:2], float("inf"), dtype=_wide(q[:0]).dtype)
    for chunk in lists.chunks():
        tile = (len(chunk.lists), -1, q.shape[3])
        scores = _scores(_wide(queries[chunk.lists]), _wide(keys[chunk.blocks]).view(tile), lists.members, chunk.keep,
                         scale, softcap)  # fmt: skip
        top = scores.amax(dim=-1)
        if sinks is not None:
            logits = sinks.to(top.dtype)[chunk.heads][..., None]  # [n, members, 1]
            top = torch.maximum(top, logits)
        nothing = top == float("-inf")
        top = top.masked_fill(nothing, 0.0)
        weights = scores.sub_(top[..., None]).exp_()
        total = weights.sum(dim=-1)
        if sinks is not None:
            total = total + (logits - top).exp()
        total = total.masked_fill(nothing, 1.0)
        found = weights.flatten(1, 2) @ _wide(values[chunk.blocks]).view(len(chunk.lists), -1, v.shape[3])
        out[chunk.lists] = (found / total.flatten(1)[..., None]).to(out.dtype)
        lse[chunk.lists] = (top + total.log()).masked_fill(nothing, float("inf")).flatten(1)
    return lists.joined_queries(out), lists.joined_queries(lse[..., None], float("inf"))[..., 0]


def block_sparse_backward_reference(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block: tuple[int, int],
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and `sum(out * d_out)` of each row."""
    grid = Grid.of(q, k, counts.shape[2], starts, ends, block)
    lists = Lists(q, k, counts, indices, grid, causal)
    delta = (_wide(out) * _wide(d_out)).sum(dim=-1)
    queries, keys, values, upstream = lists.queries(q), lists.keys(k), lists.keys(v), lists.queries(d_out)
    deltas, totals = (lists.queries(x[..., None])[..., 0] for x in (delta, lse))
    dq, dk, dv = (torch.zeros_like(x, dtype=delta.dtype) for x in (queries, keys, values))
    for chunk in lists.chunks():
        n = len(chunk.lists)
        here, d_here = _wide(queries[chunk.lists]), _wide(upstream[chunk.lists])
        there, value = (_wide(x[chunk.blocks]).view(n, -1, x.shape[2]) for x in (keys, values))
        scores = _scores(here, there, lists.members, chunk.keep, scale, softcap).flatten(1, 2)
        weights = (scores - totals[chunk.lists, :, None]).exp()
        d_scores = weights * (d_here @ value.mT - deltas[chunk.lists, :, None])
        if softcap is not None:
            d_scores = d_scores * (1 - (scores.masked_fill(weights == 0, 0.0) / softcap).square())
        dq[chunk.lists] = d_scores @ there * scale
        dk.index_add_(0, chunk.blocks, (d_scores.mT @ here * scale).view(-1, *keys.shape[1:]))
        dv.index_add_(0, chunk.blocks, (weights.mT @ d_here).view(-1, *values.shape[1:]))
    return (lists.joined_queries(dq).to(q.dtype), lists.joined_keys(dk).to(k.dtype),
            lists.joined_keys(dv).to(v.dtype), delta)  # fmt: skip


def block_maxima_reference(
    q: Tensor,
    k: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    sinks: Tensor | None,
    block: tuple[int, int],
    rows: int,
    causal: bool,
    shared: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Some blocks of queries at a time, all their scores; the logarithm of a weight is a score less its row's sum."""
    grid = Grid.of(q, k, rows, starts, ends, block)
    block_q, block_k = block
    batch, groups, columns = q.shape[0], k.shape[1], grid.columns
    members = q.shape[1] // groups
    queries = grid.cut_queries(q).unflatten(1, (groups, members))  # [B, G, members, N * block, D]
    keys = grid.cut_keys(k)[:, :, : columns * block_k]
    wide = _wide(q[:0]).dtype
    maxima = q.new_zeros(batch, groups, 1 if shared else members, rows, columns, dtype=wide)
    step = max(1, ELEMENTS // (block_q * keys.shape[2]))  # blocks of queries; heads come on top
    key_rank = torch.arange(keys.shape[2], device=q.device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        place = torch.arange(first * block_q, last * block_q, device=q.device)
        query_rank = (grid.first_block[:, None] * block_q + place)[:, None, None, :, None]  # [B or 1, 1, 1, t, 1]
        real = grid.real[:, None, None, None, None]
        reach = min(columns, int(query_rank.max()) // block_k + 1) if causal else columns
        seen = key_rank[: reach * block_k]
        keep = (seen < real) & (query_rank < real) & (query_rank >= grid.first[:, None, None, None, None])
        if causal:
            keep = keep & (seen <= query_rank)
        for group in range(groups):
            here = _wide(queries[:, group, :, place])  # [B, members, t, D]
            scores = here * scale @ _wide(keys[:, group, None, : reach * block_k]).mT
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~keep[:, 0], float("-inf"))
            total = scores.logsumexp(dim=-1, keepdim=True)
            if sinks is not None:
                logits = sinks.to(wide).view(groups, members, 1, 1)[group]
                total = torch.logaddexp(total, logits)
            logged = scores.sub_(total.masked_fill(total == float("-inf"), 0.0))
            tiles = logged.unflatten(3, (reach, block_k)).unflatten(2, (last - first, block_q)).amax(dim=(3, 5))
            tiles = tiles.exp()  # [B, members, n, reach]
            maxima[:, group, :, first:last, :reach] = tiles.amax(dim=1, keepdim=True) if shared else tiles
    return maxima.flatten(1, 2)
