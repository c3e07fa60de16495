"""What attention transfer minimises: how far a method is from the base attention on one layer.

Softmax weights of the base are computed block by block of queries and only where a loss asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from patchattn_kernels.attention import query_blocks

if TYPE_CHECKING:
    from .context import AttentionContext
    from .masks import Mask


def output_error(own: Tensor, target: Tensor, mask: Mask) -> Tensor:
    """Mean squared error of two outputs `[B, T, H, D]` over the tokens that are not padding."""
    error = (own.float() - target.float()).square().mean(dim=(2, 3))  # [B, T]
    return _mean(error, mask)


def map_cross_entropy(ctx: AttentionContext, attention_map: Callable[[AttentionContext, int, int], Tensor]) -> Tensor:
    """Mean cross-entropy of the base attention's weights against `attention_map(ctx, first, last)` `[B, H, t, S]`."""

    def rows(first: int, last: int) -> Tensor:
        own = attention_map(ctx, first, last).float()
        tiny = torch.finfo(own.dtype).tiny
        return -(ctx.base_weights(first, last) * own.clamp_min(tiny).log()).sum(dim=-1).mean(dim=1)  # [B, t]

    blocks = list(query_blocks(ctx.q.shape[2], ctx.k.shape[2]))
    if len(blocks) == 1:
        return _mean(rows(*blocks[0]), ctx.mask)
    # Long inputs: a block's weights are computed again in the backward pass, not kept.
    return _mean(torch.cat([checkpoint(rows, *block, use_reentrant=False) for block in blocks], dim=1), ctx.mask)


def block_map_divergence(ctx: AttentionContext, scores: Tensor, block_size: int) -> Tensor:
    """Mean KL divergence of softmax(`scores`) `[B, H or G, N, M]` from the block maxima of the base's weights.

    Where `scores` has a head for each group of query heads, the group's largest weight counts.
    """
    with torch.no_grad():
        target = block_maxima(ctx, block_size, scores.shape[1])
        reachable = target > 0
        target = target / target.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)
    logged = scores.float().masked_fill(~reachable, float("-inf")).log_softmax(dim=-1).masked_fill(~reachable, 0.0)
    return functional.kl_div(logged, target, reduction="none").sum(dim=-1).mean()


def block_maxima(ctx: AttentionContext, block_size: int, heads: int) -> Tensor:
    """The largest base attention weight in each block of queries and keys: `[B, heads, N, M]`."""
    queries, keys = ctx.q.shape[2], ctx.k.shape[2]
    rows = []
    for first in range(0, queries, block_size):
        weights = ctx.base_weights(first, min(first + block_size, queries))
        weights = functional.pad(weights, (0, -keys % block_size)).unflatten(-1, (-1, block_size))
        rows.append(weights.amax(dim=(2, 4)).unflatten(1, (heads, -1)).amax(dim=2))  # [B, heads, M]
    return torch.stack(rows, dim=2)


def _mean(values: Tensor, mask: Mask) -> Tensor:
    """Mean of `[B, T]` over the tokens that are not padding."""
    if mask.dense is not None or mask.padding is None:
        return values.mean()
    real = mask.padding[:, -values.shape[1] :].to(values.dtype)
    return (values * real).sum() / real.sum().clamp_min(1)
