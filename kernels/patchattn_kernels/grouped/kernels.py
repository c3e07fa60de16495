"""Attention over keys of several kinds in Triton: forward, decode and gradients. Specification: reference.py.

What a row's weights become depends on its sums over all keys, kind by kind, so it is known only at the end. One pass
gets along with two accumulators: with m the largest score, and for each kind g of keys

    l_g = sum of exp(s_j - m),  A_g = sum of exp(s_j - m) v_j,  L = sum of all l_g
    gain = recycle (l_image_sink + l_text_sink) / l_image
    out = (A_rest + (1 + gain) A_image + (1 - recycle) A_sinks) / L        in rows that are changed

The tiles of keys with an image and those with the rest are read one after the other, each by itself a flash attention
with a maximum of its own. The sinks, which are few, are gathered: their sums are taken next, and their values are
added at the end, when the factor is known. A row that is not changed has gain 0 and recycle 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..static import Compile
from ..tiles import LOG2E, Tiles, chosen, contiguous, finite, fold, load, options_of, rows_of, store
from . import reference

PADDING, REST, IMAGE, IMAGE_SINK = (
    tl.constexpr(value) for value in (reference.PADDING, reference.REST, reference.IMAGE, reference.IMAGE_SINK)
)
EPSILON = tl.constexpr(reference.EPSILON)


# By (bits of a number, largest head size). Float32 is multiplied in three parts, as exact as float32 itself.
FORWARD = {(16, 128): Tiles(128, 64, 8, 2), (32, 128): Tiles(16, 16, 8, 1)}
FORWARD_AMPERE = FORWARD | {(16, 128): Tiles(64, 32, 8, 2)}  # larger ones would spill there
DECODE = {(16, 128): Tiles(16, 64, 4, 3), (32, 128): Tiles(16, 16, 8, 2)}
QUERIES = {(16, 128): Tiles(64, 64, 8, 2), (32, 64): Tiles(16, 16, 8, 2)}
KEYS = {(16, 128): Tiles(32, 64, 8, 2), (32, 64): Tiles(16, 16, 8, 2)}
SINKS = 16  # keys that are gathered at a time
COUNT = 32  # tiles of keys that are counted at a time


# ---- what the kernels share --------------------------------------------------------------------------------


@triton.jit
def _gain(image, image_sink, text_sink, images, recycle, most_sinks, min_visual):
    """The rule of reference.py on shares of the whole weight: -1 in rows that are not changed."""
    visual = image + image_sink
    share = image_sink / tl.where(images > 0, visual + EPSILON * images, 1.0)
    moved = (images > 0) & (share <= most_sinks) & (visual >= min_visual) & (image > 0)
    return tl.where(moved, recycle * (image_sink + text_sink) / tl.where(moved, image, 1.0), -1.0)


# ---- forward -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["S"])
def lists_kernel(
    kinds_ptr, image_tiles_ptr, image_before_ptr, rest_tiles_ptr, rest_before_ptr, sink_keys_ptr, sink_count_ptr, S,
    BLOCK_S: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A program puts one tile of a row's keys on the lists it belongs to: of tiles with keys of an image, of tiles with
    keys of the rest, and of keys that are sinks. To find its place it counts, COUNT tiles at a time, what comes before.

    `before[n]` says how many of the tiles listed come before tile n.
    """
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles, columns = tl.num_programs(0), tl.arange(0, BLOCK_S)
    images, rests, sinks = 0, 0, 0
    for first in range(0, tile, COUNT):
        earlier = first + tl.arange(0, COUNT)
        keys = earlier[:, None] * BLOCK_S + columns[None, :]
        kinds = tl.load(kinds_ptr + batch * S + keys, mask=(earlier < tile)[:, None], other=PADDING)
        images += tl.sum(tl.max((kinds == IMAGE).to(tl.int32), 1), 0)
        rests += tl.sum(tl.max((kinds == REST).to(tl.int32), 1), 0)
        sinks += tl.sum(tl.sum((kinds >= IMAGE_SINK).to(tl.int32), 1), 0)
    keys = tile * BLOCK_S + columns
    kinds = tl.load(kinds_ptr + batch * S + keys, mask=keys < S, other=PADDING)
    image, rest = tl.max((kinds == IMAGE).to(tl.int32), 0), tl.max((kinds == REST).to(tl.int32), 0)
    sink = (kinds >= IMAGE_SINK).to(tl.int32)
    tl.store(image_tiles_ptr + batch * tiles + images, tile, mask=image > 0)
    tl.store(rest_tiles_ptr + batch * tiles + rests, tile, mask=rest > 0)
    earlier = tl.sum(tl.where(columns[None, :] < columns[:, None], sink[None, :], 0), 1)
    tl.store(sink_keys_ptr + batch * S + sinks + earlier, keys, mask=sink > 0)
    tl.store(image_before_ptr + batch * (tiles + 1) + tile, images)
    tl.store(rest_before_ptr + batch * (tiles + 1) + tile, rests)
    last = tile == tiles - 1
    tl.store(image_before_ptr + batch * (tiles + 1) + tiles, images + image, mask=last)
    tl.store(rest_before_ptr + batch * (tiles + 1) + tiles, rests + rest, mask=last)
    tl.store(sink_count_ptr + batch, sinks + tl.sum(sink, 0), mask=last)


