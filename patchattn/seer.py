"""What SeerAttention's two gates share: pools of blocks that grow with a text, the cache, and the choice of blocks.

Blocks are cut by *rank*, a token's place among the real tokens of its row, so that padding changes nothing. What a gate
knows of a block is its key, made of the largest, the smallest and the mean of the raw keys in it. Of a block that is
still growing only these pools are kept, never the keys themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchattn_kernels.block_sparse import BlockLists, block_sparse, block_sparse_decode, list_rows

from . import losses
from .cache import PatchCacheLayer, storage_bytes
from .method import Method, MethodConfig

if TYPE_CHECKING:
    from .context import AttentionContext
    from .sites import Site

POOLS = ("max", "min", "avg")
DENSITIES = (0.1, 0.3, 0.5)  # at which a gate in training is compared with others


class Pools(NamedTuple):
    """Of the tokens in blocks, `[B, heads, N, D]` each, in float32."""

    largest: Tensor
    smallest: Tensor
    total: Tensor

    def features(self, names: Sequence[str], count: Tensor) -> Tensor:
        """The pools called `names`, one after the other `[B, heads, N, len(names) * D]`; zeros for an empty block."""
        size = count[:, None, :, None]
        found = {"max": self.largest, "min": self.smallest, "avg": self.total / size.clamp(min=1)}
        return torch.cat([found[name] for name in names], dim=-1).masked_fill(size == 0, 0.0)

    def at(self, block: Tensor) -> Pools:
        """Those of one block a row, `block` `[B or 1]`."""
        index = block[:, None, None, None].expand(len(self.total), self.total.shape[1], 1, self.total.shape[3])
        return Pools(*(pool.gather(2, index) for pool in self))

    def joined(self, carried: Pools | None) -> Pools:
        """With what the first block held before."""
        if carried is None:
            return self
        first = (torch.maximum(self.largest[:, :, :1], carried.largest),
                 torch.minimum(self.smallest[:, :, :1], carried.smallest),
                 self.total[:, :, :1] + carried.total)  # fmt: skip
        return Pools(*(torch.cat([new, pool[:, :, 1:]], dim=2) for new, pool in zip(first, self)))


@dataclass
class Call:
    """The new tokens of a call among the real tokens of their rows.

    Attributes:
        before, new: `[B or 1]`, how many real tokens each row had, and how many come.
        length: tokens of the call, padding counted.
        order: `[B, T]`, sorts the tokens of each row so that padding comes first; None: there is none.
        start: the same as `before` where all rows agree and it is known without asking the device.
    """

    before: Tensor
    new: Tensor
    length: int
    order: Tensor | None = None
    start: int | None = None

    @classmethod
    def of(cls, real: Tensor | None, length: int, before: Tensor, start: int | None) -> Call:
        if real is None:
            return cls(before, torch.full_like(before, length), length, None, start)
        return cls(before, real.sum(dim=1), length, real.long().argsort(dim=1, stable=True))

    @property
    def after(self) -> Tensor:
        return self.before + self.new

    @property
    def place(self) -> Tensor:
        """The rank of each token, `[B or 1, T]`; -1 for padding."""
        place = torch.arange(self.length, device=self.new.device) - self.length + self.after[:, None]
        place = place.where(place >= self.before[:, None], -1)
        return place if self.order is None else torch.empty_like(place).scatter_(1, self.order, place)

    def sorted(self, x: Tensor) -> Tensor:
        """`[B, heads, T, D]`, the real tokens last."""
        return x if self.order is None else x.gather(2, self.order[:, None, :, None].expand_as(x))

    def unsorted(self, x: Tensor) -> Tensor:
        """The way back."""
        if self.order is None:
            return x
        return torch.empty_like(x).scatter(2, self.order[:, None, :, None].expand_as(x), x)

    def last(self, x: Tensor, count: int) -> Tensor:
        """The last `count` of `sorted`."""
        if self.order is None:
            return x[:, :, -count:]
        return x.gather(2, self.order[:, None, -count:, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def first_block(self, block: int) -> Tensor:
        """The block that the first new token is in, `[B or 1]`."""
        return self.before // block

    def rows(self, block: int) -> int:
        """How many blocks the new tokens touch at most."""
        if self.start is None:
            return list_rows(self.length, self.length, block, cut=True)
        return list_rows(self.length, self.start + self.length, block)

    def cut(self, x: Tensor, block: int, blocks: int) -> tuple[Tensor, Tensor]:
        """`[B, heads, T, D]` as `[B, heads, blocks, block, D]` in float32, and where there are tokens."""
        place = torch.arange(blocks * block, device=x.device)
        token = place - (self.before % block)[:, None]  # [B or 1, blocks * block]
        there = (token >= 0) & (token < self.new[:, None])
        index = (token + self.length - self.new[:, None]).clamp(0, self.length - 1)
        index = index[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])
        return self.sorted(x).gather(2, index).float().unflatten(2, (-1, block)), there.unflatten(1, (-1, block))

    def pool(self, x: Tensor, block: int, carried: Pools | None = None) -> tuple[Pools, Tensor]:
        """Pools of the blocks that the new tokens touch and of one more, and how many tokens each holds by now."""
        tokens, there = self.cut(x, block, self.rows(block) + 1)
        keep, count = there[:, None, :, :, None], there.sum(dim=2)
        pools = Pools(tokens.masked_fill(~keep, -torch.inf).amax(dim=3),
                      tokens.masked_fill(~keep, torch.inf).amin(dim=3),
                      tokens.masked_fill(~keep, 0.0).sum(dim=3))  # fmt: skip
        first = (torch.arange(count.shape[1], device=x.device) == 0) * (self.before % block)[:, None]
        return pools.joined(carried), count + first


class Notes:
    """What one gate keeps in a cache layer.

    Attributes:
        keys: `[B, heads, blocks + 1, G]`, one for each block of the text, in float32; the last takes what is nothing.
        open_keys, open_queries: pools of the block that the next token is in.
        recent: `[B, H, 2 * block + 1, D]`, the raw queries of the latest two blocks of tokens, by rank, so that tokens
            may be given back; None where a gate needs none. The last takes what is padding.
        since: `[B]`, from which rank on they are all there.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.open_keys: Pools | None = None
        self.open_queries: Pools | None = None
        self.recent: Tensor | None = None
        self.since: Tensor | None = None

    def held(self) -> list[Tensor]:
        found = [self.keys, self.recent, self.since, *(self.open_keys or ()), *(self.open_queries or ())]
        return [tensor for tensor in found if tensor is not None]

    def apply(self, change: Any) -> None:
        for name in ("keys", "recent", "since"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else change(tensor))
        for name in ("open_keys", "open_queries"):
            pools = getattr(self, name)
            setattr(self, name, None if pools is None else Pools(*map(change, pools)))

    def write(self, keys: Tensor, first: Tensor, blocks: int) -> None:
        """Put the keys of new blocks, `[B, heads, N, G]`, where they belong among `blocks` places."""
        room = 0 if self.keys is None else self.keys.shape[2] - 1
        if blocks > room:
            if self.keys is not None:
                blocks += max(4, blocks // 8)  # so that it is seldom copied
            kept = keys.new_zeros(*keys.shape[:2], blocks + 1, keys.shape[3])
            if self.keys is not None:
                kept[:, :, :room] = self.keys[:, :, :room]
            self.keys, room = kept, blocks
        assert self.keys is not None
        index = (torch.arange(keys.shape[2], device=keys.device) + first[:, None]).clamp(max=room)
        self.keys.scatter_(2, index[:, None, :, None].expand_as(keys), keys.detach())

    def remember(self, q: Tensor, call: Call, block: int) -> None:
        """Keep the raw queries of the latest two blocks of tokens."""
        size, latest = 2 * block, min(call.length, 2 * block)
        if self.recent is None or self.since is None:
            self.recent = q.new_zeros(*q.shape[:2], size + 1, q.shape[3])
            self.since = torch.zeros(len(q), dtype=torch.long, device=q.device)
        place = torch.arange(-latest, 0, device=q.device) + call.after[:, None]  # [B or 1, latest]
        slot = (place % size).where(place >= call.before[:, None], size)[:, None, :, None]
        x = call.last(q.detach(), latest)
        self.recent.scatter_(2, slot.expand_as(x), x)
        self.since = torch.maximum(self.since, call.after - size)

    def give_back(self, count: Tensor) -> str | None:
        """Go back to `count` tokens in each row; why the queries of a block that is then cut cannot be had, or None."""
        if self.recent is None or self.since is None:
            return None
        block = self.recent.shape[2] // 2
        if bool(((count % block > 0) & (count // block * block < self.since)).any()):
            return (f"SeerAttention keeps the queries of the latest two blocks, so it can give back {block} tokens, "
                    "one block, or any number up to where a block ends; use larger blocks, or an assistant that "
                    "proposes fewer tokens at once")  # fmt: skip
        self.since = torch.minimum(self.since, count)
        return None

    def carry(self, name: str, pools: Pools, static: bool) -> None:
        before = getattr(self, name)
        pools = Pools(*(pool.detach() for pool in pools))
        if static and before is not None:
            for kept, pool in zip(before, pools):
                kept.copy_(pool)  # a compiled decode step keeps its addresses
        else:
            setattr(self, name, pools)


class SeerLayer(PatchCacheLayer):
    """Rotated keys and values, each row's real tokens from the first slot on, and what gates keep of their blocks.

    One slot more, the last, takes what is padding.

    Attributes:
        kept_keys, kept_values: `[B, G, slots + 1, D]`.
        count: `[B]`, real tokens of each row.
        notes: by the name of a gate.
        cropped: tokens were given back since the gates have looked.
    """

    tensors = ("kept_keys", "kept_values", "count")
    is_croppable = True
    kept_keys: Any
    kept_values: Any
    count: Any

    def __init__(self, static_length: int | None = None) -> None:
        super().__init__(static_length)
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.notes: dict[str, Notes] = {}
        self.written = 0  # tokens a row, padding counted; a static cache counts in tensors alone
        self.aligned = self.static_length is None  # every row holds `written` real tokens
        self.cropped = False

    def call(self, x: Tensor, real: Tensor | None) -> Call:
        """Where the tokens of `x` `[B, heads, T, D]` stand, of which those in `real` `[B, T]` are no padding."""
        if self.count is None:
            self.count = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.aligned = self.aligned and real is None
        if self.aligned:
            return Call.of(None, x.shape[2], self.count.new_full((1,), self.written), self.written)
        return Call.of(real, x.shape[2], self.count.clone(), None)  # `write` counts on in place

    def write(self, k: Tensor, v: Tensor, call: Call) -> None:
        """Take up new tokens, their keys rotated."""
        self._reserve(k, v)
        slots = self.kept_keys.shape[2] - 1
        place = call.place
        place = place.where(place >= 0, slots)[:, None, :, None]
        for kept, x in ((self.kept_keys, k), (self.kept_values, v)):
            if self.aligned:
                kept[:, :, self.written : self.written + call.length] = x
            else:
                kept.scatter_(2, place.expand(len(x), x.shape[1], -1, x.shape[3]), x)
        if self.static_length is None:
            self.written += call.length
        self._put("count", call.after.expand(len(k)).clone())

    def _reserve(self, k: Tensor, v: Tensor) -> None:
        """Room for the new tokens; a cache that grows gets some more, so that it is seldom copied."""
        needed = self.written + k.shape[2] if self.static_length is None else self.static_length
        slots = 0 if self.kept_keys is None else self.kept_keys.shape[2] - 1
        if needed <= slots:
            return
        needed += max(64, needed // 64) if slots else 0
        for name, x in (("kept_keys", k), ("kept_values", v)):
            new = x.new_zeros(*x.shape[:2], needed + 1, x.shape[3])
            if slots:
                new[:, :, :slots] = getattr(self, name)[:, :, :slots]
            setattr(self, name, new)

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values, and where each row ends among them; None: at the last."""
        stop = self.written if self.aligned else -1
        return self.kept_keys[:, :, :stop], self.kept_values[:, :, :stop], None if self.aligned else self.count

    def _apply(self, change: Any) -> None:
        super()._apply(change)
        for notes in self.notes.values():
            notes.apply(change)

    def cache_bytes(self) -> int:
        notes = [tensor for notes in self.notes.values() for tensor in notes.held()]
        return storage_bytes([self.kept_keys, self.kept_values, self.count, *notes])

    def crop(self, tokens_to_remove: int) -> None:
        removed = self._given_back(tokens_to_remove)
        if removed == 0:
            return
        if self.count is not None:
            count = (self.count - removed).clamp(min=0)
            for notes in self.notes.values():
                if why := notes.give_back(count):
                    raise RuntimeError(f"cannot give back {removed} tokens: {why}")
            self.count = count
        self.seen -= removed
        self.written -= removed
        self.cropped = True


# ---- the choice of blocks ------------------------------------------------------------------------------------


def passing(scores: Tensor, threshold: float) -> Tensor:
    """Where the softmax of `scores` is above `threshold`; a score of -inf is no candidate."""
    return scores.softmax(dim=-1) > threshold  # NaN, where there is no candidate, is not


def highest(scores: Tensor, most: int | Tensor, limit: int | None = None) -> Tensor:
    """Where the `most` highest of each row are, the lower index first among equals; -inf is no candidate.

    Args:
        most: one number, or some `[..., 1]`, none of them above `limit`.
    """
    size = scores.shape[-1]
    limit = min(size, most if isinstance(most, int) else size if limit is None else limit)
    if limit == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    best = scores.topk(limit, dim=-1).values
    if isinstance(most, int):
        last = best[..., -1:]
    else:
        last = best.gather(-1, (most.long() - 1).clamp(0, limit - 1).expand(*best.shape[:-1], 1))
    above, equal = scores > last, scores == last
    left = most - (best > last).sum(dim=-1, keepdim=True)
    return (above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= left))) & (scores > -torch.inf)


def blocks_for(density: float, blocks: Tensor) -> Tensor:
    """How many blocks each row of a causal map of `blocks` rows keeps, so that nearest to `density` of all are kept.

    Rows that have fewer keep them all: k a row are k * n - k * (k - 1) / 2 of n * (n + 1) / 2.
    """
    n = blocks.double()
    exact = (2 * n + 1 - ((2 * n + 1).square() - 4 * density * n * (n + 1)).clamp(min=0).sqrt()) / 2
    return exact.round().long().clamp(min=1)


def most_blocks_for(density: float, blocks: int) -> int:
    """No row of a map of up to `blocks` rows keeps more than that by `blocks_for`."""
    return math.ceil((blocks + 0.5) * (1 - math.sqrt(1 - density))) + 1


def mass_caught(target: Tensor, scores: Tensor, density: float) -> Tensor:
    """Share of the mass in `target` that the highest `scores` of each row catch, the mean over rows that have any.

    Of each row, `density` of the candidates, at least one, is taken; candidates have scores above -inf.
    """
    candidates = scores > -torch.inf
    most = (candidates.sum(dim=-1, keepdim=True) * density).round().clamp(min=1)
    target = target.masked_fill(~candidates, 0.0)
    total = target.sum(dim=-1)
    share = target.masked_fill(~highest(scores, most), 0.0).sum(dim=-1) / total.clamp_min(1e-30)
    return share[total > 0].mean()


# ---- the gates -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateConfig(MethodConfig):
    """What both gates check alike."""

    block: int = 64
    k_pool: str = "max,min,avg"
    gate_dim: int | None = None
    rope: bool = True
    init: str = "normal"

    def __post_init__(self) -> None:
        self._require_int("block", 1)
        if self.gate_dim is not None:
            self._require_int("gate_dim", 1)
            self._require(self.gate_dim % 2 == 0 or not self.rope, "gate_dim", "even, or rope False")
        for name in ("k_pool", "q_pool"):
            if hasattr(self, name):
                names = names_of(getattr(self, name))
                self._require(bool(names) and set(names) <= set(POOLS) and len(set(names)) == len(names), name,
                              'some of "max", "min", "avg", joined by commas')  # fmt: skip
                object.__setattr__(self, name, ",".join(pool for pool in POOLS if pool in names))
        self._require_choice("init", ("normal", "mean"))
        if self.init == "mean":
            means = all("avg" in getattr(self, name, "avg") for name in ("k_pool", "q_pool"))
            self._require(means and self.gate_dim is None, "init",
                          '"normal" where a pool has no "avg" or gate_dim is given')  # fmt: skip

    def _require_share(self, field: str, zero: bool = True) -> None:
        value = getattr(self, field)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
        self._require(good and (zero or value > 0), field,
                      "a number from 0 to 1" if zero else "a number above 0, at most 1")  # fmt: skip

    def _require_bool(self, *fields: str) -> None:
        for field in fields:
            self._require(isinstance(getattr(self, field), bool), field, "True or False")


def names_of(pools: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in pools.split(",")) if isinstance(pools, str) else ()


class Gate(Method):
    """Base of both gates: what the new tokens of a call are, who attends, and how a gate is taught."""

    trained = True
    rotary = "raw"
    transfer_kinds: ClassVar[tuple[str, ...]] = ("block_map",)
    config: Any
    query_weight: nn.Parameter | None
    key_weight: nn.Parameter

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        if not site.causal:
            return "its attention is not causal"
        if site.window is not None:
            return f"this layer already has a sliding window of {site.window} tokens"
        if not site.kv_heads:
            return "its number of KV heads could not be read from the module"
        if site.position_bias:
            return "it adds a position bias to the scores"
        return site.cache_problem

    def cache_layer(self, static_length: int | None) -> PatchCacheLayer:
        return shared_layer(static_length)

    def _parameters_of(self, site: Site, queries: Sequence[int] | None, keys: Sequence[int]) -> None:
        """`query_weight` and `key_weight`, `[..., features, G]`."""
        like = site.weight
        made = {"query_weight": queries, "key_weight": keys}
        for name, shape in made.items():
            if shape is None:
                self.register_parameter(name, None)
                continue
            weight = torch.zeros(*shape, device=site.device, dtype=None if like is None else like.dtype)
            if self.config.init == "mean":
                weight[..., -shape[-1] :, :] = torch.eye(shape[-1])  # the mean comes last
            else:
                nn.init.normal_(weight, std=getattr(site.config, "initializer_range", 0.02))
            self.register_parameter(name, nn.Parameter(weight))
        self.turn: nn.Module | None = None
        self.kept: tuple[Tensor, Tensor] | None = None  # blocks read and blocks there were, by head

    # ---- for a subclass to say -------------------------------------------------------------------------------

    def note(self, ctx: AttentionContext, call: Call, notes: Notes, blocks: int, static: bool) -> None:
        """Take up the new tokens' raw keys and queries."""
        raise NotImplementedError

    def active(self, ctx: AttentionContext) -> bool:
        """Whether this gate chooses what the tokens of this call read."""
        raise NotImplementedError

    def choose(self, ctx: AttentionContext, call: Call, notes: Notes, keys: int) -> Tensor:
        """The mask of blocks that the new tokens read: `[B, H or G, N, M]`."""
        raise NotImplementedError

    # ---- attention -------------------------------------------------------------------------------------------

    def forward(self, ctx: AttentionContext) -> Tensor:
        if ctx.dropout:
            raise ValueError(f"{type(self).__name__}: in training this model drops attention weights (dropout "
                             f"{ctx.dropout}), which is not done with chosen blocks; call model.eval() or set "
                             "attention_dropout to 0")  # fmt: skip
        gates = [method for method in ctx.attachment.methods if isinstance(method, Gate)]
        length, drawn = ctx.q.shape[2], ctx.mask.dense is not None
        whole = not ctx.static and isinstance(ctx.past_length, int) and ctx.past_length == 0
        if drawn and length > 1 and not whole:
            raise ValueError(f"{type(self).__name__}: the model drew a mask of its own over {length} tokens (packed "
                             "sequences, a bidirectional prefix), which only a whole prompt may have")  # fmt: skip
        active = self.active(ctx) and not (drawn and length > 1)
        if ctx.cache is None and not active:
            return ctx.attend()
        layer: Any = SeerLayer() if ctx.cache is None else ctx.cache
        call = self._take(ctx, layer, gates)
        if not active and (self is not gates[-1] or whole):
            return ctx.attend()
        keys, values, ends = layer.read()
        q = ctx.rotate(ctx.q, call.place.clamp(min=0))
        if not active and ends is None:
            return ctx.attend_rotated(q, keys, values)
        options = dict(ends=ends, scale=ctx.scaling, softcap=ctx.softcap, sinks=ctx.sinks)
        if active:
            block, mask = self.config.block, self.choose(ctx, call, layer.notes[self.name], keys.shape[2])
        else:  # rows of different lengths, which the base attention cannot read as they are kept
            block = 64
            mask = torch.ones(1, 1, call.rows(block), -(-keys.shape[2] // block), dtype=torch.bool, device=q.device)
        lists = BlockLists.from_mask(mask)
        if length == 1:
            out = block_sparse_decode(q, keys, values, lists, block=block, **options)
        else:
            out = call.unsorted(block_sparse(call.sorted(q), keys, values, lists, block=block, **options))
        return out.transpose(1, 2)

    def _take(self, ctx: AttentionContext, layer: SeerLayer, gates: Sequence[Gate]) -> Call:
        """The call, noted by all gates on this module: by the first of them that is asked."""
        known = ctx.attachment.captured.get("seer")
        if known is not None:
            return known
        call = layer.call(ctx.q, ctx.real)
        stored, static = layer.written + call.length, layer.static_length is not None
        for gate in gates:
            notes = layer.notes.setdefault(gate.name, Notes())
            if layer.cropped:
                gate.look_again(ctx, layer, notes)
            gate.note(ctx, call, notes, -(-(layer.static_length or stored) // gate.config.block), static)
        layer.cropped = False
        layer.write(ctx.rotate(ctx.k, call.place.clamp(min=0)), ctx.v, call)
        if len(gates) > 1:
            ctx.attachment.captured["seer"] = call
        return call

    def look_again(self, ctx: AttentionContext, layer: SeerLayer, notes: Notes) -> None:
        """Make the pools of the growing block again after tokens were given back: of kept queries, and of keys rotated
        back."""
        block, count = self.config.block, layer.count
        first = count // block * block
        place = first[:, None] + torch.arange(block, device=count.device)
        index = place[:, None, :, None].clamp(max=layer.kept_keys.shape[2] - 1)
        kept = layer.kept_keys.gather(2, index.expand(-1, layer.kept_keys.shape[1], -1, layer.kept_keys.shape[3]))
        scale = ctx.turns(count.new_zeros(1))[0].amax()  # what the rotary itself scales by (YaRN), twice by now
        raw = ctx.rotate(kept.float(), -place) / scale.square()
        there = Call(torch.zeros_like(count), count - first, block)
        order = (torch.arange(block, device=count.device) + there.new[:, None]) % block  # the real ones last
        there.order = order
        notes.open_keys = Pools(*(pool[:, :, :1] for pool in there.pool(raw, block)[0]))
        if notes.recent is not None:
            index = (place % (2 * block))[:, None, :, None]
            queries = notes.recent.gather(2, index.expand(-1, notes.recent.shape[1], -1, notes.recent.shape[3]))
            notes.open_queries = Pools(*(pool[:, :, :1] for pool in there.pool(queries, block)[0]))

    def turned(self, ctx: AttentionContext, x: Tensor, positions: Tensor) -> Tensor:
        """The model's rotary, of the gate's width, on `[B, heads, N, G]` at `positions` `[B or 1, N]`."""
        if not self.config.rope:
            return x
        if x.shape[-1] == ctx.q.shape[-1]:
            return ctx.rotate(x, positions)
        if self.turn is None:
            self.turn = ctx.rotary_of_width(x.shape[-1])
        return ctx.rotate(x, positions, self.turn)

    def keys_of(self, features: Tensor) -> Tensor:
        """Pools of keys `[B, heads, N, features]` times `key_weight`, in float32."""
        return features @ self.key_weight.float()

    # ---- training --------------------------------------------------------------------------------------------

    def transfer_loss(self, ctx: AttentionContext, target: Tensor, kind: str) -> Tensor:
        """The divergence of all gates on this module from the block maxima of the base attention."""
        gates = [method for method in ctx.attachment.methods if isinstance(method, Gate)]
        found = [losses.block_map_divergence(ctx, *gate.block_map(ctx)) for gate in gates]
        return torch.stack(found).sum()

    @torch.no_grad()
    def diagnostics(self, ctx: AttentionContext, densities: Sequence[float] = DENSITIES) -> dict[str, Tensor]:
        """The share of block mass caught, by the gate, by its mean-pooled queries and keys, by chance, and at best."""
        found = {}
        for gate in (method for method in ctx.attachment.methods if isinstance(method, Gate)):
            scores, block = gate.block_map(ctx)
            target = losses.block_target(ctx, block, scores.shape[1], scores.shape[2])
            rivals = {"gate": scores, "best": target, "pooled": gate.pooled_scores(ctx, scores.shape[2]),
                      "random": torch.rand(scores.shape, device=scores.device)}  # fmt: skip
            for density in densities:
                for name, rival in rivals.items():
                    rival = rival.masked_fill(scores == -torch.inf, -torch.inf)
                    found[f"{gate.name}_{name}_{density}"] = mass_caught(target, rival, density)
        return found

    def pooled_scores(self, ctx: AttentionContext, rows: int) -> Tensor:
        """What an untrained choice goes by, mean query times mean key, in the shape of `block_map`'s scores."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        if self.kept is None:
            return {}
        read, there = (count.double().sum(dim=(0, 2)) for count in self.kept)  # [heads]
        shares = read / there.clamp(min=1)
        return {"blocks read": f"{float(read.sum() / there.sum().clamp(min=1)):.1%} "
                f"({float(shares.min()):.1%} to {float(shares.max()):.1%} a head)"}  # fmt: skip

    def _remember(self, mask: Tensor, allowed: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self.kept = (mask.sum(dim=-1), allowed.expand_as(mask).sum(dim=-1))


def whole_call(ctx: AttentionContext) -> Call:
    """The tokens of a whole text without a cache."""
    if ctx.mask.dense is not None:
        raise ValueError("SeerAttention's gates cannot be taught on packed documents, whose blocks would begin "
                         "anywhere; set packing: false under data")  # fmt: skip
    length = ctx.q.shape[2]
    real = ctx.real
    before = torch.zeros(1 if real is None else len(real), dtype=torch.long, device=ctx.q.device)
    return Call.of(real, length, before, 0 if real is None else None)


def shared_layer(static_length: int | None) -> SeerLayer:
    return SeerLayer(static_length)


def group_mean(q: Tensor, groups: int) -> Tensor:
    """`[B, H, T, D]` to `[B, G, T, D]`, in float32."""
    return q.float().unflatten(1, (groups, -1)).mean(dim=2)


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else functional.rms_norm(x, x.shape[-1:], weight.float(), 1e-6)
