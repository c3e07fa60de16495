"""Attention to listed blocks of keys in Triton: forward, gradients, block maxima, lists. Specification: reference.py.

A program owns a tile of queries that share a list: tokens of one block of queries, and of as many query heads as share
the list and fit. It walks along the list, which is ascending, so that the blocks that need no mask come first. Programs
of late queries, which have the longest lists, start first. Where the tiles are few, as for single tokens, a list is cut
in pieces that `merge_kernel` puts together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dispatch import interpreted
from ..static import Compile

LOG2E = tl.constexpr(1.4426950408889634)


class Tiles(NamedTuple):
    """How many queries and keys a program holds at a time at most, and how it is launched."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


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
def _load(ptr, offsets, columns, row_mask, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows whose columns lie side by side; zeros where `row_mask`, if any, is False."""
    places = ptr + offsets[:, None] + columns[None, :]
    if row_mask is None:
        if columns.shape[0] == D:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=(columns < D)[None, :], other=0.0)
    elif columns.shape[0] == D:
        tile = tl.load(places, mask=row_mask[:, None], other=0.0)
    else:
        tile = tl.load(places, mask=row_mask[:, None] & (columns < D)[None, :], other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _store(ptr, offsets, columns, row_mask, values, D: tl.constexpr):
    mask = row_mask[:, None] if columns.shape[0] == D else row_mask[:, None] & (columns < D)[None, :]
    tl.store(ptr + offsets[:, None] + columns[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """`q @ k.T`, scaled and capped, in units of log 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        twice = tl.exp2(scores * (2 * LOG2E * scale / softcap))
        return softcap * LOG2E * (1 - 2 / (twice + 1))  # tanh
    return scores * (scale * LOG2E)


@triton.jit
def _fold(acc, row_max, row_sum, scores, v, PRECISION: tl.constexpr):
    """One tile of scores, -inf where masked, and its values into the running softmax."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    safe = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has read nothing so far
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(row_max - safe)
    acc = tl.dot(weights.to(v.dtype), v, acc=acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(weights, 1)


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
    q = _load(q_ptr + batch * stride_qb, head * stride_qh + token.to(tl.int64) * stride_qt, columns, inside, D, UPCAST)

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
        k = _load(k_base, there, columns, None, D, UPCAST)
        v = _load(v_base, there, columns, None, D, UPCAST)
        scores = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
        acc, row_max, row_sum = _fold(acc, row_max, row_sum, scores, v, PRECISION)
    for index in range(middle, high):
        key_rank = tl.load(list_ptr + index // SUB) * BLOCK_K + index % SUB * BLOCK_S + tl.arange(0, BLOCK_S)
        there, keep = key_rank.to(tl.int64) * stride_ks, key_rank < real
        k = _load(k_base, there, columns, keep, D, UPCAST)
        v = _load(v_base, there, columns, keep, D, UPCAST)
        keep = keep[None, :]
        if CAUSAL:
            keep = keep & (key_rank[None, :] <= query_rank[:, None])
        scores = tl.where(keep, _scores(q, k, scale, softcap, SOFTCAP, PRECISION), float("-inf"))
        acc, row_max, row_sum = _fold(acc, row_max, row_sum, scores, v, PRECISION)

    place = (batch * heads + head) * T + token
    if part_ptr is None:
        read = row_sum > 0
        out = acc / tl.where(read, row_sum, 1.0)[:, None]
        _store(out_ptr + batch * stride_ob, head * stride_oh + token.to(tl.int64) * stride_ot, columns, inside, out, D)
        # +inf where nothing was read, so that the gradient finds no weight there
        lse = tl.where(read, (row_max + tl.log2(tl.where(read, row_sum, 1.0))) / LOG2E, float("inf"))
        tl.store(lse_ptr + place, lse, mask=inside)
    else:
        place = place * splits + split
        _store(part_ptr, place * D, columns, inside, acc, D)
        tl.store(sums_ptr + place * 2, row_max, mask=inside)
        tl.store(sums_ptr + place * 2 + 1, row_sum, mask=inside)


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
    row_max = tl.load(sums_ptr + parts * 2, mask=inside, other=float("-inf"))
    row_sum = tl.load(sums_ptr + parts * 2 + 1, mask=inside, other=0.0)
    acc = _load(part_ptr, parts * D, columns, inside, D, False)
    top = tl.max(row_max, 0)
    if sinks_ptr is not None:
        logit = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, logit)
    safe = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.exp2(row_max - safe)
    total = tl.sum(row_sum * factor, 0)
    if sinks_ptr is not None:
        total += tl.exp2(logit - safe)
    out = tl.sum(acc * factor[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_ot
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D)
    tl.store(
        lse_ptr + place, tl.where(total > 0, (safe + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2E, float("inf"))
    )


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit
def _differentiate(q, k, v, d_out, lse, delta, keep, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Weights of a tile and gradient of its scores before the scale; transposed if q, k and v, d_out are swapped."""
    scores = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
    weights = tl.where(keep, tl.exp2(scores - lse * LOG2E), 0.0)
    d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta)
    if SOFTCAP:
        capped = scores / (softcap * LOG2E)
        d_scores *= 1 - capped * capped
    return weights, d_scores


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
    q = _load(q_ptr, offsets, columns, inside, D, UPCAST)
    d_out = _load(d_out_ptr, offsets, columns, inside, D, UPCAST)
    out = _load(out_ptr, offsets, columns, inside, D, UPCAST)
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
        k = _load(k_base, there, columns, keep, D, UPCAST)
        v = _load(v_base, there, columns, keep, D, UPCAST)
        keep = keep[None, :]
        if CAUSAL:
            keep = keep & (key_rank[None, :] <= query_rank[:, None])
        _, d_scores = _differentiate(
            q, k, v, d_out, lse[:, None], delta[:, None], keep, scale, softcap, SOFTCAP, PRECISION
        )
        dq = tl.dot(d_scores.to(k.dtype), k, acc=dq, input_precision=PRECISION)
    _store(dq_ptr, offsets, columns, inside, dq * scale, D)


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
    k = _load(k_ptr, offsets, columns, key_rank < real, D, UPCAST)
    v = _load(v_ptr, offsets, columns, key_rank < real, D, UPCAST)
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
            q = _load(q_ptr, rows, columns, inside, D, UPCAST)
            d_out = _load(d_out_ptr, rows, columns, inside, D, UPCAST)
            lse = tl.load(lse_ptr + place, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
            keep = (key_rank < real)[:, None]
            if CAUSAL:
                keep = keep & (key_rank[:, None] <= query_rank[None, :])
            weights, d_scores = _differentiate(
                k, q, d_out, v, lse[None, :], delta[None, :], keep, scale, softcap, SOFTCAP, PRECISION
            )  # [keys, queries], so that neither is turned over before the next product
            dv = tl.dot(weights.to(v.dtype), d_out, acc=dv, input_precision=PRECISION)
            dk = tl.dot(d_scores.to(k.dtype), q, acc=dk, input_precision=PRECISION)
    inside = key_rank + start < S
    _store(dk_ptr, offsets, columns, inside, dk * scale, D)
    _store(dv_ptr, offsets, columns, inside, dv, D)


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
    q = _load(q_ptr + here, token.to(tl.int64) * stride_qt, columns, token < T, D, UPCAST)
    k_base = k_ptr + batch * stride_kb + head // GROUP * stride_kh + start * stride_ks
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    row_max = row_sum - float("inf")
    if sinks_ptr is not None:
        row_max = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E + tl.zeros([BLOCK_T], tl.float32)
        row_sum += 1
    whole, stop = real // BLOCK_S, tl.cdiv(real, BLOCK_S)
    if CAUSAL:
        rank = number * BLOCK_T + first
        whole = tl.minimum(whole, tl.maximum(rank + 1, 0) // BLOCK_S)
        stop = tl.minimum(stop, tl.cdiv(tl.maximum(rank + BLOCK_T, 0), BLOCK_S))
    for index in range(0, whole):
        there = (index * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64) * stride_ks
        scores = _scores(q, _load(k_base, there, columns, None, D, UPCAST), scale, softcap, SOFTCAP, PRECISION)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(scores - new_max[:, None]), 1)
        row_max = new_max
    for index in range(whole, stop):
        key_rank = index * BLOCK_S + tl.arange(0, BLOCK_S)
        k = _load(k_base, key_rank.to(tl.int64) * stride_ks, columns, key_rank < real, D, UPCAST)
        keep = (key_rank < real)[None, :]
        if CAUSAL:
            keep = keep & (key_rank[None, :] <= query_rank[:, None])
        scores = tl.where(keep, _scores(q, k, scale, softcap, SOFTCAP, PRECISION), float("-inf"))
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
        q = _load(q_base, token_offsets, columns, inside, D, UPCAST)
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
            k = _load(k_base, key_rank.to(tl.int64) * stride_ks, columns, key_rank < real, D, UPCAST)
            keep = (key_rank < real)[None, :]
            if CAUSAL:
                keep = keep & (key_rank[None, :] <= query_rank[:, None])
            for member in range(0, MEMBERS):
                if MEMBERS > 1:
                    q = _load(q_base + member * stride_qh, token_offsets, columns, inside, D, UPCAST)
                    lse = tl.load(sums + member * T + token, mask=inside, other=float("inf"))
                logged = _scores(q, k, scale, softcap, SOFTCAP, PRECISION) - lse[:, None]
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
    q, k, v = _rows(q, k, v)
    out = q.new_empty(batch, queries, heads, size).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    starts, ends = _contiguous(starts), _contiguous(ends)
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
    starts, ends = _contiguous(starts), _contiguous(ends)
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
    starts, ends = _contiguous(starts), _contiguous(ends)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    (tiles,) = SUMS[8 * q.element_size(), 128]
    common = _common(q)
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


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the kernels read them: columns side by side, and keys and values laid out alike."""
    alike = all(x.stride(-1) == 1 and x.stride() == tensors[-1].stride() for x in tensors[1:])
    return tuple(x if x.stride(-1) == 1 and (alike or not i) else x.contiguous() for i, x in enumerate(tensors))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _common(q: Tensor) -> dict[str, Any]:
    bits = 8 * q.element_size()
    return dict(
        D=q.shape[-1], BLOCK_D=max(16, triton.next_power_of_2(q.shape[-1])), PRECISION=launch.precision(bits),
        UPCAST=interpreted() and bits == 16,
    )  # fmt: skip


def _options(table: Table, q: Tensor, block: tuple[int, int], members: int) -> dict[str, Any]:
    """Constants and launch settings of the largest tiles that a block's tokens fill, of all heads with one list."""
    common = _common(q)
    choice = table[8 * q.element_size(), 128 if common["BLOCK_D"] <= 128 else 256]
    filled = block[0] * triton.next_power_of_2(members)
    tiles = next((tiles for tiles in choice if tiles.queries <= filled), choice[-1])
    tokens = min(block[0], tiles.queries)
    return dict(
        BLOCK_Q=block[0], BLOCK_K=block[1], TOKENS=tokens, PACK=tiles.queries // tokens,
        BLOCK_S=min(tiles.keys, block[1]), num_warps=tiles.num_warps, num_stages=tiles.num_stages, **common,
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
