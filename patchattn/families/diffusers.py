"""Diffusers' attention modules, through their own door: the attention processor.

A diffusers attention module hands everything to a processor object, which projects, normalises, joins text and
image tokens, rotates, attends and splits again, each class in its own way. Ours runs the code of the processor
that was there with one name exchanged: where that code calls attention (`F.scaled_dot_product_attention`, or
diffusers' `dispatch_attention_fn`), q, k and v go to the methods on the module, and the innermost of them calls
what the code would have called, with the arguments it gave. So nothing of a processor is written again here,
and whether one is supported is read from its code, not from its name.

Nothing here imports diffusers.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..context import Attachment, AttentionContext
from ..masks import Given
from ..method import Method
from ..running import capture_projections
from ..sites import Site, _first_int

SDPA, DISPATCH = "F.scaled_dot_product_attention", "dispatch_attention_fn"
OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")  # of both, after query, key, value
LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
TEXT = ("encoder", "txt", "text")  # parts of the names that diffusers gives to what comes from the text


# ---- what a processor's code says --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """What can be read from a processor's `__call__`.

    Attributes:
        problem: why its attention cannot be exchanged, or None.
        dispatched: it calls `dispatch_attention_fn` (tokens before heads) and not SDPA (heads before tokens).
        arguments: names of its arguments after the module; the first are the hidden states.
        text_first: whether text tokens come before image tokens in a joint query; None if that cannot be read.
        causal: the text of the `is_causal` argument.
        grouped: whether k and v may arrive with fewer heads than q.
    """

    problem: str | None = None
    dispatched: bool = False
    arguments: tuple[str, ...] = ()
    text_first: bool | None = None
    causal: str = "False"
    grouped: bool = False


def _read(processor: Any) -> _Reading:
    """What the processor's code says; a problem names its class."""
    call, kind = type(processor).__call__, type(processor).__name__
    if isinstance(processor, nn.Module):
        return _Reading(f"its processor {kind} has weights of its own")
    if not isinstance(call, FunctionType) or inspect.unwrap(call) is not call:
        return _Reading(f"its processor {kind} is no plain class with a __call__")
    reading = _read_code(call)
    return replace(reading, problem=f"its processor {kind} {reading.problem}") if reading.problem else reading


@functools.cache
def _read_code(function: FunctionType) -> _Reading:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return _Reading("has no source code that could be read")
    calls = [node for node in ast.walk(tree) if _calls(node, SDPA, DISPATCH)]
    looped = any(call in ast.walk(loop) for loop in ast.walk(tree) if isinstance(loop, LOOPS) for call in calls)
    if len(calls) != 1 or looped:
        count = "in a loop" if len(calls) == 1 else f"{len(calls)} times"
        return _Reading(f"calls {SDPA} or {DISPATCH} {count}; patchattn needs exactly one call")
    call = cast(ast.Call, calls[0])
    dispatched = _calls(call, DISPATCH)
    if not (DISPATCH in function.__globals__ if dispatched else function.__globals__.get("F") is functional):
        return _Reading(f"has a {ast.unparse(call.func)} of its own")
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return _Reading(
        dispatched=dispatched,
        arguments=tuple(inspect.signature(function).parameters)[2:],
        text_first=_text_first(tree, keywords.get("query") or ast.unparse(call.args[0]), before=call.lineno),
        causal=keywords.get("is_causal", "False"),
        grouped="enable_gqa" in keywords,
    )


def _calls(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def _text_first(tree: ast.AST, query: str, before: int) -> bool | None:
    """The order of `query = torch.cat([text part, image part])`, told by the names of the two parts."""
    orders = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and _calls(node.value, "torch.cat") and node.lineno < before):
            continue
        if ast.unparse(node.targets[0]) not in (query, "hidden_states"):
            continue
        parts = [ast.unparse(part) for part in getattr(cast(ast.Call, node.value).args[0], "elts", [])]
        text = [any(mark in part for mark in TEXT) for part in parts]
        if len(text) == 2 and sum(text) == 1:
            orders.add(text[0])
    return orders.pop() if len(orders) == 1 else None


# ---- where a method can sit --------------------------------------------------------------------------------


