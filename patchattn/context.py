"""All that a method may know of the layer it sits on and of the call it is in.

The legend of shapes, here and everywhere: B batch, H query heads, G key/value heads, T queries of this call,
S keys, D head size, C hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchattn_kernels import dispatch
from patchattn_kernels.attention import MASK_ELEMENTS, query_blocks

from .masks import Given, Mask, additive, boolean, unpack

if TYPE_CHECKING:
    from .cache import PatchCacheLayer
    from .method import Method
    from .sites import Site


class Attachment:
    """The record patchattn keeps on an attention module: which methods, over which base attention.

    `base` is the attention that ran before (`"sdpa"`, `"eager"`, ...) and `base_function` what computes it.
    """

    def __init__(self, site: Site, base: str, base_function: Callable[..., Any]) -> None:
        self.site = site
        self.base = base
        self.base_function = base_function
        self.methods: list[Method] = []  # outermost first; empty on a layer that only keeps its neighbours' company
        self.enabled = True
        self.raw = False  # q and k arrive before rotary
        self.rotary_function: Callable[..., Any] | None = None
        self.rotary_embedding: nn.Module | None = None
        self.splits_rotary = False  # the module rotates only the first part of a head
        self.context: AttentionContext | None = None  # between the pre-hook and the attention call
        self.projections: list[str] = []  # whose raw outputs are captured
        self.captured: dict[str, Any] = {}
        self.model_inputs: ModelInputs | None = None
        self.remembered: Any = None  # by the rotary of each forward in training, what came with it
        self.around: Callable[[AttentionContext], Tensor] | None = None  # a training stage that stands in between
        self.calls = 0
        self.base_ran: str | None = None  # what `attend` last ran below the methods; not counted when compiled
        self.kernels: dict[str, str] = {}  # by primitive, what computed it in the last call; likewise
        self.last_cache: Any = None


class ModelInputs:
    """What one forward of the whole model was called with; shared by all its layers."""

    def __init__(self, model_config: Any, values: dict[str, Any]) -> None:
        self.input_ids: Tensor | None = values.get("input_ids")
        self.attention_mask: Tensor | None = values.get("attention_mask")
        self.values = values
        self._config = model_config
        self._kept: dict[str, Any] = {}

    @property
    def visual(self) -> Tensor | None:
        """`[B, T]`, True where a token of this call stands for a piece of an image or a video; None if unknown."""
        if "visual" not in self._kept:  # all layers ask, once is enough
            self._kept["visual"] = self._find_visual()
        return self._kept["visual"]

    @property
    def has_visual(self) -> bool:
        """Whether there are such tokens; waits for the device."""
        if "has_visual" not in self._kept:
            self._kept["has_visual"] = self.visual is not None and bool(self.visual.any())
        return self._kept["has_visual"]

    def _find_visual(self) -> Tensor | None:
        kinds = self.values.get("mm_token_type_ids")
        if kinds is not None and (self.input_ids is None or kinds.shape == self.input_ids.shape):
            return kinds > 0
        tokens = visual_tokens(self._config)
        if self.input_ids is None or not tokens:
            return None
        return torch.isin(self.input_ids, torch.tensor(tokens, device=self.input_ids.device))


def visual_tokens(model_config: Any) -> list[int]:
    """The tokens that stand for pieces of images and videos in a model's text."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return sorted({value for name in names if isinstance(value := getattr(model_config, name, None), int)})


