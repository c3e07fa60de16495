"""The primitive's kernel as a torch operator, so that torch.compile keeps one graph and autograd knows its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import Call, FeatureMap, Reach, linear_reference


@torch.library.custom_op("patchattn::linear", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    gate: Tensor | None,
    window_factor: Tensor,
    linear_factor: Tensor,
    state: Tensor | None,
    rank: Tensor | None,
    kind: str,
    window: int,
    terraced: bool,
    scale: float,
    feature_scale: float,
    normalise: bool,
    eps: float,
    state_heads: int,
) -> tuple[Tensor, Tensor]:
    """The output and the state; factors are `[H]` or `[1]`."""
    from . import kernels

    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of the tensors
        return kernels.forward(q, k, v, kind, q_weight, k_weight, gate, window, terraced, window_factor, linear_factor,
                               scale, feature_scale, normalise, eps, rank, state, state_heads)  # fmt: skip


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    kind, state_heads = others[6], others[-1]
    (batch, heads, length, size), width = q.shape, v.shape[3]
    mapped = size if q_weight is None else q_weight.shape[-1]
    features = 2 * mapped if kind in ("softmax", "exp") else mapped
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)
    return out, q.new_empty(batch, state_heads, features, width + 1, dtype=torch.float32)


@torch.library.custom_op("patchattn::linear_gradients", mutates_args=())
def gradients(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    gate: Tensor | None,
    window_factor: Tensor,
    linear_factor: Tensor,
    state: Tensor | None,
    rank: Tensor | None,
    kind: str,
    window: int,
    terraced: bool,
    scale: float,
    feature_scale: float,
    normalise: bool,
    eps: float,
) -> list[Tensor]:
    """Of each floating tensor that is given, by the reference, whose memory grows with T and not with T * T."""
    given = [q, k, v, q_weight, k_weight, gate, window_factor, linear_factor, state]
    wide = torch.promote_types(q.dtype, torch.float32)

    def run(*floats: Tensor) -> tuple[Tensor, Tensor]:
        left = iter(floats)
        found: list[Any] = [x if x is None else next(left) for x in given]
        q, k, v, q_weight, k_weight, gate, window_factor, linear_factor, state = found
        return linear_reference(Call(
            q=q, k=k, v=v, q_map=FeatureMap(kind, q_weight).to(wide), k_map=FeatureMap(kind, k_weight).to(wide),
            window_q=q, window_k=k, gate=gate, reach=Reach(window, terraced, overlap=False), scale=scale,
            window_factor=window_factor[:, None, None], linear_factor=linear_factor[:, None, None], state=state,
            feature_scale=feature_scale, normalise=normalise, eps=eps,
            rank=torch.arange(v.shape[2], device=v.device)[None] if rank is None else rank,
        ))  # fmt: skip

    # Autograd does not see what an operator does; this transform does.
    differentiate = torch.func.vjp(run, *(x for x in given if x is not None))[1]
    return [x.contiguous() for x in differentiate((d_out, d_state))]


@gradients.register_fake
def _(d_out: Tensor, d_state: Tensor, *given: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in given[:9] if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:-1]


def _backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    found = iter(gradients(d_out, d_state, *given, *ctx.settings))
    return (*(None if x is None else next(found) for x in given[:9]), *(None,) * 9)


forward.register_autograd(_backward, setup_context=_save)
