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
from patchattn_kernels.block_sparse import block_maxima

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


def block_map_divergence(
    ctx: AttentionContext, scores: Tensor, block: int | tuple[int, int], reduction: str = "rows"
) -> Tensor:
    """KL divergence of softmax(`scores`) `[B, H or G, N, M]` from the block maxima of the base's weights.

    Args:
        scores: of the last N blocks of queries; -inf for the blocks of keys that are not asked for, as those of the
            future. Where there is a head for each group of query heads, the group's largest weight counts.
        block: tokens in a block; (of queries, of keys) where that differs.
        reduction: "rows": the mean over the rows that have something to foresee; "reference": over every entry of
            every row, as published.
    """
    asked = scores > -torch.inf
    with torch.no_grad():
        target = block_target(ctx, block, scores.shape[1], scores.shape[2]).masked_fill(~asked, 0.0)
        total = target.sum(dim=-1, keepdim=True)
        target = target / total.clamp_min(torch.finfo(target.dtype).tiny)
        rows = total[..., 0] > 0
    # A row that asks for nothing would have NaN for gradients, through the softmax of nothing.
    logged = scores.float().masked_fill(~asked & rows[..., None], -torch.inf).masked_fill(~rows[..., None], 0.0)
    logged = logged.log_softmax(dim=-1).masked_fill(~asked, 0.0)
    divergence = functional.kl_div(logged, target, reduction="none").sum(dim=-1)
    return divergence.sum() / (scores.numel() if reduction == "reference" else rows.sum().clamp_min(1))


@torch.no_grad()
def block_target(ctx: AttentionContext, block: int | tuple[int, int], heads: int, rows: int) -> Tensor:
    """The largest base attention weight in each block of queries and keys: `[B, heads, rows, M]`, float32.

    Of a whole text, the last `rows` blocks of queries. Blocks are counted from the first real token of a row.
    """
    q, k = ctx.scored()
    starts, real = None, ctx.mask.padding
    if real is not None:  # the real tokens of each row last
        real = real[:, : q.shape[2]]
        order = real.long().argsort(dim=1, stable=True)[:, None, :, None]
        q, k = (x.gather(2, order.expand_as(x)) for x in (q, k))
        starts = q.shape[2] - real.sum(dim=1)
    elif isinstance(block, tuple) and block[0] == 1:
        q = q[:, :, -rows:]
    shared = heads != q.shape[1]
    maxima = block_maxima(
        q, k, block=block, causal=ctx.mask.causal, shared=shared, starts=starts,
        scale=ctx.scaling, softcap=ctx.softcap, sinks=ctx.sinks,
    )  # fmt: skip
    return maxima[:, :, -rows:]


def _mean(values: Tensor, mask: Mask) -> Tensor:
    """Mean of `[B, T]` over the tokens that are not padding."""
    if mask.dense is not None or mask.padding is None:
        return values.mean()
    real = mask.padding[:, -values.shape[1] :].to(values.dtype)
    return (values * real).sum() / real.sum().clamp_min(1)
