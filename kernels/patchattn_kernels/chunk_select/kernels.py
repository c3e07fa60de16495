"""Chunk keys and attention to chosen chunks in Triton. Specification: reference.py.

Only keys and values may lie apart, from head to head. A prompt is read in tiles of queries, each with the list of all
chunks that some query of the tile picked: most of them are picked by many. A single token is read by one program for
each chunk it picked. The selection itself has no kernel: it is a product and a topk of torch, for blocks of queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dispatch import interpreted
from ..static import Compile


class Tiles(NamedTuple):
    """How many queries and keys a program holds at a time, and how it is launched."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By bits of a number. Float32 is multiplied in three parts, which keeps its precision.
ATTEND = {16: Tiles(64, 64, 8, 2), 32: Tiles(16, 32, 4, 1)}
BOUNDS = Tiles(0, 16, 4, 2)
COMPLETE = {16: Tiles(16, 0, 8, 1), 32: Tiles(16, 0, 8, 1)}
DECODE = Tiles(1, 32, 4, 2)


@triton.jit
def _load(ptr, rows, columns, row_mask, D: tl.constexpr, UPCAST: tl.constexpr, AGAIN: tl.constexpr = False):
    """Rows of a contiguous matrix, zeros where there is none; `AGAIN`: not kept since a first time."""
    mask = row_mask[:, None] & (columns < D)[None, :]
    tile = tl.load(ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0, volatile=AGAIN)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _cap(scores, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))  # tanh
    return scores