def site(name: str, module: nn.Module, config: Any, layer_idx: int) -> Site | None:
    """The site that this module is, or None if it is no attention module of diffusers."""
    if not any(base.__module__.partition(".")[0] == "diffusers" for base in type(module).__mro__):
        return None
    if not (callable(getattr(module, "set_processor", None)) and hasattr(module, "processor")):
        return None
    processor = _original(module)
    reading = _read(processor)
    problem = reading.problem or _cross_attention(module, processor)
    heads = _first_int(module, "heads", "num_heads", "num_attention_heads") or 0
    inner = _width(module, "out_features", "to_q") or _first_int(module, "inner_dim") or 0
    head_dim = _first_int(module, "head_dim", "dim_head") or (inner // heads if heads else 0)
    hidden = _width(module, "in_features", "to_q", "to_qkv") or _first_int(module, "query_dim") or 0
    text = _width(module, "in_features", "add_q_proj", "to_added_qkv")
    if text is not None and (text != hidden or reading.text_first is None):
        hidden = 0  # no single input lines up with the tokens of q
    kv_heads = _first_int(module, "kv_heads", "num_kv_heads") if reading.grouped else None
    causal = reading.causal == "True" or (
        reading.causal == "attn.is_causal" and bool(getattr(module, "is_causal", False))
    )
    return Site(
        name=name,
        module=module,
        family="diffusers",
        config=config,
        layer_idx=None if problem else layer_idx,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        hidden_size=hidden,
        causal=causal,
        window=None,
        problem=problem,
    )


def _cross_attention(module: nn.Module, processor: Any) -> str | None:
    named = any("cross" in type(owner).__name__.lower() for owner in (module, processor))
    widths = {_width(module, "in_features", child) for child in ("to_q", "to_k")} - {None}
    if named or getattr(module, "is_cross_attention", False) is True or len(widths) > 1:
        return "cross-attention: its keys come from another sequence"
    return None


def _width(module: nn.Module, side: str, *children: str) -> int | None:
    found = (_first_int(getattr(module, child, None), side) for child in children)
    return next((width for width in found if width is not None), None)


def unfit(site: Site, methods: Sequence[Method]) -> str | None:
    """What diffusers' modules cannot give a method, or None."""
    processor = type(_original(site.module)).__name__
    joint = _width(site.module, "in_features", "add_q_proj", "to_added_qkv") is not None
    for method in methods:
        if method.rotary == "raw":
            return f"{method.name} needs q and k before rotary, which {processor} applies itself if there is one"
        if joint and "residual" in method.needs:
            return f"{method.name} needs the residual stream; joint attention has two, of text and of image"
    return None


# ---- on and off --------------------------------------------------------------------------------------------


def attach(site: Site, methods: list[Method]) -> None:
    """Put methods on a module: they become its child `patchattn`, and its processor is wrapped."""
    module = site.module
    attachment = Attachment(site, "sdpa", _base)
    attachment.methods = methods
    module.__dict__["_patchattn"] = attachment
    module.add_module("patchattn", nn.ModuleList(methods).to(site.device).train(module.training))
    _set_processor(attachment, _original(module))
    # From outside the patch cannot be seen, and it stays on when diffusers changes processors, as
    # `fuse_qkv_projections` and `set_attn_processor` do.
    module.__dict__["set_processor"] = functools.partial(_set_processor, attachment)
    module.__dict__["get_processor"] = functools.partial(_get_processor, attachment)


def detach(site: Site) -> None:
    """Take the methods off; the module has the very processor again that it had, and no other trace."""
    module = site.module
    attachment = module.__dict__.pop("_patchattn", None)
    if attachment is None:
        return
    attachment.enabled = False  # a wrapper that somebody kept is from now on what it wraps
    module.processor = _original(module)
    module._modules.pop("patchattn", None)
    for name in ("set_processor", "get_processor"):
        module.__dict__.pop(name, None)


def _set_processor(attachment: Attachment, processor: Any, *args: Any, **kwargs: Any) -> None:
    """`set_processor` of a patched module: the patch stays on, over the new processor."""
    if isinstance(processor, PatchedProcessor):
        processor = processor.original
    problem = _read(processor).problem
    if problem is not None:
        raise ValueError(f"{attachment.site.name} is patched, and {problem}; call patchattn.unpatch first")
    attachment.site.module.processor = _wrap(processor, attachment)


def _get_processor(attachment: Attachment, *args: Any, **kwargs: Any) -> Any:
    """`get_processor` of a patched module: the processor that diffusers put there."""
    return _original(attachment.site.module)


def _original(module: nn.Module) -> Any:
    processor = module.processor
    return processor.original if isinstance(processor, PatchedProcessor) else processor


# ---- while the model runs ----------------------------------------------------------------------------------


class ProcessorContext(AttentionContext):
    """One call of a diffusers attention module, where a joint query has text and image tokens."""

    __slots__ = ("text_first", "text_states")

    text_first: bool | None
    text_states: Tensor | None

    @property
    def hidden_states(self) -> Tensor:
        """`[B, T, C]`, what went into the module, token by token as q has them: text and image joined likewise."""
        name = self.attachment.site.name
        states, text = _tokens(self._hidden_states), self.text_states
        if text is not None:
            if self.text_first is None:
                raise RuntimeError(
                    f"{name}: its processor's code does not say in which order text and image tokens are joined, so "
                    "its hidden states cannot be lined up with q"
                )
            if text.shape[-1] != states.shape[-1]:
                raise RuntimeError(
                    f"{name}: its text tokens are {text.shape[-1]} wide and its image tokens {states.shape[-1]}, so "
                    "they are no single [B, T, C]"
                )
            states = torch.cat([text, states] if self.text_first else [states, text], dim=1)
        return self._lined_up(states, "hidden states")

    @property
    def residual(self) -> Tensor:
        """`[B, T, C]`, the residual stream that enters the block."""
        return self._lined_up(super().residual, "residual stream")

    def _lined_up(self, states: Tensor, what: str) -> Tensor:
        if (states.shape[0], states.shape[1]) != (self.q.shape[0], self.q.shape[2]):
            raise RuntimeError(
                f"{self.attachment.site.name}: its {what} {list(states.shape)} cannot be lined up with its q "
                f"{list(self.q.shape)}"
            )
        return states


def _tokens(states: Any) -> Tensor:
    return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states  # [B, C, height, width] in VAEs


class PatchedProcessor:
    """Runs the code of `original`, its attention exchanged for the methods on the module."""

    __slots__ = ("attachment", "original", "reading", "run")

    def __init__(self, original: Any, attachment: Attachment) -> None:
        reading = _read(original)
        run = _exchanged(type(original).__call__, reading, attachment)
        for name, value in zip(PatchedProcessor.__slots__, (attachment, original, reading, run), strict=True):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in PatchedProcessor.__slots__ or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)  # diffusers sets a backend on a processor

    def __reduce__(self) -> Any:
        return _wrap, (self.original, self.attachment)  # `run` belongs to this attachment: a copy makes its own