@triton.jit(do_not_specialize=["T", "S", "past"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, gain_ptr, kinds_ptr, images_ptr, gate_ptr, place_ptr,
    image_tiles_ptr, image_before_ptr, rest_tiles_ptr, rest_before_ptr, sink_keys_ptr, sink_count_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gt, stride_gd, T, S, past, scale, recycle, most_sinks, min_visual,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    SINKS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_T queries of one head; where one of them may be changed it reads the keys kind by kind."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    here = batch * stride_kb + head // GROUP * stride_kh
    k_base, v_base = k_ptr + here, v_ptr + here
    if place_ptr is not None:
        past = tl.load(place_ptr).to(tl.int32)
    rows, columns = start + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    places = rows + past
    stop, whole = S, S // BLOCK_S  # keys that are read, and tiles of them that need no mask
    if CAUSAL:
        stop = tl.minimum(S, tl.minimum(start + BLOCK_T, T) + past)
        whole = tl.minimum(whole, (start + past + 1) // BLOCK_S)
    tiles = tl.cdiv(stop, BLOCK_S)
    if kinds_ptr is not None:
        whole = 0
    q = load(q_ptr + batch * stride_qb + head * stride_qh, rows, stride_qt, columns, rows < T, D, UPCAST)
    scale *= LOG2E

    rests = tiles
    if images_ptr is not None:
        changes = tl.max(tl.load(images_ptr + batch * T + rows, mask=rows < T, other=0), 0) > 0
        listed = tl.cdiv(S, BLOCK_S)
        rests = tl.where(changes, tl.load(rest_before_ptr + batch * (listed + 1) + tiles), tiles)
        image_sum = tl.zeros([BLOCK_T], tl.float32)
        image_max = image_sum - float("inf")
        image_acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for index in range(0, tl.where(changes, tl.load(image_before_ptr + batch * (listed + 1) + tiles), 0)):
            tile = tl.load(image_tiles_ptr + batch * listed + index)
            there = tile * BLOCK_S + tl.arange(0, BLOCK_S)
            kinds = tl.load(kinds_ptr + batch * S + there, mask=there < S, other=PADDING)
            k = load(k_base, there, stride_ks, columns, there < S, D, UPCAST)
            v = load(v_base, there, stride_ks, columns, there < S, D, UPCAST)
            keep = (kinds == IMAGE)[None, :]
            if CAUSAL:
                keep = keep & (there[None, :] <= places[:, None])
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where(keep, scores, float("-inf"))
            image_acc, image_max, image_sum = fold(image_acc, image_max, image_sum, scores, v, PRECISION)

    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    row_max = row_sum - float("inf")
    for tile in range(0, whole):
        there = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        k = load(k_base, there, stride_ks, columns, there < S, D, UPCAST)
        v = load(v_base, there, stride_ks, columns, there < S, D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)
    for index in range(whole, rests):
        tile = index
        if images_ptr is not None:
            tile = tl.load(rest_tiles_ptr + batch * listed + index, mask=changes, other=index)
        there = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        keep = (there < S)[None, :]
        if kinds_ptr is not None:
            kinds = tl.load(kinds_ptr + batch * S + there, mask=there < S, other=PADDING)
            keep = (kinds != PADDING)[None, :]
            if images_ptr is not None:
                keep = keep & ((kinds == REST)[None, :] | (not changes))
        if CAUSAL:
            keep = keep & (there[None, :] <= places[:, None])
        k = load(k_base, there, stride_ks, columns, there < S, D, UPCAST)
        v = load(v_base, there, stride_ks, columns, there < S, D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(keep, scores, float("-inf"))
        acc, row_max, row_sum = fold(acc, row_max, row_sum, scores, v, PRECISION)

    row = (batch * tl.num_programs(2) + head) * T + rows
    if images_ptr is not None:
        sinks = tl.where(changes, tl.load(sink_count_ptr + batch), 0)
        image_sink = tl.zeros([BLOCK_T], tl.float32)
        text_sink, sink_max = image_sink, image_sink - float("inf")
        for first in range(0, sinks, SINKS):
            place = first + tl.arange(0, SINKS)
            there = tl.load(sink_keys_ptr + batch * S + place, mask=place < sinks, other=S)
            kinds = tl.load(kinds_ptr + batch * S + there, mask=there < S, other=PADDING)
            k = load(k_base, there, stride_ks, columns, there < S, D, UPCAST)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            keep = (kinds != PADDING)[None, :]
            if CAUSAL:
                keep = keep & (there[None, :] <= places[:, None])
            scores = tl.where(keep, scores, float("-inf"))
            new_max = tl.maximum(sink_max, tl.max(scores, 1))
            weights = tl.exp2(scores - finite(new_max)[:, None])
            shrink = tl.exp2(sink_max - finite(new_max))
            of_image = tl.sum(tl.where((kinds == IMAGE_SINK)[None, :], weights, 0.0), 1)
            text_sink = text_sink * shrink + tl.sum(weights, 1) - of_image
            image_sink = image_sink * shrink + of_image
            sink_max = new_max
        images = tl.load(images_ptr + batch * T + rows, mask=rows < T, other=0)
        top = tl.maximum(row_max, tl.maximum(image_max, sink_max))
        rest_part = tl.exp2(row_max - finite(top))
        image_part = tl.exp2(image_max - finite(top))
        sink_part = tl.exp2(sink_max - finite(top))
        total = row_sum * rest_part + image_sum * image_part + (image_sink + text_sink) * sink_part
        inverse = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
        gain = _gain(image_sum * image_part * inverse, image_sink * sink_part * inverse,
                     text_sink * sink_part * inverse, images, recycle, most_sinks, min_visual)  # fmt: skip
        acc = acc * (rest_part * inverse)[:, None]
        acc += image_acc * (image_part * inverse * (1 + tl.maximum(gain, 0.0)))[:, None]
        left = inverse * tl.where(gain >= 0, 1 - recycle, 1.0)
        for first in range(0, sinks, SINKS):
            place = first + tl.arange(0, SINKS)
            there = tl.load(sink_keys_ptr + batch * S + place, mask=place < sinks, other=S)
            k = load(k_base, there, stride_ks, columns, there < S, D, UPCAST)
            v = load(v_base, there, stride_ks, columns, there < S, D, UPCAST)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            keep = (there < S)[None, :]
            if CAUSAL:
                keep = keep & (there[None, :] <= places[:, None])
            weights = tl.where(keep, tl.exp2(scores - finite(top)[:, None]) * left[:, None], 0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc=acc, input_precision=PRECISION)
        tl.store(gain_ptr + row, gain, mask=rows < T)
    else:
        top, total = row_max, row_sum
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if gate_ptr is not None:
        gates = gate_ptr + batch * stride_gb + head * stride_gh + rows.to(tl.int64)[:, None] * stride_gt
        mask = (rows < T)[:, None] & (columns < D)[None, :]
        acc *= tl.load(gates + columns[None, :] * stride_gd, mask=mask, other=0.0).to(tl.float32)
    store(out_ptr + batch * stride_ob + head * stride_oh, rows, stride_ot, columns, rows < T, acc, D)
    # +inf where nothing was read, so that the gradient finds no weight there
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse_ptr + row, lse, mask=rows < T)


# ---- decode ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["S", "past", "splits"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, sums_ptr, kinds_ptr, place_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, S, past, splits, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns the query heads of one KV head and a piece of its keys, whose sums it leaves to `merge_kernel`:

    numerators of the rest, the image and the sinks, then a maximum and the sums of the four kinds.
    """
    piece, kv_head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    members, columns = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    q = load(q_ptr + batch * stride_qb + kv_head * GROUP * stride_qh, members, stride_qh, columns, members < GROUP,
             D, UPCAST)  # fmt: skip
    here = batch * stride_kb + kv_head * stride_kh
    stop = S
    if CAUSAL:
        if place_ptr is not None:
            past = tl.load(place_ptr).to(tl.int32)
        stop = tl.minimum(S, past + 1)
    size = tl.cdiv(tl.cdiv(stop, splits), BLOCK_S) * BLOCK_S
    rest_acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    image_acc, sink_acc = rest_acc, rest_acc
    rest = tl.zeros([BLOCK_T], tl.float32)
    image, image_sink, text_sink = rest, rest, rest
    row_max = rest - float("inf")
    for first in range(piece * size, tl.minimum((piece + 1) * size, stop), BLOCK_S):
        there = first + tl.arange(0, BLOCK_S)
        k = load(k_ptr + here, there, stride_ks, columns, there < stop, D, UPCAST)
        v = load(v_ptr + here, there, stride_ks, columns, there < stop, D, UPCAST)
        kinds = tl.where(there < stop, REST, PADDING)
        if kinds_ptr is not None:
            kinds = tl.load(kinds_ptr + batch * S + there, mask=there < stop, other=PADDING).to(tl.int32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where((kinds != PADDING)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - finite(new_max)[:, None])
        shrink = tl.exp2(row_max - finite(new_max))
        row_max = new_max
        part = tl.where((kinds == REST)[None, :], weights, 0.0)
        rest = rest * shrink + tl.sum(part, 1)
        rest_acc = tl.dot(part.to(v.dtype), v, acc=rest_acc * shrink[:, None], input_precision=PRECISION)
        if kinds_ptr is not None:
            part = tl.where((kinds == IMAGE)[None, :], weights, 0.0)
            image = image * shrink + tl.sum(part, 1)
            image_acc = tl.dot(part.to(v.dtype), v, acc=image_acc * shrink[:, None], input_precision=PRECISION)
            part = tl.where((kinds >= IMAGE_SINK)[None, :], weights, 0.0)
            of_image = tl.sum(tl.where((kinds == IMAGE_SINK)[None, :], weights, 0.0), 1)
            text_sink = text_sink * shrink + tl.sum(part, 1) - of_image
            image_sink = image_sink * shrink + of_image
            sink_acc = tl.dot(part.to(v.dtype), v, acc=sink_acc * shrink[:, None], input_precision=PRECISION)

    kept = members < GROUP
    row = ((batch * tl.num_programs(1) + kv_head) * GROUP + members) * splits + piece
    sums = sums_ptr + row * 5
    tl.store(sums, row_max, mask=kept)
    tl.store(sums + 1, rest, mask=kept)
    tl.store(sums + 2, image, mask=kept)
    tl.store(sums + 3, image_sink, mask=kept)
    tl.store(sums + 4, text_sink, mask=kept)
    store(part_ptr, row * 3, D, columns, kept, rest_acc, D)
    store(part_ptr + D, row * 3, D, columns, kept, image_acc, D)
    store(part_ptr + 2 * D, row * 3, D, columns, kept, sink_acc, D)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    out_ptr, gain_ptr, part_ptr, sums_ptr, images_ptr, gate_ptr, stride_ob, stride_oh, stride_gb, stride_gh, stride_gd,
    splits, recycle, most_sinks, min_visual,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program puts the pieces of one head together and moves what is to be moved."""
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pieces, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = pieces < splits
    row = (batch * tl.num_programs(0) + head) * splits + pieces
    row_max = tl.load(sums_ptr + row * 5, mask=inside, other=float("-inf"))
    part = tl.exp2(row_max - finite(tl.max(row_max, 0)))
    rest = tl.sum(tl.load(sums_ptr + row * 5 + 1, mask=inside, other=0.0) * part, 0)
    image = tl.sum(tl.load(sums_ptr + row * 5 + 2, mask=inside, other=0.0) * part, 0)
    image_sink = tl.sum(tl.load(sums_ptr + row * 5 + 3, mask=inside, other=0.0) * part, 0)
    text_sink = tl.sum(tl.load(sums_ptr + row * 5 + 4, mask=inside, other=0.0) * part, 0)
    total = rest + image + image_sink + text_sink
    inverse = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    image_factor, sink_factor = inverse, inverse
    if images_ptr is not None:
        gain = _gain(image * inverse, image_sink * inverse, text_sink * inverse, tl.load(images_ptr + batch), recycle,
                     most_sinks, min_visual)  # fmt: skip
        image_factor *= 1 + tl.maximum(gain, 0.0)
        sink_factor *= tl.where(gain >= 0, 1 - recycle, 1.0)
        tl.store(gain_ptr + batch * tl.num_programs(0) + head, gain)
    out = tl.sum(load(part_ptr, row * 3, D, columns, inside, D, False) * (part * inverse)[:, None], 0)
    out += tl.sum(load(part_ptr + D, row * 3, D, columns, inside, D, False) * (part * image_factor)[:, None], 0)
    out += tl.sum(load(part_ptr + 2 * D, row * 3, D, columns, inside, D, False) * (part * sink_factor)[:, None], 0)
    if gate_ptr is not None:
        gates = gate_ptr + batch * stride_gb + head * stride_gh + columns * stride_gd
        out *= tl.load(gates, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + batch * stride_ob + head * stride_oh + columns, out.to(out_ptr.dtype.element_ty),
             mask=columns < D)  # fmt: skip


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit
def _differentiate(
    scores, d_weights, lse, delta, gain, kinds, keep, recycle, HAS_GAIN: tl.constexpr
):  # fmt: skip
    """New weights and the gradient of the scores on a tile; which rows are changed, and by how much, is given.

    Queries may be rows or columns: all but the numbers are tiles, or one row or column of them.
    """
    weights = tl.where(keep, tl.exp2(scores - lse), 0.0)
    if HAS_GAIN:
        moved = gain >= 0
        factor = tl.where(moved & (kinds == IMAGE), 1 + gain, 1.0)
        factor = tl.where(moved & (kinds >= IMAGE_SINK), 1 - recycle, factor)
        return weights * factor, weights * (factor * d_weights - delta)
    return weights, weights * (d_weights - delta)


@triton.jit(do_not_specialize=["T", "S", "past"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, gain_ptr, delta_ptr, dq_ptr, kinds_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    T, S, past, scale, recycle,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq: a program owns BLOCK_T queries of one head. Leaves each row's `sum(out * d_out)` in delta."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, columns = start + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside = rows < T
    q = load(q_ptr + batch * stride_qb + head * stride_qh, rows, stride_qt, columns, inside, D, UPCAST)
    here = batch * stride_ob + head * stride_oh
    out = load(out_ptr + here, rows, stride_ot, columns, inside, D, UPCAST)
    d_out = load(d_out_ptr + here, rows, stride_ot, columns, inside, D, UPCAST)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    row = (batch * tl.num_programs(2) + head) * T + rows
    tl.store(delta_ptr + row, delta, mask=inside)
    lse = tl.load(lse_ptr + row, mask=inside, other=float("inf"))
    gain = delta
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + row, mask=inside, other=-1.0)
    stop = S
    if CAUSAL:
        stop = tl.minimum(S, tl.minimum(start + BLOCK_T, T) + past)
    here = batch * stride_kb + head // GROUP * stride_kh
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, stop, BLOCK_S):
        there = first + tl.arange(0, BLOCK_S)
        kinds = tl.where(there < S, REST, PADDING)
        if kinds_ptr is not None:
            kinds = tl.load(kinds_ptr + batch * S + there, mask=there < S, other=PADDING).to(tl.int32)
        keep = (kinds != PADDING)[None, :]
        if CAUSAL:
            keep = keep & (there[None, :] <= (rows + past)[:, None])
        k = load(k_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
        v = load(v_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        _, d_scores = _differentiate(scores, d_weights, lse[:, None], delta[:, None], gain[:, None], kinds[None, :],
                                     keep, recycle, gain_ptr is not None)  # fmt: skip
        dq = tl.dot(d_scores.to(k.dtype), k, acc=dq, input_precision=PRECISION)
    store(dq_ptr + batch * stride_qb + head * stride_qh, rows, stride_qt, columns, inside, dq * scale, D)


@triton.jit(do_not_specialize=["T", "S", "past"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, gain_ptr, delta_ptr, dk_ptr, dv_ptr, kinds_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_ot,
    T, S, past, scale, recycle,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv: a program owns BLOCK_S keys of one KV head and loops over the queries that read them."""
    first = tl.program_id(0) * BLOCK_S
    batch, kv_head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    there, columns = first + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    here = batch * stride_kb + kv_head * stride_kh
    k = load(k_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
    v = load(v_ptr + here, there, stride_ks, columns, there < S, D, UPCAST)
    kinds = tl.where(there < S, REST, PADDING)
    if kinds_ptr is not None:
        kinds = tl.load(kinds_ptr + batch * S + there, mask=there < S, other=PADDING).to(tl.int32)
    low = 0
    if CAUSAL:
        low = tl.maximum(first - past, 0) // BLOCK_T * BLOCK_T
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        sums = (batch * tl.num_programs(2) * GROUP + head) * T
        for start in range(low, T, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            inside = rows < T
            q = load(q_ptr + batch * stride_qb + head * stride_qh, rows, stride_qt, columns, inside, D, UPCAST)
            d_out = load(d_out_ptr + batch * stride_ob + head * stride_oh, rows, stride_ot, columns, inside, D, UPCAST)
            lse = tl.load(lse_ptr + sums + rows, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + sums + rows, mask=inside, other=0.0)
            gain = delta
            if gain_ptr is not None:
                gain = tl.load(gain_ptr + sums + rows, mask=inside, other=-1.0)
            keep = (kinds != PADDING)[:, None]
            if CAUSAL:
                keep = keep & (there[:, None] <= (rows + past)[None, :])
            # Keys are the rows: the products then have as many, which the chip's own instructions want.
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            weights, d_scores = _differentiate(scores, d_weights, lse[None, :], delta[None, :], gain[None, :],
                                               kinds[:, None], keep, recycle, gain_ptr is not None)  # fmt: skip
            dv = tl.dot(weights.to(v.dtype), d_out, acc=dv, input_precision=PRECISION)
            dk = tl.dot(d_scores.to(k.dtype), q, acc=dk, input_precision=PRECISION)
    store(dk_ptr + here, there, stride_ks, columns, there < S, dk * scale, D)
    store(dv_ptr + here, there, stride_ks, columns, there < S, dv, D)


# ---- launchers ---------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """`reference.Rule` in the numbers that the kernels compare."""

    recycle: float
    most_sinks: float
    min_visual: float


def forward(
    q: Tensor, k: Tensor, v: Tensor, kinds: Tensor | None, images: Tensor | None, gate: Tensor | None,
    place: Tensor | None, past: int, causal: bool, scale: float, rule: Rule,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The output, the logarithm of each row's sum of weights in units of log 2, and each row's gain, -1 for none."""
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    q, k, v = rows_of(q, k, v)
    out = q.new_empty(batch, queries, heads, size).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    tiles, options = _tiles(FORWARD_AMPERE if launch.generation(q.device) == 8 else FORWARD, q)
    gain: Tensor | None = None
    lists: tuple[Tensor | None, ...] = (None,) * 6
    if images is not None:
        assert kinds is not None
        kinds, images, gain = kinds.contiguous(), images.to(torch.int32).contiguous(), torch.empty_like(lse)
        lists = _lists(kinds, tiles.keys)
    gates, gate_strides = _gate(gate, out)
    forward_kernel[(triton.cdiv(queries, tiles.queries), batch, heads)](
        q, k, v, out, lse, gain, contiguous(kinds), images, gates, place, *lists,
        *q.stride()[:3], *k.stride()[:3], *out.stride()[:3], *gate_strides, queries, keys, past, scale, *rule,
        GROUP=heads // k.shape[1], CAUSAL=causal, SINKS=SINKS, **options,
    )  # fmt: skip
    return out, lse, gain


def decode(
    q: Tensor, k: Tensor, v: Tensor, kinds: Tensor | None, images: Tensor | None, gate: Tensor | None,
    place: Tensor | None, past: int, causal: bool, scale: float, rule: Rule,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`forward` for one query a row, without the logarithm."""
    batch, heads, _, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    q, k, v = rows_of(q, k, v)
    out = q.new_empty(batch, heads, 1, size)
    gain = None if images is None else torch.empty(batch, heads, 1, dtype=torch.float32, device=q.device)
    tiles, options = _tiles(DECODE, q)
    options["BLOCK_T"] = max(tiles.queries, triton.next_power_of_2(heads // groups))
    splits = launch.splits(keys, batch * groups, tiles.keys, q.device)
    part = torch.empty(batch, heads, splits, 3, size, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, heads, splits, 5, dtype=torch.float32, device=q.device)
    decode_kernel[(splits, groups, batch)](
        q, k, v, part, sums, contiguous(kinds), place, *q.stride()[:2], *k.stride()[:3], keys, past, splits, scale,
        GROUP=heads // groups, CAUSAL=causal, **options,
    )  # fmt: skip
    gates, (gate_b, gate_h, _, gate_d) = _gate(gate, out)
    merge_kernel[(heads, batch)](
        out, gain, part, sums, None if images is None else images.to(torch.int32).contiguous(), gates,
        *out.stride()[:2], gate_b, gate_h, gate_d, splits, *rule,
        D=size, BLOCK_D=options["BLOCK_D"], BLOCK_N=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return out, gain


def gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, kinds: Tensor | None, out: Tensor, lse: Tensor,
    gain: Tensor | None, past: int, causal: bool, scale: float, recycle: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv."""
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    q, k, v, out, d_out = (x.contiguous() for x in (q, k, v, out, d_out))
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    kinds, gain = contiguous(kinds), contiguous(gain)
    numbers = (*q.stride()[:3], *k.stride()[:3], *out.stride()[:3], queries, keys, past, scale, recycle)
    constants = dict(GROUP=heads // groups, CAUSAL=causal)
    tiles, options = _tiles(QUERIES, q)
    queries_kernel[(triton.cdiv(queries, tiles.queries), batch, heads)](
        q, k, v, out, d_out, lse, gain, delta, dq, kinds, *numbers, **constants, **options
    )
    tiles, options = _tiles(KEYS, q)
    keys_kernel[(triton.cdiv(keys, tiles.keys), batch, groups)](
        q, k, v, d_out, lse, gain, delta, dk, dv, kinds, *numbers, **constants, **options
    )
    return dq, dk, dv


def _lists(kinds: Tensor, block: int) -> tuple[Tensor, ...]:
    """What `lists_kernel` lists."""
    batch, keys = kinds.shape
    tiles = triton.cdiv(keys, block)
    shapes = (tiles, tiles + 1, tiles, tiles + 1, keys)
    lists = [torch.empty(batch, n, dtype=torch.int32, device=kinds.device) for n in shapes]
    lists.append(torch.empty(batch, dtype=torch.int32, device=kinds.device))
    lists_kernel[(tiles, batch)](kinds, *lists, keys, BLOCK_S=block, COUNT=COUNT, num_warps=4)
    return tuple(lists)


def _gate(gate: Tensor | None, out: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    if gate is None:
        return None, (0, 0, 0, 0)
    wide = gate.expand(out.shape)
    return wide, wide.stride()


def _tiles(table: dict[tuple[int, int], Tiles], q: Tensor) -> tuple[Tiles, dict[str, Any]]:
    """The tiles for this dtype and head size, and the constants and launch settings that follow."""
    tiles = chosen(table, q)
    return tiles, options_of(tiles, q)


# ---- what the static check compiles ------------------------------------------------------------------------


def _static() -> Iterator[Compile]:
    """Every table's tiles, with all that a call can have; the commonest also without."""
    types = dict.fromkeys(
        (f"{name}_ptr" for name in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "gate")), "*T:16"
    )
    types |= dict.fromkeys((f"{name}_ptr" for name in ("lse", "gain", "delta", "part", "sums")), "*fp32:16")
    lists = [f"{kind}_{what}_ptr" for kind in ("image", "rest") for what in ("tiles", "before")]
    lists += ["sink_keys_ptr", "sink_count_ptr"]
    types |= dict.fromkeys((*lists, "images_ptr"), "*i32:16")
    types |= {"kinds_ptr": "*i8:16", "place_ptr": "*i64:16"}
    types |= {f"stride_{tensor}{side}": "i32:16" for tensor in "qkog" for side in "bhtsd"}
    types |= dict.fromkeys(("T", "S", "past", "splits"), "i32")
    types |= dict.fromkeys(("scale", "recycle", "most_sinks", "min_visual"), "fp32")
    optional = {"gain_ptr", "kinds_ptr", "images_ptr", "gate_ptr", "place_ptr", *lists}
    own, few = {"bf16": "own", "fp32": "mma"}, {"bf16": "mma", "fp32": "mma"}
    every, ampere, later = (80, 90, 100), (80,), (90, 100)
    for label, kernel, table, products, chips in (
        ("forward", forward_kernel, FORWARD, own, later),
        ("forward", forward_kernel, FORWARD_AMPERE, own, ampere),
        ("decode", decode_kernel, DECODE, few, every),
        ("dq", queries_kernel, QUERIES, own, every),
        ("dk dv", keys_kernel, KEYS, own, every),
    ):
        for (bits, size), tiles in table.items():
            for absent in (set(), optional) if bits == 16 else (set(),):
                names = kernel.arg_names
                constants = dict(GROUP=4, D=size, BLOCK_D=size, BLOCK_T=tiles.queries, BLOCK_S=tiles.keys, SINKS=SINKS,
                                 CAUSAL=True, PRECISION=launch.precision(bits), UPCAST=False)  # fmt: skip
                yield Compile(
                    f"{label} D{size} {tiles.queries}x{tiles.keys}{' plain' if absent else ''}", kernel,
                    {name: types[name] for name in names if name in types and name not in absent},
                    {name: constants.get(name) for name in names if name in constants or name in absent},
                    tiles.num_warps, tiles.num_stages, products, ("bf16" if bits == 16 else "fp32",), chips,
                )  # fmt: skip
    for label, kernel, sizes, num_warps in (
        ("lists", lists_kernel, dict(BLOCK_S=64, COUNT=COUNT), 4),
        ("merge D128", merge_kernel, dict(D=128, BLOCK_D=128, BLOCK_N=launch.MOST_SPLITS), 4),
    ):
        arguments = {name: types[name] for name in kernel.arg_names if name in types}
        yield Compile(label, kernel, arguments, sizes, num_warps, 3, "none", ("bf16",))


STATIC = list(_static())
