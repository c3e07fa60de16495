"""A short causal convolution over tokens, each channel with its own taps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import use_triton
from . import ops


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    rank: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`out_t = sum_i weight[:, i] x_(t - W + 1 + i) + bias`: the last tap weighs the token itself.

    Args:
        x: `[B, T, C]`; a prompt, a part of one or one token.
        weight: `[C, W]`.
        bias: `[C]`.
        state: what an earlier call returned; None at the start of a sequence.
        rank: `[B, T]`, negative for padding, which counts as zeros. None: there is none.

    Returns the convolved tokens, and the last W - 1 of what was read, `[B, W - 1, C]`, for the next call.
    """
    if weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"causal_conv: weight is {list(weight.shape)}; it must be [C, W] with C = {x.shape[-1]}")
    taps, length = weight.shape[1], x.shape[1]
    before = [x.shape[0], taps - 1, x.shape[2]]
    if state is not None and list(state.shape) != before:
        raise ValueError(f"causal_conv: state is {list(state.shape)}; it must be [B, W - 1, C] = {before}")
    if rank is not None and rank.shape != x.shape[:2]:
        raise ValueError(f"causal_conv: rank is {list(rank.shape)}; it must be [B, T] = {list(x.shape[:2])}")
    lacks = "state of another dtype" if state is not None and state.dtype != x.dtype else None
    lacks = "single tap" if taps == 1 else lacks
    if use_triton("causal_conv", x, weight, bias, state, rank, unsupported=lacks):
        out, new_state = ops.convolution(x, weight, bias, state, rank)
        return out, new_state
    real = x if rank is None else x.masked_fill((rank < 0)[..., None], 0.0)
    read = torch.cat([x.new_zeros(before) if state is None else state.to(x.dtype), real], dim=1)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = read[:, :length].to(wide) * weight[:, 0].to(wide)
    for tap in range(1, taps):
        out = out + read[:, tap : tap + length].to(wide) * weight[:, tap].to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(x.dtype), read[:, length:]
