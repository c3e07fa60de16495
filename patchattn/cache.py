"""Cache layers of patched attention modules, as members of transformers' own `Cache`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from patchattn_kernels.sink_window import Tier

from . import _compat


class Expecting:
    """A cache layer that only the patched module it belongs to may use."""

    _expected = False

    def expect(self) -> None:
        """The patched module is about to call `update`."""
        self._expected = True

    def _require_expected(self) -> None:
        if not self._expected:
            raise RuntimeError(
                f"this cache layer ({type(self).__name__}) belongs to a patched model, but a module without that "
                "patch used it; start with a new cache after patch, unpatch or disabled"
            )
        self._expected = False


class PatchCacheLayer(Expecting, CacheLayerMixin):
    """Base of a method's own cache layer.

    It reports the *logical* length, all tokens seen, so that positions and the other layers' masks stay right
    whatever it really keeps. Tensors a subclass names in `tensors` follow beam reordering, batch repeat and
    select, offloading and reset; their first dimension is the batch.

    A layer of a static length counts in tensors, and writes them in place: a compiled decode step keeps its addresses.

    Attributes:
        static_length: tokens that a static cache has room for; None for one that grows.
        seen: tokens of this cache, padding counted.
    """

    tensors: tuple[str, ...] = ()
    supports_early_init = False
    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, static_length: int | None = None) -> None:
        super().__init__()
        self.static_length = self.max_cache_len = static_length
        self.is_compileable = static_length is not None
        self.is_croppable = type(self).is_croppable and static_length is None
        self.seen: Any = self._nothing_seen()

    def _nothing_seen(self) -> Any:
        return 0 if self.static_length is None else torch.zeros((), dtype=torch.long)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)  # some models look at their size
        self.max_batch_size = key_states.shape[0]  # asked of static caches, before 5.4
        self.is_initialized = True
        if isinstance(self.seen, Tensor):
            self.seen = self.seen.to(key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens and hand them on; the method stores what it keeps when it has attended."""
        self._require_expected()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if isinstance(self.seen, Tensor):
            self.seen.add_(key_states.shape[2])
        else:
            self.seen = self.seen + key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        return self.seen

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[Any, int]:
        if self.static_length is not None:
            return self.static_length, 0
        if isinstance(query_length, Tensor):  # a cache position, before 5.4
            query_length = query_length.shape[0]
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.static_length is None else self.static_length

    get_max_cache_shape = get_max_length

    def _put(self, name: str, value: Tensor) -> None:
        """Hold `value` under `name`; of a static length in the tensor that is held there already."""
        held = getattr(self, name)
        if held is None or self.static_length is None:
            setattr(self, name, value)
        else:
            held.copy_(value)

    def _apply(self, change: Any) -> None:
        for name in self.tensors:
            value = getattr(self, name, None)
            if value is not None:
                setattr(self, name, change(value))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda tensor: tensor[indices])

    def offload(self) -> None:
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.seen = self._nothing_seen()
        self.is_initialized = False
        for name in self.tensors:
            setattr(self, name, None)

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError(f"{type(self).__name__} cannot give tokens back (crop), as assisted decoding asks")

    def _given_back(self, tokens_to_remove: int) -> int:
        """How many tokens a `crop` asks for; a static cache gives none."""
        removed = _compat.tokens_to_remove(tokens_to_remove, int(self.seen))
        if removed and self.static_length is not None:
            raise RuntimeError("a static cache cannot give tokens back (crop)")
        return removed

    def cache_bytes(self) -> int:
        """Bytes of every tensor held."""
        return storage_bytes([getattr(self, name, None) for name in self.tensors])


