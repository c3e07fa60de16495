"""Sink + recent window attention in torch: the specification, and the path every device can run.

Tokens are addressed by *rank*, their place among the real tokens of their row, so that padding of any kind
changes nothing: the query with rank `i` reads the key with rank `j` if `j <= i` and (`j < sink` or
`i - j < recent`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import masked_attention

QUERY_BLOCK = 512


def visible(query_rank: Tensor, key_rank: Tensor, sink: int, recent: int) -> Tensor:
    """The rule above: `[B, T]` and `[B, S]` ranks to a `[B, 1, T, S]` mask."""
    i, j = query_rank[:, None, :, None], key_rank[:, None, None, :]
    return (j >= 0) & (j <= i) & ((j < sink) | (i - j < recent))


def sink_window_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor,
    *,
    sink: int,
    recent: int,
    past: tuple[Tensor, Tensor, Tensor] | None,
    chunked: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    options: dict[str, Any] = dict(scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
    length = q.shape[2]
    if chunked:
        return _chunked(q, k, v, rank, past, options)
    if past is not None:
        past_k, past_v, past_rank = past
        first_k, first_v, first_rank = _first_tokens(torch.cat([past_k, k], 2), torch.cat([past_v, v], 2),
                                                     torch.cat([past_rank, rank], 1), sink)  # fmt: skip
    else:
        first_k, first_v, first_rank = _first_tokens(k, v, rank, sink)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop, low = min(start + QUERY_BLOCK, length), max(0, start - recent + 1)
        keys, values, ranks = [k[:, :, low:stop]], [v[:, :, low:stop]], [rank[:, low:stop]]
        if past is not None and start < recent:
            keys, values, ranks = [past_k, *keys], [past_v, *values], [past_rank, *ranks]
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


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, rank: Tensor, past: tuple[Tensor, Tensor, Tensor] | None, options: dict[str, Any]
) -> Tensor:
    key_rank = rank
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        key_rank = torch.cat([past[2], rank], 1)

    def keep(first: int, last: int) -> Tensor:
        i, j = rank[:, None, first:last, None], key_rank[:, None, None, :]
        return (j >= 0) & (j <= i)

    return masked_attention(q, k, v, keep, **options)
