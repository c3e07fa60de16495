"""Linear attention by flash-linear-attention, where it is installed: https://github.com/fla-org/flash-linear-attention

Only what it computes as `linear` does: features that are q and k themselves, no normaliser, no window. Written for
version 0.6; its kernels want tokens before heads, as many heads of everything, and a state without a normaliser.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .reference import Call, repeat_heads


def unsupported(call: Call, causal: bool, delta: Tensor | None) -> str | None:
    """What of this call flash-linear-attention does not have."""
    if not causal:
        return "form that reads both directions"
    if call.reach.window:
        return "softmax window"
    if call.normalise:
        return "normaliser (normalise=False goes without)"
    if any(found.kind != "identity" or found.weight is not None for found in (call.q_map, call.k_map)):
        return "feature maps"
    if call.q.shape[2] == 1:
        return "use for single tokens here"
    if delta is not None and call.gate is not None and call.gate.shape[-1] > 1:
        return "delta rule with a decay for every feature"
    if call.q.dtype == torch.float64:
        return "float64"
    return None


def flash_linear(call: Call, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    heads = call.q.shape[1]
    state_heads = call.state_heads if delta is None else max(call.state_heads, delta.shape[1])
    real = (call.rank >= 0)[:, None]  # [1 or B, 1, T]
    q, k, v = call.q * call.linear_factor.to(call.q.dtype), call.k * real[..., None], call.v
    gate = None if call.gate is None else call.gate.masked_fill(~real[..., None], 0.0)

    def given(x: Tensor) -> Tensor:
        """`[B, T, H, ...]`, as it wants it."""
        return repeat_heads(x, heads).transpose(1, 2).contiguous()

    options: dict[str, Any] = dict(scale=call.feature_scale, output_final_state=True)
    if call.state is not None:
        options |= dict(initial_state=repeat_heads(call.state[..., :-1].float(), heads).contiguous())
    qkv = [given(x) for x in (q, k, v)]
    scalar = None if gate is None else given(gate[..., 0])
    if delta is not None:
        beta = given(delta * real)
        if scalar is None:
            out, state = _operator("delta_rule")(*qkv, beta=beta, **options)
        else:
            out, state = _operator("gated_delta_rule")(*qkv, g=scalar, beta=beta, **options)
    elif gate is None:
        out, state = _operator("linear_attn")(*qkv, normalize=False, **options)
    elif gate.shape[-1] == 1:
        out, state = _operator("simple_gla")(*qkv, g=scalar, **options)
    else:
        out, state = _operator("gla")(*qkv, g=given(gate), **options)
    # A state that heads share is the same for all of them.
    state = state[:, :: heads // state_heads].float()
    return out.transpose(1, 2), torch.cat([state, _sums(call, k, gate, state, delta)], dim=-1)


def _sums(call: Call, k: Tensor, gate: Tensor | None, state: Tensor, delta: Tensor | None) -> Tensor:
    """The state's last column: sums of features, none of a delta rule."""
    if delta is not None:
        return torch.zeros_like(state[..., :1])
    keys, before = repeat_heads(k.float(), state.shape[1]), None if call.state is None else call.state[..., -1:]
    if gate is not None:
        decay = repeat_heads(gate.float().cumsum(dim=2), state.shape[1])
        keys = keys * (decay[:, :, -1:] - decay).exp()
        before = None if before is None else before * decay[:, :, -1, :, None].exp()
    sums = keys.sum(dim=2)[..., None]
    return sums if before is None else sums + before


def _operator(name: str) -> Any:
    return getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
