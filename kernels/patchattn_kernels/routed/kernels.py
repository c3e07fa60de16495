"""Attention of chosen (token, head) pairs in Triton: prefill, decode and gradients. Specification: reference.py.

`tokens` lists, for each row and head, the tokens whose pair is computed, in order, and `upto` how many there are up to
each token. A program gathers its queries by that list, so that a tile is full of pairs that count, and as they are
sorted it reads hardly more keys than a tile of neighbours would. Tiles beyond the end of a list return at once.
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
    Tiles,
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
    uncapped,
)

# By bits of a number. Float32 is multiplied in three parts, which keeps its precision.
FORWARD = {16: Tiles(128, 64, 8, 3), 32: Tiles(16, 32, 4, 1)}
FORWARD_AMPERE = FORWARD | {16: Tiles(128, 32, 8, 3)}  # 64 keys would spill there
DECODE = {16: Tiles(16, 64, 4, 3), 32: Tiles(16, 32, 4, 3)}
QUERIES = {16: Tiles(64, 32, 8, 2), 32: Tiles(16, 16, 8, 1)}
KEYS = {16: Tiles(32, 64, 8, 2), 32: Tiles(16, 16, 4, 1)}


# ---- what the kernels share --------------------------------------------------------------------------------


@triton.jit
def _start(starts_ptr, batch):
    """The first key of a row that is no padding."""
    start = 0
    if starts_ptr is not None:
        start = tl.load(starts_ptr + batch).to(tl.int32)
    return start


@triton.jit
def _tile(tokens_ptr, upto_ptr, row, T, BLOCK_T: tl.constexpr):
    """The pairs of a program: how many (none or less: nothing to do), which tokens, and which of the lanes they fill.

    The last tiles of a list read the most keys and come first.
    """
    count = tl.load(upto_ptr + row * T + T - 1)
    start = (tl.cdiv(count, BLOCK_T) - 1 - tl.program_id(0)) * BLOCK_T
    lanes = start + tl.arange(0, BLOCK_T)
    inside = (lanes >= 0) & (lanes < count)
    return tl.where(start >= 0, count - start, 0), tl.load(tokens_ptr + row * T + lanes, mask=inside, other=0), inside


@triton.jit
def _reach(token, inside, start, T, S, CAUSAL: tl.constexpr, BLOCK_S: tl.constexpr):
    """The tiles of keys that these tokens read, [low, high), of which [free, end) need no mask."""
    low, free = start // BLOCK_S, tl.cdiv(start, BLOCK_S)
    if CAUSAL:
        high = tl.cdiv(tl.max(token, 0) + (S - T + 1), BLOCK_S)
        end = (tl.min(tl.where(inside, token, T), 0) + (S - T + 1)) // BLOCK_S
    else:
        high, end = tl.cdiv(S, BLOCK_S), S // BLOCK_S
    return low, high, free, tl.maximum(end, free)


# ---- forward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "S"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, weights_ptr, out_ptr, lse_ptr, tokens_ptr, upto_ptr, starts_ptr, sinks_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    T, S, scale, softcap,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns up to BLOCK_T chosen queries of one head; it loops over the keys up to the last of them."""
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(2) + head
    count, token, inside = _tile(tokens_ptr, upto_ptr, row, T, BLOCK_T)
    if count <= 0:
        return
    start = _start(starts_ptr, batch)
    low, high, free, end = _reach(token, inside, start, T, S, CAUSAL, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    q = load(q_ptr + batch * stride_qb + head * stride_qh, token, stride_qt, columns, inside, D, UPCAST)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    row_max, row_sum = empty_rows(sinks_ptr, head, BLOCK_T)

    here = batch * stride_kb + head // GROUP * stride_kh
    for index in range(0, free - low + high - end):
        tile = tl.where(index < free - low, low + index, end + index - (free - low))
        there = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        k = load(k_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
        v = load(v_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
        keep = inside[:, None] & ((there >= start) & (there < S))[None, :]
        if CAUSAL:
            keep &= there[None, :] <= token[:, None] + (S - T)
        scores = tl.where(keep, scores_of(q, k, scale, softcap, SOFTCAP, PRECISION), float("-inf"))
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)
    for tile in range(free, end):
        there = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        k = load(k_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
        v = load(v_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
        scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)

    row_sum = tl.where(row_sum > 0, row_sum, 1.0)  # lanes beyond the end of the list
    weight = tl.load(weights_ptr + row * T + token, mask=inside, other=0.0)
    out = acc * (weight / row_sum)[:, None]
    store(out_ptr + batch * stride_ob + head * stride_oh, token, stride_ot, columns, inside, out, D)
    tl.store(lse_ptr + row * T + token, row_max + tl.log2(row_sum), mask=inside)


# ---- decode ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["S", "splits"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, weights_ptr, out_ptr, part_ptr, sums_ptr, starts_ptr, sinks_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, S, splits, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One query a row: a program owns the query heads of one KV head and a piece of its keys.

    It reads no key if none of its heads is chosen. Several pieces are left to `merge_kernel`.
    """
    batch, kv_head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    members, columns = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + members
    weight = tl.load(weights_ptr + batch * tl.num_programs(2) * GROUP + heads, mask=members < GROUP, other=0.0)
    chosen = weight != 0
    start = _start(starts_ptr, batch)
    if (tl.max(chosen.to(tl.int32), 0) == 0) | (start >= S):
        return
    q = load(q_ptr + batch * stride_qb + kv_head * GROUP * stride_qh, members, stride_qh, columns, chosen, D, UPCAST)
    size = tl.cdiv(tl.cdiv(S, splits), BLOCK_S) * BLOCK_S
    low, high = tl.program_id(0) * size, tl.minimum((tl.program_id(0) + 1) * size, S)
    here = batch * stride_kb + kv_head * stride_kh
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    row_max = row_sum - float("inf")
    for first in range(tl.maximum(low, start // BLOCK_S * BLOCK_S), high, BLOCK_S):
        there = first + tl.arange(0, BLOCK_S)
        k = load(k_ptr + here, there, stride_ks, columns, there < high, D, UPCAST)
        v = load(v_ptr + here, there, stride_ks, columns, there < high, D, UPCAST)
        scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
        scores = tl.where(((there >= start) & (there < high))[None, :], scores, float("-inf"))
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)
    if part_ptr is not None:
        parts = ((batch * tl.num_programs(2) + kv_head) * splits + tl.program_id(0)) * GROUP + members
        leave(part_ptr, sums_ptr, parts, columns, chosen, acc, row_max, row_sum, D)
    else:
        if sinks_ptr is not None:
            acc, row_sum = fold_sinks(acc, row_max, row_sum, sinks_ptr, heads, chosen)
        out = acc * (weight / row_sum)[:, None]
        store(out_ptr + batch * stride_ob + kv_head * GROUP * stride_oh, members, stride_oh, columns, chosen, out, D)


@triton.jit(do_not_specialize=["S", "splits"])
def merge_kernel(
    weights_ptr, out_ptr, part_ptr, sums_ptr, starts_ptr, sinks_ptr, stride_ob, stride_oh, S, splits,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program puts the pieces of one head together."""
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + batch * tl.num_programs(0) + head)
    if (weight == 0) | (_start(starts_ptr, batch) >= S):
        return
    pieces, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    kv_head = batch * (tl.num_programs(0) // GROUP) + head // GROUP
    parts = (kv_head * splits + pieces) * GROUP + head % GROUP
    acc, total, _top = join(part_ptr, sums_ptr, parts, columns, pieces < splits, sinks_ptr, head, D)
    out = acc * (weight / total)
    tl.store(
        out_ptr + batch * stride_ob + head * stride_oh + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D
    )


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit
def _differentiate(
    q, k, v, d_out, lse, delta, weight, keep, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """Of a tile the shares, what they bring of `sum(out * d_out)`, and the gradient of the scores before the scale.

    All transposed if q and k, v and d_out are swapped.
    """
    scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
    shares = tl.where(keep, tl.exp2(scores - lse), 0.0)
    brought = shares * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) * weight)
    return shares, brought, uncapped(brought - shares * delta, scores, softcap, SOFTCAP)


@triton.jit(do_not_specialize=["T", "S"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, weights_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, tokens_ptr, upto_ptr, starts_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    T, S, scale, softcap,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq: a program owns what a program of `forward_kernel` owns.

    Leaves each pair's `sum(out * d_out)` in delta, summed anew, as `out` was rounded and sinks and weights feel it.
    """
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(2) + head
    count, token, inside = _tile(tokens_ptr, upto_ptr, row, T, BLOCK_T)
    if count <= 0:
        return
    start = _start(starts_ptr, batch)
    low, high, _free, _end = _reach(token, inside, start, T, S, CAUSAL, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    q = load(q_ptr + batch * stride_qb + head * stride_qh, token, stride_qt, columns, inside, D, UPCAST)
    mine = batch * stride_ob + head * stride_oh
    out = load(out_ptr + mine, token, stride_ot, columns, inside, D, UPCAST)
    d_out = load(d_out_ptr + mine, token, stride_ot, columns, inside, D, UPCAST)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    weight = tl.load(weights_ptr + row * T + token, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + row * T + token, mask=inside, other=float("inf"))

    here = batch * stride_kb + head // GROUP * stride_kh
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    exact = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(low, high):
        there = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        k = load(k_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
        v = load(v_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
        keep = inside[:, None] & ((there >= start) & (there < S))[None, :]
        if CAUSAL:
            keep &= there[None, :] <= token[:, None] + (S - T)
        _, brought, d_scores = _differentiate(
            q, k, v, d_out, lse[:, None], delta[:, None], weight[:, None], keep, scale, softcap, SOFTCAP, PRECISION
        )
        dq = tl.dot(d_scores.to(k.dtype), k, acc=dq, input_precision=PRECISION)
        exact += tl.sum(brought, 1)
    tl.store(delta_ptr + row * T + token, exact, mask=inside)
    store(dq_ptr + mine, token, stride_ot, columns, inside, dq * scale, D)


@triton.jit(do_not_specialize=["T", "S"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, weights_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tokens_ptr, upto_ptr, starts_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gs, T, S, scale, softcap,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv: a program owns BLOCK_S keys of one KV head and loops over the chosen queries that read them."""
    first = tl.program_id(0) * BLOCK_S
    batch, kv_head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = _start(starts_ptr, batch)
    there, columns = first + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    here = batch * stride_kb + kv_head * stride_kh
    k = load(k_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
    v = load(v_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        row = batch * tl.num_programs(2) * GROUP + head
        count = tl.load(upto_ptr + row * T + T - 1)
        begin = 0
        if CAUSAL:  # the tokens before the first of these keys do not read them
            earlier = first - (S - T)
            begin = tl.load(upto_ptr + row * T + earlier - 1, mask=earlier > 0, other=0)
        if first + BLOCK_S <= start:
            count = 0
        for index in range(begin, count, BLOCK_T):
            lanes = index + tl.arange(0, BLOCK_T)
            inside = lanes < count
            token = tl.load(tokens_ptr + row * T + lanes, mask=inside, other=0)
            q = load(q_ptr + batch * stride_qb + head * stride_qh, token, stride_qt, columns, inside, D, UPCAST)
            d_out = load(d_out_ptr + batch * stride_ob + head * stride_oh, token, stride_ot, columns, inside, D, UPCAST)
            lse = tl.load(lse_ptr + row * T + token, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + row * T + token, mask=inside, other=0.0)
            weight = tl.load(weights_ptr + row * T + token, mask=inside, other=0.0)
            keep = inside[None, :] & ((there >= start) & (there < S))[:, None]
            if CAUSAL:
                keep &= there[:, None] <= token[None, :] + (S - T)
            shares, _, d_scores = _differentiate(
                k, q, d_out, v, lse[None, :], delta[None, :], weight[None, :], keep, scale, softcap, SOFTCAP, PRECISION
            )  # [keys, queries], so that neither is turned over before the next product
            dv = tl.dot((shares * weight[None, :]).to(v.dtype), d_out, acc=dv, input_precision=PRECISION)
            dk = tl.dot(d_scores.to(k.dtype), q, acc=dk, input_precision=PRECISION)
    here = batch * stride_gb + kv_head * stride_gh
    store(dk_ptr + here, there, stride_gs, columns, there < S, dk * scale, D)
    store(dv_ptr + here, there, stride_gs, columns, there < S, dv, D)


# ---- launchers ---------------------------------------------------------------------------------------------


def lists(weights: Tensor, starts: Tensor | None, keys: int) -> tuple[Tensor, Tensor]:
    """`tokens` and `upto`, `[B, H, T]` in int32; the tokens that are not chosen follow the list of those that are."""
    chosen = weights != 0
    token = torch.arange(weights.shape[2], dtype=torch.int32, device=weights.device)
    if starts is not None:
        chosen &= (token >= starts[:, None] - (keys - len(token)))[:, None]
    upto = chosen.cumsum(dim=2, dtype=torch.int32)
    # The others follow, so that each has a place of its own.
    place = torch.where(chosen, upto - 1, upto[..., -1:] + (token - upto))
    return torch.empty_like(upto).scatter_(2, place.long(), token.expand_as(upto)), upto


def forward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, starts: Tensor | None, sinks: Tensor | None, causal: bool,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`[B, H, T, D]`, and the logarithm of each pair's sum of weights, in units of log 2; only of what is computed."""
    batch, heads, length, size = q.shape
    q, k, v = rows_of(q, k, v)
    weights, starts = _as_read(weights, starts)
    tokens, upto = lists(weights, starts, k.shape[2])
    out = q.new_zeros(batch, length, heads, size).transpose(1, 2)
    lse = weights.new_full(weights.shape, float("inf"))
    tiles, options = _tiles(FORWARD_AMPERE if launch.generation(q.device) == 8 else FORWARD, q)
    forward_kernel[(triton.cdiv(length, tiles.queries), batch, heads)](
        q, k, v, weights, out, lse, tokens, upto, starts, sinks,
        *q.stride()[:3], *k.stride()[:3], *out.stride()[:3], length, k.shape[2], scale, softcap or 1.0,
        GROUP=heads // k.shape[1], CAUSAL=causal, SOFTCAP=softcap is not None, **options,
    )  # fmt: skip
    return out, lse


def decode(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, starts: Tensor | None, sinks: Tensor | None, scale: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    (batch, heads, _, size), (groups, keys) = q.shape, k.shape[1:3]
    q, k, v = rows_of(q, k, v)
    weights, starts = _as_read(weights, starts)
    out = q.new_zeros(batch, heads, 1, size)
    tiles, options = _tiles(DECODE, q)
    options["BLOCK_T"] = max(tiles.queries, triton.next_power_of_2(heads // groups))
    splits = launch.splits(keys, batch * groups, tiles.keys, q.device)
    part = sums = None
    if splits > 1:
        part = weights.new_empty(batch, groups, splits, heads // groups, size)
        sums = weights.new_empty(batch, groups, splits, heads // groups, 2)
    decode_kernel[(splits, batch, groups)](
        q, k, v, weights, out, part, sums, starts, sinks, *q.stride()[:2], *k.stride()[:3], *out.stride()[:2],
        keys, splits, scale, softcap or 1.0, GROUP=heads // groups, SOFTCAP=softcap is not None, **options,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(heads, batch)](
            weights, out, part, sums, starts, sinks, *out.stride()[:2], keys, splits, GROUP=heads // groups, D=size,
            BLOCK_D=options["BLOCK_D"], BLOCK_N=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out


def gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, starts: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, and `sum(out * d_out)` of each pair, 0 where nothing is computed."""
    batch, heads, length, _ = q.shape
    q, k, v = rows_of(q, k, v)
    out, d_out = out.contiguous(), d_out.contiguous()
    weights, starts = _as_read(weights, starts)
    tokens, upto = lists(weights, starts, k.shape[2])
    dq, dk, dv = q.new_zeros(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.zeros_like(lse)
    sides = (*q.stride()[:3], *k.stride()[:3], *out.stride()[:3])
    numbers = (length, k.shape[2], scale, softcap or 1.0)
    tiles, options = _tiles(QUERIES, q)
    kind = dict(GROUP=heads // k.shape[1], CAUSAL=causal, SOFTCAP=softcap is not None)
    queries_kernel[(triton.cdiv(length, tiles.queries), batch, heads)](
        q, k, v, weights, out, d_out, lse, delta, dq, tokens, upto, starts, *sides, *numbers, **kind, **options
    )
    tiles, options = _tiles(KEYS, q)
    keys_kernel[(triton.cdiv(k.shape[2], tiles.keys), batch, k.shape[1])](
        q, k, v, weights, d_out, lse, delta, dk, dv, tokens, upto, starts, *sides, *dk.stride()[:3], *numbers,
        **kind, **options,
    )  # fmt: skip
    return dq, dk, dv, delta


def _as_read(weights: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weights.float().contiguous(), None if starts is None else starts.int().clamp(min=0)


def _tiles(table: dict[int, Tiles], q: Tensor) -> tuple[Tiles, dict[str, Any]]:
    """The tiles for this dtype, and the constants and launch settings that follow."""
    tiles = table[8 * q.element_size()]
    return tiles, options_of(tiles, q)


# ---- what the static check compiles ------------------------------------------------------------------------


def _static() -> Iterator[Compile]:
    """Every table's tiles, with all that a call can have; the commonest also without."""
    tensors = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "sinks")
    types = {f"{name}_ptr": "*T:16" for name in tensors}
    types |= {f"{name}_ptr": "*fp32:16" for name in ("weights", "lse", "delta", "part", "sums")}
    types |= {f"{name}_ptr": "*i32:16" for name in ("tokens", "upto", "starts")}
    types |= {f"stride_{tensor}{side}": "i32:16" for tensor in "qkog" for side in "bhts"}
    types |= dict(T="i32", S="i32", splits="i32", scale="fp32", softcap="fp32")
    optional = {"starts_ptr", "sinks_ptr", "part_ptr", "sums_ptr"}
    own, few = {"bf16": "own", "fp32": "mma"}, {"bf16": "mma", "fp32": "mma"}
    every, ampere, later = (80, 90, 100), (80,), (90, 100)
    for label, kernel, table, products, chips in (
        ("forward", forward_kernel, FORWARD, own, later),
        ("forward", forward_kernel, FORWARD_AMPERE, own, ampere),
        ("decode", decode_kernel, DECODE, few, every),
        ("dq", queries_kernel, QUERIES, own, every),
        ("dk dv", keys_kernel, KEYS, own, every),
    ):
        for bits, tiles in table.items():
            for absent in (set(), optional) if bits == 16 else (set(),):
                constants = dict(GROUP=4, CAUSAL=True, D=128, BLOCK_D=128, BLOCK_T=tiles.queries, BLOCK_S=tiles.keys,
                                 UPCAST=False, SOFTCAP=not absent, PRECISION=launch.precision(bits))  # fmt: skip
                names = kernel.arg_names
                yield Compile(
                    f"{label} {tiles.queries}x{tiles.keys}{' plain' if absent else ''}", kernel,
                    {name: types[name] for name in names if name in types and name not in absent},
                    {name: value for name, value in constants.items() if name in names}
                    | {name: None for name in names if name in absent},
                    tiles.num_warps, tiles.num_stages, products, ("bf16" if bits == 16 else "fp32",), chips,
                )  # fmt: skip
    yield Compile(
        "merge", merge_kernel, {name: types[name] for name in merge_kernel.arg_names if name in types},
        dict(GROUP=4, D=128, BLOCK_D=128, BLOCK_N=launch.MOST_SPLITS), 4, 3, "none", ("bf16",),
    )  # fmt: skip


STATIC = list(_static())
