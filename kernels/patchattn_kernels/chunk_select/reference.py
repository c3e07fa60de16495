"""Attention to chunks of keys that each token and head picks for itself, in torch: the specification.

Keys are cut into chunks of `chunk` tokens and rotated (RoPE) by their place inside their chunk. Each complete chunk
has one key that stands for it. A token scores those, picks some chunks, lays them side by side in their order, and
attends to them as if they were its whole past. No key is rotated again for that: scores depend on differences of
positions only, so it is the query that turns on, by whole chunks, once for each chunk it reads.

Nothing here holds `[B, H, T, S]`, nor the scores `[B, H, T, chunks]` of more than a block of queries.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_ELEMENTS = 1 << 23  # of the largest temporary tensor: scores, probabilities, turned queries
PAIRS = 64  # queries that read one chunk, in one tile
TILE_ELEMENTS = 1 << 18  # of the turned queries and the scores of the tiles that are done at once


def complete_chunks_reference(
    chunk_keys: Tensor, q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor, chunk: int, scale: float
) -> None:
    heads = q.shape[1]
    for row, (first, last) in enumerate(zip((before // chunk).tolist(), (after // chunk).tolist(), strict=True)):
        size = max(1, BLOCK_ELEMENTS // (heads * chunk * chunk))
        for start in range(first, last, size):
            chunks = torch.arange(start, min(start + size, last), device=q.device)
            some_q, some_k, some_v = (_from_ring(x[row], chunks, chunk) for x in (q, k, v))
            found = represent(some_q, some_k, some_v, scale)
            chunk_keys[row, :, start : start + len(chunks)] = found.to(chunk_keys.dtype)


def complete_bounds_reference(bounds: Tensor, k: Tensor, before: Tensor, after: Tensor, chunk: int) -> None:
    for row, (first, last) in enumerate(zip((before // chunk).tolist(), (after // chunk).tolist(), strict=True)):
        keys = _from_ring(k[row], torch.arange(first, last, device=k.device), chunk)
        bounds[row, :, first:last] = torch.cat([keys.amax(dim=-2), keys.amin(dim=-2)], dim=-1)


def _from_ring(x: Tensor, chunks: Tensor, chunk: int) -> Tensor:
    """These chunks out of `[heads, slots + 1, D]`, where token r has slot r % slots: `[heads, chunks, chunk, D]`."""
    slots = (x.shape[1] - 1) // chunk
    return x[:, :-1].unflatten(1, (slots, chunk)).index_select(1, chunks % slots)


def represent(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One key for each chunk: `q` `[H, N, chunk, D]` and `k`, `v` `[G, N, chunk, D]` to `[H, N, D]`, float32.

    Inside the chunk every token attends to every other; the mean of the results is the query that gathers the
    chunk's keys into one.
    """
    group = q.shape[0] // k.shape[0]
    q, k, v = q.float(), k.float().repeat_interleave(group, dim=0), v.float().repeat_interleave(group, dim=0)
    weights = (q @ k.mT * scale).softmax(dim=-1).mean(dim=-2, keepdim=True)  # [H, N, 1, chunk]
    query = weights @ v
    return ((query @ k.mT * scale).softmax(dim=-1) @ k).squeeze(-2)


