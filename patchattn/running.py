"""What happens in a patched model while it runs: our side of transformers' extension points.

A pre-hook on each attention module notes what the call is about (hidden states, cache, rotary); then the module
calls the registered attention function, which asks the methods on it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import _compat
from .context import Attachment, AttentionContext, ModelInputs
from .masks import mask_function
from .reading import forward_function
from .record import attachment_of

IMPLEMENTATION = "patchattn"


def register() -> None:
    """Add "patchattn" to transformers' tables of attention and mask functions: always both."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention side of the "patchattn" implementation: what every touched module calls."""
    attachment = module.__dict__.get("_patchattn")
    if attachment is None:
        raise RuntimeError(
            f"{type(module).__name__} shares its config with a patched module but was added or copied after patch; "
            "call patchattn.unpatch and patch again"
        )
    ctx = attachment.context
    if not attachment.site.pieces:
        attachment.context = None
    if ctx is None:
        ctx = AttentionContext(module, attachment)
    ctx.take(query, key, value, attention_mask, kwargs)
    if attachment.methods and not torch.compiler.is_compiling():
        attachment.calls += 1
    out = ctx.run()
    if attachment.captured:
        attachment.captured.clear()
    return out.contiguous(), ctx.weights  # many modules view the result


def after_attention(module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__["_patchattn"].context = None


def before_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    attachment: Attachment = module.__dict__["_patchattn"]
    if not attachment.enabled:
        return None
    ctx = AttentionContext(module, attachment)
    attachment.context = ctx
    ctx._hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else (args[0] if args else None)
    cache = None
    for name in _compat.CACHE_ARGUMENTS:
        if name in kwargs:
            cache = kwargs[name]
            break
    if cache is not None:
        _note_cache(ctx, attachment, cache)
    capture_projections(module, attachment)
    if module.training and attachment.methods and not torch.compiler.is_compiling():
        _remember(attachment, kwargs.get("position_embeddings"))
    if attachment.raw:
        return _neutral_rotary(ctx, args, kwargs)
    return None


def _remember(attachment: Attachment, rotary: Any) -> None:
    """Keep what came with this call for the second run that gradient checkpointing makes of it, or find it again.

    That run comes when the model's forward, and perhaps another one, is over, and reaches neither the model nor the
    decoder layer. The rotary tells which forward it belongs to: each makes its own, and both runs are handed it.
    """
    if not isinstance(rotary, tuple) or not isinstance(rotary[0], Tensor):
        return
    if attachment.model_inputs is not None:
        residual = attachment.captured.get("residual")
        kept = {} if residual is None else {"residual": residual.detach()}  # a graph would keep itself alive
        if attachment.remembered is None:
            attachment.remembered = WeakTensorKeyDictionary()
        attachment.remembered[rotary[0]] = {**kept, "model_inputs": attachment.model_inputs}
    elif attachment.remembered is not None and (found := attachment.remembered.get(rotary[0])) is not None:
        attachment.captured.update(found)


def _note_cache(ctx: AttentionContext, attachment: Attachment, cache: Any) -> None:
    """Length and kind of this layer's cache before the call; puts the method's own cache layer in place."""
    cache = getattr(cache, "self_attention_cache", cache)
    index, layers = attachment.site.cache_index, cache.layers
    if index is not None and len(layers) <= index and getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) <= index:
            layers.append(cache.layer_class_to_replicate())
    queries = ctx._hidden_states.shape[1] if ctx._hidden_states is not None else 1
    if index is None or len(layers) <= index or not hasattr(layers[index], "get_seq_length"):
        return _note_elsewhere(ctx, layers, queries)
    layer = layers[index]
    own = getattr(layer, "expect", None)
    if own is None and attachment.methods:
        replacement = _own_layer(attachment, layer)
        if replacement is not None:
            layers[index] = layer = replacement
            own = layer.expect
    past = layer.get_seq_length()
    if isinstance(past, Tensor):
        ctx.past_length, ctx.static = past.clone(), True  # `update` counts on in place
        ctx.key_offset = _compat.key_offset(layer, queries)
    else:
        ctx.past_length = past
        if getattr(layer, "is_sliding", False):
            ctx.key_offset = _compat.key_offset(layer, queries)
        ctx.static = getattr(layer, "max_cache_len", None) is not None
    if own is not None:
        if not attachment.methods:
            raise RuntimeError(f"{attachment.site.name}: this cache was made under another patch; start with a new one")
        ctx.cache = layer
        own()
    if not torch.compiler.is_compiling():
        attachment.last_cache = weakref.ref(layer)


