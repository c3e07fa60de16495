"""Sink + recent window attention in which one more key stands for all tokens that a query does not read any more.

RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (Tang et al., 2024), arXiv 2407.15891: with n
tokens dropped, whose keys have the mean k' and values the mean v', a query weighs v' by `n exp(q k')` beside the
`exp(q k) v` of the tokens it reads. So the token is one key with the value v' and log(n) added to its score.

Here the dropped tokens are those of each query itself, `sink <= rank <= i - recent`, so that a prompt in one piece, in
chunks, and token by token give the same. Torch only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import masked_attention
from ..dispatch import use_triton
from .reference import QUERY_BLOCK, Tier, _first_tokens, visible


def compensated_sink_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor,
    *,
    sink: int,
    recent: int,
    past: Tier | None = None,
    lost: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """As `sink_window` of streaming heads alone, with the compensation token.

    Args:
        lost: sums `[B, G, D]`, float32, of the keys and of the values of earlier tokens that `past` does not hold.
        options: scale, softcap, sinks, dropout.
    """
    use_triton("compensated_sink_window", q, k, v, unsupported="compensation token")
    queries, key_rank = q.shape[2], rank
    if past is not None:
        assert past.rank is not None
        k, v = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
        key_rank = torch.cat([past.rank, rank], 1)
    # Free slots and padding first, then the tokens in order: the last keys belong to the queries of this call.
    order = key_rank.argsort(dim=1, stable=True)
    key_rank, k, v = key_rank.gather(1, order), _take(k, order), _take(v, order)
    earlier = k.shape[2] - queries
    first_k, first_v, first_rank = _first_tokens(k, v, key_rank, sink)
    key_rank = key_rank.where(key_rank >= sink, -1)  # so that no sink counts twice
    sums = [torch.where((key_rank >= 0)[:, None, :, None], x, 0).float().cumsum(dim=2) for x in (k, v)]
    if lost is not None:
        sums = [total + before[:, :, None] for total, before in zip(sums, lost, strict=True)]
    blocks = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        low = max(0, earlier + start - recent + 1)
        here = slice(low, earlier + stop)
        # The last token that a query does not read stands `recent` places before it.
        last = torch.arange(earlier + start - recent, earlier + stop - recent, device=q.device).clamp(min=0)
        number = (rank[:, start:stop] - recent + 1 - sink).clamp(min=0)[:, None, :, None]  # [B, 1, t, 1]
        mean_k, mean_v = ((total[:, :, last] / number.clamp(min=1)).to(q.dtype) for total in sums)
        keep = visible(rank[:, start:stop], torch.cat([first_rank, key_rank[:, here]], 1), sink, recent)
        own = torch.eye(stop - start, dtype=torch.bool, device=q.device) & (number > 0)
        added = torch.cat([torch.zeros_like(keep, dtype=torch.float32).masked_fill(~keep, float("-inf")),
                           number.float().log().expand_as(own).masked_fill(~own, float("-inf"))], -1)  # fmt: skip
        blocks.append(masked_attention(q[:, :, start:stop], torch.cat([first_k, k[:, :, here], mean_k], 2),
                                       torch.cat([first_v, v[:, :, here], mean_v], 2), added, **options))  # fmt: skip
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
