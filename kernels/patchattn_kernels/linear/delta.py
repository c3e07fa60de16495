"""The delta rule, with decay: a token takes from the state what it holds for the token's key before it adds its value.

With the decay a_t = exp(gate_t) and the share b_t, of unit keys usually,

    S_t = a_t (S_(t-1) - b_t k_t (k_t S_(t-1))) + b_t k_t v_t,     out_t = q_t S_t

Parallelizing Linear Transformers with the Delta Rule over Sequence Length, Yang et al., 2024, arXiv 2406.06484; Gated
Delta Networks, Yang et al., 2024, arXiv 2412.06464. Within a chunk that begins with S_0, what each token writes, u_t,
solves a triangular system, with G the sums of the gates:

    u_t + b_t sum_(j<t) exp(G_t - G_j) (k_t k_j) u_j = b_t (v_t - exp(G_t) k_t S_0)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .reference import Call, features, repeat_heads

CHUNK = 64


def delta_reference(call: Call, delta: Tensor) -> tuple[Tensor, Tensor]:
    """As `linear_reference`; the last column of the state stays zero."""
    heads, length = call.q.shape[1], call.q.shape[2]
    real = (call.rank >= 0)[:, None]  # [1 or B, 1, T]
    state_heads = max(call.state_heads, delta.shape[1])
    q = features(call.q, call.q_map) * call.feature_scale * call.linear_factor
    k = repeat_heads(features(call.k, call.k_map), state_heads)
    q, k = q * real[..., None], k * real[..., None]
    v = repeat_heads(call.v.to(call.wide), state_heads)
    share = repeat_heads(delta.to(call.wide), state_heads)[..., None]
    gate = torch.zeros_like(share[:, :1]) if call.gate is None else call.gate.to(call.wide)
    gate = repeat_heads(gate.masked_fill(~real[..., None], 0.0), state_heads)  # [B, state heads, T, 1]
    if call.state is None:
        state = v.new_zeros(v.shape[0], state_heads, k.shape[-1], v.shape[-1])
    else:
        state = repeat_heads(call.state[..., :-1], state_heads)
    outs = []
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        keys, b, decay = k[:, :, part], share[:, :, part], gate[:, :, part].cumsum(dim=2)
        ones = torch.ones(keys.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device)
        # Later keys would give positive exponents, which may overflow; they are not read anyway.
        between = (decay - decay.mT).masked_fill(~ones.tril(), -torch.inf).exp()
        overlaps = (b * (keys @ keys.mT) * between).tril(-1)
        wanted = b * (v[:, :, part] - decay.exp() * (keys @ state))
        written = torch.linalg.solve_triangular(overlaps, wanted, upper=False, unitriangular=True)
        queries = q[:, :, part]
        weights = queries @ repeat_heads(keys, heads).mT * repeat_heads(between, heads)
        seen = repeat_heads(decay.exp(), heads) * (queries @ repeat_heads(state, heads))
        outs.append((seen + weights @ repeat_heads(written, heads)).to(call.q.dtype))
        end = decay[:, :, -1:]
        state = end.exp() * state + (keys * (end - decay).exp()).mT @ written
    return torch.cat(outs, dim=2), functional.pad(state, (0, 1))