# ---- chunk keys --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["q_slots", "k_slots", "v_slots", "chunks"])
def complete_kernel(
    out_ptr, q_ptr, k_ptr, v_ptr, before_ptr, after_ptr, q_slots, k_slots, v_slots, chunks, scale,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns one chunk of one head, if the call completed it; BLOCK_S holds the whole chunk."""
    batch, head = tl.program_id(1).to(tl.int64) // HEADS, tl.program_id(1).to(tl.int64) % HEADS
    chunk = tl.load(before_ptr + batch) // CHUNK + tl.program_id(0)
    if chunk >= tl.load(after_ptr + batch) // CHUNK:
        return
    kv_head = batch * (HEADS // GROUP) + head // GROUP
    columns, inside = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    k_base, k_rows = k_ptr + kv_head * (k_slots + 1) * D, chunk * CHUNK % k_slots + inside
    k = _load(k_base, k_rows, columns, inside < CHUNK, D, UPCAST)
    q_rows, q_base = chunk * CHUNK % q_slots, q_ptr + (batch * HEADS + head) * (q_slots + 1) * D
    weight = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        q = _load(q_base, q_rows + rows, columns, rows < CHUNK, D, UPCAST)
        weights = _weights(q, k, inside < CHUNK, scale, PRECISION)
        weight += tl.sum(tl.where((rows < CHUNK)[:, None], weights, 0.0), 0)
    # From here on one row would do; a product wants BLOCK_T of them, all alike.
    v = _load(v_ptr + kv_head * (v_slots + 1) * D, chunk * CHUNK % v_slots + inside, columns, inside < CHUNK, D, UPCAST)
    alike = tl.zeros([BLOCK_T, BLOCK_S], tl.float32) + (weight / CHUNK)[None, :]
    query = tl.dot(alike.to(v.dtype), v, input_precision=PRECISION).to(v.dtype)
    k = _load(k_base, k_rows, columns, inside < CHUNK, D, UPCAST, True)  # keys and values do not fit side by side
    found = tl.dot(_weights(query, k, inside < CHUNK, scale, PRECISION).to(k.dtype), k, input_precision=PRECISION)
    first = tl.sum(tl.where((tl.arange(0, BLOCK_T) == 0)[:, None], found, 0.0), 0)
    out = out_ptr + ((batch * HEADS + head) * chunks + chunk) * D
    tl.store(out + columns, first.to(out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def _weights(q, k, keep, scale, PRECISION: tl.constexpr):
    """Softmax of `q @ k.T` over the kept keys."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(keep[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["slots", "chunks"])
def bounds_kernel(
    out_ptr, k_ptr, before_ptr, after_ptr, slots, chunks,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program owns one chunk of one KV head, of which there are HEADS, if the call completed it."""
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1).to(tl.int64)
    chunk = tl.load(before_ptr + batch) // CHUNK + tl.program_id(0)
    if chunk >= tl.load(after_ptr + batch) // CHUNK:
        return
    columns, inside = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    base = k_ptr + head * (slots + 1) * D
    largest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    smallest = tl.full([BLOCK_D], float("inf"), tl.float32)
    for start in range(0, CHUNK, BLOCK_S):
        keep = start + inside < CHUNK
        k = _load(base, chunk * CHUNK % slots + start + inside, columns, keep, D, True)
        largest = tl.maximum(largest, tl.max(tl.where(keep[:, None], k, float("-inf")), 0))
        smallest = tl.minimum(smallest, tl.min(tl.where(keep[:, None], k, float("inf")), 0))
    out = out_ptr + (head * chunks + chunk) * 2 * D
    tl.store(out + columns, largest.to(out_ptr.dtype.element_ty), mask=columns < D)
    tl.store(out + D + columns, smallest.to(out_ptr.dtype.element_ty), mask=columns < D)


# ---- attention to chosen chunks, a tile of queries at a time ------------------------------------------------


@triton.jit(do_not_specialize=["T", "S", "stored", "n"])
def attend_kernel(
    q_ptr, turned_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, selected_ptr, opened_ptr, sinks_ptr, union_ptr, sizes_ptr,
    out_ptr, total_ptr, T, S, stride_k, stride_v, stored, n, scale, softcap,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_T queries of one head and loops over the chunks that any of them picked."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch = head // HEADS
    kv_head = batch * (HEADS // GROUP) + head % HEADS // GROUP
    rows, columns, picks = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    at = (head * T + rows)[:, None] * n + picks[None, :]
    selected = tl.load(selected_ptr + at, mask=(rows < T)[:, None] & (picks < n)[None, :], other=-1)
    own = tl.sum((selected >= 0).to(tl.int32), 1) - 1
    opened = tl.load(opened_ptr + batch * T + rows, mask=rows < T, other=0).to(tl.int32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    row_max = row_sum - float("inf")
    if sinks_ptr is not None:  # a logit that takes weight and gives no value
        row_max = tl.load(sinks_ptr + head % HEADS).to(tl.float32) + row_sum
        row_sum += 1
    list_ptr = union_ptr + (head * tl.num_programs(0) + tile) * stored
    for item in range(tl.load(sizes_ptr + head * tl.num_programs(0) + tile)):
        chunk = tl.load(list_ptr + item)
        member = tl.sum((selected == chunk).to(tl.int32), 1) > 0
        step = own - tl.sum(((selected >= 0) & (selected < chunk)).to(tl.int32), 1)
        step = tl.where(member, step, 0)
        readable = tl.where(member, tl.where(step == 0, opened, CHUNK), 0)
        q = _turned(q_ptr + head * T * D, turned_ptr + head * T * D, cos_ptr, sin_ptr, rows, step, columns, rows < T, D,
                    UPCAST)  # fmt: skip
        for first in range(0, CHUNK, BLOCK_S):
            inside = first + tl.arange(0, BLOCK_S)
            there = chunk * CHUNK + inside
            exists = (inside < CHUNK) & (there < S)
            k = _load(k_ptr + kv_head * stride_k, there, columns, exists, D, UPCAST)
            scores = _cap(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, softcap, SOFTCAP)
            scores = tl.where((inside[None, :] < readable[:, None]) & exists[None, :], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            safe = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has read nothing so far
            weights = tl.exp(scores - safe[:, None])
            shrink = tl.exp(row_max - safe)
            v = _load(v_ptr + kv_head * stride_v, there, columns, exists, D, UPCAST)
            acc = tl.dot(weights.to(v.dtype), v, acc=acc * shrink[:, None], input_precision=PRECISION)
            row_max, row_sum = new_max, row_sum * shrink + tl.sum(weights, 1)
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    out = out_ptr + (head * T + rows)[:, None] * D + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (columns < D)[None, :])
    tl.store(total_ptr + head * T + rows, row_max + tl.log(row_sum), mask=rows < T)


@triton.jit
def _turned(
    q_ptr, turned_ptr, cos_ptr, sin_ptr, rows, step, columns, row_mask, D: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Rows of q, each turned on by its own number of chunks."""
    q, turned = _load(q_ptr, rows, columns, row_mask, D, UPCAST), _load(turned_ptr, rows, columns, row_mask, D, UPCAST)
    cos, sin = _load(cos_ptr, step, columns, row_mask, D, False), _load(sin_ptr, step, columns, row_mask, D, False)
    return (q.to(tl.float32) * cos + turned.to(tl.float32) * sin).to(q.dtype)


# ---- attention of one token --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["S", "n"])
def decode_kernel(
    q_ptr, turned_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, selected_ptr, opened_ptr, part_ptr, total_ptr,
    S, stride_k, stride_v, n, scale, softcap,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns one chunk that one head picked; `merge_kernel` joins what its chunks give."""
    place, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch = head // HEADS
    kv_head = batch * (HEADS // GROUP) + head % HEADS // GROUP
    columns, picks = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    selected = tl.load(selected_ptr + head * n + picks, mask=picks < n, other=-1)
    chunk = tl.load(selected_ptr + head * n + place)
    step = tl.sum((selected >= 0).to(tl.int32), 0) - 1 - place
    readable = tl.where(step == 0, tl.load(opened_ptr + batch).to(tl.int32), CHUNK)
    readable = tl.where(chunk >= 0, readable, 0)
    mask, angle = columns < D, tl.maximum(step, 0) * D + columns
    q = tl.load(q_ptr + head * D + columns, mask=mask, other=0.0).to(tl.float32)
    turned = tl.load(turned_ptr + head * D + columns, mask=mask, other=0.0).to(tl.float32)
    q = q * tl.load(cos_ptr + angle, mask=mask, other=0.0) + turned * tl.load(sin_ptr + angle, mask=mask, other=0.0)
    acc = tl.zeros([BLOCK_D], tl.float32)
    row_sum = tl.sum(acc, 0)
    row_max = row_sum - float("inf")
    for first in range(0, readable, BLOCK_S):
        inside = first + tl.arange(0, BLOCK_S)
        there = chunk * CHUNK + inside
        exists = (inside < readable) & (there < S)
        k = _load(k_ptr + kv_head * stride_k, there, columns, exists, D, UPCAST).to(tl.float32)
        scores = _cap(tl.sum(k * q[None, :], 1) * scale, softcap, SOFTCAP)
        scores = tl.where(exists, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        weights = tl.exp(scores - new_max)
        shrink = tl.exp(row_max - new_max)
        v = _load(v_ptr + kv_head * stride_v, there, columns, exists, D, UPCAST).to(tl.float32)
        acc = acc * shrink + tl.sum(v * weights[:, None], 0)
        row_max, row_sum = new_max, row_sum * shrink + tl.sum(weights, 0)
    tl.store(part_ptr + (head * n + place) * D + columns, acc / tl.where(row_sum > 0, row_sum, 1.0), mask=mask)
    tl.store(total_ptr + head * n + place, row_max + tl.log(row_sum))


@triton.jit(do_not_specialize=["n"])
def merge_kernel(
    part_ptr, parts_total_ptr, sinks_ptr, out_ptr, total_ptr, n,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program joins the parts of one head by their weights."""
    head = tl.program_id(0).to(tl.int64)
    columns, picks = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    totals = tl.load(parts_total_ptr + head * n + picks, mask=picks < n, other=float("-inf"))
    most = tl.max(totals, 0)
    if sinks_ptr is not None:
        most = tl.maximum(most, tl.load(sinks_ptr + head % HEADS).to(tl.float32))
    safe = tl.where(most == float("-inf"), 0.0, most)  # padding reads nothing
    weights = tl.exp(totals - safe)
    row_sum = tl.sum(weights, 0)
    if sinks_ptr is not None:
        row_sum += tl.exp(tl.load(sinks_ptr + head % HEADS).to(tl.float32) - safe)
    part = _load(part_ptr + head * n * D, picks, columns, picks < n, D, False)
    out = tl.sum(part * weights[:, None], 0) / tl.where(row_sum > 0, row_sum, 1.0)
    tl.store(out_ptr + head * D + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D)
    tl.store(total_ptr + head, safe + tl.log(row_sum))


# ---- launchers ---------------------------------------------------------------------------------------------


def _bits(x: Tensor) -> int:
    return 32 if x.dtype == torch.float32 else 16


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _heads_apart(x: Tensor) -> Tensor:
    """`[B, G, S, D]` whose tokens lie side by side and whose heads are all equally far apart."""
    _, groups, _, size = x.shape
    even = x.stride(0) == groups * x.stride(1) and x.stride()[2:] == (size, 1)
    return x if even else x.contiguous()


def _common(x: Tensor) -> dict[str, object]:
    bits = _bits(x)
    return dict(D=x.shape[-1], BLOCK_D=_block(x.shape[-1]), UPCAST=interpreted() and bits == 16)


def complete_chunks(
    chunk_keys: Tensor, q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor, chunk: int, scale: float
) -> None:
    tiles, (rows, heads, slots, _) = COMPLETE[_bits(q)], q.shape
    q, k, v = (x.contiguous() for x in (q, k, v))
    most = min(chunk_keys.shape[2], (slots - 1) // chunk)  # that a call can complete
    complete_kernel[most, rows * heads](
        chunk_keys, q, k, v, before, after, slots - 1, k.shape[2] - 1, v.shape[2] - 1, chunk_keys.shape[2], scale,
        CHUNK=chunk, HEADS=heads, GROUP=heads // k.shape[1], BLOCK_T=tiles.queries, BLOCK_S=_block(chunk),
        PRECISION=launch.precision(_bits(q)), num_warps=tiles.num_warps, num_stages=tiles.num_stages, **_common(q),
    )  # fmt: skip


def complete_bounds(bounds: Tensor, k: Tensor, before: Tensor, after: Tensor, chunk: int) -> None:
    k, (rows, groups, slots, size) = k.contiguous(), k.shape
    most = min(bounds.shape[2], (slots - 1) // chunk)  # that a call can complete
    bounds_kernel[most, rows * groups](
        bounds, k, before, after, slots - 1, bounds.shape[2], CHUNK=chunk, HEADS=groups, D=size, BLOCK_D=_block(size),
        BLOCK_S=min(_block(chunk), BOUNDS.keys), num_warps=BOUNDS.num_warps, num_stages=BOUNDS.num_stages,
    )  # fmt: skip


def chunk_attention(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, selected: Tensor, opened: Tensor,
    sinks: Tensor | None, chunk: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (rows, heads, length, size), n = q.shape, selected.shape[3]
    q, turned, cos, sin, selected, opened = (x.contiguous() for x in (q, turned, cos, sin, selected, opened))
    k, v = (_heads_apart(x) for x in (k, v))
    out = q.new_empty(rows, heads, length, size)
    total = q.new_empty(rows, heads, length, dtype=torch.float32)
    shared = dict(CHUNK=chunk, HEADS=heads, GROUP=heads // k.shape[1], BLOCK_N=_block(n), SOFTCAP=softcap is not None,
                  **_common(q))  # fmt: skip
    if length == 1:
        part = q.new_empty(rows, heads, n, size, dtype=torch.float32)
        parts_total = q.new_empty(rows, heads, n, dtype=torch.float32)
        decode_kernel[n, rows * heads](
            q, turned, k, v, cos, sin, selected, opened, part, parts_total,
            k.shape[2], k.stride(1), v.stride(1), n, scale, softcap or 0.0,
            BLOCK_S=min(_block(chunk), DECODE.keys), num_warps=DECODE.num_warps, num_stages=DECODE.num_stages, **shared,
        )  # fmt: skip
        names = ("HEADS", "D", "BLOCK_D", "BLOCK_N")
        merge_kernel[rows * heads,](part, parts_total, sinks, out, total, n, **{name: shared[name] for name in names})
        return out, total
    tiles = ATTEND[_bits(q)]
    union, sizes = unions(selected, -(-k.shape[2] // chunk), tiles.queries)
    attend_kernel[union.shape[2], rows * heads](
        q, turned, k, v, cos, sin, selected, opened, sinks, union, sizes, out, total,
        length, k.shape[2], k.stride(1), v.stride(1), union.shape[3], n, scale, softcap or 0.0,
        BLOCK_T=tiles.queries, BLOCK_S=min(_block(chunk), tiles.keys), PRECISION=launch.precision(_bits(q)),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **shared,
    )  # fmt: skip
    return out, total


def unions(selected: Tensor, stored: int, queries: int) -> tuple[Tensor, Tensor]:
    """For each tile of queries, the chunks that any of them picked `[B, H, tiles, stored]`, and how many there are."""
    rows, heads, length, n = selected.shape
    tiles = triton.cdiv(length, queries)
    padded = torch.nn.functional.pad(selected, (0, 0, 0, tiles * queries - length), value=-1)
    index = padded.view(rows, heads, tiles, queries * n).long()
    picked = torch.zeros(rows, heads, tiles, stored + 1, dtype=torch.bool, device=selected.device)
    picked = picked.scatter_(3, index.where((index >= 0) & (index < stored), stored), True)[..., :stored]
    return (~picked).byte().argsort(dim=-1, stable=True).int(), picked.sum(dim=-1, dtype=torch.int32)


# ---- what is compiled without a GPU ------------------------------------------------------------------------


def _static() -> Iterator[Compile]:
    floats = ("q", "turned", "k", "v", "out", "sinks", "keys")
    types = {f"{name}_ptr": "*T:16" for name in floats}
    types |= {f"{name}_ptr": "*fp32:16" for name in ("cos", "sin", "total", "part", "parts_total")}
    types |= {f"{name}_ptr": "*i64:16" for name in ("opened", "current", "before", "after")}
    types |= {f"{name}_ptr": "*i32:16" for name in ("selected", "union", "sizes")}
    types |= dict.fromkeys(("T", "S", "n", "stored", "chunks", "slots", "q_slots", "k_slots", "v_slots"), "i32")
    types |= dict.fromkeys(("stride_k", "stride_v"), "i32:16")
    types |= dict(scale="fp32", softcap="fp32")
    shared = dict(CHUNK=256, HEADS=32, GROUP=4, D=128, BLOCK_D=128, BLOCK_N=16, SOFTCAP=True, UPCAST=False)
    few = {"bf16": "mma", "fp32": "mma"}
    for label, kernel, table, products, more in (
        ("attend", attend_kernel, ATTEND, {"bf16": "own", "fp32": "mma"}, {}),
        ("chunk keys", complete_kernel, COMPLETE, few, {"BLOCK_S": 256}),
    ):
        for bits, tiles in table.items():
            if kernel is complete_kernel and bits == 32:  # larger ones are left to torch
                more = {"BLOCK_S": 256, "D": 64, "BLOCK_D": 64}
            given = {
                **shared,
                "PRECISION": launch.precision(bits),
                "BLOCK_T": tiles.queries,
                "BLOCK_S": tiles.keys,
                **more,
            }
            yield _entry(
                f"{label} D{given['D']}", kernel, types, given, tiles, products, "bf16" if bits == 16 else "fp32"
            )
    for dtype in ("bf16", "fp32"):
        yield _entry("decode D128", decode_kernel, types, {**shared, "BLOCK_S": DECODE.keys}, DECODE, "none", dtype)
        yield _entry("bounds D128", bounds_kernel, types, {**shared, "BLOCK_S": BOUNDS.keys}, BOUNDS, "none", dtype)
        yield _entry("merge D128", merge_kernel, types, shared, Tiles(1, 0, 4, 3), "none", dtype)


def _entry(
    label: str, kernel: object, types: dict[str, str], constants: Mapping[str, object], tiles: Tiles,
    products: str | Mapping[str, str], dtype: str,
) -> Compile:  # fmt: skip
    names = kernel.arg_names  # type: ignore[attr-defined]
    said = {name: types[name] for name in names if name in types}
    return Compile(label, kernel, said, {name: constants[name] for name in names if name in constants},
                   tiles.num_warps, tiles.num_stages, products, (dtype,))  # fmt: skip


STATIC = list(_static())
