"""The primitive as torch operators, so that torch.compile keeps one graph: loops that depend on the choice cannot be
traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import routed_backward_reference, routed_reference

LOG2E = 1.4426950408889634


@torch.library.custom_op("patchattn::routed_in_torch", mutates_args=())
def in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    return routed_reference(q, k, v, weights, starts, sinks, causal, scale, softcap)


@in_torch.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return _empty(q, v)


@torch.library.custom_op("patchattn::routed_in_torch_gradients", mutates_args=())
def gradients_in_torch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    return routed_backward_reference(grad, q, k, v, weights, starts, sinks, causal, scale, softcap)


@gradients_in_torch.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, starts: Any, sinks: Tensor | None, *others: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, weights, sinks) if x is not None]


def _save_in_torch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, causal, scale, softcap = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = causal, scale, softcap


def _backward_in_torch(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = gradients_in_torch(grad, *ctx.saved_tensors, *ctx.settings)
    return (*found[:4], None, found[4] if len(found) > 4 else None, None, None, None)


in_torch.register_autograd(_backward_in_torch, setup_context=_save_in_torch)


@torch.library.custom_op("patchattn::routed", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each pair's sum of weights `[B, H, T]`, in units of log 2."""
    from . import kernels

    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of the tensors
        return kernels.forward(q, k, v, weights, starts, sinks, causal, scale, softcap)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty(q, v), weights.new_empty(weights.shape, dtype=torch.float)


@torch.library.custom_op("patchattn::routed_gradients", mutates_args=())
def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and `sum(out * grad)` of each pair."""
    from . import kernels

    with torch.cuda.device_of(q):
        return kernels.gradients(grad, q, k, v, weights, starts, out, lse, causal, scale, softcap)


@gradients.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, starts: Any, out: Any, lse: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, scale, softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = causal, scale, softcap
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv, delta = gradients(grad, *tensors, out, lse, *ctx.settings)
    weights = tensors[3]
    d_weights = torch.where(weights == 0, 0.0, delta / weights.float()).to(weights.dtype)
    d_sinks = None
    if sinks is not None:
        share = torch.exp2(sinks.float()[None, :, None] * LOG2E - lse)  # 0 where nothing is computed
        d_sinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return dq, dk, dv, d_weights, None, d_sinks, None, None, None


forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("patchattn::routed_decode", mutates_args=())
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`[B, H, 1, D]`; without gradient."""
    from . import kernels

    with torch.cuda.device_of(q):
        return kernels.decode(q, k, v, weights, starts, sinks, scale, softcap)


@decode.register_fake
def _(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape)


def _empty(q: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)  # as models go on with it
