"""Linear attention, with decay and beside a softmax window: the specification, and the path of every CPU.

With features phi, decay G (the sum of the log gates up to a token) and, of query n, the keys W(n) of its window and the
keys L(n) of its linear part,

    weight(n, j) =  window_factor * exp(s_nj - max_W s)                                      for j in W(n)
                 +  linear_factor * feature_scale * sum_f phi_q(n)_f phi_k(j)_f exp(G_nf - G_jf)   for j in L(n)
    out(n) = sum_j weight(n, j) v_j / (sum_j weight(n, j) + eps)

`weights_reference` says that of all pairs at once. `linear_reference` goes through the queries in chunks and carries
what lies behind in a state `S [B, state heads, K, D + 1]`, whose last column is the normaliser; a chunk of one query is
the recurrent form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 128  # queries at a time
GATED_CHUNK = 16  # with a decay for every feature, whose weights are made of a [queries, keys, features] tensor
MILD_CHUNK = 64  # with such a decay of which so many tokens still give a number and its inverse
MILDEST = -60.0  # sum of log gates whose exponential and its inverse float32 holds, with room for the features
LEAST = 1e-12  # features that must be positive are at least that
MAPS = ("softmax", "softmax_half", "exp", "exp_half", "relu", "elu", "taylor", "identity")


class FeatureMap(NamedTuple):
    """What turns queries or keys into features.

    Attributes:
        kind: with `z = x @ weight + bias` (or x itself),
            "softmax": softmax of z beside softmax of -z, Hedgehog's; "softmax_half": the first alone;
            "exp": exp(z - max z) beside exp(min z - z); "exp_half": the first alone;
            "relu": T2R's; "elu": elu(z) + 1; "taylor": Based's 1, z, z z^T, whose products are the second-order
            expansion of exp(z.z' / sqrt(F)); "identity": z.
        weight: `[heads, D, F]`.
        bias: `[heads, F]` or `[heads, 1]`.
        skip: z is `x + x @ weight + bias` (F = D).
    """

    kind: str = "softmax"
    weight: Tensor | None = None
    bias: Tensor | None = None
    skip: bool = False

    def to(self, dtype: torch.dtype) -> FeatureMap:
        """With parameters of another dtype: once a call, so that gradients of its chunks add up in it."""
        weight, bias = (x if x is None else x.to(dtype) for x in (self.weight, self.bias))
        return self._replace(weight=weight, bias=bias)


def features(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """Features of `x` `[B, heads, T, D]`, in at least float32: `[B, heads, T, K]`, for each head of the weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    z = x
    if feature_map.weight is not None:
        heads = max(x.shape[1], feature_map.weight.shape[0])
        x = repeat_heads(x, heads)
        z = x @ repeat_heads(feature_map.weight.to(wide), heads, dim=0)
    if feature_map.bias is not None:
        z = z + feature_map.bias.to(wide)[:, None]
    if feature_map.skip:
        z = x + z
    match feature_map.kind:
        case "softmax":
            found = torch.cat([z.softmax(dim=-1), (-z).softmax(dim=-1)], dim=-1)
        case "softmax_half":
            found = z.softmax(dim=-1)
        case "exp":
            found = torch.cat([(z - z.amax(-1, keepdim=True)).exp(), (z.amin(-1, keepdim=True) - z).exp()], dim=-1)
        case "exp_half":
            found = (z - z.amax(-1, keepdim=True)).exp()
        case "relu":
            found = z.relu()
        case "elu":
            found = functional.elu(z) + 1
        case "taylor":
            z = z * z.shape[-1] ** -0.25
            squares = (z[..., :, None] * z[..., None, :]).flatten(-2) * 0.5**0.5
            return torch.cat([torch.ones_like(z[..., :1]), z, squares], dim=-1)
        case "identity":
            return z
        case kind:
            raise ValueError(f"features: kind is {kind!r}; it must be one of {', '.join(MAPS)}")
    return found.clamp(min=LEAST)


@dataclass(frozen=True)
class Reach:
    """Which keys a query reads by softmax and which linearly, by their places among the real tokens of a row."""

    window: int
    terraced: bool
    overlap: bool

    @property
    def disjoint(self) -> bool:
        return self.window > 0 and not self.overlap

    @property
    def columns(self) -> int:
        """How many tokens before its own a query may read by softmax."""
        return max(0, (2 * self.window if self.terraced else self.window) - 1)

    def window_start(self, place: Tensor) -> Tensor:
        """The first key of the window of the query at `place`."""
        if self.terraced:
            return self.window * (place.div(self.window, rounding_mode="floor") - 1)
        return place - self.window + 1

    def linear_stop(self, place: Tensor) -> Tensor:
        """Keys before this one are read linearly by the query at `place`."""
        return self.window_start(place) if self.disjoint else place + 1

    def in_state(self, place: Tensor) -> Tensor:
        """How many tokens of its row a state holds when the token at `place` comes."""
        return torch.minimum(self.linear_stop(place), place).clamp(min=0)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, checked, as the two forms of the reference take them.

    q, window_q: `[B, H, T, D]`; k, v, window_k, gate, rank: the tokens that they hold, the call's T the last of them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_map: FeatureMap
    k_map: FeatureMap
    window_q: Tensor
    window_k: Tensor
    gate: Tensor | None  # [B, heads, S, 1 or K]
    rank: Tensor  # [1 or B, S]
    reach: Reach
    window_factor: Tensor  # [H, 1, 1]
    linear_factor: Tensor  # [H, 1, 1]
    scale: float
    feature_scale: float
    normalise: bool
    eps: float
    state: Tensor | None
    past: Tensor | None = None  # [B], as `linear` takes it

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def state_heads(self) -> int:
        mapped = 1 if self.k_map.weight is None else self.k_map.weight.shape[0]
        return max(self.k.shape[1], self.v.shape[1], mapped, 1 if self.gate is None else self.gate.shape[1])


def linear_reference(call: Call) -> tuple[Tensor, Tensor]:
    reach, queries, keys = call.reach, call.q.shape[2], call.v.shape[2]
    past, heads = keys - queries, call.q.shape[1]
    extra = keys - call.k.shape[2]  # keys of the window that are in the state already
    delay = reach.columns if reach.disjoint else 0  # how far the state stays behind
    first = call.rank[:, past].clamp(min=0) if call.past is None else call.past
    after = call.rank[:, -1:] + 1
    absorbed = reach.in_state(first)[:, None]  # [1 or B, 1]
    state, outs = call.state, []
    size = queries if call.gate is None and queries <= CHUNK else CHUNK
    mild = False
    if call.gate is not None and call.gate.shape[-1] > 1:
        mild = _is_mild(call, MILD_CHUNK + delay)
        size = MILD_CHUNK if mild else GATED_CHUNK
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        low, high = max(0, past + start - delay), past + stop
        place, key_place = call.rank[:, past + start : high], call.rank[:, low:high]
        values = _with_ones(repeat_heads(call.v[:, :, low:high], call.state_heads), call.wide)
        phi_q = features(call.q[:, :, start:stop], call.q_map) * call.feature_scale
        phi_k = repeat_heads(features(call.k[:, :, low - extra : high - extra], call.k_map), call.state_heads)
        # Keys that the state holds on entry, and padding, give nothing; a softmax of zeros would.
        phi_k = phi_k * (key_place >= absorbed)[:, None, :, None]  # [B, state heads, keys, K]
        decay = _decay(call, low - extra, high - extra, key_place)
        before = past + start - low  # keys of this chunk that came before its first query
        keep = key_place[:, None] < reach.linear_stop(place)[..., None]  # [1 or B, queries, keys]
        near = _near(phi_q, repeat_heads(phi_k, heads), decay, before, keep[:, None], mild)
        sums = near @ repeat_heads(values, heads)
        if state is not None:
            seen = phi_q if decay is None else phi_q * repeat_heads(_since(decay, before).exp(), heads)
            sums = sums + seen @ repeat_heads(state, heads)
        sums = sums * call.linear_factor
        if reach.window:
            sums = sums + _window(call, start, stop) * call.window_factor
        out = sums[..., :-1]
        outs.append((out / (sums[..., -1:] + call.eps) if call.normalise else out).to(call.q.dtype))

        if stop < queries:
            done = max(0, past + stop - delay) - low
            phi_k, values = phi_k[:, :, :done], values[:, :, :done]
        else:
            done = high - low
            phi_k = phi_k * (key_place < reach.in_state(after))[:, None, :, None]
        if decay is not None:
            phi_k = phi_k * (decay[:, :, -1:] - decay[:, :, :done]).exp()
            if state is not None:
                state = state * _since(decay, before)[:, :, -1, :, None].exp()
        added = phi_k.mT @ values
        state = added if state is None else state + added
    assert state is not None
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), state


