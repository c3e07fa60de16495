"""A short causal convolution over tokens in Triton, and its gradients. Specification: conv.py.

A program owns a tile of tokens and channels. What it reads is the W - 1 tokens of the state and then those of the call,
counted as one; each tap reads that again, one token later, from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..static import Compile

BLOCK_T, BLOCK_C, NUM_WARPS = 32, 64, 4
PIECE = 512  # tokens whose part of the taps' gradient one program adds up


@triton.jit
def _read(x_ptr, state_ptr, rank_ptr, batch, at, columns, stride_xb, stride_xt, T, C, W: tl.constexpr):
    """Tokens `at` of the state and the call together, zeros for padding and beyond them."""
    own, inside = at - (W - 1), (columns < C)[None, :]
    real = (own >= 0) & (own < T)
    if rank_ptr is not None:
        real &= tl.load(rank_ptr + batch * T + own, mask=real, other=-1) >= 0
    found = tl.load(x_ptr + batch * stride_xb + own.to(tl.int64)[:, None] * stride_xt + columns[None, :],
                    mask=real[:, None] & inside, other=0.0).to(tl.float32)  # fmt: skip
    if state_ptr is not None:
        kept = (at >= 0) & (at < W - 1)
        found += tl.load(state_ptr + (batch * (W - 1) + at[:, None]) * C + columns[None, :],
                         mask=kept[:, None] & inside, other=0.0).to(tl.float32)  # fmt: skip
    return found


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, rank_ptr, out_ptr, new_state_ptr, stride_xb, stride_xt, T, C,
    W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_T
    rows, columns = start + tl.arange(0, BLOCK_T), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    out = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for tap in tl.static_range(W):
        weight = tl.load(weight_ptr + columns * W + tap, mask=inside, other=0.0).to(tl.float32)
        out += weight * _read(x_ptr, state_ptr, rank_ptr, batch, rows + tap, columns, stride_xb, stride_xt, T, C, W)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + (batch * T + rows.to(tl.int64)[:, None]) * C + columns[None, :],
             out.to(out_ptr.dtype.element_ty), mask=(rows < T)[:, None] & inside[None, :])  # fmt: skip
    if tl.program_id(1) == 0:
        last = tl.arange(0, BLOCK_W)
        kept = _read(x_ptr, state_ptr, rank_ptr, batch, T + last, columns, stride_xb, stride_xt, T, C, W)
        tl.store(new_state_ptr + (batch * (W - 1) + last[:, None]) * C + columns[None, :],
                 kept.to(new_state_ptr.dtype.element_ty), mask=(last < W - 1)[:, None] & inside[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def inputs_kernel(
    weight_ptr, rank_ptr, d_out_ptr, d_new_state_ptr, dx_ptr, d_state_ptr, stride_db, stride_dt, T, C,
    W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of what was read, token by token: the state's and the call's."""
    batch, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_T
    at, columns = start + tl.arange(0, BLOCK_T), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    found = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for tap in tl.static_range(W):
        weight = tl.load(weight_ptr + columns * W + tap, mask=inside, other=0.0).to(tl.float32)
        rows = at - tap
        read = (rows >= 0) & (rows < T)
        found += weight * tl.load(
            d_out_ptr + batch * stride_db + rows.to(tl.int64)[:, None] * stride_dt + columns[None, :],
            mask=read[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
    kept = (at >= T) & (at < T + W - 1)
    found += tl.load(d_new_state_ptr + (batch * (W - 1) + (at - T)[:, None]) * C + columns[None, :],
                     mask=kept[:, None] & inside[None, :], other=0.0).to(tl.float32)  # fmt: skip
    own = at - (W - 1)
    there = (own >= 0) & (own < T)
    if rank_ptr is not None:
        found = tl.where((tl.load(rank_ptr + batch * T + own, mask=there, other=-1) >= 0)[:, None] | (own < 0)[:, None],
                         found, 0.0)  # fmt: skip
    tl.store(dx_ptr + (batch * T + own.to(tl.int64)[:, None]) * C + columns[None, :], found.to(dx_ptr.dtype.element_ty),
             mask=there[:, None] & inside[None, :])  # fmt: skip
    if d_state_ptr is not None:
        tl.store(d_state_ptr + (batch * (W - 1) + at[:, None]) * C + columns[None, :],
                 found.to(d_state_ptr.dtype.element_ty), mask=(at < W - 1)[:, None] & inside[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def taps_kernel(
    x_ptr, state_ptr, rank_ptr, d_out_ptr, part_ptr, stride_xb, stride_xt, stride_db, stride_dt, T, C,
    W: tl.constexpr, BLOCK_W: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of the taps and, in the row after them, of the bias: the sum over a piece of the tokens of a row."""
    batch, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns, taps = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_W)
    inside = columns < C
    sums = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for start in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, T), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        d_out = tl.load(d_out_ptr + batch * stride_db + rows.to(tl.int64)[:, None] * stride_dt + columns[None, :],
                        mask=(rows < T)[:, None] & inside[None, :], other=0.0).to(tl.float32)  # fmt: skip
        for tap in tl.static_range(W):
            read = _read(x_ptr, state_ptr, rank_ptr, batch, rows + tap, columns, stride_xb, stride_xt, T, C, W)
            sums += tl.where((taps == tap)[:, None], tl.sum(read * d_out, 0)[None, :], 0.0)
        sums += tl.where((taps == W)[:, None], tl.sum(d_out, 0)[None, :], 0.0)
    row = (batch * tl.num_programs(1) + piece) * (W + 1) + taps
    tl.store(part_ptr + row[:, None] * C + columns[None, :], sums, mask=(taps <= W)[:, None] & inside[None, :])


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, rank: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, weight, bias, state, rank = _ready(x, weight, bias, state, rank)
    (batch, length, channels), taps = x.shape, weight.shape[1]
    out, new_state = x.new_empty(x.shape), x.new_empty(batch, taps - 1, channels)
    forward_kernel[(batch, triton.cdiv(length, BLOCK_T), triton.cdiv(channels, BLOCK_C))](
        x, weight, bias, state, rank, out, new_state, *x.stride()[:2], length, channels, W=taps,
        BLOCK_W=triton.next_power_of_2(taps), BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out, new_state


def gradients(
    d_out: Tensor, d_new_state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None,
    rank: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Of x, weight, and bias and state if they are given."""
    raw = weight, bias, state
    x, weight, bias, state, rank = _ready(x, weight, bias, state, rank)
    d_out, d_new_state = d_out if d_out.stride(-1) == 1 else d_out.contiguous(), d_new_state.contiguous()
    (batch, length, channels), taps = x.shape, weight.shape[1]
    dx, d_state = x.new_empty(x.shape), None if state is None else torch.empty_like(state)
    blocks = triton.cdiv(channels, BLOCK_C)
    inputs_kernel[(batch, triton.cdiv(length + taps - 1, BLOCK_T), blocks)](
        weight, rank, d_out, d_new_state, dx, d_state, *d_out.stride()[:2], length, channels, W=taps, BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    pieces = triton.cdiv(length, PIECE)
    parts = x.new_empty(batch * pieces, taps + 1, channels, dtype=torch.float32)
    taps_kernel[(batch, pieces, blocks)](
        x, state, rank, d_out, parts, *x.stride()[:2], *d_out.stride()[:2], length, channels, W=taps,
        BLOCK_W=triton.next_power_of_2(taps + 1), PIECE=PIECE, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    sums = parts.sum(0)
    found = [dx, sums[:taps].mT, None if bias is None else sums[taps], d_state]
    return [dx, *(x.to(like.dtype).contiguous() for x, like in zip(found[1:], raw, strict=True)
                  if x is not None and like is not None)]  # fmt: skip


def _ready(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, rank: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    rank = None if rank is None else rank.to(torch.int32).expand(x.shape[:2]).contiguous()
    state = None if state is None else state.to(x.dtype).contiguous()
    return x, weight.contiguous(), None if bias is None else bias.contiguous(), state, rank


# ---- what the static check compiles ------------------------------------------------------------------------


def _static() -> Iterator[Compile]:
    same = ("x", "weight", "bias", "state", "out", "new_state", "d_out", "d_new_state", "dx", "d_state")
    types = {f"{name}_ptr": "*T:16" for name in same} | {"part_ptr": "*fp32:16", "rank_ptr": "*i32:16"}
    types |= {f"stride_{name}": "i32:16" for name in ("xb", "xt", "db", "dt")} | {"T": "i32", "C": "i32:16"}
    for label, kernel, rows in (("forward", forward_kernel, 4), ("dx", inputs_kernel, 4), ("taps", taps_kernel, 8)):
        numbers = dict(W=4, BLOCK_W=rows, PIECE=PIECE, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C)
        names = kernel.arg_names
        yield Compile(
            f"convolution {label} {BLOCK_T}x{BLOCK_C}", kernel, {name: types[name] for name in names if name in types},
            {name: numbers[name] for name in names if name in numbers}, NUM_WARPS, 3, "none", ("bf16", "fp32"),
        )  # fmt: skip


STATIC = list(_static())
