"""The Triton kernels as torch operators, so that torch.compile keeps one graph and autograd knows their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import Tier

LOG2E = 1.4426950408889634


@torch.library.custom_op("patchattn::sink_window", mutates_args=())
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    past_rank: Tensor | None,
    full_k: Tensor | None,
    full_v: Tensor | None,
    full_rank: Tensor | None,
    full_heads: Sequence[bool],
    sink: int,
    recent: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`[B, H, T, D]`, and the logarithm of each row's sum of weights `[B, H, T]`, in units of log 2."""
    from . import kernels

    past, full = _tier(past_k, past_v, past_rank), _tier(full_k, full_v, full_rank)
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of the tensors
        return kernels.prefill(q, k, v, rank, past, full, full_heads, sink, recent, scale, softcap, sinks)


@prefill.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = q.shape
    out = q.new_empty(batch, length, heads, size).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("patchattn::sink_window_gradients", mutates_args=())
def gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rank: Tensor | None,
    out: Tensor,
    lse: Tensor,
    full_heads: Sequence[bool],
    sink: int,
    recent: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and `sum(out * d_out)` of each row."""
    from . import kernels

    with torch.cuda.device_of(q):
        return kernels.gradients(d_out, q, k, v, rank, out, lse, full_heads, sink, recent, scale, softcap)


@gradients.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, rank: Any, out: Any, lse: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rank, *_tiers, full_heads, sink, recent, scale, softcap, sinks = inputs
    ctx.save_for_backward(q, k, v, rank, sinks, *output)
    ctx.settings = (full_heads, sink, recent, scale, softcap)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, rank, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv, delta = gradients(d_out, q, k, v, rank, out, lse, *ctx.settings)
    d_sinks = None
    if sinks is not None and ctx.needs_input_grad[15]:
        weight = torch.exp2(sinks.float()[None, :, None] * LOG2E - lse)
        d_sinks = -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return dq, dk, dv, *(None,) * 12, d_sinks


prefill.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("patchattn::sink_window_decode", mutates_args=())
def decode(
    q: Tensor,
    rank: Tensor | None,
    kept_k: Tensor | None,
    kept_v: Tensor | None,
    kept_rank: Tensor | None,
    full_k: Tensor | None,
    full_v: Tensor | None,
    full_rank: Tensor | None,
    full_heads: Sequence[bool],
    sink: int,
    recent: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`[B, H, 1, D]`."""
    from . import kernels

    kept, full = _tier(kept_k, kept_v, kept_rank), _tier(full_k, full_v, full_rank)
    with torch.cuda.device_of(q):
        return kernels.decode(q, rank, kept, full, full_heads, sink, recent, scale, softcap, sinks)


@decode.register_fake
def _(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape)


def _tier(k: Tensor | None, v: Tensor | None, rank: Tensor | None) -> Tier | None:
    return None if k is None or v is None else Tier(k, v, rank)