def _note_elsewhere(ctx: AttentionContext, layers: Sequence[Any], queries: int) -> None:
    """Where the keys come from another layer: the mask will tell how many there are, but not in a static cache."""
    ctx.past_length = ctx.key_offset = None
    first = next((layer for layer in layers if hasattr(layer, "get_seq_length")), None)
    if first is not None and getattr(first, "max_cache_len", None) is not None:
        ctx.past_length, ctx.static = first.get_seq_length() - queries, True  # it has counted this call already


def _own_layer(attachment: Attachment, layer: Any) -> Any:
    static = getattr(layer, "max_cache_len", None)
    made = None
    for method in attachment.methods:
        made = method.cache_layer(static) if made is None else made
    if made is None:
        return None
    kind = type(layer).__name__
    if kind not in ("DynamicLayer", "StaticLayer"):
        raise ValueError(
            f"{attachment.site.name}: {attachment.methods[-1].name} keeps its own cache and cannot replace a {kind}; "
            "use the default or a static cache"
        )
    if int(layer.get_seq_length()) > 0:
        raise ValueError(
            f"{attachment.site.name}: this cache already holds {int(layer.get_seq_length())} tokens of the unpatched "
            "model; start with a new cache"
        )
    return made


def _neutral_rotary(ctx: AttentionContext, args: Any, kwargs: dict[str, Any]) -> Any:
    """Hand the module cos = 1 and sin = 0, so that it leaves q and k as they are, bit for bit."""
    given = kwargs.get("position_embeddings")
    if given is None and len(args) > 1:
        given = args[1]
    if not (isinstance(given, tuple) and len(given) == 2):
        raise RuntimeError(f"{ctx.attachment.site.name}: expected rotary as (cos, sin), got {type(given).__name__}")
    ctx.position_embeddings = given
    cos, sin = given
    neutral = (torch.ones_like(cos), torch.zeros_like(sin))
    if "position_embeddings" in kwargs:
        return args, {**kwargs, "position_embeddings": neutral}
    return (args[0], neutral, *args[2:]), kwargs


class Residual:
    """Pre-hook on a decoder layer: notes the residual stream for the attention module inside it."""

    _patchattn_hook = True

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.attachment.captured["residual"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


class Projection:
    """Hook on a projection: notes its raw output."""

    _patchattn_hook = True

    def __init__(self, attachment: Attachment, name: str) -> None:
        self.attachment, self.name = attachment, name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.attachment.captured[self.name] = output


def capture_projections(module: nn.Module, attachment: Attachment) -> None:
    """Note the outputs of the projections as they are now: adapters may have been wrapped around them since."""
    if torch.compiler.is_compiling():
        return
    for name in attachment.projections:
        projection = getattr(module, name)
        if not any(isinstance(hook, Projection) for hook in projection._forward_hooks.values()):
            projection.register_forward_hook(Projection(attachment, name))


def before_model(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    values = dict(kwargs)
    if args:
        values.update(zip(list(inspect.signature(forward_function(model)).parameters)[1:], args, strict=False))
    inputs = ModelInputs(getattr(model, "config", None), values)
    for site in model.__dict__["_patchattn_patch"].sites:
        attachment_of(site.module).model_inputs = inputs


def after_model(model: nn.Module, args: Any, output: Any) -> None:
    for site in model.__dict__["_patchattn_patch"].sites:
        attachment = attachment_of(site.module)
        attachment.model_inputs = None
        attachment.captured.clear()


for _hook in (before_attention, after_attention, before_model, after_model):
    _hook._patchattn_hook = True  # type: ignore[union-attr]
