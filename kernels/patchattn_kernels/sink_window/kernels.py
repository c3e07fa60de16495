"""Sink + recent window attention in Triton: prefill, decode and gradients. Specification: reference.py.

A streaming head reads the tiles of keys that hold sinks and those that its window reaches; a full head is one whose
window reaches everything, so both run the same loops. `order` lists the KV heads, full ones first; grids have the heads
slowest and the last queries first, so that long programs start early and short ones fill up the end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..static import Compile
from ..tiles import (
    Tiles,
    chosen,
    contiguous,
    differentiate,
    empty_rows,
    fold,
    fold_sinks,
    join,
    leave,
    load,
    options_of,
    rows_of,
    scores_of,
    store,
)
from .reference import EVERYTHING, Tier

# By (bits of a number, largest head size). Float32 is multiplied in three parts, which keeps its precision.
PREFILL = {(16, 128): Tiles(128, 64, 8, 3), (16, 256): Tiles(64, 32, 8, 2), (32, 128): Tiles(16, 32, 4, 1)}
PREFILL_AMPERE = PREFILL | {(16, 128): Tiles(128, 32, 8, 3)}  # 64 keys would spill there
DECODE = {(16, 128): Tiles(16, 64, 4, 3), (16, 256): Tiles(16, 32, 4, 3), (32, 128): Tiles(16, 32, 4, 3)}
QUERIES = {(16, 128): Tiles(64, 32, 8, 2), (32, 128): Tiles(16, 16, 4, 1)}
KEYS = {(16, 128): Tiles(32, 64, 8, 2), (32, 128): Tiles(16, 16, 4, 1)}
FAR_QUERIES = 1024  # of those that read a sink from afar, as many as one program takes


# ---- what the kernels share --------------------------------------------------------------------------------


@triton.jit
def _visible(i, j, sink, recent):
    """The rule of reference.py on the ranks of queries i and keys j; negative ranks are padding."""
    return (j >= 0) & (j <= i) & ((j < sink) | (i - j < recent))


@triton.jit
def _reach(start, stop, shift, pad, first_rank, sink, recent, BLOCK_S: tl.constexpr):
    """The tiles of keys that the queries [start, stop) read; query t is key t + shift, the first real key is `pad`.

    Sinks in [a, a + sinks), the window in [b, c), of which [d, e) need no mask.
    """
    low, high = start + shift, stop + shift
    c = tl.cdiv(high, BLOCK_S)
    b = tl.minimum(tl.maximum(pad, low - recent + 1) // BLOCK_S, c)
    a = tl.minimum(pad // BLOCK_S, b)
    sinks = tl.minimum(tl.maximum(tl.cdiv(pad + tl.maximum(sink - first_rank, 0), BLOCK_S) - a, 0), b - a)
    sinks = tl.where(sink > first_rank, sinks, 0)
    d = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(pad, high - recent), BLOCK_S), b), c)
    e = tl.minimum(tl.maximum((low + 1) // BLOCK_S, d), c)
    return a, sinks, b, c, d, e


# ---- prefill -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "S", "P", "full_heads", "sink", "recent"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, order_ptr, rank_ptr, pads_ptr, sinks_ptr,
    full_k_ptr, full_v_ptr, full_rank_ptr, full_ends_ptr, past_k_ptr, past_v_ptr, past_rank_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_fb, stride_fh, stride_fs,
    stride_pb, stride_ph, stride_ps, stride_ob, stride_oh, stride_ot,
    T, S, P, full_heads, sink, recent, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    EVERYTHING: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_T queries of one head; it loops over the past, then over the tiles of `_reach`."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2) // GROUP  # among the KV heads, full ones first
    kv_head = tl.load(order_ptr + place).to(tl.int64)
    head = kv_head * GROUP + tl.program_id(2) % GROUP
    is_full = place < full_heads

    pad, last_rank = 0, S - 1
    if rank_ptr is not None:
        pad, last_rank = tl.load(pads_ptr + batch).to(tl.int32), tl.load(rank_ptr + (batch + 1) * T - 1).to(tl.int32)
    rows, columns = start + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    query_rank = tl.where((rows >= pad) & (rows < T), rows + (last_rank - T + 1), -1)
    q = load(q_ptr + batch * stride_qb + head * stride_qh, rows, stride_qt, columns, rows < T, D, UPCAST)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    row_max, row_sum = empty_rows(sinks_ptr, head, BLOCK_T)

    if past_k_ptr is not None:
        if not is_full:
            slot = (place - full_heads).to(tl.int64)
            past_k = past_k_ptr + batch * stride_pb + slot * stride_ph
            past_v = past_v_ptr + batch * stride_pb + slot * stride_ph
            oldest = tl.maximum(start, pad) + (last_rank - T + 1) - recent  # no query here reads as far back
            for first in range(0, P, BLOCK_S):
                there = first + tl.arange(0, BLOCK_S)
                key_rank = tl.load(past_rank_ptr + batch * P + there, mask=there < P, other=-1).to(tl.int32)
                wanted = (key_rank >= 0) & ((key_rank < sink) | (key_rank > oldest))
                if tl.max(wanted.to(tl.int32), 0) > 0:
                    k = load(past_k, there, stride_ps, columns, there < P, D, UPCAST)
                    v = load(past_v, there, stride_ps, columns, there < P, D, UPCAST)
                    scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
                    scores = tl.where(
                        _visible(query_rank[:, None], key_rank[None, :], sink, recent), scores, float("-inf")
                    )
                    acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)

    # The keys of this call, or for full heads of the whole cache; query t is key t + shift.
    k_base, v_base = k_ptr + batch * stride_kb + kv_head * stride_kh, v_ptr + batch * stride_kb + kv_head * stride_kh
    stride_s, keys, shift, first_key = stride_ks, T, 0, pad
    if full_k_ptr is not None:
        if is_full:
            k_base = full_k_ptr + batch * stride_fb + place.to(tl.int64) * stride_fh
            v_base = full_v_ptr + batch * stride_fb + place.to(tl.int64) * stride_fh
            end = S
            if full_rank_ptr is not None:
                end = tl.load(full_ends_ptr + batch).to(tl.int32)
            stride_s, keys, shift, first_key = stride_fs, S, end - T, 0
    if is_full:
        sink, recent = 0, EVERYTHING
    offset = last_rank - T + 1 - shift  # from a key's index to its rank
    stop = tl.minimum(start + BLOCK_T, T)
    a, sinks, b, c, d, e = _reach(start, stop, shift, first_key, first_key + offset, sink, recent, BLOCK_S)
    if full_rank_ptr is not None:
        if is_full:  # only the ranks tell which keys are real
            d, e = c, c
    for index in range(0, sinks + (d - b) + (c - e)):
        tile = tl.where(index < sinks, a + index, b + index - sinks)
        tile = tl.where(index < sinks + d - b, tile, e + index - sinks - (d - b))
        there = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        key_rank = tl.where((there >= first_key) & (there < keys), there + offset, -1)
        if full_rank_ptr is not None:
            ranked = there < tl.where(is_full, keys, 0)
            given = tl.load(full_rank_ptr + batch * S + there, mask=ranked, other=-1).to(tl.int32)
            key_rank = tl.where(is_full, given, key_rank)
        k = load(k_base, there, stride_s, columns, there < keys, D, UPCAST)
        v = load(v_base, there, stride_s, columns, there < keys, D, UPCAST)
        scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
        scores = tl.where(_visible(query_rank[:, None], key_rank[None, :], sink, recent), scores, float("-inf"))
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)
    for tile in range(d, e):
        there = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        k = load(k_base, there, stride_s, columns, there < keys, D, UPCAST)
        v = load(v_base, there, stride_s, columns, there < keys, D, UPCAST)
        scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)

    real = (query_rank >= 0) & (row_sum > 0)
    out = tl.where(real[:, None], acc / tl.where(real, row_sum, 1.0)[:, None], 0.0)
    store(out_ptr + batch * stride_ob + head * stride_oh, rows, stride_ot, columns, rows < T, out, D)
    # +inf where nothing was read, so that the gradient finds no weight there
    lse = tl.where(real, row_max + tl.log2(tl.where(real, row_sum, 1.0)), float("inf"))
    tl.store(lse_ptr + (batch * tl.num_programs(2) + head) * T + rows, lse, mask=rows < T)


# ---- decode ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["S", "P", "full_heads", "splits", "sink", "recent"])
def decode_kernel(
    q_ptr, out_ptr, part_ptr, sums_ptr, order_ptr, rank_ptr, sinks_ptr,
    full_k_ptr, full_v_ptr, full_rank_ptr, kept_k_ptr, kept_v_ptr, kept_rank_ptr,
    stride_qb, stride_qh, stride_fb, stride_fh, stride_fs, stride_pb, stride_ph, stride_ps, stride_ob, stride_oh,
    S, P, full_heads, splits, sink, recent, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    EVERYTHING: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns the query heads of one KV head and a piece of its keys; a streaming head is one piece.

    The pieces of the full heads come first. They leave numerators and sums to `merge_kernel` where there are several.
    """
    batch = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0)
    is_full = piece < full_heads * splits
    place = tl.where(is_full, piece // splits, piece - full_heads * (splits - 1))
    kv_head = tl.load(order_ptr + place).to(tl.int64)
    members, columns = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + members
    q = load(q_ptr + batch * stride_qb + kv_head * GROUP * stride_qh, members, stride_qh, columns, members < GROUP,
             D, UPCAST)  # fmt: skip
    query_rank = EVERYTHING
    if rank_ptr is not None:
        query_rank = tl.load(rank_ptr + batch).to(tl.int32)

    # An absent tier is given as one of no tokens, with any pointer.
    slot = tl.where(is_full, place, place - full_heads).to(tl.int64)
    if is_full:
        k_base = full_k_ptr + batch * stride_fb + slot * stride_fh
        v_base = full_v_ptr + batch * stride_fb + slot * stride_fh
        size = tl.cdiv(tl.cdiv(S, splits), BLOCK_S) * BLOCK_S
        low = (piece % splits) * size
        high = tl.minimum(low + size, S)
        stride_s, sink, recent = stride_fs, 0, EVERYTHING
    else:
        k_base = kept_k_ptr + batch * stride_pb + slot * stride_ph
        v_base = kept_v_ptr + batch * stride_pb + slot * stride_ph
        low, high, stride_s = 0, P, stride_ps

    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    row_max = row_sum - float("inf")
    for first in range(low, high, BLOCK_S):
        there = first + tl.arange(0, BLOCK_S)
        inside = there < high
        key_rank = tl.where(inside, 0, -1)  # without ranks all are real and may be read
        if full_rank_ptr is not None:
            ranked = there < tl.where(is_full, high, 0)
            given = tl.load(full_rank_ptr + batch * S + there, mask=ranked, other=-1).to(tl.int32)
            key_rank = tl.where(is_full, given, key_rank)
        if kept_rank_ptr is not None:
            ranked = there < tl.where(is_full, 0, high)
            given = tl.load(kept_rank_ptr + batch * P + there, mask=ranked, other=-1).to(tl.int32)
            key_rank = tl.where(is_full, key_rank, given)
        keep = (key_rank >= 0) & (key_rank <= query_rank)
        keep &= (key_rank < sink) | (query_rank - key_rank < recent)
        k = load(k_base, there, stride_s, columns, inside, D, UPCAST)
        v = load(v_base, there, stride_s, columns, inside, D, UPCAST)
        scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
        scores = tl.where(keep[None, :], scores, float("-inf"))
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)

    inside = members < GROUP
    if part_ptr is not None:
        pieced = members < tl.where(is_full, GROUP, 0)
        parts = (batch * full_heads * splits + piece) * GROUP + members
        leave(part_ptr, sums_ptr, parts, columns, pieced, acc, row_max, row_sum, D)
        inside = members < tl.where(is_full, 0, GROUP)
    if sinks_ptr is not None:
        acc, row_sum = fold_sinks(acc, row_max, row_sum, sinks_ptr, heads, inside)
    out = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    store(out_ptr + batch * stride_ob + kv_head * GROUP * stride_oh, members, stride_oh, columns, inside, out, D)


