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
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..context import Attachment, AttentionContext
from ..method import Method
from ..sites import Site, _first_int

SDPA, DISPATCH = "F.scaled_dot_product_attention", "dispatch_attention_fn"
OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")  # of both, after query, key, value
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


@functools.cache
def _read(function: Callable[..., Any]) -> _Reading:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return _Reading("its source code cannot be read")
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in (SDPA, DISPATCH)
    ]
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While, ast.comprehension))]
    if len(calls) != 1 or any(calls[0] in ast.walk(loop) for loop in loops):
        count = "in a loop" if len(calls) == 1 else f"{len(calls)} times"
        return _Reading(f"it calls {SDPA} or {DISPATCH} {count}; patchattn needs exactly one call")
    call = calls[0]
    dispatched = ast.unparse(call.func) == DISPATCH
    scope = getattr(function, "__globals__", {})
    if not dispatched and scope.get("F") is not functional:
        return _Reading("its F is not torch.nn.functional")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    query = ast.unparse(call.args[0] if call.args else keywords["query"])
    return _Reading(
        dispatched=dispatched,
        arguments=tuple(inspect.signature(function).parameters)[2:],
        text_first=_text_first(tree, query, before=call.lineno),
        causal=ast.unparse(keywords["is_causal"]) if "is_causal" in keywords else "False",
        grouped="enable_gqa" in keywords,
    )


def _text_first(tree: ast.AST, query: str, before: int) -> bool | None:
    """The order of `query = torch.cat([text part, image part])`, told by the names of the two parts."""
    orders = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.lineno < before):
            continue
        joined = ast.unparse(node.value.func) == "torch.cat" and ast.unparse(node.targets[0]) in (
            query,
            "hidden_states",
        )
        parts = getattr(node.value.args[0], "elts", []) if joined and node.value.args else []
        text = [any(mark in ast.unparse(part) for mark in TEXT) for part in parts]
        if len(text) == 2 and sum(text) == 1:
            orders.add(text[0])
    return orders.pop() if len(orders) == 1 else None


def _call_of(processor: Any) -> Any:
    return type(processor).__call__


def _problem(processor: Any) -> str | None:
    """Why this processor cannot be wrapped, naming its class, or None."""
    kind = type(processor).__name__
    if isinstance(processor, nn.Module):
        return f"its processor {kind} has weights of its own"
    if not isinstance(_call_of(processor), FunctionType) or inspect.unwrap(_call_of(processor)) is not _call_of(
        processor
    ):
        return f"its processor {kind} is no plain class with a __call__"
    problem = _read(_call_of(processor)).problem
    return f"its processor {kind} cannot be wrapped: {problem}" if problem else None


# ---- where a method can sit --------------------------------------------------------------------------------


def site(name: str, module: nn.Module, config: Any, layer_idx: int) -> Site | None:
    """The site that this module is, or None if it is no attention module of diffusers."""
    if not any(base.__module__.partition(".")[0] == "diffusers" for base in type(module).__mro__):
        return None
    if not (callable(getattr(module, "set_processor", None)) and hasattr(module, "processor")):
        return None
    processor = _original(module)
    problem = _problem(processor)
    reading = _read(_call_of(processor)) if problem is None else _Reading(problem)
    problem = problem or _cross_attention(module, processor)
    heads = _first_int(module, "heads", "num_heads", "num_attention_heads") or 0
    head_dim = _first_int(module, "head_dim", "dim_head", "attention_head_dim")
    head_dim = head_dim or (_width(module, "out_features", "to_q") or _first_int(module, "inner_dim") or 0) // max(
        heads, 1
    )
    hidden = _width(module, "in_features", "to_q", "to_qkv") or _first_int(module, "query_dim") or 0
    text = _width(module, "in_features", "add_q_proj", "to_added_qkv")
    if text is not None and (text != hidden or reading.text_first is None):
        hidden = 0  # no single input lines up with the tokens of q
    kv_heads = _first_int(module, "kv_heads", "num_kv_heads") if reading.grouped else None
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
        causal=reading.causal == "True"
        or ("is_causal" in reading.causal and bool(getattr(module, "is_causal", False))),
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
    for method in methods:
        if method.rotary == "raw":
            return f"{method.name} needs q and k before rotary, but diffusers' {processor} applies it inside, if any"
        if "residual" in method.needs and _width(site.module, "in_features", "add_q_proj", "to_added_qkv") is not None:
            return (
                f"{method.name} needs the residual stream, but in joint attention there are two: of text and of image"
            )
    return None


