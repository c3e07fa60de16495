"""What the Triton kernels of linear attention do with a chunk of tokens, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Tiles(NamedTuple):
    """How many tokens and value columns a program holds at a time, and how it is launched."""

    tokens: int
    values: int
    num_warps: int
    num_stages: int


@triton.jit
def load(ptr, rows, stride, columns, row_mask, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a matrix whose columns lie side by side; zeros where there is none. `rows * stride` is small."""
    mask = row_mask[:, None] if columns.shape[0] == D else row_mask[:, None] & (columns < D)[None, :]
    tile = tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store(ptr, rows, stride, columns, row_mask, tile, D: tl.constexpr):
    mask = row_mask[:, None] if columns.shape[0] == D else row_mask[:, None] & (columns < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, dtype: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`a @ b` where one of them is a sum over many tokens, which may not fit into float16."""
    if dtype == tl.bfloat16 and not UPCAST:
        found = tl.dot(a.to(dtype), b.to(dtype))
    elif dtype == tl.float16:
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return found


# ---- places ------------------------------------------------------------------------------------------------


@triton.jit
def places(rank_ptr, batch, columns, inside, S):
    """Places among the real tokens of a row; -1 for padding and beyond the tokens."""
    if rank_ptr is None:
        place = columns
    else:
        place = tl.load(rank_ptr + batch * S + columns, mask=inside, other=-1)
    return tl.where(inside, place, -1)


@triton.jit
def window_start(place, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    if TERRACED:
        return WINDOW * (place // WINDOW - 1)
    return place - WINDOW + 1


@triton.jit
def in_state(place, WINDOW: tl.constexpr, TERRACED: tl.constexpr, OVERLAP: tl.constexpr):
    """How many tokens a state holds when the token at `place` comes."""
    if WINDOW and not OVERLAP:
        return tl.maximum(window_start(place, WINDOW, TERRACED), 0)
    return place


@triton.jit
def bounds(rank_ptr, batch, past, S, WINDOW: tl.constexpr, TERRACED: tl.constexpr, OVERLAP: tl.constexpr):
    """How many tokens the state holds when the call begins, and when it is over."""
    if rank_ptr is None:
        first, after = past, S
    else:
        first, after = tl.load(rank_ptr + batch * S + past), tl.load(rank_ptr + batch * S + S - 1) + 1
    absorbed = in_state(tl.maximum(first, 0), WINDOW, TERRACED, OVERLAP)
    return absorbed, in_state(after, WINDOW, TERRACED, OVERLAP)


@triton.jit
def linear_stop(place, WINDOW: tl.constexpr, TERRACED: tl.constexpr, OVERLAP: tl.constexpr):
    """Keys before this one are read linearly by the query at `place`."""
    if WINDOW and not OVERLAP:
        return window_start(place, WINDOW, TERRACED)
    return place + 1


@triton.jit
def in_window(place, key, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """Which keys, in columns, each query reads by softmax."""
    start = window_start(place, WINDOW, TERRACED)
    return (key >= 0)[None, :] & (key[None, :] <= place[:, None]) & (key[None, :] >= start[:, None])


# ---- features ----------------------------------------------------------------------------------------------


@triton.jit
def weight(ptr, head, D: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
           UPCAST: tl.constexpr):  # fmt: skip
    """The map of one head, read once; nothing where there is none."""
    rows, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    if ptr is None:
        found = rows
    else:
        found = load(ptr + head * D * F, rows, F, columns, rows < D, F, UPCAST)
    return found


@triton.jit
def mapped(x, weight, bias_ptr, head, F: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
           MAPPED: tl.constexpr):  # fmt: skip
    """`x @ weight + bias` in float32; x itself without a weight."""
    if MAPPED:
        z = tl.dot(x, weight, input_precision=PRECISION)
    else:
        z = x.to(tl.float32)
    if bias_ptr is not None:
        columns = tl.arange(0, BLOCK_F)
        z += tl.load(bias_ptr + head * F + columns, mask=columns < F, other=0.0)[None, :]
    return z


@triton.jit
def features(z, real, KIND: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr):
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
def features_gradient(z, phi, d_phi, real, KIND: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """The gradient of z from that of its features phi."""
    keep = real[:, None] & (tl.arange(0, BLOCK_F) < F)[None, :]
    if KIND != "identity":  # none comes through the least that features are
        keep_phi = keep & (phi > 1e-12)
        d_phi = tl.where(keep_phi, d_phi, 0.0)
    if KIND == "softmax":
        d_phi = phi * (d_phi - tl.sum(phi * d_phi, 1)[:, None])
    elif KIND == "exp":
        d_phi = phi * d_phi
        z = tl.where(keep, z, float("-inf"))
        largest = (z == tl.max(z, 1)[:, None]) & keep  # which the others are relative to; equal ones share
        share = tl.sum(d_phi, 1) / tl.maximum(tl.sum(largest.to(tl.float32), 1), 1.0)
        d_phi -= tl.where(largest, share[:, None], 0.0)
    elif KIND == "elu":
        d_phi = tl.where(z > 0, d_phi, d_phi * phi)
    return tl.where(keep, d_phi, 0.0)


# ---- decay -------------------------------------------------------------------------------------------------


@triton.jit
def gates(gate_ptr, row, columns, inside, K: tl.constexpr, FIRST, BLOCK_F: tl.constexpr,
          F: tl.constexpr):  # fmt: skip
    """Sums of the log gates of a chunk up to each token, `[tokens, BLOCK_F]`; one column serves all for K = 1."""
    columns_f = tl.arange(0, BLOCK_F)
    if K == 1:
        gate = tl.load(gate_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        return tl.cumsum(gate, 0)[:, None] + tl.zeros([columns.shape[0], BLOCK_F], tl.float32)
    mask = inside[:, None] & (columns_f < F)[None, :]
    gate = tl.load(gate_ptr + (row + columns)[:, None] * K + FIRST + columns_f[None, :], mask=mask, other=0.0)
    return tl.cumsum(gate.to(tl.float32), 0)


@triton.jit
def last(decay, BLOCK_T: tl.constexpr):
    return row(decay, BLOCK_T - 1, BLOCK_T)


@triton.jit
def row(tile, index, BLOCK_T: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, BLOCK_T) == index)[:, None], tile, 0.0), 0)


@triton.jit
def decayed(phi_q, phi_k, decay, BLOCK_T: tl.constexpr):
    """Products of features with a decay of each, key by key: inverses of strong decays would overflow."""
    lanes = tl.arange(0, BLOCK_T)
    weights = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for j in range(BLOCK_T):
        key, upto = row(phi_k, j, BLOCK_T), row(decay, j, BLOCK_T)
        column = tl.sum(phi_q * key[None, :] * tl.exp(tl.minimum(decay - upto[None, :], 0.0)), 1)
        weights = tl.where((lanes == j)[None, :], column[:, None], weights)
    return weights


@triton.jit
def decayed_query_gradient(pairs, phi_k, decay, BLOCK_T: tl.constexpr):
    """Of `decayed`, with `pairs` that of its weights, zero where a key is later than the query."""
    lanes = tl.arange(0, BLOCK_T)
    found = tl.zeros_like(phi_k)
    for j in range(BLOCK_T):
        key, upto = row(phi_k, j, BLOCK_T), row(decay, j, BLOCK_T)
        column = tl.sum(tl.where((lanes == j)[None, :], pairs, 0.0), 1)
        found += column[:, None] * key[None, :] * tl.exp(tl.minimum(decay - upto[None, :], 0.0))
    return found


@triton.jit
def decayed_key_gradient(pairs, phi_q, decay, BLOCK_T: tl.constexpr):
    found = tl.zeros_like(phi_q)
    for i in range(BLOCK_T):
        query, upto = row(phi_q, i, BLOCK_T), row(decay, i, BLOCK_T)
        pair = row(pairs, i, BLOCK_T)
        found += pair[:, None] * query[None, :] * tl.exp(tl.minimum(upto[None, :] - decay, 0.0))
    return found
