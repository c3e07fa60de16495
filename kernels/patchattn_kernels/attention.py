"""Softmax attention over whatever keys a mask leaves, without ever holding a `[T, S]` tensor for long inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

# Elements of one `[queries, keys]` mask block: 2048 x 2048, or 128 queries over 32768 keys.
MASK_ELEMENTS = 1 << 22


def query_blocks(queries: int, keys: int) -> Iterator[tuple[int, int]]:
    """Cut `queries` rows so that no block times `keys` exceeds `MASK_ELEMENTS`."""
    if queries * keys <= MASK_ELEMENTS:  # tested first, so that a compiled step is not bound to one length
        yield 0, queries
        return
    size = max(1, MASK_ELEMENTS // keys)
    for first in range(0, queries, size):
        yield first, min(first + size, queries)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | Callable[[int, int], Tensor] | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of `q` `[B, H, T, D]` over `k`, `v` `[B, G, S, D]`, with H a multiple of G.

    Args:
        keep: True where a query may read a key, broadcastable to `[B, 1, T, S]`, or numbers to add to the scores,
            -inf where it may not; or a function that makes the rows `[first, last)` of either, so that long inputs
            are masked block by block. None reads every key.
        causal: read keys up to the query's own place (T = S, no `keep`).
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, one extra logit a head that takes weight and gives no value.

    Returns `[B, H, T, D]`. A query that may read nothing gives zeros.
    """
    if causal and keep is not None:
        raise ValueError("masked_attention: causal=True and keep were both given; put causality into keep")
    if callable(keep):
        blocks = [
            masked_attention(
                q[:, :, first:last], k, v, keep(first, last), scale=scale, softcap=softcap, sinks=sinks, dropout=dropout
            )
            for first, last in query_blocks(q.shape[2], k.shape[2])
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
    added = keep is not None and keep.dtype != torch.bool
    if softcap is not None or sinks is not None or added:
        return _weighted_sum(q, k, v, keep, causal=causal, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
    if q.shape[2] == 1 and q.shape[1] != k.shape[1]:
        # One token: the query heads of a group become rows, so that no key is repeated.
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, G, H/G, D]
        out = functional.scaled_dot_product_attention(rows, k, v, keep, dropout, scale=scale)
        return out.reshape(q.shape[0], q.shape[1], 1, v.shape[3])
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(
        q, k, v, keep, dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _weighted_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """The same by hand, for what SDPA cannot do: capped scores, sink logits, numbers more precise than the scores."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = scores.float()
    if keep is not None and keep.dtype == torch.bool:
        scores = scores.masked_fill(~keep, float("-inf"))
    elif keep is not None:
        scores = scores + keep
    if sinks is not None:
        logits = sinks.float().reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        weights = torch.cat([scores, logits], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a row that reads nothing
    weights = functional.dropout(weights.to(v.dtype), dropout, training=dropout > 0)
    return weights @ v
