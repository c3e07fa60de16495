"""The primitive's kernels as torch operators, so that torch.compile keeps one graph and autograd their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TENSORS = 14  # of a call, the last of them its rank


@torch.library.custom_op("patchattn::linear", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    gate: Tensor | None,
    window_factor: Tensor,
    linear_factor: Tensor,
    state: Tensor | None,
    rank: Tensor | None,
    kind: str,
    window: int,
    terraced: bool,
    overlap: bool,
    causal: bool,
    scale: float,
    feature_scale: float,
    normalise: bool,
    eps: float,
    state_heads: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the state, and with `keep` what the gradient needs of each query; see `kernels.Given` and `Form`."""
    from . import kernels

    given = kernels.Given(q, k, v, near_q, near_k, q_weight, k_weight, q_bias, k_bias, gate, window_factor,
                          linear_factor, state, rank)  # fmt: skip
    form = kernels.Form(kind, window, terraced, overlap, causal, scale, feature_scale, normalise, eps, state_heads)
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of the tensors
        out, new_state, total, far, largest, top = kernels.forward(given, form, keep)
    return out, new_state, total, far, largest, top


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    weight = others[2] if others[3] is None else others[3]  # near_q and near_k come before
    kind, window, state_heads, keep = others[11], others[12], others[20], others[21]
    (batch, heads, length, size), width = q.shape, v.shape[3]
    mapped = size if weight is None else weight.shape[-1]
    features = 2 * mapped if kind in ("softmax", "exp") else mapped
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)
    total, largest = (
        q.new_empty((batch, heads, length) if kept else (0,), dtype=torch.float32) for kept in (keep, keep and window)
    )
    state = q.new_empty(batch, state_heads, features, width + 1, dtype=torch.float32)
    return out, state, total, largest, torch.empty_like(largest), torch.empty_like(largest, dtype=torch.int32)


@torch.library.custom_op("patchattn::linear_gradients", mutates_args=())
def gradients(
    d_out: Tensor,
    d_state: Tensor,
    out: Tensor,
    new_state: Tensor,
    total: Tensor,
    far: Tensor,
    largest: Tensor,
    top: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    gate: Tensor | None,
    window_factor: Tensor,
    linear_factor: Tensor,
    state: Tensor | None,
    rank: Tensor | None,
    kind: str,
    window: int,
    terraced: bool,
    overlap: bool,
    causal: bool,
    scale: float,
    feature_scale: float,
    normalise: bool,
    eps: float,
    state_heads: int,
) -> list[Tensor]:
    """Of each floating tensor that is given."""
    from . import kernels

    given = kernels.Given(q, k, v, near_q, near_k, q_weight, k_weight, q_bias, k_bias, gate, window_factor,
                          linear_factor, state, rank)  # fmt: skip
    form = kernels.Form(kind, window, terraced, overlap, causal, scale, feature_scale, normalise, eps, state_heads)
    with torch.cuda.device_of(q):
        found = kernels.gradients(d_out, d_state, given, form, out, new_state, total, far, largest, top)
    return [x.contiguous() for x in found if x is not None]


@gradients.register_fake
def _(*given: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in given[8 : 8 + TENSORS - 1] if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.settings = inputs[TENSORS:-1]
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, d_out: Tensor, d_state: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    given, output = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
    found = iter(gradients(d_out, d_state, *output, *given, *ctx.settings))
    floats = [None if x is None else next(found) for x in given[:-1]]
    return (*floats, *(None,) * (len(ctx.settings) + 2))


forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("patchattn::causal_conv", mutates_args=())
def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, rank: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The convolved tokens and the state."""
    from . import conv_kernels

    with torch.cuda.device_of(x):
        return conv_kernels.forward(x, weight, bias, state, rank)


@convolution.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


@torch.library.custom_op("patchattn::causal_conv_gradients", mutates_args=())
def convolution_gradients(
    d_out: Tensor,
    d_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    rank: Tensor | None,
) -> list[Tensor]:
    """Of each floating tensor that is given."""
    from . import conv_kernels

    with torch.cuda.device_of(x):
        return conv_kernels.gradients(d_out, d_state, x, weight, bias, state, rank)


@convolution_gradients.register_fake
def _(d_out: Tensor, d_state: Tensor, *given: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in given[:4] if x is not None]


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _convolution_backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    found = iter(convolution_gradients(d_out, d_state, *given))
    return (*(None if x is None else next(found) for x in given[:4]), None)


convolution.register_autograd(_convolution_backward, setup_context=_save_convolution)
