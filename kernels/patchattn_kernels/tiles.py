"""What kernels of several primitives do alike with a tile of rows: read it, score it, fold it into a softmax, write it.

Device helpers, one idea each; then how a launcher describes its tiles. Needs triton: only `kernels.py` files import it.
A score is in units of log 2 throughout, so that one `exp2` makes a weight of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .dispatch import interpreted

LOG2E = tl.constexpr(1.4426950408889634)


# ---- rows of a matrix --------------------------------------------------------------------------------------


@triton.jit
def load_at(ptr, offsets, columns, row_mask, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows whose columns lie side by side; zeros where `row_mask`, if any, is False."""
    places = ptr + offsets[:, None] + columns[None, :]
    if row_mask is None:
        if columns.shape[0] == D:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=(columns < D)[None, :], other=0.0)
    else:
        mask = row_mask[:, None] if columns.shape[0] == D else row_mask[:, None] & (columns < D)[None, :]
        tile = tl.load(places, mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def load(ptr, rows, stride, columns, row_mask, D: tl.constexpr, UPCAST: tl.constexpr):
    """`load_at` of the rows of a matrix, by their numbers."""
    return load_at(ptr, rows.to(tl.int64) * stride, columns, row_mask, D, UPCAST)


@triton.jit
def store_at(ptr, offsets, columns, row_mask, values, D: tl.constexpr):
    mask = row_mask[:, None] if columns.shape[0] == D else row_mask[:, None] & (columns < D)[None, :]
    tl.store(ptr + offsets[:, None] + columns[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store(ptr, rows, stride, columns, row_mask, values, D: tl.constexpr):
    store_at(ptr, rows.to(tl.int64) * stride, columns, row_mask, values, D)


# ---- a running softmax -------------------------------------------------------------------------------------


@triton.jit
def finite(row_max):
    """A maximum to subtract; 0 in a row that has read nothing so far."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def scores_of(q, k, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """`q @ k.T`, scaled and capped, in units of log 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        twice = tl.exp2(scores * (2 * LOG2E * scale / softcap))
        return softcap * LOG2E * (1 - 2 / (twice + 1))  # tanh
    return scores * (scale * LOG2E)


@triton.jit
def empty_rows(sinks_ptr, head, ROWS: tl.constexpr):
    """Maximum and sum of rows of one head that have read nothing yet but its sink, if it has one."""
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = row_sum - float("inf")
    if sinks_ptr is not None:  # a logit that takes weight and gives no value
        row_max = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E + tl.zeros([ROWS], tl.float32)
        row_sum += 1
    return row_max, row_sum


@triton.jit
def fold(acc, row_max, row_sum, scores, v, PRECISION: tl.constexpr):
    """One tile of scores, -inf where masked, and its values into the running softmax."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    safe = tl.where(new_max == float("-inf"), 0.0, new_max)  # `finite`, which called from here costs registers
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(row_max - safe)
    acc = tl.dot(weights.to(v.dtype), v, acc=acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum * shrink + tl.sum(weights, 1)


@triton.jit
def fold_sinks(acc, row_max, row_sum, sinks_ptr, heads, inside):
    """The sink of each row's own head into the running softmax."""
    logit = tl.load(sinks_ptr + heads, mask=inside, other=0.0).to(tl.float32) * LOG2E
    new_max = tl.maximum(row_max, logit)
    shrink = tl.exp2(row_max - new_max)
    return acc * shrink[:, None], row_sum * shrink + tl.exp2(logit - new_max)


# ---- a softmax in pieces -----------------------------------------------------------------------------------


@triton.jit
def leave(part_ptr, sums_ptr, parts, columns, inside, acc, row_max, row_sum, D: tl.constexpr):
    """Numerators, maxima and sums of one piece of some rows, for `join`."""
    store(part_ptr, parts, D, columns, inside, acc, D)
    tl.store(sums_ptr + parts * 2, row_max, mask=inside)
    tl.store(sums_ptr + parts * 2 + 1, row_sum, mask=inside)


@triton.jit
def join(part_ptr, sums_ptr, parts, columns, inside, sinks_ptr, head, D: tl.constexpr):
    """Numerator and sum of one row from all its pieces and its sink, if any, and the maximum they are relative to."""
    row_max = tl.load(sums_ptr + parts * 2, mask=inside, other=float("-inf"))
    row_sum = tl.load(sums_ptr + parts * 2 + 1, mask=inside, other=0.0)
    acc = load(part_ptr, parts, D, columns, inside, D, False)
    top = tl.max(row_max, 0)
    if sinks_ptr is not None:
        logit = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, logit)
    factor = tl.exp2(row_max - finite(top))
    total = tl.sum(row_sum * factor, 0)
    if sinks_ptr is not None:
        total += tl.exp2(logit - finite(top))
    return tl.sum(acc * factor[:, None], 0), total, finite(top)


# ---- gradients ---------------------------------------------------------------------------------------------


@triton.jit
def uncapped(d_scores, scores, softcap, SOFTCAP: tl.constexpr):
    """The gradient of scores before the cap, from that of scores after it."""
    if SOFTCAP:
        capped = scores / (softcap * LOG2E)
        d_scores *= 1 - capped * capped
    return d_scores


@triton.jit
def differentiate(q, k, v, d_out, lse, delta, keep, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Weights of a tile and gradient of its scores before the scale; transposed if q, k and v, d_out are swapped."""
    scores = scores_of(q, k, scale, softcap, SOFTCAP, PRECISION)
    weights = tl.where(keep, tl.exp2(scores - lse), 0.0)
    d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta)
    return weights, uncapped(d_scores, scores, softcap, SOFTCAP)


# ---- launchers ---------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How many queries and keys a program holds at a time, at most, and how it is launched."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


Choice = TypeVar("Choice")


def block_of(size: int) -> int:
    """The columns of a tile that holds `size` of them: a power of two, and as many as a product wants."""
    return max(16, triton.next_power_of_2(size))


def chosen(table: Mapping[tuple[int, int], Choice], q: Tensor) -> Choice:
    """What a table by (bits of a number, largest head size) says for these queries; the smaller sizes come first."""
    bits, block = 8 * q.element_size(), block_of(q.shape[-1])
    return next(choice for (of, most), choice in table.items() if of == bits and block <= most)


def constants_of(q: Tensor) -> dict[str, Any]:
    """What every kernel is told of its queries."""
    bits = 8 * q.element_size()
    return dict(
        D=q.shape[-1], BLOCK_D=block_of(q.shape[-1]), PRECISION=launch.precision(bits),
        UPCAST=interpreted() and bits == 16,
    )  # fmt: skip


def options_of(tiles: Tiles, q: Tensor) -> dict[str, Any]:
    """The constants and launch settings that follow from the tiles."""
    return dict(
        BLOCK_T=tiles.queries, BLOCK_S=tiles.keys, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        **constants_of(q),
    )  # fmt: skip


def rows_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the kernels read them: columns side by side, and keys and values laid out alike."""
    alike = all(x.stride(-1) == 1 and x.stride() == tensors[-1].stride() for x in tensors[1:])
    return tuple(x if x.stride(-1) == 1 and (alike or not i) else x.contiguous() for i, x in enumerate(tensors))


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
