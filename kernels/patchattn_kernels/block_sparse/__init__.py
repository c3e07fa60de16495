"""Attention to blocks of keys that each block of queries lists: any mask of blocks, and a skipped block costs nothing.

Tokens are counted from the first real token of their row: block 0 begins there, whatever padding comes before it. The
queries of a call are the last tokens of their rows. Row 0 of the lists belongs to the block that the call's first real
query is in, which need not be the first of that block; a whole prompt begins with block 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

__all__ = ["BlockLists", "block_maxima", "block_sparse", "block_sparse_decode", "list_rows"]


class BlockLists(NamedTuple):
    """Which blocks of keys each block of queries reads.

    Attributes:
        counts: `[B or 1, H or G or 1, N]`, how many blocks a list names; int32. A list for each query head, one for
            each KV head, which its query heads share, or one for all heads.
        indices: `[B or 1, H or G or 1, N, places]`, the numbers of the blocks, ascending; int32. What stands behind
            the count of a list is not read.
    """

    counts: Tensor
    indices: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, most: int | None = None) -> BlockLists:
        """Lists of the blocks that are True in `mask` `[B or 1, H or G or 1, N, M]`.

        Args:
            most: a list has so many places, fewer than M, where no row of the mask keeps more; of a row that does,
                the first ones are listed.
        """
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise ValueError(f"BlockLists: the mask is {list(mask.shape)} of {mask.dtype}; it must be "
                             "[B or 1, H or G or 1, query blocks, key blocks] of torch.bool")  # fmt: skip
        places = mask.shape[3] if most is None else min(most, mask.shape[3])
        return cls(*ops.lists(mask, places))

    def mask(self, blocks: int) -> Tensor:
        """The mask of `blocks` key blocks that they were made from: `[B or 1, H or G or 1, N, blocks]`."""
        return ops.mask(self.counts, self.indices, blocks)


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    block: int | tuple[int, int],
    causal: bool = True,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each query over the keys of the blocks that its block lists.

    Args:
        q: `[B, H, T, D]`, the last T tokens of their rows.
        k, v: `[B, G, S, D]`, with H a multiple of G.
        lists: of `list_rows(T, S, block)` blocks of queries, or more.
        block: how many tokens a block has; (of queries, of keys) where that differs. Any numbers do; the Triton kernel
            takes 16, 32, 64 and 128.
        causal: of a listed block, a query reads the keys up to its own place; a later block gives it nothing.
        starts: `[B]`, the first real token of each row; None: no padding. What comes before it gives zeros.
        ends: `[B]`, one past the last token of each row, among the S keys; None: S. What a static cache has not yet
            filled lies beyond.
        scale: on the scores; None is `D ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, one extra logit a head that takes weight and gives no value.

    Returns `[B, H, T, D]`, zeros for a query that reads nothing. Gradients flow to q, k, v and sinks.
    """
    sizes = _block("block_sparse", block)
    _check("block_sparse", q, k, v, lists, sizes, starts is not None, ends is not None)
    return ops.forward(q, k, v, *lists, starts, ends, sinks, *sizes, causal, _scale(q, scale), softcap)[0]


def block_sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    block: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query a row over a cache, or a few, each with a list of its own: `lists` has T rows.

    That is `block_sparse` with blocks of one query, causal; the kernel divides each list among many programs. The
    arguments are the same.
    """
    _check("block_sparse_decode", q, k, v, lists, _block("block_sparse_decode", (1, block)), True, True)
    return ops.forward(q, k, v, *lists, starts, ends, sinks, 1, block, True, _scale(q, scale), softcap)[0]


@torch.no_grad()
def block_maxima(
    q: Tensor,
    k: Tensor,
    *,
    block: int | tuple[int, int],
    causal: bool = True,
    shared: bool = False,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The largest softmax weight in each block of queries and keys: what a gate is taught to foresee.

    Args:
        block: as in `block_sparse`; (1, keys) gives each query a row of its own.
        shared: a map for each KV head, with the largest weight of its query heads.

    The other arguments are those of `block_sparse`. Returns `[B, H or G, N, M]` in float32, with N as `list_rows` says
    and zeros where nothing can be read. The weights themselves are never held.
    """
    sizes = _block("block_maxima", block)
    _check_heads("block_maxima", q, k)
    rows = list_rows(q.shape[2], k.shape[2], sizes[0], moved=starts is not None, cut=ends is not None)
    return ops.maxima(q, k, starts, ends, sinks, *sizes, rows, causal, shared, _scale(q, scale), softcap)


def list_rows(queries: int, keys: int, block: int, *, moved: bool = False, cut: bool = False) -> int:
    """How many blocks of queries a call touches at most: the rows that its lists have.

    Args:
        block: tokens in a block of queries.
        moved, cut: whether the call gives `starts`, `ends`; where its first query stands is then not known.
    """
    if queries == keys and not cut:
        return -(-queries // block)
    if moved or cut:
        return (queries + block - 2) // block + 1
    return (keys - 1) // block - (keys - queries) // block + 1


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _block(name: str, block: int | tuple[int, int]) -> tuple[int, int]:
    sizes = (block, block) if isinstance(block, int) else (block[0], block[1])
    if min(sizes) < 1:
        raise ValueError(f"{name}: block is {block}; blocks have at least 1 token")
    return sizes


def _check_heads(name: str, q: Tensor, k: Tensor) -> None:
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{name}: q has {q.shape[1]} heads; that must be a multiple of the {k.shape[1]} KV heads")


def _check(
    name: str, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, block: tuple[int, int], moved: bool, cut: bool
) -> None:
    _check_heads(name, q, k)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{name}: k is {list(k.shape)} and v {list(v.shape)}; they must have the same heads and tokens"
        )
    counts, indices = lists
    if counts.shape != indices.shape[:3]:
        raise ValueError(f"{name}: the lists have counts {list(counts.shape)} and indices {list(indices.shape)}; the "
                         "indices need the shape of the counts and one more dimension")  # fmt: skip
    heads = sorted({1, k.shape[1], q.shape[1]})
    if counts.shape[0] not in (1, q.shape[0]) or counts.shape[1] not in heads:
        raise ValueError(f"{name}: there are lists for {counts.shape[0]} rows and {counts.shape[1]} heads; q and k "
                         f"need them for {' or '.join(map(str, sorted({1, q.shape[0]})))} rows and "
                         f"{' or '.join(map(str, heads))} heads")  # fmt: skip
    rows = list_rows(q.shape[2], k.shape[2], block[0], moved=moved, cut=cut)
    if counts.shape[2] < rows:
        raise ValueError(f"{name}: there are lists for {counts.shape[2]} blocks of queries; {q.shape[2]} queries of "
                         f"{k.shape[2]} keys in blocks of {block[0]} may touch {rows} (see list_rows)")  # fmt: skip
