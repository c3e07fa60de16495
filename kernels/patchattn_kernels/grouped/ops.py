"""The Triton kernels as torch operators, so that torch.compile keeps one graph and autograd knows their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("patchattn::grouped", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kinds: Tensor | None,
    images: Tensor | None,
    gate: Tensor | None,
    place: Tensor | None,
    past: int,
    causal: bool,
    scale: float,
    recycle: float,
    most_sinks: float,
    min_visual: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the logarithm of each row's sum of weights in units of log 2, and the gain of each row.

    The gain, -1 where a row is not changed, is empty without `images`.
    """
    from . import kernels

    rule = kernels.Rule(recycle, most_sinks, min_visual)
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of the tensors
        out, lse, gain = kernels.forward(q, k, v, kinds, images, gate, place, past, causal, scale, rule)
    return out, lse, lse.new_empty(0) if gain is None else gain


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kinds: Any, images: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    batch, heads, queries, size = q.shape
    out = q.new_empty(batch, queries, heads, size).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    return out, lse, lse.new_empty(0) if images is None else torch.empty_like(lse)


@torch.library.custom_op("patchattn::grouped_gradients", mutates_args=())
def gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kinds: Tensor | None,
    out: Tensor,
    lse: Tensor,
    gain: Tensor,
    past: int,
    causal: bool,
    scale: float,
    recycle: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    from . import kernels

    gains = gain if gain.numel() else None
    with torch.cuda.device_of(q):
        return kernels.gradients(d_out, q, k, v, kinds, out, lse, gains, past, causal, scale, recycle)


@gradients.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, kinds, _images, gate, place, past, causal, scale, recycle, *_ = inputs
    assert gate is None and place is None, "grouped: what trains has neither its gate nor its place in the kernel"
    ctx.save_for_backward(q, k, v, kinds, *output)
    ctx.settings = (past, causal, scale, recycle)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, d_out: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    return *gradients(d_out, *ctx.saved_tensors, *ctx.settings), *(None,) * 10


forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("patchattn::grouped_decode", mutates_args=())
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kinds: Tensor | None,
    images: Tensor | None,
    gate: Tensor | None,
    place: Tensor | None,
    past: int,
    causal: bool,
    scale: float,
    recycle: float,
    most_sinks: float,
    min_visual: float,
) -> tuple[Tensor, Tensor]:
    """`forward` for one query a row: the output and its gain."""
    from . import kernels

    rule = kernels.Rule(recycle, most_sinks, min_visual)
    with torch.cuda.device_of(q):
        out, gain = kernels.decode(q, k, v, kinds, images, gate, place, past, causal, scale, rule)
    return out, q.new_empty(0, dtype=torch.float32) if gain is None else gain


@decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, kinds: Any, images: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (0,) if images is None else q.shape[:3]
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)