@triton.jit(do_not_specialize=["full_heads", "splits"])
def merge_kernel(
    out_ptr, part_ptr, sums_ptr, order_ptr, sinks_ptr, stride_ob, stride_oh, full_heads, splits,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program puts the pieces of one full head together."""
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) // GROUP
    member = tl.program_id(0) % GROUP
    head = tl.load(order_ptr + place).to(tl.int64) * GROUP + member
    pieces, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    parts = ((batch * full_heads + place) * splits + pieces) * GROUP + member
    acc, total, _top = join(part_ptr, sums_ptr, parts, columns, pieces < splits, sinks_ptr, head, D)
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(
        out_ptr + batch * stride_ob + head * stride_oh + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D
    )


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "full_heads", "sink", "recent"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, order_ptr, rank_ptr, pads_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    T, full_heads, sink, recent, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    EVERYTHING: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq: a program owns what a program of `prefill_kernel` owns. Leaves each row's `sum(out * d_out)` in delta."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2) // GROUP
    kv_head = tl.load(order_ptr + place).to(tl.int64)
    head = kv_head * GROUP + tl.program_id(2) % GROUP
    if place < full_heads:
        sink, recent = 0, EVERYTHING
    pad, last_rank = 0, T - 1
    if rank_ptr is not None:
        pad, last_rank = tl.load(pads_ptr + batch).to(tl.int32), tl.load(rank_ptr + (batch + 1) * T - 1).to(tl.int32)
    offset = last_rank - T + 1
    rows, columns = start + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    query_rank = tl.where((rows >= pad) & (rows < T), rows + offset, -1)
    q = load(q_ptr + batch * stride_qb + head * stride_qh, rows, stride_qt, columns, rows < T, D, UPCAST)
    here = batch * stride_ob + head * stride_oh
    out = load(out_ptr + here, rows, stride_ot, columns, rows < T, D, UPCAST)
    d_out = load(d_out_ptr + here, rows, stride_ot, columns, rows < T, D, UPCAST)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    row = (batch * tl.num_programs(2) + head) * T + rows
    tl.store(delta_ptr + row, delta, mask=rows < T)
    lse = tl.load(lse_ptr + row, mask=rows < T, other=float("inf"))

    k_base, v_base = k_ptr + batch * stride_kb + kv_head * stride_kh, v_ptr + batch * stride_kb + kv_head * stride_kh
    stop = tl.minimum(start + BLOCK_T, T)
    a, sinks, b, c, _d, _e = _reach(start, stop, 0, pad, pad + offset, sink, recent, BLOCK_S)
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for index in range(0, sinks + c - b):
        there = tl.where(index < sinks, a + index, b + index - sinks) * BLOCK_S + tl.arange(0, BLOCK_S)
        key_rank = tl.where((there >= pad) & (there < T), there + offset, -1)
        k = load(k_base, there, stride_ks, columns, there < T, D, UPCAST)
        v = load(v_base, there, stride_ks, columns, there < T, D, UPCAST)
        keep = _visible(query_rank[:, None], key_rank[None, :], sink, recent)
        _, d_scores = differentiate(
            q, k, v, d_out, lse[:, None], delta[:, None], keep, scale, softcap, SOFTCAP, PRECISION
        )
        dq = tl.dot(d_scores.to(k.dtype), k, acc=dq, input_precision=PRECISION)
    store(dq_ptr + here, rows, stride_ot, columns, rows < T, dq * scale, D)


@triton.jit(do_not_specialize=["T", "full_heads", "sink", "recent", "chunks"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, far_ptr, order_ptr, rank_ptr, pads_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gs, T, full_heads, sink, recent, chunks, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    EVERYTHING: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv: a program owns BLOCK_S keys of one KV head and loops over the queries that read them.

    Every query reads the sinks, so a tile that holds some would end long after the others. Where `chunks` is not 0, the
    queries that come to it by no window are left to further programs, `chunks` a tile, which write to `far`.
    """
    tiles = tl.cdiv(T, BLOCK_S)
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2)
    kv_head = tl.load(order_ptr + place).to(tl.int64)
    is_full = place < full_heads
    if is_full:
        sink, recent = 0, EVERYTHING
    pad, last_rank = 0, T - 1
    if rank_ptr is not None:
        pad, last_rank = tl.load(pads_ptr + batch).to(tl.int32), tl.load(rank_ptr + (batch + 1) * T - 1).to(tl.int32)
    offset = last_rank - T + 1
    number = tl.program_id(0) - tiles  # among the further programs
    tile = tl.where(number < 0, tl.program_id(0), pad // BLOCK_S + number // tl.maximum(chunks, 1))
    first = tile * BLOCK_S
    near = tl.minimum(first + BLOCK_S - 1 + recent, T)  # the queries whose window reaches a key of the tile
    has_sinks = (sink > 0) & (first < pad + sink - (pad + offset)) & (first + BLOCK_S > pad)
    low, high = tl.maximum(first, pad), tl.where(has_sinks & (chunks == 0), T, near)
    if number >= 0:
        size = tl.cdiv(T - near, tl.maximum(chunks, 1))
        low = near + (number % tl.maximum(chunks, 1)) * size
        high = tl.where(has_sinks, tl.minimum(low + size, T), low)

    there, columns = first + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    key_rank = tl.where((there >= pad) & (there < T), there + offset, -1)
    here = batch * stride_kb + kv_head * stride_kh
    k = load(k_ptr + here, there, stride_ks, columns, there < T, D, UPCAST)
    v = load(v_ptr + here, there, stride_ks, columns, there < T, D, UPCAST)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        sums = (batch * tl.num_programs(2) * GROUP + head) * T
        for start in range(low, high, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            inside = rows < high
            q = load(q_ptr + batch * stride_qb + head * stride_qh, rows, stride_qt, columns, inside, D, UPCAST)
            d_out = load(d_out_ptr + batch * stride_ob + head * stride_oh, rows, stride_ot, columns, inside, D, UPCAST)
            lse = tl.load(lse_ptr + sums + rows, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + sums + rows, mask=inside, other=0.0)
            query_rank = tl.where((rows >= pad) & inside, rows + offset, -1)
            keep = _visible(query_rank[None, :], key_rank[:, None], sink, recent)
            weights, d_scores = differentiate(
                k, q, d_out, v, lse[None, :], delta[None, :], keep, scale, softcap, SOFTCAP, PRECISION
            )  # [keys, queries], so that neither is turned over before the next product
            dv = tl.dot(weights.to(v.dtype), d_out, acc=dv, input_precision=PRECISION)
            dk = tl.dot(d_scores.to(k.dtype), q, acc=dk, input_precision=PRECISION)
    if number < 0:
        here = batch * stride_gb + kv_head * stride_gh
        store(dk_ptr + here, there, stride_gs, columns, there < T, dk * scale, D)
        store(dv_ptr + here, there, stride_gs, columns, there < T, dv, D)
    elif far_ptr is not None:
        count = tl.num_programs(0) - tiles
        part = far_ptr + ((batch * tl.num_programs(2) + kv_head) * count + number) * 2 * BLOCK_S * D
        own = tl.arange(0, BLOCK_S)
        store(part, own, D, columns, own < BLOCK_S, dk * scale, D)
        store(part + BLOCK_S * D, own, D, columns, own < BLOCK_S, dv, D)


# ---- launchers ---------------------------------------------------------------------------------------------


def prefill(
    q: Tensor, k: Tensor, v: Tensor, rank: Tensor | None, past: Tier | None, full: Tier | None,
    full_heads: Sequence[bool], sink: int, recent: int, scale: float, softcap: float | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`[B, H, T, D]`, and the logarithm of each row's sum of weights, in units of log 2."""
    batch, heads, length, size = q.shape
    q, k, v = rows_of(q, k, v)
    full_k, full_v, full_rank, full_strides = _tier(full)
    past_k, past_v, past_rank, past_strides = _tier(past)
    pads = None if rank is None else (rank < 0).sum(dim=1, dtype=torch.int32)
    ends = None
    if full_rank is not None:  # one past the last real token
        place = torch.arange(1, full_rank.shape[1] + 1, dtype=torch.int32, device=q.device)
        ends = torch.where(full_rank >= 0, place, 0).amax(dim=1)
    out = q.new_empty(batch, length, heads, size).transpose(1, 2)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    tiles, options = _tiles(PREFILL_AMPERE if launch.generation(q.device) == 8 else PREFILL, q)
    grid = (triton.cdiv(length, tiles.queries), batch, heads)
    prefill_kernel[grid](
        q, k, v, out, lse, _order(tuple(full_heads), q.device), contiguous(rank), pads, sinks,
        full_k, full_v, full_rank, ends, past_k, past_v, past_rank,
        *q.stride()[:3], *k.stride()[:3], *full_strides, *past_strides, *out.stride()[:3],
        length, length if full is None else full.keys.shape[2], 0 if past is None else past.keys.shape[2],
        sum(full_heads), sink, recent, scale, softcap or 1.0,
        GROUP=heads // k.shape[1], SOFTCAP=softcap is not None, **options,
    )  # fmt: skip
    return out, lse


def decode(
    q: Tensor, rank: Tensor | None, kept: Tier | None, full: Tier | None, full_heads: Sequence[bool],
    sink: int, recent: int, scale: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    batch, heads, _, size = q.shape
    (q,) = rows_of(q)
    full_k, full_v, full_rank, full_strides = _tier(full)
    kept_k, kept_v, kept_rank, kept_strides = _tier(kept)
    out = q.new_empty(batch, heads, 1, size)
    tiles, options = _tiles(DECODE, q)
    group, whole = heads // len(full_heads), sum(full_heads)
    options["BLOCK_T"] = max(tiles.queries, triton.next_power_of_2(group))
    keys = 0 if full is None else full.keys.shape[2]
    splits = launch.splits(keys, batch * whole, tiles.keys, q.device)
    part = sums = None
    if splits > 1:
        part = torch.empty(batch, whole * splits, group, size, dtype=torch.float32, device=q.device)
        sums = torch.empty(batch, whole * splits, group, 2, dtype=torch.float32, device=q.device)
    order = _order(tuple(full_heads), q.device)
    sizes = dict(GROUP=group, D=size, BLOCK_D=options["BLOCK_D"])
    absent = q  # any pointer
    decode_kernel[(whole * splits + len(full_heads) - whole, batch)](
        q, out, part, sums, order, contiguous(rank), sinks,
        absent if full_k is None else full_k, absent if full_v is None else full_v, full_rank,
        absent if kept_k is None else kept_k, absent if kept_v is None else kept_v, kept_rank,
        *q.stride()[:2], *full_strides, *kept_strides, *out.stride()[:2],
        keys, 0 if kept is None else kept.keys.shape[2], whole, splits, sink, recent, scale, softcap or 1.0,
        SOFTCAP=softcap is not None, **(options | sizes),
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(whole * group, batch)](
            out, part, sums, order, sinks, *out.stride()[:2], whole, splits,
            BLOCK_N=triton.next_power_of_2(splits), num_warps=4, **sizes,
        )  # fmt: skip
    return out


def gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, rank: Tensor | None, out: Tensor, lse: Tensor,
    full_heads: Sequence[bool], sink: int, recent: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, and `sum(out * d_out)` of each row. No tiers: a cache has no gradient."""
    batch, heads, length, size = q.shape
    q, k, v = rows_of(q, k, v)
    out, d_out = out.contiguous(), d_out.contiguous()
    pads = None if rank is None else (rank < 0).sum(dim=1, dtype=torch.int32)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    order, rank = _order(tuple(full_heads), q.device), contiguous(rank)
    whole, cap = sum(full_heads), softcap or 1.0
    sides = (*q.stride()[:3], *k.stride()[:3], *out.stride()[:3])
    tiles, options = _tiles(QUERIES, q)
    kind = dict(GROUP=heads // k.shape[1], SOFTCAP=softcap is not None)
    queries_kernel[(triton.cdiv(length, tiles.queries), batch, heads)](
        q, k, v, out, d_out, lse, delta, dq, order, rank, pads, *sides,
        length, whole, sink, recent, scale, cap, **kind, **options,
    )  # fmt: skip
    tiles, options = _tiles(KEYS, q)
    sink_tiles = 0 if whole == len(full_heads) or not sink else triton.cdiv(sink, tiles.keys) + 1
    chunks = max(0, length - recent) // FAR_QUERIES if sink_tiles else 0
    far = None
    if chunks:
        shape = (batch, k.shape[1], sink_tiles, chunks, 2, tiles.keys, size)
        far = torch.empty(shape, dtype=torch.float32, device=q.device)
    keys_kernel[(triton.cdiv(length, tiles.keys) + sink_tiles * chunks, batch, k.shape[1])](
        q, k, v, d_out, lse, delta, dk, dv, far, order, rank, pads, *sides, *dk.stride()[:3],
        length, whole, sink, recent, chunks, scale, cap, **kind, **options,
    )  # fmt: skip
    if far is not None:
        low = torch.zeros(batch, 1, dtype=torch.long, device=q.device)
        if pads is not None:
            low = pads[:, None] // tiles.keys * tiles.keys
        place = low + torch.arange(sink_tiles * tiles.keys, device=q.device)  # [B, keys]
        found = far.sum(dim=3).movedim(3, 0).flatten(3, 4)  # dk and dv, [B, G, keys, D]
        found = found.masked_fill((place >= length)[:, None, :, None], 0.0)  # a tile beyond the end
        index = place.clamp(max=length - 1)[:, None, :, None].expand(found.shape[1:])
        for gradient, part in ((dk, found[0]), (dv, found[1])):
            gradient.scatter_add_(2, index, part.to(gradient.dtype))
    return dq, dk, dv, delta


def _tier(tier: Tier | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[int, ...]]:
    if tier is None:
        return None, None, None, (0, 0, 0)
    k, v = tier.keys, tier.values
    if k.stride() != v.stride() or k.stride(-1) != 1:
        k, v = k.contiguous(), v.contiguous()
    return k, v, contiguous(tier.rank), k.stride()[:3]


def _tiles(table: dict[tuple[int, int], Tiles], q: Tensor) -> tuple[Tiles, dict[str, Any]]:
    """The tiles for this dtype and head size, and the constants and launch settings that follow."""
    tiles = chosen(table, q)
    return tiles, options_of(tiles, q) | dict(EVERYTHING=EVERYTHING)


@functools.lru_cache(maxsize=256)
def _order(full_heads: tuple[bool, ...], device: torch.device) -> Tensor:
    """KV heads, full ones first."""
    order = sorted(range(len(full_heads)), key=lambda head: not full_heads[head])
    return torch.tensor(order, dtype=torch.int32, device=device)


# ---- what the static check compiles ------------------------------------------------------------------------


def _static() -> Iterator[Compile]:
    """Every table's tiles, with all that a call can have; the commonest also without."""
    strides = [f"stride_{tensor}{side}" for tensor in "qkfpog" for side in "bhts"]
    sizes = ["T", "S", "P", "full_heads", "splits", "chunks", "sink", "recent"]
    inputs = ["q", "k", "v", "out", "d_out", "dq", "dk", "dv", "sinks", "full_k", "full_v", "past_k", "past_v",
              "kept_k", "kept_v"]  # fmt: skip
    types = {f"{name}_ptr": "*T:16" for name in inputs}
    types |= {f"{name}_ptr": "*fp32:16" for name in ("lse", "delta", "part", "sums", "far")}
    types |= {f"{name}_ptr": "*i64:16" for name in ("rank", "full_rank", "past_rank", "kept_rank")}
    types |= {f"{name}_ptr": "*i32:16" for name in ("order", "pads", "full_ends")}
    types |= dict.fromkeys(strides, "i32:16") | dict.fromkeys(sizes, "i32")
    types |= dict(scale="fp32", softcap="fp32")
    prompt = {"sinks", "rank", "pads", "full_k", "full_v", "full_rank", "full_ends", "past_k", "past_v", "past_rank"}
    step = {"sinks", "full_rank", "part", "sums"}
    own, few = {"bf16": "own", "fp32": "mma"}, {"bf16": "mma", "fp32": "mma"}
    every, ampere, later = (80, 90, 100), (80,), (90, 100)
    for label, kernel, table, optional, products, chips in (
        ("prefill", prefill_kernel, PREFILL, prompt, own, later),
        ("prefill", prefill_kernel, PREFILL_AMPERE, prompt, own, ampere),
        ("decode", decode_kernel, DECODE, step, few, every),
        ("dq", queries_kernel, QUERIES, {"rank", "pads"}, own, every),
        ("dk dv", keys_kernel, KEYS, {"rank", "pads", "far"}, own, every),
    ):
        for (bits, size), tiles in table.items():
            for absent in (set(), {f"{name}_ptr" for name in optional}) if (bits, size) == (16, 128) else (set(),):
                constants = dict(GROUP=4, D=size, BLOCK_D=size, BLOCK_T=tiles.queries, BLOCK_S=tiles.keys, UPCAST=False,
                                 EVERYTHING=EVERYTHING, SOFTCAP=not absent,
                                 PRECISION=launch.precision(bits))  # fmt: skip
                names = kernel.arg_names
                yield Compile(
                    f"{label} D{size} {tiles.queries}x{tiles.keys}{' plain' if absent else ''}", kernel,
                    {name: types[name] for name in names if name in types and name not in absent},
                    constants | {name: None for name in names if name in absent},
                    tiles.num_warps, tiles.num_stages, products, ("bf16" if bits == 16 else "fp32",), chips,
                )  # fmt: skip
    yield Compile(
        "merge D128", merge_kernel, {name: types[name] for name in merge_kernel.arg_names if name in types},
        dict(GROUP=4, D=128, BLOCK_D=128, BLOCK_N=launch.MOST_SPLITS), 4, 3, "none", ("bf16",),
    )  # fmt: skip


STATIC = list(_static())