class TwoTierLayer(PatchCacheLayer):
    """Some heads keep every key, the others only the first `sink` and the last `recent` real tokens of a row.

    The streaming tier is a ring of `recent + slack` slots after those of the sinks: a token's slot is its rank if it
    is a sink, else `sink + (rank - sink) % ring`, where the rank is its place among the real tokens of its row. So
    nothing is shifted, a row's padding takes no room, and the rank in every slot follows from the row's `count`.

    Attributes:
        slack: tokens that may be given back (`crop`) once the ring has dropped some.
        full: transformers' own layer with the keys of the full heads `[B, G_full, S, D]`, or None.
        ring_keys, ring_values: `[B, G_streaming, sink + recent + slack, D]`, None before the first token.
        lost_keys, lost_values: `[B, G_streaming, D]` in float32, sums over the tokens that have left the ring; None
            unless `sums`.
        count: `[B]`, real tokens seen by each row.
        peak: `[B]`, the most it has been, once tokens were given back.
    """

    tensors = ("ring_keys", "ring_values", "lost_keys", "lost_values", "count", "peak")
    is_croppable = True

    def __init__(
        self, full: bool, sink: int, recent: int, static_length: int | None = None, slack: int = 0, sums: bool = False
    ) -> None:
        super().__init__(static_length)
        self.sink, self.recent, self.slack, self.sums = sink, recent, slack, sums
        self.ring = recent + slack
        self.full: Any = None
        if full:
            self.full = DynamicLayer() if static_length is None else StaticLayer(static_length)
        self.ring_keys: Tensor | None = None
        self.ring_values: Tensor | None = None
        self.lost_keys: Tensor | None = None
        self.lost_values: Tensor | None = None
        self.count: Tensor | None = None
        self.peak: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.count = torch.zeros(key_states.shape[0], dtype=torch.long, device=key_states.device)

    def ranks(self, count: Tensor | None = None) -> Tensor:
        """`[B, slots]`, the rank of the token in each slot after `count` tokens; -1 where there is none."""
        last = (self.count if count is None else count)[:, None] - 1  # type: ignore[index]
        slot = torch.arange(self.sink + self.ring, device=last.device)[None]
        rank = torch.where(slot < self.sink, slot, last - (last - slot) % self.ring)
        valid = (rank <= last) & ((slot < self.sink) | (rank >= self.sink))
        if self.peak is not None:  # tokens that were given back had overwritten others
            valid = valid & ((slot < self.sink) | (rank >= self.peak[:, None] - self.ring))
        return rank.where(valid, -1)

    def past(self) -> Tier | None:
        """What later queries of the streaming heads may read, or None before the first token."""
        if self.ring_keys is None or self.ring_values is None or self.count is None:
            return None
        rank = self.ranks()
        if self.slack:
            rank = rank.where((rank < self.sink) | (rank >= self.count[:, None] - self.recent), -1)
        return Tier(self.ring_keys, self.ring_values, rank)

    @property
    def lost(self) -> tuple[Tensor, Tensor] | None:
        """`lost_keys` and `lost_values`, or None before the first token."""
        return None if self.lost_keys is None or self.lost_values is None else (self.lost_keys, self.lost_values)

    def write(self, k: Tensor, v: Tensor, new: Tensor) -> None:
        """Take up streaming keys and values `[B, G, T, D]`, of which the last `new` `[B]` of each row are real."""
        assert self.count is not None
        if self.ring_keys is None or self.ring_values is None:
            shape = (k.shape[0], k.shape[1], self.sink + self.ring)
            self.ring_keys, self.ring_values = k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3])
            if self.sums:
                self.lost_keys, self.lost_values = (
                    torch.zeros(*shape[:2], x.shape[3], dtype=torch.float32, device=x.device) for x in (k, v)
                )
        count = self.count + new
        if self.sums:
            self._add_lost(k, v, count)
        if k.shape[2] == 1 and not torch.is_grad_enabled():
            self._write_one(k, v, new)
        else:
            rank = self.ranks(count)  # [B, slots]
            taken = (rank >= self.count[:, None])[:, None, :, None]
            index = (k.shape[2] - count[:, None] + rank).clamp(0, k.shape[2] - 1)[:, None, :, None]
            for name, x in (("ring_keys", k), ("ring_values", v)):
                there = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
                setattr(self, name, torch.where(taken, there, getattr(self, name)))
        if self.peak is not None:
            self.peak = torch.maximum(self.peak, count)
        self._put("count", count)

    def _write_one(self, k: Tensor, v: Tensor, new: Tensor) -> None:
        assert self.count is not None and self.ring_keys is not None and self.ring_values is not None
        slot = torch.where(self.count < self.sink, self.count, self.sink + (self.count - self.sink) % self.ring)
        index, real = slot[:, None, None, None], (new > 0)[:, None, None, None]
        for ring, x in ((self.ring_keys, k), (self.ring_values, v)):
            there = index.expand(-1, x.shape[1], 1, x.shape[3])
            ring.scatter_(2, there, torch.where(real, x, ring.gather(2, there)))

    def _add_lost(self, k: Tensor, v: Tensor, count: Tensor) -> None:
        """Sum up what leaves the ring when a row has `count` tokens: of its slots, and of the new tokens themselves."""
        assert self.count is not None and self.ring_keys is not None and self.ring_values is not None
        held, length = self.ranks(), k.shape[2]
        rank = torch.arange(length, device=k.device) - length + count[:, None]  # [B, T]
        rank = rank.where(rank >= self.count[:, None], -1)
        leaves, skipped = ((r >= self.sink) & (r < count[:, None] - self.ring) for r in (held, rank))
        for name, ring, x in (("lost_keys", self.ring_keys, k), ("lost_values", self.ring_values, v)):
            gone = torch.einsum("bs,bgsd->bgd", leaves.float(), ring.float())
            gone = gone + torch.einsum("bt,bgtd->bgd", skipped.float(), x.float())
            self._put(name, getattr(self, name) + gone)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.full is not None:
            self.full.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.full is not None:
            self.full.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.full is not None:
            self.full.batch_select_indices(indices)

    def offload(self) -> None:
        super().offload()
        if self.full is not None:
            self.full.offload()

    def prefetch(self) -> None:
        super().prefetch()
        if self.full is not None:
            self.full.prefetch()

    def reset(self) -> None:
        super().reset()
        if self.full is not None:
            self.full.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Give tokens back: any number until a streaming head has dropped one, and then up to `slack` of them."""
        removed = self._given_back(tokens_to_remove)
        if removed == 0:
            return
        if self.count is not None and self.ring_keys is not None:
            count, peak = self.count - removed, self.count if self.peak is None else self.peak
            if bool(((peak > self.sink + self.ring) & (peak - count > self.slack)).any()):
                raise RuntimeError(
                    f"cannot give back {removed} tokens: the streaming heads have already dropped tokens beyond sink + "
                    f"recent + slack = {self.sink + self.ring}, and then no more than slack = {self.slack} may be "
                    "given back; patch with a slack of at least as many tokens as an assistant proposes at once"
                )
            self.count, self.peak = count, peak
        self.seen -= removed
        if self.full is not None and self.full.is_initialized:
            self.full.keys = self.full.keys[:, :, :-removed]
            self.full.values = self.full.values[:, :, :-removed]

    def cache_bytes(self) -> int:
        return super().cache_bytes() + (layer_bytes(self.full) if self.full is not None else 0)


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Memory behind these tensors; a slice counts as the whole it keeps alive, and nothing counts twice."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def layer_bytes(layer: Any) -> int:
    """Bytes of keys, values and states that one cache layer holds, ours or transformers'."""
    if isinstance(layer, PatchCacheLayer):
        return layer.cache_bytes()
    held = [value for value in vars(layer).values() if isinstance(value, Tensor) and value.dim()]
    for value in vars(layer).values():
        if isinstance(value, dict):
            held += list(value.values())
    return storage_bytes(held)


def cache_bytes(cache: Any) -> int:
    """Bytes that a whole cache holds, for patched and unpatched models alike."""
    return sum(layer_bytes(layer) for layer in cache.layers)