# ---- on and off --------------------------------------------------------------------------------------------


def attach(site: Site, methods: list[Method]) -> None:
    """Put methods on a module: they become its child `patchattn`, and its processor is wrapped."""
    module = site.module
    attachment = Attachment(site, "sdpa", _base)
    attachment.methods = methods
    module.__dict__["_patchattn"] = attachment
    module.add_module("patchattn", nn.ModuleList(methods))
    module.patchattn.to(site.device)
    module.patchattn.train(module.training)
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
    problem = _problem(processor)
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

    @property
    def hidden_states(self) -> Tensor:
        """`[B, T, C]`, what went into the module, token by token as q has them: text and image joined likewise."""
        name = self.attachment.site.name
        states, text = _tokens(self._hidden_states), self.text_states
        if text is not None:
            if self.text_first is None:
                raise RuntimeError(f"{name}: how its processor joins text and image tokens cannot be read from its code, "
                                   "so its hidden states cannot be lined up with q")  # fmt: skip
            if text.shape[-1] != states.shape[-1]:
                raise RuntimeError(f"{name}: its text tokens are {text.shape[-1]} wide and its image tokens "
                                   f"{states.shape[-1]}, so they are no single [B, T, C]")  # fmt: skip
            states = torch.cat([text, states] if self.text_first else [states, text], dim=1)
        return self._lined_up(states, "hidden states")

    @property
    def residual(self) -> Tensor:
        """`[B, T, C]`, the residual stream that enters the block."""
        return self._lined_up(super().residual, "residual stream")

    def _lined_up(self, states: Tensor, what: str) -> Tensor:
        if (states.shape[0], states.shape[1]) != (self.q.shape[0], self.q.shape[2]):
            raise RuntimeError(f"{self.attachment.site.name}: its {what} {list(states.shape)} cannot be lined up with its "
                               f"q {list(self.q.shape)}")  # fmt: skip
        return states


def _tokens(states: Any) -> Tensor:
    return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states  # [B, C, height, width] in VAEs


class PatchedProcessor:
    """Runs the code of `original`, its attention exchanged for the methods on the module."""

    __slots__ = ("attachment", "original", "reading", "run")

    def __init__(self, original: Any, attachment: Attachment) -> None:
        function = _call_of(original)
        reading = _read(function)
        for name, value in (("original", original), ("attachment", attachment), ("reading", reading),
                            ("run", _exchanged(function, reading, attachment))):  # fmt: skip
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
    return self.run(self.original, attn, *args, **kwargs)


@functools.cache
def _wrapper_class(original: type) -> type[PatchedProcessor]:
    """A class for each processor class: diffusers reads from the signature which arguments a processor takes."""
    call = FunctionType(_call.__code__, _call.__globals__, "__call__")
    call.__signature__ = inspect.signature(original.__call__)  # type: ignore[attr-defined]
    return type(f"Patched{original.__name__}", (PatchedProcessor,), {"__call__": call, "__slots__": ()})


def _wrap(original: Any, attachment: Attachment) -> PatchedProcessor:
    return _wrapper_class(type(original))(original, attachment)


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
    attachment: Attachment, original: Callable[..., Tensor], dispatched: bool, query: Tensor, key: Tensor, value: Tensor,
    *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """What a wrapped processor calls in place of `original`: `[B, T, H, D]` if dispatched, else `[B, H, T, D]`."""
    ctx = attachment.context
    attachment.context = None
    given = {**dict(zip(OPTIONS, args, strict=False)), **kwargs}
    ctx.q, ctx.k, ctx.v = (x.transpose(1, 2) if dispatched else x for x in (query, key, value))
    ctx._given_mask = _four_dimensional(given.get("attn_mask"), dispatched, ctx)
    ctx.kwargs = {
        "scaling": given.get("scale"),
        "dropout": given.get("dropout_p", 0.0),
        "is_causal": given.get("is_causal", False),
        "original": original,
        "dispatched": dispatched,
        "given": given,
    }
    if ctx.text_states is not None and _tokens(ctx._hidden_states).shape[1] == ctx.q.shape[2]:
        raise RuntimeError(f"{attachment.site.name} was called as cross-attention (with encoder_hidden_states that do not "
                           "join its query), which patchattn does not patch; name other layers")  # fmt: skip
    if not torch.compiler.is_compiling():
        attachment.calls += 1
    out = ctx.attend()
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
