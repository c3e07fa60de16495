"""Attention of chosen (token, head) pairs alone: what a router leaves out is not computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import use_triton
from . import ops

__all__ = ["routed"]


def routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    causal: bool,
    starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention of each (token, head) pair, times its weight; a pair whose weight is 0 is not computed.

    Args:
        q: `[B, H, T, D]`, the queries of the last T of the S tokens.
        k, v: `[B, G, S, D]`.
        weights: `[B, H, T]`, of any floating dtype. Of pairs with weight 0 the query is not looked at.
        causal: read keys up to the query's own place; else all of them.
        starts: `[B]`, the first real token of each row; earlier keys are padding, and earlier queries give zeros.
            None: there is no padding.
        scale: on the scores; None means D ** -0.5.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, one extra logit a head that takes weight and gives no value.

    Returns `[B, H, T, D]`, zeros for pairs that are not computed. Gradients flow to q, k, v, weights and sinks; those
    of pairs that are not computed are zero, for their weights too.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"routed: {q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if weights.shape != q.shape[:3]:
        raise ValueError(f"routed: weights is {list(weights.shape)}; it must be [B, H, T] = {list(q.shape[:3])}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"routed: {q.shape[2]} queries over {k.shape[2]} keys; the queries must be the last of the "
                         "tokens that k and v hold")  # fmt: skip
    if starts is not None and starts.shape != q.shape[:1]:
        raise ValueError(f"routed: starts is {list(starts.shape)}; it must be [B] = {list(q.shape[:1])}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    given = q, k, v, weights, starts, sinks
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if not use_triton("routed", *given, unsupported=_unsupported(q, v)):
        return ops.in_torch(*given, causal, scale, softcap)
    if q.shape[2] == 1 and not trains:
        return ops.decode(*given, scale, softcap)
    return ops.forward(*given, causal, scale, softcap)[0]


def _unsupported(q: Tensor, v: Tensor) -> str | None:
    if q.shape[-1] > 128:
        return f"heads of size {q.shape[-1]}"
    return None if v.shape[-1] == q.shape[-1] else "values of another size than the keys"
