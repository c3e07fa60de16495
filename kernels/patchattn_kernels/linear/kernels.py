"""Linear attention in Triton: a prompt, a part of one or one token in one pass. Specification: reference.py.

A program owns the queries of one head and a block of value columns, and walks them in chunks, as the reference does.
The state stays on the chip; features are made there of the tiles that are read anyway, and never leave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from ..static import Compile


class Tiles(NamedTuple):
    """How many tokens and value columns a program holds at a time, and how it is launched."""

    tokens: int
    values: int
    num_warps: int
    num_stages: int


# By bits of a number. A chunk's features, both halves of the state and the products of a tile have to fit side by side:
# with more tokens at a time, or float32 in parts of tf32, they would spill.
FORWARD = {16: Tiles(16, 32, 4, 1), 32: Tiles(16, 16, 8, 1)}
GATED = FORWARD | {16: Tiles(16, 16, 4, 1)}  # with a decay, more columns of values would spill on Ampere
GATES = FORWARD | {16: Tiles(16, 32, 8, 1)}  # with one for every feature any number would
PRECISION = "ieee"


@triton.jit
def _load(ptr, rows, stride, columns, row_mask, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a matrix whose columns lie side by side; zeros where there is none. `rows * stride` is small."""
    mask = row_mask[:, None] if columns.shape[0] == D else row_mask[:, None] & (columns < D)[None, :]
    tile = tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _rank(rank_ptr, batch, columns, inside, S):
    """Places among the real tokens of a row; -1 for padding and beyond the tokens."""
    if rank_ptr is None:
        place = columns
    else:
        place = tl.load(rank_ptr + batch * S + columns, mask=inside, other=-1)
    return tl.where(inside, place, -1)