def _call(self: PatchedProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
    attachment = self.attachment
    if not attachment.enabled:
        return self.original(attn, *args, **kwargs)
    names = self.reading.arguments
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    ctx = ProcessorContext(attn, attachment)
    states, text = values[names[0]], values.get("encoder_hidden_states")
    ctx._hidden_states = states
    ctx.text_states = None if text is states else text  # some models say self-attention that way
    ctx.text_first = self.reading.text_first
    attachment.context = ctx
    capture_projections(attn, attachment)
    return self.run(self.original, attn, *args, **kwargs)


@functools.cache
def _wrapper_class(original: Any) -> type[PatchedProcessor]:
    """A class for each processor class: diffusers reads from the signature which arguments a processor takes."""
    call = FunctionType(_call.__code__, _call.__globals__, "__call__")
    call.__signature__ = inspect.signature(original.__call__)  # type: ignore[attr-defined]
    return type(f"Patched{original.__name__}", (PatchedProcessor,), {"__call__": call, "__slots__": ()})


def _wrap(original: Any, attachment: Attachment) -> Any:
    kind: Any = type(original)
    return _wrapper_class(kind)(original, attachment)


def _exchanged(function: Any, reading: _Reading, attachment: Attachment) -> Callable[..., Any]:
    """The function again, with another global where it calls attention."""
    scope = dict(function.__globals__)
    scope.pop("__name__", None)  # torch.compile would look globals up in the module of that name
    if reading.dispatched:
        scope[DISPATCH] = functools.partial(_attention, attachment, scope[DISPATCH], True)
    else:
        ours = functools.partial(_attention, attachment, functional.scaled_dot_product_attention, False)
        scope["F"] = SimpleNamespace(**{**vars(functional), "scaled_dot_product_attention": ours})
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _attention(
    attachment: Attachment, original: Callable[..., Tensor], dispatched: bool,
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """What a wrapped processor calls in place of `original`: `[B, T, H, D]` if dispatched, else `[B, H, T, D]`."""
    ctx = attachment.context
    assert isinstance(ctx, ProcessorContext)
    attachment.context = None
    given = {**dict(zip(OPTIONS, args, strict=False)), **kwargs}
    ctx.q, ctx.k, ctx.v = (x.transpose(1, 2) if dispatched else x for x in (query, key, value))
    ctx._given = Given(_four_dimensional(given.get("attn_mask"), dispatched, ctx))
    ctx.kwargs = {
        "scaling": given.get("scale"),
        "dropout": given.get("dropout_p", 0.0),
        "is_causal": given.get("is_causal", False),
        "original": original,
        "dispatched": dispatched,
        "given": given,
    }
    if ctx.text_states is not None and _tokens(ctx._hidden_states).shape[1] == ctx.q.shape[2]:
        raise RuntimeError(
            f"{attachment.site.name} was called as cross-attention (with encoder_hidden_states that do not join its "
            "query), which patchattn does not patch; name the other layers"
        )
    if not torch.compiler.is_compiling():
        attachment.calls += 1
    out = ctx.run()
    return out if dispatched else out.transpose(1, 2)


def _base(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, original: Callable[..., Tensor], dispatched: bool,
    given: dict[str, Any], **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The call that the processor's own code would have made; `given` has its mask as it was."""
    if dispatched:
        return original(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **given), None
    return original(q, k, v, **given).transpose(1, 2), None


def _four_dimensional(mask: Tensor | None, dispatched: bool, ctx: AttentionContext) -> Tensor | None:
    """`[B, 1, T or 1, S]`, read as the exchanged call would read it; diffusers repeats a mask for each head."""
    if mask is None:
        return None
    if dispatched and tuple(mask.shape) == (ctx.k.shape[0], ctx.k.shape[2]):
        return mask[:, None, None]
    return mask[(None,) * (4 - mask.dim())][:, :1]
