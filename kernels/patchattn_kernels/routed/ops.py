"""The primitive as torch operators: loops that depend on the choice cannot be traced, so each is one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import routed_backward_reference, routed_reference


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


def _empty(q: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)  # as models go on with it
