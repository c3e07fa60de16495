"""Sink + recent window attention in torch: the specification, and the path every device can run.

Tokens are addressed by *rank*, their place among the real tokens of their row, so that padding of any kind
changes nothing: the query with rank `i` reads the key with rank `j` if `j <= i` and (`j < sink` or
`i - j < recent`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import masked_attention

QUERY_BLOCK = 512
EVERYTHING = 1 << 30  # a window that reaches any token


class Tier(NamedTuple):
    """What a cache holds for some KV heads.

    Attributes:
        keys, values: `[B, heads, S, D]`.
        rank: `[B, S]`, the place of each token among the real tokens of its row, negative for padding and for empty
            places; None: all S are real and in order.
    """

    keys: Tensor
    values: Tensor
    rank: Tensor | None = None


def visible(query_rank: Tensor, key_rank: Tensor, sink: int, recent: int) -> Tensor:
    """The rule above: `[B, T]` and `[B, S]` ranks to a `[B, 1, T, S]` mask."""
    i, j = query_rank[:, None, :, None], key_rank[:, None, None, :]
    return (j >= 0) & (j <= i) & ((j < sink) | (i - j < recent))


def sink_window_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor | None,
    *,
    sink: int,
    recent: int,
    past: Tier | None,
    full_heads: Sequence[bool],
    full: Tier | None,
    chunked: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    options: dict[str, Any] = dict(scale=scale, softcap=softcap, dropout=dropout)

    def read_all(q: Tensor, sinks: Tensor | None, heads: Tensor | None) -> Tensor:
        keys, values, key_rank = full or Tier(_of(heads, k), _of(heads, v), rank)
        return _full(q, keys, values, rank, key_rank, options | {"sinks": sinks})

    def stream(q: Tensor, sinks: Tensor | None, heads: Tensor | None) -> Tensor:
        place = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1) if rank is None else rank
        new = Tier(_of(heads, k), _of(heads, v), place)
        if chunked:
            return _chunked(q, new, past, options | {"sinks": sinks})
        return _streaming(q, new, past, sink, recent, options | {"sinks": sinks})

    return _by_kind(q, sinks, full_heads, read_all, stream)


def decode_reference(
    q: Tensor,
    rank: Tensor | None,
    *,
    sink: int,
    recent: int,
    kept: Tier | None,
    full_heads: Sequence[bool],
    full: Tier | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    options: dict[str, Any] = dict(scale=scale, softcap=softcap, dropout=dropout)

    def read_all(q: Tensor, sinks: Tensor | None, heads: Tensor | None) -> Tensor:
        assert full is not None
        keep = None if full.rank is None else (full.rank >= 0)[:, None, None]
        if rank is not None and full.rank is not None:
            keep = visible(rank, full.rank, 0, EVERYTHING)
        return masked_attention(q, full.keys, full.values, keep, sinks=sinks, **options)

    def stream(q: Tensor, sinks: Tensor | None, heads: Tensor | None) -> Tensor:
        assert kept is not None and kept.rank is not None and rank is not None
        return masked_attention(
            q, kept.keys, kept.values, visible(rank, kept.rank, sink, recent), sinks=sinks, **options
        )

    return _by_kind(q, sinks, full_heads, read_all, stream)


Part = Callable[[Tensor, "Tensor | None", "Tensor | None"], Tensor]


def _by_kind(q: Tensor, sinks: Tensor | None, full_heads: Sequence[bool], read_all: Part, stream: Part) -> Tensor:
    """Full heads from one function and streaming ones from another, back in the order of q's heads."""
    if not any(full_heads):
        return stream(q, sinks, None)
    if all(full_heads):
        return read_all(q, sinks, None)
    group = q.shape[1] // len(full_heads)
    parts, places = [], []
    for kind, compute in ((True, read_all), (False, stream)):
        groups = [index for index, flag in enumerate(full_heads) if bool(flag) == kind]
        heads = [index * group + member for index in groups for member in range(group)]
        here, there = (torch.tensor(indices, device=q.device) for indices in (heads, groups))
        parts.append(compute(q.index_select(1, here), None if sinks is None else sinks.index_select(0, here), there))
        places += heads
    back = sorted(range(len(places)), key=places.__getitem__)
    return torch.cat(parts, dim=1).index_select(1, torch.tensor(back, device=q.device))


def _of(heads: Tensor | None, x: Tensor) -> Tensor:
    return x if heads is None else x.index_select(1, heads)


def _full(
    q: Tensor, k: Tensor, v: Tensor, rank: Tensor | None, key_rank: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Every token up to the query's own; without ranks the queries are the last of the keys."""
    queries, keys = q.shape[2], k.shape[2]
    if key_rank is None and queries == keys:
        return masked_attention(q, k, v, causal=True, **options)
    if key_rank is None:
        key_rank = torch.arange(keys, device=q.device)[None]
    if rank is None:
        rank = key_rank[:, -queries:]

    def keep(first: int, last: int) -> Tensor:
        return visible(rank[:, first:last], key_rank, 0, EVERYTHING)

    return masked_attention(q, k, v, keep, **options)


def _streaming(q: Tensor, new: Tier, past: Tier | None, sink: int, recent: int, options: dict[str, Any]) -> Tensor:
    k, v, rank = new
    assert rank is not None
    length = q.shape[2]
    if past is not None:
        assert past.rank is not None
        first_k, first_v, first_rank = _first_tokens(torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2),
                                                     torch.cat([past.rank, rank], 1), sink)  # fmt: skip
    else:
        first_k, first_v, first_rank = _first_tokens(k, v, rank, sink)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop, low = min(start + QUERY_BLOCK, length), max(0, start - recent + 1)
        keys, values, ranks = [k[:, :, low:stop]], [v[:, :, low:stop]], [rank[:, low:stop]]
        if past is not None and past.rank is not None and start < recent:
            keys, values, ranks = [past.keys, *keys], [past.values, *values], [past.rank, *ranks]
        # The window holds no sink, so that no token counts twice.
        ranks = [ranks_here.where(ranks_here >= sink, -1) for ranks_here in ranks]
        keep = visible(rank[:, start:stop], torch.cat([first_rank, *ranks], 1), sink, recent)
        out = masked_attention(
            q[:, :, start:stop], torch.cat([first_k, *keys], 2), torch.cat([first_v, *values], 2), keep, **options
        )
        blocks.append(out)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _first_tokens(k: Tensor, v: Tensor, rank: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens with ranks 0 .. count - 1 of every row, wherever padding put them."""
    count = min(count, rank.shape[1])
    real = rank >= 0
    order = torch.where(real, rank, rank.shape[1] + count).argsort(dim=1, stable=True)[:, :count]  # [B, count]
    found = rank.gather(1, order)
    found = found.where((found >= 0) & (found < count), -1)
    index = order[:, None, :, None]
    first_k = k.gather(2, index.expand(-1, k.shape[1], -1, k.shape[3]))
    first_v = v.gather(2, index.expand(-1, v.shape[1], -1, v.shape[3]))
    return first_k, first_v, found


def _chunked(q: Tensor, new: Tier, past: Tier | None, options: dict[str, Any]) -> Tensor:
    k, v, rank = new
    assert rank is not None
    key_rank = rank
    if past is not None:
        assert past.rank is not None
        k, v = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
        key_rank = torch.cat([past.rank, rank], 1)
    return _full(q, k, v, rank, key_rank, options)
