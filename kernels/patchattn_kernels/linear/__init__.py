"""Linear attention: learned or fixed features in place of softmax, with decay, and beside a softmax window.

`linear` computes a prompt, a part of one or one token, and gives the state that the next call goes on from, whose size
does not grow with the context. `linear_weights` shows which key weighs how much. `causal_conv` is the short convolution
over tokens that some methods put before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..dispatch import use_fla, use_triton
from . import flash_linear, ops
from .conv import causal_conv
from .delta import delta_reference
from .reference import (
    MAPS,
    Call,
    FeatureMap,
    Reach,
    bidirectional_reference,
    features,
    linear_reference,
    weights_reference,
)

__all__ = ["FeatureMap", "causal_conv", "features", "linear", "linear_weights", "window_tokens"]

WINDOWS = ("sliding", "terraced")


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_map: FeatureMap,
    k_map: FeatureMap | None = None,
    gate: Tensor | None = None,
    delta: Tensor | None = None,
    window: int = 0,
    window_kind: str = "sliding",
    window_q: Tensor | None = None,
    window_k: Tensor | None = None,
    window_factor: Tensor | None = None,
    linear_factor: Tensor | None = None,
    overlap: bool = False,
    scale: float | None = None,
    feature_scale: float = 1.0,
    normalise: bool = True,
    eps: float = 1e-12,
    causal: bool = True,
    rank: Tensor | None = None,
    past: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention whose weights are products of features, and softmax's within a window.

    The last T of the S tokens are those of this call; earlier ones are what a cache keeps of the window's keys (none
    without a window). A query reads every key that is not in its window through the features of both, so that what lies
    behind fits into a state: of a sliding window keep the last `window - 1` tokens, of a terraced one those of the last
    block and the one before (`window_tokens`).

    Args:
        q: `[B, H, T, D]`.
        k: `[B, G or H, S, D]`.
        v: `[B, G, S, Dv]`.
        q_map, k_map: what makes features of queries and keys; k_map None: the same for both.
        gate: the logarithm of each token's decay, 0 or less, `[B, heads, S]` for all features or `[B, heads, S, K]`
            for each, with 1, G or H heads. What came before decays by it, the token itself does not.
        delta: `[B, heads, T]`, the share of what the state holds for a token's key that its value replaces: the delta
            rule, for unit keys. It needs normalise=False, no window, and a gate of a number a token if any; the
            last column of the state is then zero.
        window: tokens that a query reads by softmax, its own included; 0: none.
        window_kind: "sliding": the last `window` tokens; "terraced": the query's block of `window` tokens up to
            itself, and the whole block before.
        window_q, window_k: what the window's scores are made of, where it is not q and k.
        window_factor, linear_factor: `[H]`, on the weights of both parts; None: 1. The window's largest weight is
            `window_factor`, whatever its scores are.
        overlap: linear weights for the keys of the window too. k and gate may then hold just the T tokens of the call.
        scale: on the window's scores; None is `D ** -0.5`.
        feature_scale: on products of features.
        normalise: divide by the sum of the weights plus `eps`.
        causal: False: every query reads every key, by features alone.
        rank: `[B, S]`, the place of each token among the real tokens of its row; negative for padding. None: there is
            no padding. Needed to go on with a terraced window.
        past: `[B]`, real tokens of each row before this call, which `overlap` needs where there is padding between the
            tokens kept of a row and its new ones; None: as the rank of the call's first token says.
        state: what an earlier call returned; None at the start of a sequence.

    Returns `[B, H, T, Dv]`, zeros for padding, and the state `[B, heads, K, Dv + 1]` in float32: sums over tokens that
    have left the window of features times values, and of features in the last column; with G heads where nothing
    tells the query heads of a group apart, else with H.
    """
    call = _call(
        "linear", q, k, v, q_map=q_map, k_map=k_map, gate=gate, window=window, window_kind=window_kind,
        window_q=window_q, window_k=window_k, window_factor=window_factor, linear_factor=linear_factor,
        overlap=overlap, scale=scale, feature_scale=feature_scale, normalise=normalise, eps=eps, causal=causal,
        rank=rank, past=past, state=state,
    )  # fmt: skip
    if delta is not None:
        _check_delta(call, delta, causal)
    if use_fla("linear", q, k, v, gate, delta, rank, state, unsupported=flash_linear.unsupported(call, causal, delta)):
        return flash_linear.flash_linear(call, delta)
    lacks = "delta rule" if delta is not None else _unsupported(call)
    if use_triton("linear", q, k, v, gate, delta, rank, state, unsupported=lacks):
        (q_weight, q_bias), (k_weight, k_bias) = _folded(call.q_map), _folded(call.k_map)
        near_k = call.window_k if window and call.window_k is not call.k else None
        out, new_state, *_ = ops.forward(
            call.q, call.k, call.v, call.window_q if window and call.window_q is not call.q else None, near_k,
            q_weight, k_weight, q_bias, k_bias, call.gate, call.window_factor.flatten(), call.linear_factor.flatten(),
            state, rank, call.q_map.kind, window, call.reach.terraced, overlap, causal, call.scale, feature_scale,
            normalise, eps, call.state_heads, torch.is_grad_enabled(),
        )  # fmt: skip
        return out, new_state
    if delta is not None:
        return delta_reference(call, delta)
    return linear_reference(call) if causal else bidirectional_reference(call)


