"""Attention to listed blocks of keys in Triton: forward, gradients, block maxima, lists. Specification: reference.py.

A program owns a tile of queries that share a list: tokens of one block of queries, and of as many query heads as share
the list and fit. It walks along the list, which is ascending, so that the blocks that need no mask come first. Programs
of late queries, which have the longest lists, start first. Where the tiles are few, as for single tokens, a list is cut
in pieces that `merge_kernel` puts together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..static import Compile
from ..tiles import (
    LOG2E,
    Tiles,
    chosen,
    constants_of,
    contiguous,
    differentiate,
    empty_rows,
    fold,
    join,
    leave,
    load_at,
    rows_of,
    scores_of,
    store_at,
)

Table = dict[tuple[int, int], tuple[Tiles, ...]]
# By (bits of a number, largest head size), for tiles of many and of few queries. Float32 is multiplied in three parts.
FORWARD: Table = {
    (16, 128): (Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(16, 64, 4, 3)),
    (16, 256): (Tiles(64, 16, 8, 2), Tiles(16, 32, 4, 3)),
    (32, 128): (Tiles(16, 32, 4, 1),),
}
FORWARD_AMPERE = FORWARD | {  # more would spill there
    (16, 128): (Tiles(128, 32, 8, 3), Tiles(64, 32, 8, 3), Tiles(32, 32, 4, 3), Tiles(16, 32, 4, 3))
}
QUERIES: Table = {(16, 128): (Tiles(64, 32, 8, 2), Tiles(16, 32, 4, 2)), (32, 128): (Tiles(16, 16, 4, 1),)}
KEYS: Table = {(16, 128): (Tiles(32, 64, 8, 2), Tiles(16, 64, 8, 2)), (32, 128): (Tiles(16, 16, 4, 1),)}
SUMS: Table = {(16, 128): (Tiles(128, 64, 8, 3),), (32, 128): (Tiles(16, 32, 4, 1),)}
MAXIMA: Table = {(16, 128): (Tiles(128, 64, 8, 3),), (32, 128): (Tiles(16, 64, 8, 1),)}
COLUMNS = 512  # of a mask, read at a time


# ---- what the kernels share --------------------------------------------------------------------------------


@triton.jit
def _grid(starts_ptr, ends_ptr, batch, T, S, BLOCK_Q: tl.constexpr):
    """`Grid` of reference.py for one row: first real key, real keys, rank of the first query, its block."""
    start, end = 0, S
    if starts_ptr is not None:
        start = tl.load(starts_ptr + batch).to(tl.int64)  # it meets a stride
    if ends_ptr is not None:
        end = tl.load(ends_ptr + batch).to(tl.int32)
    real = (end - start).to(tl.int32)
    first = real - T
    return start, real, first, tl.maximum(first, 0) // BLOCK_Q


@triton.jit
def _below(list_ptr, count, limit):
    """How many numbers of an ascending list are below `limit`."""
    low, high = 0 * count, count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(list_ptr + middle) < limit
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit
def _reach(list_ptr, count, rank, real, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """How many blocks of a list the queries from `rank` on read without any mask, and how many at all."""
    whole, stop = real // BLOCK_K, tl.cdiv(real, BLOCK_K)
    if CAUSAL:
        whole = tl.minimum(whole, (rank + 1) // BLOCK_K)
        stop = tl.minimum(stop, (rank + TOKENS - 1) // BLOCK_K + 1)
    return _below(list_ptr, count, whole), _below(list_ptr, count, stop)


# ---- forward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "S", "rows", "splits"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, sums_ptr, counts_ptr, indices_ptr, starts_ptr, ends_ptr, sinks_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    stride_ib, stride_ih, stride_in, T, S, rows, splits, scale, softcap,
    MEMBERS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, PACK: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of queries and a piece of their list."""
    PARTS: tl.constexpr = tl.cdiv(BLOCK_Q, TOKENS)
    PACKS: tl.constexpr = tl.cdiv(MEMBERS, PACK)
    SUB: tl.constexpr = BLOCK_K // BLOCK_S
    split, number = tl.program_id(0) % splits, rows * PARTS - 1 - tl.program_id(0) // splits
    batch, owner = tl.program_id(1).to(tl.int64), tl.program_id(2) // PACKS
    row, heads = number // PARTS, tl.num_programs(2) // PACKS * MEMBERS
    start, real, first, first_block = _grid(starts_ptr, ends_ptr, batch, T, S, BLOCK_Q)
    rank = (first_block + row) * BLOCK_Q + number % PARTS * TOKENS
    tile, columns = tl.arange(0, PACK * TOKENS), tl.arange(0, BLOCK_D)
    member = tl.program_id(2) % PACKS * PACK + tile // TOKENS
    query_rank = rank + tile % TOKENS
    token, head = query_rank - first, (owner * MEMBERS + member).to(tl.int64)
    inside = (token >= 0) & (token < T) & (member < MEMBERS)
    q = load_at(
        q_ptr + batch * stride_qb, head * stride_qh + token.to(tl.int64) * stride_qt, columns, inside, D, UPCAST
    )

    acc = tl.zeros([PACK * TOKENS, BLOCK_D], tl.float32)
    row_sum = tl.zeros([PACK * TOKENS], tl.float32)
    row_max = row_sum - float("inf")
    if sinks_ptr is not None:
        if part_ptr is None:  # a logit that takes weight and gives no value
            row_max = tl.load(sinks_ptr + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
            row_sum += 1
    here = batch * stride_kb + (owner * MEMBERS // GROUP).to(tl.int64) * stride_kh + start * stride_ks
    k_base, v_base = k_ptr + here, v_ptr + here
    list_ptr = indices_ptr + batch * stride_ib + owner.to(tl.int64) * stride_ih + row.to(tl.int64) * stride_in
    count = tl.load(counts_ptr + (batch * (heads // MEMBERS) + owner) * rows + row)
    whole, stop = _reach(list_ptr, count, rank, real, TOKENS, BLOCK_K, CAUSAL)
    whole, stop = whole * SUB, stop * SUB
    piece = tl.cdiv(stop, splits)
    low = split * piece
    high = tl.minimum(low + piece, stop)
    middle = tl.minimum(tl.maximum(whole, low), high)
    for index in range(low, middle):
        key_rank = tl.load(list_ptr + index // SUB) * BLOCK_K + index % SUB * BLOCK_S + tl.arange(0, BLOCK_S)
        there = key_rank.to(tl.int64) * stride_ks
        k = load_at(k_base, there, columns, None, D, UPCAST)
        v = load_at(v_base, there, columns, None, D, UPCAST)
        scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)
    for index in range(middle, high):
        key_rank = tl.load(list_ptr + index // SUB) * BLOCK_K + index % SUB * BLOCK_S + tl.arange(0, BLOCK_S)
        there, keep = key_rank.to(tl.int64) * stride_ks, key_rank < real
        k = load_at(k_base, there, columns, keep, D, UPCAST)
        v = load_at(v_base, there, columns, keep, D, UPCAST)
        keep = keep[None, :]
        if CAUSAL:
            keep = keep & (key_rank[None, :] <= query_rank[:, None])
        scores = tl.where(keep, scores_of(q, k, scale, softcap, SOFTCAP, PRECISION), float("-inf"))
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)

    place = (batch * heads + head) * T + token
    if part_ptr is None:
        read = row_sum > 0
        out = acc / tl.where(read, row_sum, 1.0)[:, None]
        store_at(
            out_ptr + batch * stride_ob, head * stride_oh + token.to(tl.int64) * stride_ot, columns, inside, out, D
        )
        # +inf where nothing was read, so that the gradient finds no weight there
        lse = tl.where(read, (row_max + tl.log2(tl.where(read, row_sum, 1.0))) / LOG2E, float("inf"))
        tl.store(lse_ptr + place, lse, mask=inside)
    else:
        place = place * splits + split
        leave(part_ptr, sums_ptr, place, columns, inside, acc, row_max, row_sum, D)


@triton.jit(do_not_specialize=["T", "S", "splits"])
def merge_kernel(
    out_ptr, lse_ptr, part_ptr, sums_ptr, starts_ptr, ends_ptr, sinks_ptr, stride_ob, stride_oh, stride_ot,
    T, S, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program puts together what was found in the pieces of one list for one query of one head."""
    token, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    _start, _real, first, _block = _grid(starts_ptr, ends_ptr, batch, T, S, 1)
    pieces, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    place = (batch * tl.num_programs(1) + head) * T + token
    parts, inside = place * splits + pieces, pieces < tl.where(token + first >= 0, splits, 0)  # none for padding
    acc, total, top = join(part_ptr, sums_ptr, parts, columns, inside, sinks_ptr, head, D)
    out = acc / tl.where(total > 0, total, 1.0)
    out_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_ot
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D)
    tl.store(
        lse_ptr + place, tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2E, float("inf"))
    )


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "S", "rows"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, counts_ptr, indices_ptr, starts_ptr, ends_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ib, stride_ih, stride_in,
    T, S, rows, scale, softcap,
    MEMBERS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, PACK: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq: a program owns what a program of `forward_kernel` owns. Leaves each row's `sum(out * d_out)` in delta."""
    PARTS: tl.constexpr = tl.cdiv(BLOCK_Q, TOKENS)
    PACKS: tl.constexpr = tl.cdiv(MEMBERS, PACK)
    SUB: tl.constexpr = BLOCK_K // BLOCK_S
    number = rows * PARTS - 1 - tl.program_id(0)
    batch, owner = tl.program_id(1).to(tl.int64), tl.program_id(2) // PACKS
    row, heads = number // PARTS, tl.num_programs(2) // PACKS * MEMBERS
    start, real, first, first_block = _grid(starts_ptr, ends_ptr, batch, T, S, BLOCK_Q)
    rank = (first_block + row) * BLOCK_Q + number % PARTS * TOKENS
    tile, columns = tl.arange(0, PACK * TOKENS), tl.arange(0, BLOCK_D)
    member = tl.program_id(2) % PACKS * PACK + tile // TOKENS
    query_rank = rank + tile % TOKENS
    token, head = query_rank - first, (owner * MEMBERS + member).to(tl.int64)
    inside = (token >= 0) & (token < T) & (member < MEMBERS)
    offsets = batch * stride_qb + head * stride_qh + token.to(tl.int64) * stride_qt
    q = load_at(q_ptr, offsets, columns, inside, D, UPCAST)
    d_out = load_at(d_out_ptr, offsets, columns, inside, D, UPCAST)
    out = load_at(out_ptr, offsets, columns, inside, D, UPCAST)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    place = (batch * heads + head) * T + token
    tl.store(delta_ptr + place, delta, mask=inside)
    lse = tl.load(lse_ptr + place, mask=inside, other=float("inf"))

    here = batch * stride_kb + (owner * MEMBERS // GROUP).to(tl.int64) * stride_kh + start * stride_ks
    k_base, v_base = k_ptr + here, v_ptr + here
    list_ptr = indices_ptr + batch * stride_ib + owner.to(tl.int64) * stride_ih + row.to(tl.int64) * stride_in
    count = tl.load(counts_ptr + (batch * (heads // MEMBERS) + owner) * rows + row)
    _whole, stop = _reach(list_ptr, count, rank, real, TOKENS, BLOCK_K, CAUSAL)
    dq = tl.zeros([PACK * TOKENS, BLOCK_D], tl.float32)
    for index in range(0, stop * SUB):
        key_rank = tl.load(list_ptr + index // SUB) * BLOCK_K + index % SUB * BLOCK_S + tl.arange(0, BLOCK_S)
        there, keep = key_rank.to(tl.int64) * stride_ks, key_rank < real
        k = load_at(k_base, there, columns, keep, D, UPCAST)
        v = load_at(v_base, there, columns, keep, D, UPCAST)
        keep = keep[None, :]
        if CAUSAL:
            keep = keep & (key_rank[None, :] <= query_rank[:, None])
        _, d_scores = differentiate(
            q, k, v, d_out, lse[:, None] * LOG2E, delta[:, None], keep, scale, softcap, SOFTCAP, PRECISION
        )
        dq = tl.dot(d_scores.to(k.dtype), k, acc=dq, input_precision=PRECISION)
    store_at(dq_ptr, offsets, columns, inside, dq * scale, D)


@triton.jit(do_not_specialize=["T", "S", "rows"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, counts_ptr, indices_ptr, starts_ptr, ends_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ib, stride_ih, stride_in,
    T, S, blocks, groups, scale, softcap,
    MEMBERS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, PACK: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv: a program owns keys of one KV head and loops over the lists of the blocks of queries that read them.

    The first keys, which most queries read, come first in all heads.
    """
    PARTS: tl.constexpr = tl.cdiv(BLOCK_Q, TOKENS)
    PACKS: tl.constexpr = tl.cdiv(MEMBERS, PACK)
    SUB: tl.constexpr = BLOCK_K // BLOCK_S
    OWNERS: tl.constexpr = GROUP // MEMBERS
    batch, kv_head = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    block = tl.program_id(1) // SUB
    start, real, first, first_block = _grid(starts_ptr, ends_ptr, batch, T, S, BLOCK_Q)
    key_rank = block * BLOCK_K + tl.program_id(1) % SUB * BLOCK_S + tl.arange(0, BLOCK_S)
    tile, columns = tl.arange(0, PACK * TOKENS), tl.arange(0, BLOCK_D)
    offsets = batch * stride_kb + kv_head.to(tl.int64) * stride_kh + (key_rank + start).to(tl.int64) * stride_ks
    k = load_at(k_ptr, offsets, columns, key_rank < real, D, UPCAST)
    v = load_at(v_ptr, offsets, columns, key_rank < real, D, UPCAST)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for one in range(0, OWNERS):
        owner = kv_head * OWNERS + one
        list_ptr = indices_ptr + batch * stride_ib + owner.to(tl.int64) * stride_ih + block.to(tl.int64) * stride_in
        count = tl.load(counts_ptr + (batch * groups * OWNERS + owner) * blocks + block)
        begin = 0 * count
        if CAUSAL:
            begin = _below(list_ptr, count, block * BLOCK_K // BLOCK_Q - first_block)
        for index in range(begin * PARTS * PACKS, count * PARTS * PACKS):
            row, piece = tl.load(list_ptr + index // (PARTS * PACKS)), index % (PARTS * PACKS)
            query_rank = (first_block + row) * BLOCK_Q + piece // PACKS * TOKENS + tile % TOKENS
            member = piece % PACKS * PACK + tile // TOKENS
            token, head = query_rank - first, (owner * MEMBERS + member).to(tl.int64)
            inside = (token >= 0) & (token < T) & (member < MEMBERS)
            place = (batch * groups * GROUP + head) * T + token
            rows = batch * stride_qb + head * stride_qh + token.to(tl.int64) * stride_qt
            q = load_at(q_ptr, rows, columns, inside, D, UPCAST)
            d_out = load_at(d_out_ptr, rows, columns, inside, D, UPCAST)
            lse = tl.load(lse_ptr + place, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
            keep = (key_rank < real)[:, None]
            if CAUSAL:
                keep = keep & (key_rank[:, None] <= query_rank[None, :])
            weights, d_scores = differentiate(
                k, q, d_out, v, lse[None, :] * LOG2E, delta[None, :], keep, scale, softcap, SOFTCAP, PRECISION
            )  # [keys, queries], so that neither is turned over before the next product
            dv = tl.dot(weights.to(v.dtype), d_out, acc=dv, input_precision=PRECISION)
            dk = tl.dot(d_scores.to(k.dtype), q, acc=dk, input_precision=PRECISION)
    inside = key_rank + start < S
    store_at(dk_ptr, offsets, columns, inside, dk * scale, D)
    store_at(dv_ptr, offsets, columns, inside, dv, D)


# ---- block maxima ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "S"])
def sums_kernel(
    q_ptr, k_ptr, lse_ptr, starts_ptr, ends_ptr, sinks_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, T, S, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The logarithm, in units of log 2, of the sum of each query's weights over all keys; +inf for padding."""
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, real, first, _block = _grid(starts_ptr, ends_ptr, batch, T, S, 1)
    token, columns = number * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    query_rank = token + first
    here = batch * stride_qb + head * stride_qh
    q = load_at(q_ptr + here, token.to(tl.int64) * stride_qt, columns, token < T, D, UPCAST)
    k_base = k_ptr + batch * stride_kb + head // GROUP * stride_kh + start * stride_ks
    row_max, row_sum = empty_rows(sinks_ptr, head, BLOCK_T)
    whole, stop = real // BLOCK_S, tl.cdiv(real, BLOCK_S)
    if CAUSAL:
        rank = number * BLOCK_T + first
        whole = tl.minimum(whole, tl.maximum(rank + 1, 0) // BLOCK_S)
        stop = tl.minimum(stop, tl.cdiv(tl.maximum(rank + BLOCK_T, 0), BLOCK_S))
    for index in range(0, whole):
        there = (index * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64) * stride_ks
        scores = scores_of(q, load_at(k_base, there, columns, None, D, UPCAST), scale, softcap, SOFTCAP, PRECISION)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(scores - new_max[:, None]), 1)
        row_max = new_max
    for index in range(whole, stop):
        key_rank = index * BLOCK_S + tl.arange(0, BLOCK_S)
        k = load_at(k_base, key_rank.to(tl.int64) * stride_ks, columns, key_rank < real, D, UPCAST)
        keep = (key_rank < real)[None, :]
        if CAUSAL:
            keep = keep & (key_rank[None, :] <= query_rank[:, None])
        scores = tl.where(keep, scores_of(q, k, scale, softcap, SOFTCAP, PRECISION), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2(row_max - safe) + tl.sum(tl.exp2(scores - safe[:, None]), 1)
        row_max = new_max
    read = (query_rank >= 0) & (row_sum > 0)
    lse = tl.where(read, row_max + tl.log2(tl.where(read, row_sum, 1.0)), float("inf"))
    tl.store(lse_ptr + (batch * tl.num_programs(2) + head) * T + token, lse, mask=token < T)


@triton.jit(do_not_specialize=["T", "S", "rows", "blocks"])
def maxima_kernel(
    q_ptr, k_ptr, lse_ptr, maxima_ptr, starts_ptr, ends_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, T, S, rows, blocks, scale, softcap,
    MEMBERS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns some blocks of queries, of one head or of the MEMBERS heads whose largest weight counts.

    It reads all keys; of each tile the largest logarithm of a weight is found, and only that is exponentiated.
    """
    ROWS: tl.constexpr = BLOCK_T // BLOCK_Q
    SUB: tl.constexpr = tl.cdiv(BLOCK_K, BLOCK_S)
    WIDTH: tl.constexpr = BLOCK_K // SUB
    COLUMNS: tl.constexpr = BLOCK_S // WIDTH
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, owner = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, real, first, first_block = _grid(starts_ptr, ends_ptr, batch, T, S, BLOCK_Q)
    rank = first_block * BLOCK_Q + number * BLOCK_T
    query_rank, columns = rank + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    token = query_rank - first
    inside = (token >= 0) & (token < T)
    q_base = q_ptr + batch * stride_qb + owner * MEMBERS * stride_qh
    k_base = k_ptr + batch * stride_kb + owner * MEMBERS // GROUP * stride_kh + start * stride_ks
    sums = lse_ptr + (batch * tl.num_programs(2) + owner) * MEMBERS * T
    token_offsets = token.to(tl.int64) * stride_qt
    if MEMBERS == 1:
        q = load_at(q_base, token_offsets, columns, inside, D, UPCAST)
        lse = tl.load(sums + token, mask=inside, other=float("inf"))
    row = number * ROWS + tl.arange(0, ROWS)
    out = maxima_ptr + ((batch * tl.num_programs(2) + owner) * rows + row[:, None]) * blocks
    stop = tl.cdiv(real, BLOCK_S * SUB)
    if CAUSAL:
        stop = tl.minimum(stop, tl.cdiv(rank + BLOCK_T, BLOCK_S * SUB))
    for index in range(0, stop):
        best = tl.zeros([ROWS, COLUMNS], tl.float32) - float("inf")
        for part in tl.static_range(SUB):
            key_rank = (index * SUB + part) * BLOCK_S + tl.arange(0, BLOCK_S)
            k = load_at(k_base, key_rank.to(tl.int64) * stride_ks, columns, key_rank < real, D, UPCAST)
            keep = (key_rank < real)[None, :]
            if CAUSAL:
                keep = keep & (key_rank[None, :] <= query_rank[:, None])
            for member in range(0, MEMBERS):
                if MEMBERS > 1:
                    q = load_at(q_base + member * stride_qh, token_offsets, columns, inside, D, UPCAST)
                    lse = tl.load(sums + member * T + token, mask=inside, other=float("inf"))
                logged = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION) - lse[:, None]
                logged = tl.reshape(tl.where(keep, logged, float("-inf")), [BLOCK_T, COLUMNS, WIDTH])
                found = tl.reshape(tl.max(logged, 2), [ROWS, BLOCK_Q, COLUMNS])
                best = tl.maximum(best, tl.max(found, 1))
        block = index * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(out + block[None, :], tl.exp2(best), mask=(row < rows)[:, None] & (block < blocks)[None, :])


# ---- lists -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["columns", "places"])
def lists_kernel(
    mask_ptr, counts_ptr, indices_ptr, stride_ab, stride_ah, stride_an, stride_am, heads, rows, columns, places,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program writes the list of one row of a mask."""
    row, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    mask_ptr += batch * stride_ab + head * stride_ah + row.to(tl.int64) * stride_an
    place = (batch * heads + head) * rows + row
    count = 0
    for first in range(0, columns, BLOCK_N):
        number = first + tl.arange(0, BLOCK_N)
        listed = tl.load(mask_ptr + number.to(tl.int64) * stride_am, mask=number < columns, other=0).to(tl.int32)
        behind = count + tl.cumsum(listed, 0) - listed
        tl.store(indices_ptr + place * places + behind, number, mask=(listed > 0) & (behind < places))
        count += tl.sum(listed, 0)
    tl.store(counts_ptr + place, tl.minimum(count, places))


# ---- launchers ---------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, starts: Tensor | None, ends: Tensor | None,
    sinks: Tensor | None, block: tuple[int, int], causal: bool, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the logarithm of each row's sum of weights."""
    batch, heads, queries, size = q.shape
    q, k, v = rows_of(q, k, v)
    out = q.new_empty(batch, queries, heads, size).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    starts, ends = contiguous(starts), contiguous(ends)
    counts, indices, members = _owned(q, k, counts, indices)
    table = FORWARD_AMPERE if launch.generation(q.device) == 8 else FORWARD
    options = _options(table, q, block, members)
    rows, packs = counts.shape[2], triton.cdiv(members, options["PACK"])
    programs = rows * triton.cdiv(block[0], options["TOKENS"]), batch, counts.shape[1] * packs
    keys = min(indices.shape[3] * block[1], k.shape[2])
    splits = launch.splits(keys, programs[0] * programs[1] * programs[2], options["BLOCK_S"], q.device)
    part = sums = None
    if splits > 1:
        part = torch.empty(batch, heads, queries, splits, size, dtype=torch.float32, device=q.device)
        sums = torch.empty(batch, heads, queries, splits, 2, dtype=torch.float32, device=q.device)
    elif starts is not None or ends is not None:  # no program owns padding
        out.zero_()
        lse.fill_(float("inf"))
    forward_kernel[(programs[0] * splits, *programs[1:])](
        q, k, v, out, lse, part, sums, counts, indices, starts, ends, sinks,
        *q.stride()[:3], *k.stride()[:3], *out.stride()[:3], *indices.stride()[:3],
        queries, k.shape[2], rows, splits, scale, softcap or 1.0,
        MEMBERS=members, GROUP=heads // k.shape[1], CAUSAL=causal, SOFTCAP=softcap is not None, **options,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(queries, heads, batch)](
            out, lse, part, sums, starts, ends, sinks, *out.stride()[:3], queries, k.shape[2], splits,
            D=size, BLOCK_D=options["BLOCK_D"], BLOCK_N=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out, lse


def gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, turned_counts: Tensor,
    turned: Tensor, starts: Tensor | None, ends: Tensor | None, out: Tensor, lse: Tensor, block: tuple[int, int],
    causal: bool, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, and `sum(out * d_out)` of each row; `turned` lists the blocks of queries of each block of keys."""
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    q, k, v, out, d_out = (x.contiguous() for x in (q, k, v, out, d_out))
    starts, ends = contiguous(starts), contiguous(ends)
    counts, indices, members = _owned(q, k, counts, indices)
    turned_counts, turned, _ = _owned(q, k, turned_counts, turned)
    # No program owns padding.
    new = torch.empty_like if starts is None and ends is None else torch.zeros_like
    dq, dk, dv, delta = new(q), new(k), new(v), new(lse)
    shared = dict(MEMBERS=members, GROUP=heads // groups, CAUSAL=causal, SOFTCAP=softcap is not None)
    options = _options(QUERIES, q, block, members)
    rows, packs = counts.shape[2], triton.cdiv(members, options["PACK"])
    queries_kernel[(rows * triton.cdiv(block[0], options["TOKENS"]), batch, counts.shape[1] * packs)](
        q, k, v, out, d_out, lse, delta, dq, counts, indices, starts, ends,
        *q.stride()[:3], *k.stride()[:3], *indices.stride()[:3], queries, keys, rows, scale, softcap or 1.0,
        **shared, **options,
    )  # fmt: skip
    options = _options(KEYS, q, block, members)
    blocks = turned_counts.shape[2]
    keys_kernel[(batch * groups, blocks * (block[1] // options["BLOCK_S"]))](
        q, k, v, d_out, lse, delta, dk, dv, turned_counts, turned, starts, ends,
        *q.stride()[:3], *k.stride()[:3], *turned.stride()[:3], queries, keys, blocks, groups, scale, softcap or 1.0,
        **shared, **options,
    )  # fmt: skip
    return dq, dk, dv, delta


def maxima(
    q: Tensor, k: Tensor, starts: Tensor | None, ends: Tensor | None, sinks: Tensor | None, block: tuple[int, int],
    rows: int, causal: bool, shared: bool, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """`[B, H or G, N, M]`."""
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    starts, ends = contiguous(starts), contiguous(ends)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    (tiles,) = SUMS[8 * q.element_size(), 128]
    common = constants_of(q)
    options = dict(GROUP=heads // groups, CAUSAL=causal, SOFTCAP=softcap is not None, **common)
    sides = *q.stride()[:3], *k.stride()[:3]
    sums_kernel[(triton.cdiv(queries, tiles.queries), batch, heads)](
        q, k, lse, starts, ends, sinks, *sides, queries, keys, scale, softcap or 1.0,
        BLOCK_T=tiles.queries, BLOCK_S=tiles.keys, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **options,
    )  # fmt: skip
    (tiles,) = MAXIMA[8 * q.element_size(), 128]
    owners, blocks = groups if shared else heads, triton.cdiv(keys, block[1])
    found = torch.zeros(batch, owners, rows, blocks, dtype=torch.float32, device=q.device)
    maxima_kernel[(triton.cdiv(rows, tiles.queries // block[0]), batch, owners)](
        q, k, lse, found, starts, ends, *sides, queries, keys, rows, blocks, scale, softcap or 1.0,
        MEMBERS=heads // owners, BLOCK_Q=block[0], BLOCK_K=block[1], BLOCK_T=tiles.queries, BLOCK_S=tiles.keys,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **options,
    )  # fmt: skip
    return found


def lists(mask: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Counts and indices of what is True in `mask` `[B, heads, N, M]`; what stands behind a count is arbitrary."""
    batch, heads, rows, columns = mask.shape
    counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=mask.device)
    indices = torch.empty(batch, heads, rows, places, dtype=torch.int32, device=mask.device)
    if mask.numel():
        lists_kernel[(rows, heads, batch)](
            mask.view(torch.uint8), counts, indices, *mask.stride(), heads, rows, columns, places,
            BLOCK_N=COLUMNS, num_warps=4,
        )  # fmt: skip
    return counts, indices


def _owned(q: Tensor, k: Tensor, counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, int]:
    """A list for each row and each query head or KV head, and how many query heads share it."""
    owners = q.shape[1] if counts.shape[1] == q.shape[1] else k.shape[1]
    shape = (q.shape[0], owners, counts.shape[2])
    indices = indices.expand(*shape, -1)
    if indices.stride(-1) != 1:
        indices = indices.contiguous()
    return counts.expand(shape).contiguous(), indices, q.shape[1] // owners


def _options(table: Table, q: Tensor, block: tuple[int, int], members: int) -> dict[str, Any]:
    """Constants and launch settings of the largest tiles that a block's tokens fill, of all heads with one list."""
    choice = chosen(table, q)
    filled = block[0] * triton.next_power_of_2(members)
    tiles = next((tiles for tiles in choice if tiles.queries <= filled), choice[-1])
    tokens = min(block[0], tiles.queries)
    return dict(
        BLOCK_Q=block[0], BLOCK_K=block[1], TOKENS=tokens, PACK=tiles.queries // tokens,
        BLOCK_S=min(tiles.keys, block[1]), num_warps=tiles.num_warps, num_stages=tiles.num_stages, **constants_of(q),
    )  # fmt: skip


# ---- what the static check compiles ------------------------------------------------------------------------


def _static() -> Iterator[Compile]:
    """Every table's tiles, with all that a call can have; the commonest also without."""
    floats = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "sinks")
    types = {f"{name}_ptr": "*T:16" for name in floats} | {"mask_ptr": "*u8:16"}
    types |= {f"{name}_ptr": "*fp32:16" for name in ("lse", "delta", "part", "sums", "maxima")}
    types |= {f"{name}_ptr": "*i32:16" for name in ("counts", "indices")}
    types |= {f"{name}_ptr": "*i64:16" for name in ("starts", "ends")}
    types |= {f"stride_{tensor}{side}": "i32:16" for tensor in "qkoia" for side in "bhtsnm"}
    types |= dict.fromkeys(("T", "S", "rows", "splits", "blocks", "groups", "heads", "columns", "places"), "i32")
    types |= dict(scale="fp32", softcap="fp32")
    optional, parts = {"starts_ptr", "ends_ptr", "sinks_ptr"}, {"part_ptr", "sums_ptr"}
    for label, kernel, table, chips in (
        ("forward", forward_kernel, FORWARD, (90, 100)),
        ("forward", forward_kernel, FORWARD_AMPERE, (80,)),
        ("dq", queries_kernel, QUERIES, (80, 90, 100)),
        ("dk dv", keys_kernel, KEYS, (80, 90, 100)),
        ("sums", sums_kernel, SUMS, (80, 90, 100)),
        ("maxima", maxima_kernel, MAXIMA, (80, 90, 100)),
    ):
        names = kernel.arg_names
        for (bits, size), choice in table.items():
            for tiles in choice:
                for name, constants, rows in _shapes(kernel, tiles, bits):
                    constants |= dict(GROUP=4, D=size, BLOCK_D=size, CAUSAL=True, SOFTCAP=True, UPCAST=False,
                                      PRECISION=launch.precision(bits))  # fmt: skip
                    kinds = {"": parts, " plain": parts | optional, " pieces": {"out_ptr", "lse_ptr", "sinks_ptr"}}
                    if kernel is not forward_kernel or tiles.queries > 16:
                        del kinds[" pieces"]
                    for kind, without in kinds.items():
                        absent = dict.fromkeys(without.intersection(names))
                        given = constants | absent | dict(SOFTCAP=not kind)
                        yield Compile(
                            f"{label} D{size} {name}{kind}", kernel,
                            {name: types[name] for name in names if name in types and name not in absent},
                            {name: given[name] for name in names if name in given}, tiles.num_warps, tiles.num_stages,
                            "own" if rows >= 64 else "mma", ("bf16" if bits == 16 else "fp32",), chips,
                        )  # fmt: skip
    for label, kernel, sizes in (
        ("merge D128", merge_kernel, dict(D=128, BLOCK_D=128, BLOCK_N=launch.MOST_SPLITS)),
        ("lists", lists_kernel, dict(BLOCK_N=COLUMNS)),
    ):
        arguments = {name: types[name] for name in kernel.arg_names if name in types}
        yield Compile(label, kernel, arguments, sizes, 4, 3, "none", ("bf16",))


def _shapes(kernel: Any, tiles: Tiles, bits: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """What a kernel is compiled for with these tiles: a name, constants, and the rows of its products."""
    if kernel is sums_kernel:
        yield f"{tiles.queries}x{tiles.keys}", dict(BLOCK_T=tiles.queries, BLOCK_S=tiles.keys), tiles.queries
    elif kernel is maxima_kernel:
        for block_q, block_k, members in ((1, 128, 4), (min(tiles.queries, 64), 64, 1), (tiles.queries, 128, 1)):
            constants = dict(BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_T=tiles.queries, BLOCK_S=tiles.keys)
            yield f"blocks of {block_q}x{block_k}", constants | dict(MEMBERS=members), tiles.queries
    else:  # a list of one head, of heads that fill a tile together, and of 4 heads for each single token
        for pack in (1, 2) if tiles.queries >= 64 else (1, tiles.queries):
            tokens = tiles.queries // pack
            constants = dict(MEMBERS=1 if pack == 1 else 4, BLOCK_Q=tokens, BLOCK_K=64, TOKENS=tokens, PACK=pack,
                             BLOCK_S=tiles.keys)  # fmt: skip
            rows = tiles.keys if kernel is keys_kernel else tiles.queries
            yield f"{pack}x{tokens}x{tiles.keys}", constants, rows


STATIC = list(_static())