def bidirectional_reference(call: Call) -> tuple[Tensor, Tensor]:
    """Every query reads every key: sums over all keys, chunk by chunk."""
    state: Tensor | None = call.state
    for start in range(0, call.k.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        phi_k = repeat_heads(features(call.k[:, :, part], call.k_map), call.state_heads)
        phi_k = phi_k * (call.rank[:, None, part, None] >= 0)
        added = phi_k.mT @ _with_ones(repeat_heads(call.v[:, :, part], call.state_heads), call.wide)
        state = added if state is None else state + added
    assert state is not None
    shared, outs = repeat_heads(state, call.q.shape[1]), []
    for start in range(0, call.q.shape[2], CHUNK):
        sums = features(call.q[:, :, start : start + CHUNK], call.q_map) * call.feature_scale @ shared
        sums = sums * call.linear_factor
        out = sums[..., :-1]
        outs.append((out / (sums[..., -1:] + call.eps) if call.normalise else out).to(call.q.dtype))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), state


def weights_reference(call: Call, causal: bool) -> tuple[Tensor, Tensor]:
    """Of every query and key the weight by softmax and the linear one, `[B, H, T, S]` each."""
    reach, heads, queries, keys = call.reach, call.q.shape[1], call.q.shape[2], call.v.shape[2]
    place, key_place = call.rank[:, keys - queries :, None], call.rank[:, None]
    real = key_place >= 0
    keep = real & (key_place < reach.linear_stop(place)) if causal else real
    phi_q = features(call.q, call.q_map) * call.feature_scale
    phi_k = repeat_heads(features(call.k, call.k_map), heads)
    decay = _decay(call, 0, keys, call.rank)
    linear = _near(phi_q, phi_k, decay, keys - queries, keep[:, None]) * call.linear_factor
    window = torch.zeros_like(linear)
    if reach.window:
        window = _exponentials(call, 0, queries, 0) * call.window_factor
    if call.normalise:
        total = (linear + window).sum(dim=-1, keepdim=True) + call.eps
        return window / total, linear / total
    return window, linear