def select_chunks_reference(q: Tensor, chunk_keys: Tensor, current: Tensor, chunks: int, dense: int) -> Tensor:
    count, width = chunk_keys.shape[2] + 2, max(chunks, dense)  # the last two chunks may have no key yet
    size = max(1, BLOCK_ELEMENTS // (q.shape[0] * q.shape[1] * count))
    index, shared = torch.arange(count, device=q.device), chunk_keys.float().mT
    none = torch.iinfo(torch.int32).max
    blocks = []
    for some, here in zip(q.split(size, dim=2), current[:, None, :, None].split(size, dim=2), strict=True):
        grouped = some.float().unflatten(1, (shared.shape[1], -1)).flatten(2, 3)
        scores = functional.pad(grouped @ shared, (0, 2)).view(*some.shape[:3], count)
        scores = scores.masked_fill((index < 1) | (index > here - 2), float("inf"))  # the first and the last two
        best, found = scores.masked_fill(index > here, float("-inf")).topk(min(width, count), dim=-1)
        allowed = torch.where(here < dense, width, chunks)
        read = (best > float("-inf")) & (index[: best.shape[3]] < allowed)
        chosen = found.int().where(read, none).sort(dim=-1).values
        blocks.append(functional.pad(chosen.where(chosen < none, -1), (0, width - chosen.shape[3]), value=-1))
    return torch.cat(blocks, dim=2)


def chunk_attention_reference(
    q: Tensor,
    turned: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    selected: Tensor,
    opened: Tensor,
    sinks: Tensor | None,
    chunk: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The output `[B, H, T, D]`, and the logarithm of the sum of each query's weights, `[B, H, T]` in float32."""
    run = _one_token if q.shape[2] == 1 else _by_chunk
    parts = [
        run(some_q, some_turned, k, v, cos, sin, chosen, readable, sinks, chunk, scale, softcap)
        for some_q, some_turned, chosen, readable in _blocks(selected, opened, q, turned)
    ]
    out, total = (torch.cat(same, dim=2) for same in zip(*parts, strict=True))
    return out.to(q.dtype), total


def _blocks(selected: Tensor, opened: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of queries so small that a tensor of every pair of query and chunk fits; `[B, H, T, ...]`, `[B, T]`."""
    rows, heads, _, count = selected.shape
    size = max(1, BLOCK_ELEMENTS // (rows * heads * count * others[0].shape[3]))
    return zip(*(x.split(size, dim=2) for x in (*others, selected)), opened.split(size, dim=1), strict=True)


def _steps(selected: Tensor) -> Tensor:
    """How many chunks each chosen chunk lies before the query's own: `[..., n]`, negative where there is none."""
    return (selected >= 0).sum(dim=-1, keepdim=True) - torch.arange(1, selected.shape[-1] + 1, device=selected.device)


def _readable(selected: Tensor, steps: Tensor, opened: Tensor, chunk: int) -> Tensor:
    """How many keys of each chosen chunk are read: `[B, H, T, n]`."""
    return opened[:, None, :, None].where(steps == 0, chunk).where(selected >= 0, 0)


class _Tiles:
    """Every pair of a query and a chunk that it reads, those of one chunk together, cut into tiles of `PAIRS`.

    The room left in the last tile of a chunk is filled with its last pair, which reads nothing there.

    Attributes:
        chunk: `[tiles]` each, the row, the KV head and the chunk that a tile reads.
        index: `[tiles, PAIRS]`, where each pair stood in `selected`; one past its end where there is no pair.
        query, step, readable: `[tiles, PAIRS]`, which query it is; see `_steps` and `_readable`.
        slices: of the tiles that are done at once.
    """

    def __init__(self, selected: Tensor, opened: Tensor, groups: int, length: int, chunk: int, features: int) -> None:
        rows, heads, _, count = selected.shape
        steps, stored, device = _steps(selected), -(-length // chunk), selected.device
        readable = _readable(selected, steps, opened, chunk)
        row, head = (torch.arange(n, device=device) for n in (rows, heads))
        owner = row[:, None] * groups + head // (heads // groups)  # [B, H], which keys a head reads
        place = owner[:, :, None, None] * stored + selected
        nowhere = rows * groups * stored
        place = place.where((readable > 0) & (selected < stored), nowhere).flatten()
        pairs = place.bincount(minlength=nowhere + 1)[:nowhere]  # of each chunk
        tiles = (pairs + PAIRS - 1) // PAIRS
        of = torch.arange(nowhere, device=device).repeat_interleave(tiles)  # [tiles], the chunk of each
        first = (torch.arange(len(of), device=device) - (tiles.cumsum(0) - tiles)[of]) * PAIRS
        left = (pairs[of] - first)[:, None]
        lane = torch.arange(PAIRS, device=device)
        self.index = place.argsort(stable=True)[
            (pairs.cumsum(0) - pairs)[of, None] + first[:, None] + lane.minimum(left - 1)
        ]
        self.query = self.index // count
        self.step, self.readable = (x.flatten()[self.index] for x in (steps, readable))
        self.index, self.readable = self.index.where(lane < left, selected.numel()), self.readable.where(lane < left, 0)
        self.chunk = of // stored // groups, of // stored % groups, of % stored
        size = max(1, TILE_ELEMENTS // (PAIRS * max(chunk, features)))
        self.slices = [slice(start, start + size) for start in range(0, len(of), size)]

    def chunks(self, x: Tensor, some: slice) -> Tensor:
        """What some tiles read of `[B, G, chunks, chunk, D]`: `[tiles, chunk, D]`, float32."""
        row, group, chunk = self.chunk
        return x[row[some], group[some], chunk[some]].float()

    def hidden(self, some: slice, keys: int) -> Tensor:
        """Which of the keys of its chunk each pair does not read: `[tiles, PAIRS, keys]`."""
        return torch.arange(keys, device=self.readable.device) >= self.readable[some, :, None]


def _by_chunk(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, selected: Tensor, opened: Tensor,
    sinks: Tensor | None, chunk: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each chunk with all the queries that picked it; then each query joins its parts by their weights."""
    tiles = _Tiles(selected, opened, k.shape[1], k.shape[2], chunk, k.shape[3])
    k, v = (_chunks(x, chunk) for x in (k, v))
    q, turned = (x.reshape(-1, x.shape[3]) for x in (q, turned))
    part = torch.zeros(selected.numel() + 1, v.shape[4], device=q.device)
    weight = torch.full((selected.numel() + 1,), float("-inf"), device=q.device)
    for some in tiles.slices:
        scores = _capped(_turn(q, turned, cos, sin, tiles, some) @ tiles.chunks(k, some).mT * scale, softcap)
        scores = scores.masked_fill(tiles.hidden(some, chunk), float("-inf"))
        total = scores.logsumexp(dim=-1)
        weight[tiles.index[some]] = total
        part[tiles.index[some]] = (scores - total[..., None]).exp() @ tiles.chunks(v, some)
    part, weight = part[:-1], weight[:-1].view(selected.shape)
    everything = weight if sinks is None else torch.cat([weight, _logits(sinks, weight)], dim=-1)
    total = everything.logsumexp(dim=-1)
    share = (weight - total.masked_fill(total == float("-inf"), 0.0)[..., None]).exp()  # padding reads nothing
    return (share.unsqueeze(-2) @ part.view(*selected.shape, -1)).squeeze(-2), total


def _turn(q: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, tiles: _Tiles, some: slice) -> Tensor:
    """The queries of some tiles, each turned on to its distance from the chunk: `[tiles, PAIRS, D]`, float32."""
    query, step = tiles.query[some].flatten(), tiles.step[some].flatten()
    q, turned, cos, sin = q.index_select(0, query), turned.index_select(0, query), cos[step], sin[step]
    return torch.addcmul(q * cos, turned, sin).unflatten(0, (-1, PAIRS))


def _logits(sinks: Tensor, weight: Tensor) -> Tensor:
    return sinks.float()[:, None, None].expand(*weight.shape[:3], 1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _one_token(
    q: Tensor, turned: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, selected: Tensor, opened: Tensor,
    sinks: Tensor | None, chunk: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same for one query a row. In float32 its chunks are read where they lie, without a copy."""
    (rows, heads, _, size), (groups, length) = q.shape, k.shape[1:3]
    chosen = selected[:, :, 0]
    step = _steps(chosen)
    readable = step[..., :1] * chunk + opened[:, :, None]  # [B, H, 1], of the chosen chunks side by side
    step = step.clamp(min=0)
    q = q.float() * cos[step] + turned.float() * sin[step]  # [B, H, n, D]
    tokens = chosen.long()[..., None] * chunk + torch.arange(chunk, device=q.device)
    tokens = tokens.clamp(min=0, max=length - 1).flatten(2)  # [B, H, n * chunk]
    row, head = (torch.arange(count, device=q.device) for count in (rows, heads))
    owner = row[:, None], head // (heads // groups)
    scores = _products(q.view(-1, size), *_listed(k, tokens, owner), chunk).view(rows, heads, -1)
    scores = _capped(scores * scale, softcap)
    scores = scores.masked_fill(torch.arange(scores.shape[2], device=q.device) >= readable, float("-inf"))
    everything = scores if sinks is None else torch.cat([scores, sinks.float()[:, None].expand(rows, -1, 1)], dim=-1)
    total = everything.logsumexp(dim=-1, keepdim=True)
    weights = (scores - total.clamp(min=torch.finfo(torch.float).min)).exp()  # padding reads nothing
    out = _weighted(weights.flatten(0, 1), *_listed(v, tokens, owner))
    return out.view(rows, heads, 1, -1), total


def _listed(x: Tensor, tokens: Tensor, owner: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`[B, G, S, D]` as one list of tokens `[any, D]`, and where in it the tokens `[B, H, n]` of some heads are."""
    rows, groups, length, size = x.shape
    if x.stride()[2:] != (size, 1) or x.stride(0) % size or x.stride(1) % size:
        x = x.contiguous()
    apart = x.stride(0) // size, x.stride(1) // size  # rows and heads, in tokens
    count = (rows - 1) * apart[0] + (groups - 1) * apart[1] + length
    first = owner[0] * apart[0] + owner[1] * apart[1]
    return x.as_strided((count, size), (size, 1)), (tokens + first[..., None]).flatten(0, 1)


def _products(q: Tensor, k: Tensor, tokens: Tensor, chunk: int) -> Tensor:
    """Of each query `[N, D]` with a chunk of keys of its own: `[N * chunk]`."""
    if k.dtype != torch.float:
        queries = q.view(len(tokens), -1, 1, q.shape[1])
        copies = (copy.unflatten(0, (-1, chunk)).mT for copy in _copies(k, tokens))
        return torch.stack([some @ keys for some, keys in zip(queries, copies, strict=True)])
    _beta()
    ends = torch.arange(0, tokens.numel() + 1, chunk, device=k.device)
    asked = torch.sparse_csr_tensor(ends, tokens.flatten(), q.new_zeros(tokens.numel()), (len(q), len(k)),
                                    check_invariants=False)  # fmt: skip
    return torch.sparse.sampled_addmm(asked, q, k.T, beta=0.0).values()


def _weighted(weights: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """The sum of some tokens of `v`, by weight: twice `[heads, n]` to `[heads, D]`."""
    if v.dtype != torch.float:
        return torch.stack([some @ values for some, values in zip(weights, _copies(v, tokens), strict=True)])
    return functional.embedding_bag(tokens, v, mode="sum", per_sample_weights=weights)


def _copies(x: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """The tokens of one head after the other, in float32; all in one place, which stays in the processor's cache."""
    narrow = x.new_empty(tokens.shape[1], x.shape[1])
    wide = torch.empty_like(narrow, dtype=torch.float)
    for some in tokens:
        yield wide.copy_(torch.index_select(x, 0, some, out=narrow))


@functools.cache
def _beta() -> None:
    """Let torch say unheard what it says once in a process: that its sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, G, S, D]` as `[B, G, chunks, chunk, D]`; a view where S is a multiple of chunk."""
    count = -(-x.shape[2] // chunk)
    if count * chunk > x.shape[2]:
        x = functional.pad(x, (0, 0, 0, count * chunk - x.shape[2]))
    return x.unflatten(2, (count, chunk))


def chunk_attention_backward_reference(
    grad: Tensor,
    q: Tensor,
    turned: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    selected: Tensor,
    opened: Tensor,
    out: Tensor,
    total: Tensor,
    sinks: Tensor | None,
    chunk: int,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of q, turned, k, v, and of sinks if there are any; the choice of chunks has none."""
    found: list[tuple[Tensor, Tensor]] = []
    length, (k, v) = k.shape[2], (_chunks(x, chunk) for x in (k, v))
    grad_k, grad_v = (torch.zeros(x.shape, device=x.device) for x in (k, v))
    for part in _blocks(selected, opened, q, turned, grad, out, total[..., None]):
        some_q, some_turned, upstream, mine, sums, chosen, readable = part
        tiles = _Tiles(chosen, readable, k.shape[1], length, chunk, k.shape[4])
        upstream = upstream.float()
        shift = (upstream * mine.float()).sum(dim=-1).reshape(-1, 1)
        sums, upstream = sums.reshape(-1, 1), upstream.reshape(-1, v.shape[4])
        straight, quarter = (torch.zeros(some_q.shape, device=q.device) for _ in "qt")
        flat_q, flat_turned, flat_straight, flat_quarter = (
            x.reshape(-1, q.shape[3]) for x in (some_q, some_turned, straight, quarter)
        )
        for some in tiles.slices:
            query, step = tiles.query[some], tiles.step[some]
            queries = _turn(flat_q, flat_turned, cos, sin, tiles, some)
            keys, values = tiles.chunks(k, some), tiles.chunks(v, some)
            scores = _capped(queries @ keys.mT * scale, softcap)
            weights = (scores - sums[query]).exp().masked_fill(tiles.hidden(some, chunk), 0.0)
            change = weights * (upstream[query] @ values.mT - shift[query]) * scale
            if softcap is not None:
                change = change * (1 - (scores / softcap).square())
            turn = change @ keys
            flat_straight.index_add_(0, query.flatten(), (turn * cos[step]).flatten(0, 1))
            flat_quarter.index_add_(0, query.flatten(), (turn * sin[step]).flatten(0, 1))
            where = tuple(x[some] for x in tiles.chunk)
            grad_k.index_put_(where, change.mT @ queries, accumulate=True)
            grad_v.index_put_(where, weights.mT @ upstream[query], accumulate=True)
        found.append((straight, quarter))
    grad_q, grad_turned = (torch.cat(same, dim=2).to(q.dtype) for same in zip(*found, strict=True))
    grad_k, grad_v = (x.flatten(2, 3)[:, :, :length] for x in (grad_k, grad_v))
    gradients = [grad_q, grad_turned, grad_k.to(k.dtype), grad_v.to(v.dtype)]
    if sinks is not None:
        taken = (_logits(sinks, total[..., None])[..., 0] - total).exp()  # the weight of the sink
        gradients.append(-(taken * (grad.float() * out.float()).sum(dim=-1)).sum(dim=(0, 2)).to(sinks.dtype))
    return gradients
