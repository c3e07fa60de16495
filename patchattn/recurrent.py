"""What methods with a state share: the tokens of a call in order, and a cache that does not grow with the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from .cache import PatchCacheLayer

if TYPE_CHECKING:
    from .context import AttentionContext
    from .sites import Site


def unlike_features(site: Site) -> str | None:
    """Why features and a state cannot stand for the softmax of this layer, or None."""
    if site.position_bias:
        return "it adds a position bias to the scores, which features do not see"
    if site.pieces:
        return "one forward calls the attention several times, which has no one state to go on from"
    if site.window is not None:
        return f"this layer already has a sliding window of {site.window} tokens"
    if getattr(site.module, "sinks", None) is not None:
        return "it has a learned extra score in its softmax (sinks), which features have no place for"
    if getattr(site.config, "attn_logit_softcapping", None) is not None:
        return "it caps its scores (softcap), which features do not see"
    return None


class Tokens:
    """The tokens of a call, row by row, padding first and then the real ones.

    Attributes:
        real: `[B, T]`, which are no padding; None where all are.
        order: `[B, T]`, what puts them in order, or None.
    """

    def __init__(self, ctx: AttentionContext, method: str) -> None:
        self.real = _real(ctx, method)
        self.order = None if self.real is None else self.real.int().argsort(dim=1, stable=True)

    def sorted(self, x: Tensor, dim: int = 2) -> Tensor:
        """`x` with its tokens, along `dim`, in order."""
        return x if self.order is None else _take(x, self.order, dim)

    def unsorted(self, x: Tensor) -> Tensor:
        """`[B, heads, T, D]` as it came."""
        return x if self.order is None else _take(x, self.order.argsort(dim=1), 2)

    def rank(self) -> Tensor | None:
        """`[B, T]`, the place of each token in order among the real ones of a row, from 0; negative for padding."""
        if self.real is None:
            return None
        return torch.arange(self.real.shape[1], device=self.real.device) - (~self.real).sum(dim=1, keepdim=True)


def _real(ctx: AttentionContext, method: str) -> Tensor | None:
    length = ctx.q.shape[2]
    if ctx.mask.dense is not None and length > 1:
        raise ValueError(f"{method}: the model drew a mask of its own over {length} tokens (packed sequences, a "
                         "bidirectional prefix), which a state that sums up all earlier tokens cannot follow; pass "
                         "the 2-D padding mask instead")  # fmt: skip
    return ctx.real


def rotated(ctx: AttentionContext, tokens: Tokens, cache: RecurrentLayer | None) -> tuple[Tensor, Tensor]:
    """q and k as the model rotates them, by their distance from the first real token of their row.

    Scores depend on differences of positions alone, features do not: padding before a text must not shift it.
    """
    if not ctx.raw or ctx.position_embeddings is None:
        return ctx.q, ctx.k
    if tokens.real is None:
        return ctx.rotate(ctx.q), ctx.rotate(ctx.k)
    cos, sin = ctx.position_embeddings  # [1 or B, T, D]
    rows, length = tokens.real.shape
    angles = torch.stack([cos, sin], dim=-3).float().expand(rows, 2, length, -1)
    index = tokens.real.int().argmax(dim=1)[:, None, None, None].expand(-1, 2, 1, angles.shape[3])
    origin = angles.gather(2, index)  # [B, 2, 1, D]
    if cache is not None:
        origin = cache.origin_of(origin)
    (cos_0, sin_0), (cos_t, sin_t) = origin.unbind(1), angles.unbind(1)
    size = (cos_0.square() + sin_0.square()).sqrt()  # 1, but for rotaries that scale (YaRN)
    turned = (cos_t * cos_0 + sin_t * sin_0) / size, (sin_t * cos_0 - cos_t * sin_0) / size
    new_cos, new_sin = (x.to(cos.dtype) for x in turned)
    return ctx.rotate_by(ctx.q, new_cos, new_sin), ctx.rotate_by(ctx.k, new_cos, new_sin)


class RecurrentLayer(PatchCacheLayer):
    """A state, the last few tokens, and how many tokens a row had: as many bytes after any number of them.

    Attributes:
        recent: how many of the last tokens are kept.
        block: of a terraced window, else 0. Of tokens before the last whole block nothing is read but the state.
        state: `[B, heads, K, D + 1]` in float32; None before the first token.
        recent_keys, recent_values: `[B, G, recent, D]`, the last real tokens of each row, the latest last.
        before: `[B, W - 1, C]`, what a short convolution over tokens read last; None where there is none.
        origin: `[B, 2, 1, D]`, cosines and sines of the first real token's position in its row; None where no call had
            padding.
        count: `[B]`, real tokens seen by each row.
    """

    tensors = ("state", "recent_keys", "recent_values", "before", "origin", "count")
    state: Tensor | None
    recent_keys: Tensor | None
    recent_values: Tensor | None
    before: Tensor | None
    origin: Tensor | None
    count: Any

    def __init__(self, recent: int, static_length: int | None = None, block: int = 0) -> None:
        super().__init__(static_length)
        self.recent, self.block = recent, block
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.count = torch.zeros(key_states.shape[0], dtype=torch.long, device=key_states.device)

    def origin_of(self, found: Tensor) -> Tensor:
        """Where each row begins: as noted, or, for rows that begin with this call, as `found`."""
        begins = (self.count == 0)[:, None, None, None]
        kept = self.origin
        if kept is None:  # no padding until now: positions count from 0
            kept = torch.stack([torch.ones_like(found[:, 0]), torch.zeros_like(found[:, 1])], dim=1)
        self._put("origin", torch.where(begins, found, kept))
        assert self.origin is not None
        return self.origin

    def joined(self, k: Tensor, v: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Kept keys and values and then those of a call, `[B, G, S, D]`, in order, and the rank of each, `[B, S]`.

        The rank is None at the start of a sequence without padding.
        """
        if self.state is None:
            return k, v, tokens.rank()
        length, count = k.shape[2], self.count[:, None]
        kept = count - self.recent + torch.arange(self.recent, device=k.device)  # [B, recent]
        if self.block:
            kept = kept.where(kept >= self.block * (count // self.block - 1), -1)
        new = torch.arange(length, device=k.device)
        if tokens.real is None:
            new = count + new
        else:
            place = new - (~tokens.real).sum(dim=1, keepdim=True)
            new = torch.where(place >= 0, count + place, -1)
        rank = torch.cat([kept, new.expand(kept.shape[0], -1)], dim=1)
        if self.recent_keys is not None and self.recent_values is not None:
            k, v = torch.cat([self.recent_keys, k], dim=2), torch.cat([self.recent_values, v], dim=2)
            if tokens.real is not None:  # no padding between tokens
                order = (rank >= 0).int().argsort(dim=1, stable=True)
                k, v, rank = _take(k, order, 2), _take(v, order, 2), rank.gather(1, order)
        return k, v, rank

    def after_earlier(self, x: Tensor, rank: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs of a convolution `[B, T, C]`, in order, with no padding between them and earlier ones, and those."""
        assert self.before is not None
        if rank is None:
            return x, self.before
        x = torch.cat([self.before, x.masked_fill((rank < 0)[..., None], 0.0)], dim=1)
        ahead = functional.pad(rank >= 0, (self.before.shape[1], 0), value=True)
        x = _take(x, ahead.int().argsort(dim=1, stable=True), 1)
        return x[:, self.before.shape[1] :], x[:, : self.before.shape[1]]

    def keep(self, state: Tensor, k: Tensor, v: Tensor, tokens: Tokens, before: Tensor | None = None) -> None:
        """Go on from here: the state, and the last of what `joined` gave."""
        length = k.shape[2] if self.state is None else k.shape[2] - self.recent
        if self.recent:
            self._put("recent_keys", _last(k, self.recent))
            self._put("recent_values", _last(v, self.recent))
        self._put("state", state)
        if before is not None:
            self._put("before", before.clone())  # a part of all that was read
        new: Any = length if tokens.real is None else tokens.real.sum(dim=1)
        self._put("count", self.count + new)


def _last(x: Tensor, count: int) -> Tensor:
    """The last `count` tokens, zeros before them where there are fewer; a copy, so that the others are not kept."""
    if x.shape[2] < count:
        return functional.pad(x, (0, 0, count - x.shape[2], 0))
    return x[:, :, x.shape[2] - count :].clone()


def _take(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Reorder the tokens of each row, which stand along `dim`."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = order.shape
    return x.gather(dim, order.view(shape).expand(x.shape))