@triton.jit
def _window_start(place, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    if TERRACED:
        return WINDOW * (place // WINDOW - 1)
    return place - WINDOW + 1


@triton.jit
def _in_state(place, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """How many tokens a state holds when the token at `place` comes."""
    if WINDOW:
        return tl.maximum(_window_start(place, WINDOW, TERRACED), 0)
    return place


@triton.jit
def _weight(ptr, head, D: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
            UPCAST: tl.constexpr):  # fmt: skip
    """The map of one head, read once; nothing where there is none."""
    rows, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    if ptr is None:
        weight = rows
    else:
        weight = _load(ptr + head * D * F, rows, F, columns, rows < D, F, UPCAST)
    return weight


@triton.jit
def _map(x, weight, PRECISION: tl.constexpr, MAPPED: tl.constexpr):
    """`x @ weight` in float32; x itself without a weight."""
    if MAPPED:
        z = tl.dot(x, weight, input_precision=PRECISION)
    else:
        z = x.to(tl.float32)
    return z


@triton.jit
def _features(z, real, KIND: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """Features of z, zeros for rows that are not real and columns beyond F."""
    keep = real[:, None] & (tl.arange(0, BLOCK_F) < F)[None, :]
    if KIND == "softmax" or KIND == "exp":
        z = tl.where(keep, z, float("-inf"))
        top = tl.max(z, 1)
        found = tl.exp(z - tl.where(real, top, 0.0)[:, None])
        if KIND == "softmax":
            total = tl.sum(found, 1)
            found /= tl.where(real, total, 1.0)[:, None]
    elif KIND == "relu":
        found = tl.maximum(z, 0.0)
    elif KIND == "elu":
        found = tl.where(z > 0, z + 1, tl.exp(tl.minimum(z, 0.0)))
    else:
        found = z
    if KIND != "identity":
        found = tl.maximum(found, 1e-12)
    return tl.where(keep, found, 0.0)


@triton.jit
def _gates(gate_ptr, row, columns, inside, K: tl.constexpr, FIRST: tl.constexpr, BLOCK_F: tl.constexpr,
           F: tl.constexpr):  # fmt: skip
    """Sums of the log gates of a chunk up to each token, `[tokens, BLOCK_F]`; one column serves all for K = 1."""
    features = tl.arange(0, BLOCK_F)
    if K == 1:
        gate = tl.load(gate_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        return tl.cumsum(gate, 0)[:, None] + tl.zeros([columns.shape[0], BLOCK_F], tl.float32)
    mask = inside[:, None] & (features < F)[None, :]
    gate = tl.load(gate_ptr + (row + columns)[:, None] * K + FIRST + features[None, :], mask=mask, other=0.0)
    return tl.cumsum(gate.to(tl.float32), 0)


@triton.jit
def _decayed(phi_q, phi_k, decay, BLOCK_T: tl.constexpr):
    """Products of features with a decay of each, key by key: inverses of strong decays would overflow."""
    rows = tl.arange(0, BLOCK_T)
    weights = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for j in range(BLOCK_T):
        one = (rows == j)[:, None]
        key, upto = tl.sum(tl.where(one, phi_k, 0.0), 0), tl.sum(tl.where(one, decay, 0.0), 0)
        column = tl.sum(phi_q * key[None, :] * tl.exp(tl.minimum(decay - upto[None, :], 0.0)), 1)
        weights = tl.where((rows == j)[None, :], column[:, None], weights)
    return weights


@triton.jit
def _read(phi, state, dtype: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Features times the state; sums over a long past do not fit into float16."""
    if dtype == tl.bfloat16 and not UPCAST:
        found = tl.dot(phi.to(dtype), state.to(dtype))
    elif dtype == tl.float16:
        found = tl.dot(phi, state, input_precision="tf32")
    else:
        found = tl.dot(phi, state, input_precision=PRECISION)
    return found


@triton.jit
def _last(decay, BLOCK_T: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None], decay, 0.0), 0)


@triton.jit(do_not_specialize=["T", "S", "tiles"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, q_weight_ptr, k_weight_ptr, gate_ptr, rank_ptr, window_factor_ptr,
    linear_factor_ptr, state_ptr, new_state_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot, T, S, tiles, scale, feature_scale, eps,
    H: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, STATE_GROUP: tl.constexpr, GATE_GROUP: tl.constexpr,
    GATES: tl.constexpr, KIND: tl.constexpr, BOTH: tl.constexpr, MAPPED: tl.constexpr, WINDOW: tl.constexpr,
    TERRACED: tl.constexpr, NORMALISE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of keys are at hand for a chunk: those that some of its queries may read by softmax, and its own.

    `plus` and `minus` are the state of both halves of the features; without BOTH there is the first alone.
    """
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    K: tl.constexpr = 2 * F if BOTH else F
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // K_GROUP * stride_kh
    v_ptr += batch * stride_vb + head // V_GROUP * stride_vh
    columns, features = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    lanes, past = tl.arange(0, BLOCK_T), S - T
    gate_row = (batch * (H // GATE_GROUP) + head // GATE_GROUP) * S
    q_weight = _weight(q_weight_ptr, head, D, F, BLOCK_D, BLOCK_F, UPCAST)
    k_weight = _weight(k_weight_ptr, head, D, F, BLOCK_D, BLOCK_F, UPCAST)
    window_factor = tl.load(window_factor_ptr + head) if WINDOW else 0.0
    linear_factor = tl.load(linear_factor_ptr + head) if linear_factor_ptr is not None else 1.0

    plus = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    plus_sum = tl.zeros([BLOCK_F], tl.float32)
    minus, minus_sum = plus, plus_sum
    state_row = (batch * (H // STATE_GROUP) + head // STATE_GROUP) * K
    if state_ptr is not None:
        given = state_ptr + state_row * (DV + 1)
        plus = _load(given, features, DV + 1, values, features < F, DV, False)
        plus_sum = tl.load(given + features * (DV + 1) + DV, mask=features < F, other=0.0)
        if BOTH:
            given += F * (DV + 1)
            minus = _load(given, features, DV + 1, values, features < F, DV, False)
            minus_sum = tl.load(given + features * (DV + 1) + DV, mask=features < F, other=0.0)
    if rank_ptr is None:
        first, after = past, S
    else:
        first, after = tl.load(rank_ptr + batch * S + past), tl.load(rank_ptr + batch * S + S - 1) + 1
    absorbed = _in_state(tl.maximum(first, 0), WINDOW, TERRACED)
    leaving = _in_state(after, WINDOW, TERRACED)

    for start in range(0, T, BLOCK_T):
        rows = start + lanes
        inside = rows < T
        place = _rank(rank_ptr, batch, past + rows, inside, S)
        q = _load(q_ptr + tl.cast(start, tl.int64) * stride_qt, lanes, stride_qt, columns, inside, D, UPCAST)
        z_q = _map(q, q_weight, PRECISION, MAPPED)
        # One half of the features after the other, and made anew where they are needed: both would not fit.
        phi_q = _features(z_q, inside, KIND, F, BLOCK_F) * feature_scale
        if GATES:
            decay_plus = _gates(gate_ptr, gate_row, past + rows, inside & (place >= 0), GATES, 0, BLOCK_F, F)
            phi_q *= tl.exp(decay_plus)
        acc = _read(phi_q, plus, v_ptr.dtype.element_ty, PRECISION, UPCAST)
        total = tl.sum(phi_q * plus_sum[None, :], 1)
        if BOTH:
            phi_q = _features(-z_q, inside, KIND, F, BLOCK_F) * feature_scale
            if GATES:
                decay_minus = _gates(gate_ptr, gate_row, past + rows, inside & (place >= 0), GATES, F, BLOCK_F, F)
                phi_q *= tl.exp(decay_minus)
            acc += _read(phi_q, minus, v_ptr.dtype.element_ty, PRECISION, UPCAST)
            total += tl.sum(phi_q * minus_sum[None, :], 1)
        near = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        near_sum = tl.zeros([BLOCK_T], tl.float32)
        near_max = near_sum - float("inf")
        for tile in range(tiles):
            base = tl.cast(past + start - (tiles - 1 - tile) * BLOCK_T, tl.int64)
            there = (base + lanes).to(tl.int32)
            real = (there >= 0) & (there < S)
            key = _rank(rank_ptr, batch, there, real, S)
            k = _load(k_ptr + base * stride_ks, lanes, stride_ks, columns, real, D, UPCAST)
            v = _load(v_ptr + base * stride_vs, lanes, stride_vs, values, real, DV, UPCAST)
            z = _map(k, k_weight, PRECISION, MAPPED)
            fresh = key >= absorbed
            stop = _window_start(place, WINDOW, TERRACED) if WINDOW else place + 1
            far = key[None, :] < stop[:, None]
            phi_q = _features(z_q, inside, KIND, F, BLOCK_F) * feature_scale
            phi_k = _features(z, fresh, KIND, F, BLOCK_F)
            if GATES > 1:
                weights = _decayed(phi_q, phi_k, decay_plus, BLOCK_T)
            else:
                weights = tl.dot(phi_q.to(v.dtype), tl.trans(phi_k.to(v.dtype)), input_precision=PRECISION)
            if BOTH:
                phi_q = _features(-z_q, inside, KIND, F, BLOCK_F) * feature_scale
                phi_k = _features(-z, fresh, KIND, F, BLOCK_F)
                if GATES > 1:
                    weights += _decayed(phi_q, phi_k, decay_minus, BLOCK_T)
                else:
                    weights = tl.dot(phi_q.to(v.dtype), tl.trans(phi_k.to(v.dtype)), acc=weights,
                                     input_precision=PRECISION)  # fmt: skip
            if GATES == 1:
                upto = tl.max(decay_plus, 1)  # all columns are alike
                weights *= tl.exp(tl.minimum(upto[:, None] - upto[None, :], 0.0))
            weights = tl.where(far, weights, 0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc=acc, input_precision=PRECISION)
            total += tl.sum(weights, 1)
            if WINDOW:
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
                keep = (key >= 0)[None, :] & (key[None, :] <= place[:, None]) & (key[None, :] >= stop[:, None])
                scores = tl.where(keep, scores, float("-inf"))
                new_max = tl.maximum(near_max, tl.max(scores, 1))
                safe = tl.where(new_max == float("-inf"), 0.0, new_max)
                shares, shrink = tl.exp2(scores - safe[:, None]), tl.exp2(near_max - safe)
                near = tl.dot(shares.to(v.dtype), v, acc=near * shrink[:, None], input_precision=PRECISION)
                near_sum, near_max = near_sum * shrink + tl.sum(shares, 1), new_max
        # The window's weights are relative to its own maximum alone, so that both parts meet only now.
        total = total * linear_factor + near_sum * window_factor
        acc = acc * linear_factor + near * window_factor
        if NORMALISE:
            acc /= (total + eps)[:, None]
        mask = inside[:, None] & (values < DV)[None, :]
        written = out_ptr + batch * stride_ob + head * stride_oh + tl.cast(start, tl.int64) * stride_ot
        tl.store(written + lanes[:, None] * stride_ot + values[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)

        # What no later query has in its window goes into the state: one tile, and after the last chunk all that is due.
        ended = start + BLOCK_T >= T
        for tile in range(tl.where(ended, tiles, 1)):
            base = tl.cast(past + start - (tiles - 1 - tile) * BLOCK_T, tl.int64)
            there = (base + lanes).to(tl.int32)
            real = (there >= 0) & (there < S)
            key = _rank(rank_ptr, batch, there, real, S)
            due = (key >= absorbed) & ((key < leaving) | (not ended))
            k = _load(k_ptr + base * stride_ks, lanes, stride_ks, columns, due, D, UPCAST)
            v = _load(v_ptr + base * stride_vs, lanes, stride_vs, values, due, DV, UPCAST)
            z = _map(k, k_weight, PRECISION, MAPPED)
            phi_k = _features(z, due, KIND, F, BLOCK_F)
            if GATES:
                end = _last(decay_plus, BLOCK_T)
                phi_k *= tl.exp(end[None, :] - decay_plus)
                plus, plus_sum = plus * tl.exp(end)[:, None], plus_sum * tl.exp(end)
            plus = tl.dot(tl.trans(phi_k.to(v.dtype)), v, acc=plus, input_precision=PRECISION)
            plus_sum += tl.sum(phi_k, 0)
            if BOTH:
                phi_k = _features(-z, due, KIND, F, BLOCK_F)
                if GATES:
                    end = _last(decay_minus, BLOCK_T)
                    phi_k *= tl.exp(end[None, :] - decay_minus)
                    minus, minus_sum = minus * tl.exp(end)[:, None], minus_sum * tl.exp(end)
                minus = tl.dot(tl.trans(phi_k.to(v.dtype)), v, acc=minus, input_precision=PRECISION)
                minus_sum += tl.sum(phi_k, 0)

    if head % STATE_GROUP == 0:
        mine = new_state_ptr + (state_row + features) * (DV + 1)
        mask = (features < F)[:, None] & (values < DV)[None, :]
        tl.store(mine[:, None] + values[None, :], plus, mask=mask)
        if BOTH:
            tl.store(mine[:, None] + F * (DV + 1) + values[None, :], minus, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(mine + DV, plus_sum, mask=features < F)
            if BOTH:
                tl.store(mine + F * (DV + 1) + DV, minus_sum, mask=features < F)


# ---- launchers ---------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, kind: str, q_weight: Tensor | None, k_weight: Tensor | None, gate: Tensor | None,
    window: int, terraced: bool, window_factor: Tensor, linear_factor: Tensor, scale: float, feature_scale: float,
    normalise: bool, eps: float, rank: Tensor | None, state: Tensor | None, state_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`[B, H, T, Dv]` and the state; gate `[B, heads, S, 1 or K]`, factors `[H]`."""
    (batch, heads, length, size), keys, width = q.shape, v.shape[2], v.shape[3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    mapped = size if q_weight is None else q_weight.shape[-1]
    kind, _, half = kind.partition("_")
    both = kind in ("softmax", "exp") and not half
    gates = 0 if gate is None else gate.shape[-1]
    bits = 8 * q.element_size()
    tiles = _table(gates)[bits]
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)
    shape = batch, state_heads, 2 * mapped if both else mapped, width + 1
    new_state = torch.empty(shape, dtype=torch.float32, device=q.device)
    reach = (2 * window if terraced else window) - 1
    at_hand = 1 + (triton.cdiv(reach, tiles.tokens) if window else 0)
    forward_kernel[(batch * heads, triton.cdiv(width, tiles.values))](
        q, k, v, out, *(_as_read(x, q.dtype) for x in (q_weight, k_weight)), _as_read(gate, torch.float32),
        None if rank is None else _as_read(rank.expand(batch, -1), torch.int32),
        *(_as_read(x.expand(heads), torch.float32) for x in (window_factor, linear_factor)),
        _as_read(state, torch.float32), new_state, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *out.stride()[:3], length, keys, at_hand, scale, feature_scale, eps,
        H=heads, K_GROUP=heads // k.shape[1], V_GROUP=heads // v.shape[1], STATE_GROUP=heads // state_heads,
        GATE_GROUP=1 if gate is None else heads // gate.shape[1], GATES=gates, KIND=kind, BOTH=both,
        MAPPED=q_weight is not None, WINDOW=window, TERRACED=terraced, NORMALISE=normalise, D=size, DV=width, F=mapped,
        BLOCK_D=max(16, triton.next_power_of_2(size)), BLOCK_V=tiles.values,
        BLOCK_F=max(16, triton.next_power_of_2(mapped)), BLOCK_T=tiles.tokens, PRECISION=PRECISION,
        UPCAST=interpreted() and bits == 16, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, new_state


def _table(gates: int) -> dict[int, Tiles]:
    return GATES if gates > 1 else GATED if gates else FORWARD


def _as_read(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


# ---- what the static check compiles ------------------------------------------------------------------------


def _static() -> Iterator[Compile]:
    types = {f"{name}_ptr": "*T:16" for name in ("q", "k", "v", "out", "q_weight", "k_weight")}
    floats = ("gate", "window_factor", "linear_factor", "state", "new_state")
    types |= {f"{name}_ptr": "*fp32:16" for name in floats} | {"rank_ptr": "*i32:16"}
    types |= {f"stride_{tensor}{side}": "i32:16" for tensor, last in zip("qkvo", "tsst", strict=True)
              for side in f"bh{last}"}  # fmt: skip
    types |= dict(T="i32", S="i32", tiles="i32", scale="fp32", feature_scale="fp32", eps="fp32")
    for label, gates, window in (("pure", 0, 0), ("window", 0, 64), ("scalar gate", 1, 0), ("gates", 128, 0)):
        for bits, tiles in _table(gates).items():
            constants = dict(
                H=32, K_GROUP=4, V_GROUP=4, STATE_GROUP=1, GATE_GROUP=4, GATES=gates, KIND="softmax", BOTH=True,
                MAPPED=True, WINDOW=window, TERRACED=False, NORMALISE=True, D=128, DV=128, F=64, BLOCK_D=128,
                BLOCK_V=tiles.values, BLOCK_F=64, BLOCK_T=tiles.tokens, PRECISION=PRECISION, UPCAST=False,
            )  # fmt: skip
            given = types if gates else {name: text for name, text in types.items() if name != "gate_ptr"}
            yield Compile(
                f"{label} {tiles.tokens}x{tiles.values}", forward_kernel, given,
                constants | ({} if gates else {"gate_ptr": None}), tiles.num_warps, tiles.num_stages,
                {"bf16": "both", "fp32": "none"}, ("bf16" if bits == 16 else "fp32",),
                (90, 100) if gates > 1 and bits == 16 else (80, 90, 100),
            )  # fmt: skip


STATIC = list(_static())