def _near(phi_q: Tensor, phi_k: Tensor, decay: Tensor | None, before: int, keep: Tensor, mild: bool = False) -> Tensor:
    """The linear weights of a chunk's queries for keys at hand, `[B, H, queries, keys]`."""
    if decay is None:
        return (phi_q @ phi_k.mT).masked_fill(~keep, 0.0)
    decay = repeat_heads(decay, phi_q.shape[1])
    if mild:
        return ((phi_q * decay[:, :, before:].exp()) @ (phi_k * (-decay).exp()).mT).masked_fill(~keep, 0.0)
    # Later keys would give positive exponents, which may overflow; they are not read anyway.
    between = (decay[:, :, before:, None] - decay[:, :, None]).masked_fill(~keep[..., None], -torch.inf)
    if decay.shape[-1] == 1:
        return (phi_q @ phi_k.mT) * between[..., 0].exp()
    return torch.einsum("bhqf,bhkf,bhqkf->bhqk", phi_q, phi_k, between.exp())


def _decay(call: Call, low: int, high: int, key_place: Tensor) -> Tensor | None:
    """Sums of the log gates over keys [low, high), each key's own included; padding does not decay."""
    if call.gate is None:
        return None
    gate = call.gate[:, :, low:high].to(call.wide).masked_fill((key_place < 0)[:, None, :, None], 0.0)
    return repeat_heads(gate.cumsum(dim=2), call.state_heads)


def _is_mild(call: Call, tokens: int) -> bool:
    """Whether no decay over so many tokens is too strong to be taken back by its inverse; asked where it saves time."""
    assert call.gate is not None
    if call.q.shape[2] <= GATED_CHUNK or torch.compiler.is_compiling():
        return False
    return bool(call.gate.amin() * tokens > MILDEST)


def _since(decay: Tensor, before: int) -> Tensor:
    """The decay of what a state holds, which is as of the token before the chunk's first query."""
    return decay[:, :, before:] - (decay[:, :, before - 1 : before] if before else 0.0)


def _window(call: Call, start: int, stop: int) -> Tensor:
    """Exponentials of the window's scores times values, and their sum, `[B, H, queries, D + 1]`."""
    past = call.v.shape[2] - call.q.shape[2]
    low = max(0, past + start - call.reach.columns)
    values = _with_ones(call.v[:, :, low : past + stop], call.wide)
    return _exponentials(call, start, stop, low) @ repeat_heads(values, call.q.shape[1])


def _exponentials(call: Call, start: int, stop: int, low: int) -> Tensor:
    past = call.v.shape[2] - call.q.shape[2]
    place = call.rank[:, past + start : past + stop, None]
    key_place = call.rank[:, None, low : past + stop]
    keep = (key_place >= 0) & (key_place <= place) & (key_place >= call.reach.window_start(place))
    keys = repeat_heads(call.window_k[:, :, low : past + stop].to(call.wide), call.q.shape[1])
    scores = call.window_q[:, :, start:stop].to(call.wide) @ keys.mT * call.scale
    scores = scores.masked_fill(~keep[:, None], -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    return (scores - largest.masked_fill(largest == -torch.inf, 0.0)).exp()


def _with_ones(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`[v, 1]`: the same sums give numerator and normaliser."""
    return functional.pad(values.to(dtype), (0, 1), value=1.0)


def repeat_heads(x: Tensor, heads: int, dim: int = 1) -> Tensor:
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim=dim)
