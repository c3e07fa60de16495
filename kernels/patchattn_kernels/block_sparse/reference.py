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

ELEMENTS = 1 << 18  # scores held at a time, unless one list has more; what a CPU's cache holds


@dataclass(frozen=True)
class Grid:
    """Where the tokens of a call stand in blocks. Tensors are `[B or 1]`.

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


def _shifted(x: Tensor, shift: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """`x[b, :, place + shift[b]]` for `length` places, `fill` where there is no such token."""
    source = torch.arange(length, device=x.device) + shift[:, None]  # [B or 1, length]
    there = (source >= 0) & (source < x.shape[2])
    if len(source) == 1:
        moved = x.index_select(2, source[0].clamp(0, x.shape[2] - 1))
    else:
        index = source.clamp(0, x.shape[2] - 1)[:, None, :, None]
        moved = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
    return moved.masked_fill_(~there[:, None, :, None], fill)


@dataclass(frozen=True)
class Chunk:
    """Lists that are computed together: n of them with room for c keys.

    Attributes:
        lists: `[n]`, which ones, among all of the call.
        tokens: `[n, c]`, the keys of the blocks they name, among all of the call; the first again where there are
            no more, as no other may be touched: nothing times NaN would be NaN.
        keep: `[n, 1, queries or 1, c]`, True where a query reads a key.
        heads: `[n, heads of a list]`, the query heads they belong to.
    """

    lists: Tensor
    tokens: Tensor
    keep: Tensor
    heads: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """Those of these lists, of `[lists, members * block, D]`."""
        return _wide(x.index_select(0, self.lists))

    def keys(self, x: Tensor) -> Tensor:
        """Those of these lists, of all in a row `[B * G * S, D]`: `[n, c, D]`."""
        return _wide(x.index_select(0, self.tokens.flatten()).view(*self.tokens.shape, -1))


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
            key_rank = (self.indices[lists, :most, None].long() * block_k + inside).flatten(1)  # [n, c]
            there = named.repeat_interleave(block_k, dim=1) & (key_rank < _of(grid.real, batch))
            keep = there[:, None, None]
            if self.causal:
                query_rank = (_of(grid.first_block, batch) + row[:, None]) * block_q + place  # [n, queries]
                keep = keep & (key_rank[:, None, None] <= query_rank[:, None, :, None])
            kv_head = batch * (self.owners // self.group) + head // self.group
            tokens = kv_head[:, None] * grid.keys + (key_rank + _of(grid.starts, batch)).clamp(0, grid.keys - 1)
            heads = head[:, None] * self.members + torch.arange(self.members, device=lists.device)
            yield Chunk(lists, tokens.where(there, tokens[:, :1]), keep, heads)


def _of(values: Tensor, batch: Tensor) -> Tensor:
    """Each list's own of `[B or 1]` values: `[n or 1, 1]`."""
    return (values[batch] if len(values) > 1 else values)[:, None]


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
    queries, k, v = lists.queries(q), k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    out = queries.new_zeros(*queries.shape[:2], v.shape[1])
    lse = queries.new_full(queries.shape[:2], float("inf"), dtype=_wide(q[:0]).dtype)
    for chunk in lists.chunks():
        scores = _scores(chunk.queries(queries), chunk.keys(k), lists.members, chunk.keep, scale, softcap)
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
        found = weights.flatten(1, 2) @ chunk.keys(v)
        found = (found / total.flatten(1)[..., None]).masked_fill_(nothing.flatten(1)[..., None], 0.0)
        out.index_copy_(0, chunk.lists, found.to(out.dtype))
        lse.index_copy_(0, chunk.lists, (top + total.log()).masked_fill(nothing, float("inf")).flatten(1))
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
    queries, upstream = lists.queries(q), lists.queries(d_out)
    deltas, totals = (lists.queries(x[..., None]) for x in (delta, lse))
    dq = torch.zeros_like(queries, dtype=delta.dtype)
    dk, dv = (x.new_zeros(x.shape[:3].numel(), x.shape[3], dtype=delta.dtype) for x in (k, v))
    flat_k, flat_v = k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    for chunk in lists.chunks():
        here, d_here, there, value = (
            chunk.queries(queries), chunk.queries(upstream), chunk.keys(flat_k), chunk.keys(flat_v)
        )  # fmt: skip
        scores = _scores(here, there, lists.members, chunk.keep, scale, softcap).flatten(1, 2)
        weights = (scores - chunk.queries(totals)).exp()
        d_scores = weights * (d_here @ value.mT - chunk.queries(deltas))
        if softcap is not None:
            d_scores = d_scores * (1 - (scores.masked_fill(weights == 0, 0.0) / softcap).square())
        dq.index_copy_(0, chunk.lists, d_scores @ there * scale)
        dk.index_add_(0, chunk.tokens.flatten(), (d_scores.mT @ here * scale).flatten(0, 1))
        dv.index_add_(0, chunk.tokens.flatten(), (weights.mT @ d_here).flatten(0, 1))
    return lists.joined_queries(dq).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), delta


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
    keys = _shifted(k, grid.starts, columns * block_k)
    wide = _wide(q[:0]).dtype
    maxima = q.new_zeros(batch, groups, 1 if shared else members, rows, columns, dtype=wide)
    step = max(1, ELEMENTS // (batch * members * block_q * keys.shape[2]))  # blocks of queries
    key_rank = torch.arange(keys.shape[2], device=q.device)
    latest_first, fewest = int(grid.first.max()), int(grid.real.min())
    for first in range(0, rows, step):
        last = min(first + step, rows)
        place = torch.arange(first * block_q, last * block_q, device=q.device)
        query_rank = (grid.first_block[:, None] * block_q + place)[:, None, None, :, None]  # [B or 1, 1, 1, t, 1]
        real = grid.real[:, None, None, None, None]
        lowest, highest = int(query_rank.min()), int(query_rank.max())
        reach = min(columns, highest // block_k + 1) if causal else columns
        seen = key_rank[: reach * block_k]
        keep = (seen < real) & (query_rank < real) & (query_rank >= grid.first[:, None, None, None, None])
        if causal:
            keep = keep & (seen <= query_rank)
        whole = 0  # so many keys are read by every query here, and need no mask
        if latest_first <= lowest and highest < fewest:
            whole = min(fewest, lowest + 1) if causal else fewest
        for group in range(groups):
            here = _wide(queries[:, group, :, place]).flatten(1, 2)  # [B, members * t, D]
            scores = here * scale @ _wide(keys[:, group, : reach * block_k]).mT
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.unflatten(1, (members, -1))
            scores[..., whole:].masked_fill_(~keep[:, 0, ..., whole:], float("-inf"))
            tiles = scores.unflatten(3, (reach, block_k)).amax(dim=4)  # [B, members, t, reach]
            peak = tiles.amax(dim=3, keepdim=True)
            peak = peak.masked_fill(peak == float("-inf"), 0.0)
            total = scores.sub_(peak).exp_().sum(dim=3, keepdim=True).log_().add_(peak)
            if sinks is not None:
                logits = sinks.to(wide).view(groups, members, 1, 1)[group]
                total = torch.logaddexp(total, logits)
            logged = tiles.sub_(total.masked_fill_(total == float("-inf"), 0.0))
            tiles = logged.unflatten(2, (last - first, block_q)).amax(dim=3).exp_()  # [B, members, n, reach]
            maxima[:, group, :, first:last, :reach] = tiles.amax(dim=1, keepdim=True) if shared else tiles
    return maxima.flatten(1, 2)