class AttentionContext:
    """One call of one attention layer.

    Attributes:
        module, layer_idx, config: where we are.
        q: `[B, H, T, D]`; k, v: `[B, G, S, D]`, as the cache returned them; rotated, or raw if asked for raw.
        past_length: tokens in the cache before this call (an int; a tensor under a static cache).
        cache: this method's own cache layer, or None.
        scaling, softcap, sinks, dropout: what the model asks of its attention.
        model_inputs: of the whole model's forward, if the method needs them.
        weights: `[B, H, T, S]` where the base attention returns them (eager), else None.
    """

    __slots__ = (
        "_depth", "_given", "_hidden_states", "_mask", "_turned", "attachment", "cache", "k", "key_offset", "kwargs",
        "layer_idx", "module", "past_length", "position_embeddings", "q", "static", "v", "weights",
    )  # fmt: skip

    q: Tensor
    k: Tensor
    v: Tensor

    def __init__(self, module: nn.Module, attachment: Attachment) -> None:
        self.module = module
        self.attachment = attachment
        self.layer_idx = attachment.site.layer_idx
        self.past_length: Any = 0
        self.key_offset: Any = 0  # the position of the first key, where a sliding cache has dropped some
        self.static = False  # the keys include slots not written yet
        self.cache: PatchCacheLayer | None = None
        self.position_embeddings: Any = None
        self.weights: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        self._hidden_states: Tensor | None = None
        self._given = Given(None)
        self._mask: Mask | None = None
        self._depth = 0
        self._turned = False  # q and k have been rotated by the method that now calls `attend`

    # ---- what the model said -------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.attachment.site.config

    @property
    def hidden_states(self) -> Tensor:
        """`[B, T, C]`, the input of the attention module, after the layer's norm."""
        if self._hidden_states is None:
            raise RuntimeError(f"{self.attachment.site.name}: the attention was called without its module's __call__, "
                               "so its hidden states are unknown")  # fmt: skip
        states = self._hidden_states
        return states if states.device == self.q.device else states.to(self.q.device)

    @property
    def residual(self) -> Tensor:
        """`[B, T, C]`, the residual stream that enters the decoder layer, before its norm (needs "residual")."""
        return self._captured("residual")

    def projected(self, name: str) -> Tensor:
        """The raw output of a projection of this module, before any norm and rotary (needs its name)."""
        return self._captured(name)

    def _captured(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self.attachment.captured[name]
            return tensor
        except KeyError:
            owners = ", ".join(type(method).__name__ for method in self.attachment.methods)
            raise RuntimeError(f"{name!r} was not captured; add it to `needs` of {owners}") from None

    @property
    def model_inputs(self) -> ModelInputs | None:
        """What the whole model was called with; None where only a part of it was called (needs "model_inputs")."""
        return self.attachment.model_inputs or self.attachment.captured.get("model_inputs")

    @property
    def scaling(self) -> float | None:
        """The factor on the scores; None means D ** -0.5."""
        return self.kwargs.get("scaling")

    @property
    def softcap(self) -> float | None:
        return self.kwargs.get("softcap")

    @property
    def sinks(self) -> Tensor | None:
        """`[H]`, a learned extra logit a head (gpt-oss), or None."""
        return self.kwargs.get("s_aux", self.kwargs.get("sinks"))

    @property
    def dropout(self) -> float:
        return self.kwargs.get("dropout", 0.0)

    def take(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        """What the module hands to its attention."""
        self.q, self.k, self.v, self.kwargs = q, k, v, kwargs
        self._given, self._mask = Given(mask) if self.attachment.site.base_masks else unpack(mask), None
        if self.past_length is None:  # no cache layer told: the mask counts every token so far
            self.past_length = (self._given.length or k.shape[2]) - q.shape[2]
        if self.key_offset is None:
            offset = self.past_length + q.shape[2] - k.shape[2]
            self.key_offset = offset.clamp(min=0) if isinstance(offset, Tensor) else max(0, offset)
        indices = kwargs.pop("indices", None)
        if indices is not None:
            self._keep_only(indices)

    def _keep_only(self, indices: Tensor) -> None:
        """Narrow the mask to the keys `[B, T, n]` that the module's own indexer picked."""
        shape = (*indices.shape[:2], self.k.shape[2])
        picked = torch.zeros(shape, dtype=torch.bool, device=indices.device).scatter(-1, indices.long(), True)[:, None]
        keep = self.mask.keep(0, shape[1], shape[2], self.past_length, self.key_offset, indices.device)
        self._given, self._mask = Given(keep & picked), None

    @property
    def window(self) -> int | None:
        """The model's own sliding window on this layer."""
        if self._given.causal:
            return self._given.window
        return self.kwargs.get("sliding_window", self.attachment.site.window)

    @property
    def causal(self) -> bool:
        if self._given.causal:
            return True
        given = self.kwargs.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if given is None else given)

    @property
    def positions(self) -> Tensor:
        """`[T]`, where the tokens of this call stand in their sequence, padding counted."""
        return torch.arange(self.q.shape[2], device=self.q.device) + self.past_length

    @property
    def mask(self) -> Mask:
        """Which keys may be read, compactly."""
        if self._mask is None:
            given = self._given.mask
            dense = boolean(given) if given is not None and given.dim() == 4 else None
            padding = given if given is not None and given.dim() == 2 else None
            self._mask = Mask(padding, self.causal, self.window, dense)
        return self._mask

    @property
    def real(self) -> Tensor | None:
        """`[B, T]`, which tokens of this call are no padding; None if all are, or if a static cache hides it."""
        mask, length = self.mask, self.q.shape[2]
        if mask.dense is None:
            return None if mask.padding is None else mask.key_padding(length, self.past_length)
        own = mask.dense[:, 0, :, -length:].diagonal(dim1=1, dim2=2)  # whether a token reads itself
        return None if self.static else own.expand(self.q.shape[0], -1)

    # ---- rotary --------------------------------------------------------------------------------------------

    def rotate(self, x: Tensor, positions: Tensor | None = None, rotary: nn.Module | None = None) -> Tensor:
        """The model's own rotary on `[B, heads, tokens, D]`: at the true positions, or at any `[B or 1, tokens]`.

        Args:
            rotary: another of `rotary_of_width`.
        """
        if positions is None:
            return self.rotate_by(x, *self.position_embeddings)
        return self.rotate_by(x, *(self._angles(x, positions) if rotary is None else rotary(x, positions)))

    def rotary_of_width(self, width: int) -> nn.Module:
        """The model's rotary, its base and its scaling, for vectors of another size than its heads."""
        embedding: Any = self.attachment.rotary_embedding
        if embedding is None or getattr(embedding, "config", None) is None:
            raise RuntimeError(f"{self.attachment.site.name}: its rotary embedding cannot be made for another width "
                               f"({width}); use the width of its heads, {self.q.shape[-1]}")  # fmt: skip
        config = copy.deepcopy(embedding.config)
        config.head_dim = width
        made: nn.Module = type(embedding)(config).to(self.q.device)
        return made

    def turned(self, x: Tensor) -> Tensor:
        """`x` `[B, heads, T, D]` a quarter turn on: `rotate(x, p)` is `x * cos + turned(x) * sin`, see `turns`."""
        cos, sin = self.position_embeddings
        return self.rotate_by(x, torch.zeros_like(cos), torch.ones_like(sin))

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the model's rotary at `positions` `[N]`, in the places of a head: `[N, D]`, float32."""
        ones = torch.ones(1, 1, len(positions), self.q.shape[-1], device=self.q.device)
        cos, sin = self._angles(ones, positions[None])
        zero, one = torch.zeros_like(cos), torch.ones_like(sin)
        kept = self.rotate_by(ones, zero, zero)  # 1 in the part of a head that is not rotated, else 0
        sines = self.rotate_by(ones, zero, sin) * self.rotate_by(ones, zero, one) - kept
        return self.rotate_by(ones, cos, zero)[0, 0], sines[0, 0]

    def _angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.attachment.rotary_embedding is None:
            raise RuntimeError(f"{self.attachment.site.name}: the model's rotary embedding was not found")
        return self.attachment.rotary_embedding(x, positions)

    def rotate_by(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The model's own rotary on `[B, heads, tokens, D]` by given angles, as `position_embeddings` are."""
        attachment = self.attachment
        if attachment.rotary_function is None:
            raise RuntimeError(f"{attachment.site.name}: the model has no rotary that patchattn can apply")
        width = cos.shape[-1]
        if attachment.splits_rotary and width < x.shape[-1]:
            turned = attachment.rotary_function(x[..., :width], x[..., :width], cos, sin)[0]
            return torch.cat([turned, x[..., width:]], dim=-1)
        return attachment.rotary_function(x, x, cos, sin)[0]

    def _rotated_pair(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Raw q of this call and raw k as the unpatched module rotates them, where padding is left or right."""
        if self.position_embeddings is None:
            return q, k
        if k.shape[2] == q.shape[2]:
            return self.rotate(q), self.rotate(k)
        keys = torch.arange(k.shape[2], device=k.device)[None] + self.key_offset
        return self.rotate(q, self.positions[None]), self.rotate(k, keys)  # both by their place in the cache

    # ---- the inner attention -------------------------------------------------------------------------------

    @property
    def innermost(self) -> bool:
        """Whether `attend` runs the model's own attention: no other method is below the one that asks."""
        return self._depth >= len(self.attachment.methods)

    def attend(self, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """What would have run had this method not been there: `[B, T, H, D]`. Any of q, k, v may be replaced."""
        methods, depth = self.attachment.methods, self._depth
        kept = self.q, self.k, self.v
        if q is not None:
            self.q = q
        if k is not None:
            self.k = k
        if v is not None:
            self.v = v
        if depth < len(methods):
            self._depth = depth + 1
            out = methods[depth](self)
            self._depth = depth
        else:
            out = self._base()
        self.q, self.k, self.v = kept
        return out

    def attend_rotated(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend`, where no method further in needs raw q and k: these are rotated."""
        before, self._turned = self._turned, True
        out = self.attend(q, k, v)
        self._turned = before
        return out

    @property
    def raw(self) -> bool:
        """Whether q and k are those before rotary."""
        return self.attachment.raw and not self._turned

    def scored(self) -> tuple[Tensor, Tensor]:
        """q and k as the base attention scores them: rotated."""
        return self._rotated_pair(self.q, self.k) if self.raw else (self.q, self.k)

    def run(self) -> Tensor:
        """The attention of this call, or what a training stage makes of it."""
        around = self.attachment.around or AttentionContext.attend
        if torch.compiler.is_compiling():
            return around(self)
        self.attachment.kernels = {}
        with dispatch.recording(self.attachment.kernels):
            return around(self)

    def base(self) -> Tensor:
        """What the unpatched model computes here: `[B, T, H, D]`, without gradients."""
        with torch.no_grad():
            return self._base()

    @torch.no_grad()
    def base_weights(self, first: int, last: int) -> Tensor:
        """The base attention's softmax weights of the queries `first` to `last`, without gradients; float32."""
        return self.softmax_weights(first, last)

    def softmax_weights(self, first: int, last: int) -> Tensor:
        """The softmax of the scores of the queries `first` to `last`: `[B, H, last - first, S]`, float32."""
        q, k = self.scored()
        q = q[:, :, first:last]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        keep = self.mask.keep(first, last, k.shape[2], self.past_length, self.key_offset, q.device)
        scores = scores.masked_fill(~keep, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        return scores.softmax(dim=-1).nan_to_num(0.0)  # a row that reads nothing

    def transfer_loss(self, target: Tensor, kind: str) -> Tensor:
        """How far the methods on this layer are from the base attention's output `target`: the outermost one's loss."""
        self._depth = 1
        loss = self.attachment.methods[0].transfer_loss(self, target, kind)
        self._depth = 0
        return loss

    def _base(self) -> Tensor:
        attachment = self.attachment
        (q, k), v = self.scored(), self.v
        function, base = attachment.base_function, attachment.base
        given = self._given.mask
        if given is not None and given.dim() == 4 and base not in ("sdpa", "eager"):
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            function, base = sdpa_attention_forward, "sdpa"  # the others cannot take a mask drawn by hand
        if not torch.compiler.is_compiling():
            attachment.base_ran = base
        if self._too_large(q, k, base):
            out, self.weights = self._in_blocks(function, base, q, k, v), None
        else:
            mask = self._base_mask(base, q.shape[2], k.shape[2], q)
            out, self.weights = function(self.module, q, k, v, mask, **self.kwargs)
        return out

    def _needs_no_mask(self, base: str, queries: int, keys: int) -> bool:
        """The layer's own causality says everything, so that the base attention can take its fastest path."""
        if self._given.mask is not None or self.static:
            return False
        if not self._given.causal:
            return True  # the model gave no mask at all
        window = self.window
        if window is not None and keys >= window:
            return False
        return queries == 1 or (queries == keys and base != "eager")

    def _base_mask(self, base: str, queries: int, keys: int, like: Tensor) -> Any:
        given = self._given.mask
        if given is not None and given.dim() == 4:
            return additive(given, like.dtype) if base == "eager" and given.dtype == torch.bool else given
        if self._needs_no_mask(base, queries, keys):
            return None
        if base.startswith("flash"):
            return None if given is None else self.mask.key_padding(keys, self.key_offset)
        if base not in ("sdpa", "eager"):
            return self._registered_mask(base, queries, keys, like)
        keep = self.mask.keep(0, queries, keys, self.past_length, self.key_offset, like.device)
        return keep if base == "sdpa" else additive(keep, like.dtype)

    def _registered_mask(self, base: str, queries: int, keys: int, like: Tensor) -> Any:
        from . import _compat

        return _compat.registered_mask(
            base, like, queries, keys, self.past_length, self.key_offset, self.window, self._given.mask, self.config
        )

    def _too_large(self, q: Tensor, k: Tensor, base: str) -> bool:
        queries, keys = q.shape[2], k.shape[2]
        if queries * keys <= MASK_ELEMENTS or base not in ("sdpa", "eager") or "position_bias" in self.kwargs:
            return False
        given = self._given.mask
        return not (given is not None and given.dim() == 4) and not self._needs_no_mask(base, queries, keys)

    def _in_blocks(self, function: Callable[..., Any], base: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Long padded or windowed inputs: the base attention on one block of queries after the other."""
        mask, keys, blocks = self.mask, k.shape[2], []
        for first, last in query_blocks(q.shape[2], keys):
            low, high = 0, keys
            if mask.causal and isinstance(self.past_length, int) and isinstance(self.key_offset, int):
                high = min(keys, self.past_length + last - self.key_offset)
                if mask.window is not None:
                    low = max(0, self.past_length + first - mask.window + 1 - self.key_offset)
            keep = mask.keep(first, last, high - low, self.past_length, self.key_offset + low, q.device)
            keep = keep if base == "sdpa" else additive(keep, q.dtype)
            out, _ = function(self.module, q[:, :, first:last], k[:, :, low:high], v[:, :, low:high], keep,
                              **self.kwargs)  # fmt: skip
            blocks.append(out)
        return torch.cat(blocks, dim=1)


def first_token_mass(ctx: AttentionContext) -> Tensor:
    """The softmax weight of each query on the first token of its sequence: `[B, H, T]`.

    That is the first token that is no padding, and in packed rows the first that the query may read.
    """
    queries, keys, mask = ctx.q.shape[2], ctx.k.shape[2], ctx.mask
    first = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=ctx.q.device)  # [B or 1, 1, T or 1, 1]
    if mask.dense is not None:
        first = mask.dense[:, :1].int().argmax(dim=-1, keepdim=True)
    elif mask.padding is not None:
        first = mask.padding[:, None, None, :keys].int().argmax(dim=-1, keepdim=True)
    blocks = []
    for start, stop in query_blocks(queries, keys):
        weights = ctx.softmax_weights(start, stop)  # [B, H, t, S]
        own = first[:, :, start:stop] if first.shape[2] > 1 else first
        blocks.append(weights.gather(-1, own.expand(*weights.shape[:3], 1)).squeeze(-1))
    return torch.cat(blocks, dim=-1)