def linear_weights(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
    """The weights of `linear` by softmax and by features, `[B, H, T, S]` each: for losses, pictures and tests.

    Takes what `linear` takes, except a state. The sum of both over keys is 1 where normalised; `linear` of the same is
    their sum times v.
    """
    call = _call("linear_weights", q, k, v, causal=causal, **options)
    if call.state is not None or call.k.shape[2] != v.shape[2] or (q.shape[2] != v.shape[2] and causal):
        raise ValueError("linear_weights: it shows whole sequences; give all tokens and no state")
    return weights_reference(call, causal)


def window_tokens(window: int, window_kind: str = "sliding") -> int:
    """How many of the last tokens a cache must keep beside the state."""
    return Reach(window, window_kind == "terraced", overlap=False).columns


def _check_delta(call: Call, delta: Tensor, causal: bool) -> None:
    wanted = [call.q.shape[0], "heads", call.q.shape[2]]
    if delta.ndim != 3 or [delta.shape[0], delta.shape[2]] != [wanted[0], wanted[2]]:
        raise ValueError(f"linear: delta is {list(delta.shape)}; it must be [B, heads, T] = {wanted}")
    if call.q.shape[1] % delta.shape[1]:
        raise ValueError(f"linear: {call.q.shape[1]} query heads cannot share {delta.shape[1]} heads of delta evenly")
    if call.normalise or call.reach.window or not causal:
        raise ValueError("linear: delta needs normalise=False, window=0 and causal=True")
    if call.gate is not None and call.gate.shape[-1] > 1:
        raise ValueError(f"linear: gate holds {call.gate.shape[-1]} decays a token; with delta it must hold one")


def _folded(found: FeatureMap) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a map as the kernels take them: what a map skips its weight for is part of the weight."""
    weight, bias = found.weight, found.bias
    if found.skip and weight is not None:
        weight = weight + torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
    if bias is not None and weight is not None:
        bias = bias.expand(weight.shape[0], weight.shape[2])
    return weight, bias


def _unsupported(call: Call) -> str | None:
    """What the kernels do not have."""
    maps, size = (call.q_map, call.k_map), call.q.shape[-1]
    mapped = next((found.weight.shape[-1] for found in maps if found.weight is not None), size)
    gates = 0 if call.gate is None else call.gate.shape[-1]
    if call.q_map.kind != call.k_map.kind:
        return "features of different kinds for queries and keys"
    if call.q_map.kind == "taylor":
        return "features of kind 'taylor'"
    if any(found.weight is None and (found.bias is not None or found.skip) for found in maps):
        return "bias or skip connection without a weight"
    if any(found.skip and found.weight is not None and found.weight.shape[1] != mapped for found in maps):
        return "skip connection around a map to another size"
    if call.reach.disjoint and gates:
        return "gates for keys behind a window (they may be read by both: overlap=True)"
    if gates > 1 and call.q.element_size() == 2 and launch.generation(call.q.device) < 9:
        return "decay for every feature on a GPU before compute capability 9.0"
    if max(size, call.v.shape[-1]) > 128:
        return f"heads of size {max(size, call.v.shape[-1])}"
    narrow = call.q_map.kind in ("softmax", "exp") or any(found.weight is not None for found in maps)
    most = 64 if narrow or call.q.element_size() == 4 else 128
    if mapped > most:
        return f"{mapped} features in one half"
    floats = (call.q, call.k, call.v, call.gate, call.state, call.window_factor, call.linear_factor,
              *(x for found in maps for x in (found.weight, found.bias)))  # fmt: skip
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    if trained and mapped > 64:
        return f"gradients of {mapped} features without a map"
    # More would spill.
    if trained and call.q.element_size() == 4 and max(size, call.v.shape[-1]) > (32 if gates == 1 else 64):
        return f"gradients in float32 of heads of size {max(size, call.v.shape[-1])}"
    return None


def _call(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_map: FeatureMap,
    k_map: FeatureMap | None = None,
    gate: Tensor | None = None,
    window: int = 0,
    window_kind: str = "sliding",
    window_q: Tensor | None = None,
    window_k: Tensor | None = None,
    window_factor: Tensor | None = None,
    linear_factor: Tensor | None = None,
    overlap: bool = False,
    scale: float | None = None,
    feature_scale: float = 1.0,
    normalise: bool = True,
    eps: float = 1e-12,
    causal: bool = True,
    rank: Tensor | None = None,
    past: Tensor | None = None,
    state: Tensor | None = None,
) -> Call:
    """The arguments, checked."""
    k_map = q_map if k_map is None else k_map
    wide = torch.promote_types(q.dtype, torch.float32)
    (batch, heads, queries, _), keys = q.shape, v.shape[2]
    for what, found in (("q_map", q_map.kind), ("k_map", k_map.kind)):
        if found not in MAPS:
            raise ValueError(f"{name}: {what}.kind is {found!r}; it must be one of {', '.join(MAPS)}")
    if window < 0:
        raise ValueError(f"{name}: window is {window}; it must be 0 (none) or more")
    if window_kind not in WINDOWS:
        raise ValueError(f"{name}: window_kind is {window_kind!r}; it must be one of {', '.join(WINDOWS)}")
    if window and not (normalise and causal):
        raise ValueError(f"{name}: a window of {window} needs normalise=True and causal=True")
    if gate is not None and not causal:
        raise ValueError(f"{name}: a gate says how the past decays; it needs causal=True")
    for what, factor in (("window_factor", window_factor), ("linear_factor", linear_factor)):
        if factor is not None and factor.shape != (heads,):
            raise ValueError(f"{name}: {what} is {list(factor.shape)}; it must be [H] = {[heads]}")
    for what, tensor in (("k", k), ("v", v), ("window_k", window_k), ("gate", gate)):
        if tensor is not None and heads % tensor.shape[1]:
            raise ValueError(f"{name}: {heads} query heads cannot share {tensor.shape[1]} heads of {what} evenly")
    fewest = queries if overlap or not window else keys
    for what, tensor in (("k", k), ("gate", gate)):
        if tensor is not None and causal and tensor.shape[2] not in (fewest, keys):
            raise ValueError(f"{name}: {what} holds {tensor.shape[2]} tokens; it must hold the {keys} of v")
    if causal and queries > keys:
        raise ValueError(f"{name}: {queries} queries over {keys} keys; the queries must be the last of the tokens that "
                         "k and v hold")  # fmt: skip
    if rank is not None and rank.shape[1:] != v.shape[2:3]:
        raise ValueError(f"{name}: rank is {list(rank.shape)}; it must be [B, S] = {[batch, keys]}")
    if rank is None and state is not None and window and window_kind == "terraced":
        raise ValueError(f"{name}: a terraced window that goes on from a state needs rank, to know where blocks begin")
    if causal and not overlap and not window and keys != queries:
        raise ValueError(f"{name}: {keys} keys for {queries} queries; without a window, earlier keys are in the state")
    if window and window_k is None and k.shape[2] != keys:
        raise ValueError(f"{name}: k holds {k.shape[2]} tokens and v {keys}; give window_k for all of them")
    window_k = k if window_k is None else window_k
    if overlap:  # earlier keys are in the state
        k, gate = k[:, :, k.shape[2] - queries :], None if gate is None else gate[:, :, gate.shape[2] - queries :]
    if gate is not None and gate.ndim == 3:
        gate = gate[..., None]
    ones = torch.ones(1, device=q.device)
    return Call(
        q=q, k=k, v=v, q_map=q_map.to(wide), k_map=k_map.to(wide), gate=gate, past=past, state=state,
        window_q=q if window_q is None else window_q, window_k=window_k,
        rank=torch.arange(keys, device=q.device)[None] if rank is None else rank,
        reach=Reach(window, window_kind == "terraced", overlap),
        window_factor=(ones if window_factor is None else window_factor).to(wide)[:, None, None],
        linear_factor=(ones if linear_factor is None else linear_factor).to(wide)[:, None, None],
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        feature_scale=feature_scale, normalise=normalise, eps=eps,
    )  # fmt: skip
