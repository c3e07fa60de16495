"""The primitive as torch operators: loops that depend on the lists cannot be traced, so each is one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import use_triton
from .reference import block_maxima_reference, block_sparse_backward_reference, block_sparse_reference

BLOCKS = (16, 32, 64, 128)  # sizes that the kernels have


@torch.library.custom_op("patchattn::block_lists", mutates_args=())
def lists(mask: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Counts `[..., N]` and indices `[..., N, places]` of what is True in `mask` `[..., N, M]`."""
    if use_triton("block_lists", mask):
        from . import kernels

        with torch.cuda.device_of(mask):  # Triton launches on the current device, which need not be the tensors'
            return kernels.lists(mask, places)
    place = mask.cumsum(dim=-1) - 1
    place = place.where(mask & (place < places), places)  # one more place, for what is not listed
    number = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    indices = torch.zeros(*mask.shape[:-1], places + 1, dtype=torch.int32, device=mask.device)
    indices = indices.scatter_(-1, place, number.expand(mask.shape))[..., :places].contiguous()
    return mask.sum(dim=-1, dtype=torch.int32).clamp(max=places), indices


@lists.register_fake
def _(mask: Tensor, places: int) -> tuple[Tensor, Tensor]:
    counts = mask.new_empty(mask.shape[:-1], dtype=torch.int32)
    return counts, counts.new_empty(*mask.shape[:-1], places)


def mask(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """`[..., N, blocks]`, True where a list names a block."""
    named = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    place = indices.long().where(named & (indices < blocks), blocks)
    found = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, place, True)[..., :blocks]


@torch.library.custom_op("patchattn::block_sparse", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    sinks: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each row's sum of weights `[B, H, T]`; +inf where nothing was read."""
    block = (block_q, block_k)
    if use_triton("block_sparse", q, k, v, unsupported=_unsupported(q, k, v, block)):
        from . import kernels

        with torch.cuda.device_of(q):
            return kernels.forward(q, k, v, counts, indices, starts, ends, sinks, block, causal, scale, softcap)
    out, lse = block_sparse_reference(q, k, v, counts, indices, starts, ends, sinks, block, causal, scale, softcap)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)  # as models go on with it
    return out, q.new_empty(batch, heads, queries, dtype=_wide(q))


@torch.library.custom_op("patchattn::block_sparse_gradients", mutates_args=())
def gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and `sum(out * d_out)` of each row."""
    block = (block_q, block_k)
    if use_triton("block_sparse_gradients", q, k, v, unsupported=_unsupported(q, k, v, block, gradient=True)):
        from . import kernels

        with torch.cuda.device_of(q):
            turned_counts, turned = lists(mask(counts, indices, -(-k.shape[2] // block_k)).mT, counts.shape[2])
            return kernels.gradients(
                d_out,
                q,
                k,
                v,
                counts,
                indices,
                turned_counts,
                turned,
                starts,
                ends,
                out,
                lse,
                block,
                causal,
                scale,
                softcap,
            )
    return block_sparse_backward_reference(
        d_out, q, k, v, counts, indices, starts, ends, out, lse, block, causal, scale, softcap
    )


@gradients.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=_wide(q))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, counts, indices, starts, ends, sinks, *settings = inputs
    ctx.save_for_backward(q, k, v, counts, indices, starts, ends, *output, sinks)
    ctx.settings = settings
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lse, sinks = ctx.saved_tensors
    dq, dk, dv, delta = gradients(d_out, *tensors, lse, *ctx.settings)
    d_sinks = None
    if sinks is not None and ctx.needs_input_grad[7]:
        weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()
        d_sinks = -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return dq, dk, dv, None, None, None, None, d_sinks, *(None,) * 5


forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("patchattn::block_maxima", mutates_args=())
def maxima(
    q: Tensor,
    k: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    sinks: Tensor | None,
    block_q: int,
    block_k: int,
    rows: int,
    causal: bool,
    shared: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`[B, H or G, N, M]`."""
    block = (block_q, block_k)
    if use_triton("block_maxima", q, k, unsupported=_unsupported(q, k, None, block, maxima=True)):
        from . import kernels

        with torch.cuda.device_of(q):
            return kernels.maxima(q, k, starts, ends, sinks, block, rows, causal, shared, scale, softcap)
    return block_maxima_reference(q, k, starts, ends, sinks, block, rows, causal, shared, scale, softcap)


@maxima.register_fake
def _(
    q: Tensor, k: Tensor, starts: Any, ends: Any, sinks: Any, block_q: int, block_k: int, rows: int, causal: bool,
    shared: bool, *others: Any,
) -> Tensor:  # fmt: skip
    heads = k.shape[1] if shared else q.shape[1]
    return q.new_empty(q.shape[0], heads, rows, -(-k.shape[2] // block_k), dtype=_wide(q))


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _unsupported(
    q: Tensor, k: Tensor, v: Tensor | None, block: tuple[int, int], *, gradient: bool = False, maxima: bool = False
) -> str | None:
    """What a call asks for that the kernels do not have."""
    size, narrow = q.shape[-1], q.element_size() == 2
    if block[0] not in (1, *BLOCKS) or block[1] not in BLOCKS:
        return f"blocks of {block[0]} queries and {block[1]} keys"
    if maxima and not narrow and block[0] > 16:
        return f"maxima of blocks of {block[0]} queries in float32"
    if size > (256 if narrow and not (gradient or maxima) else 128):
        return f"{'gradient for ' if gradient else ''}heads of size {size} in {str(q.dtype).removeprefix('torch.')}"
    if v is not None and v.shape[-1] != size:
        return "values of another size than the keys"
    return None
