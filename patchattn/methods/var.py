"""VAR: attention that sinks into meaningless tokens goes back to the image.

See What You Are Told: Visual Attention Sink in Large Multimodal Models (Kang et al., 2025),
https://arxiv.org/abs/2503.03321

Some tokens take much attention and give little: the first one, some punctuation, and a few of every image. They show
by a huge value in the same few dimensions of the residual stream x, at every layer anew:

    sink token     max over d in sink_dims of |x_d| / rms(x) > tau
    moved rows     of a head and a query after an image: the image has at least min_visual of the weight, and at
                   least non_sink_min of that lies on image tokens that are no sinks
    there          sinks keep 1 - recycle of their weight; the rest goes to those other image tokens, in proportion
                   to the weight they have

Nothing is trained, K and V stay as they are. Differs from the published code: sinks are found anew for every prompt
and every row of a batch (there the first prompt's are kept), the last layer is left alone, as the paper says, and
with several images a query sees those before it. A row without an image computes exactly what the model does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from patchattn_kernels import grouped
from patchattn_kernels.grouped import IMAGE, IMAGE_SINK, PADDING, REST, TEXT_SINK, Rule

from ..context import visual_tokens
from ..method import Method, MethodConfig, register, runtime

if TYPE_CHECKING:
    from ..cache import PatchCacheLayer
    from ..context import AttentionContext
    from ..sites import Site

PRESETS = {"general": 0.8, "hallucination": 0.5, "vision": 0.9}  # the paper's non_sink_min


@register("var")
class VAR(Method):
    """Weight goes from sink tokens to the image, in the heads that look at it."""

    summary = "vision-language models look more at the image: weight of sinks goes back to it"
    paper = "See What You Are Told: Visual Attention Sink in Large Multimodal Models, arXiv 2503.03321"
    needs = frozenset({"residual", "model_inputs"})
    innermost = True
    example: ClassVar[dict[str, Any]] = {
        "sink_dims": (0, 1), "tau": 1.0, "non_sink_min": 0.2, "min_visual": 0.01, "skip_first": 0, "skip_last": 0,
        "generated_sinks": True,
    }  # fmt: skip

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Settings of VAR.

        Args:
            sink_dims: the dimensions of the residual stream in which sinks show, a property of the language model;
                "auto" looks for them when the model is patched (`patchattn.var.find_sink_dims`).
            tau: how far beyond the root mean square of the token; below the square root of the hidden size.
            recycle: the share of a sink's weight that goes to the image.
            preset: "general", "hallucination" or "vision": the paper's non_sink_min for such questions.
            non_sink_min: the least share of a row's weight on images that must lie on tokens that are no sinks;
                None: what the preset says. Above 1 nothing is moved.
            min_visual: the least weight on images.
            skip_first, skip_last: how many layers of the language model stay as they are.
            generated_sinks: whether tokens that come one at a time may be sinks, so that the result does not
                depend on how a text is cut into calls. The published code tests the prompt only.
            visual_mask: `[rows, tokens]`, True for tokens of an image, where the model itself does not tell; with
                `patchattn.settings` a different one for each prompt.
        """

        sink_dims: Any = "auto"
        tau: float = runtime(20.0)
        recycle: float = runtime(0.6)
        preset: str = runtime("hallucination")
        non_sink_min: float | None = runtime(None)
        min_visual: float = runtime(0.2)
        skip_first: int = 2
        skip_last: int = 1
        generated_sinks: bool = runtime(False)
        visual_mask: list[list[bool]] | None = runtime(None)  # noqa: RUF009

        def __post_init__(self) -> None:
            if self.sink_dims != "auto":
                dims = _integers(self.sink_dims)
                self._require(bool(dims) and min(dims, default=-1) >= 0, "sink_dims",
                              '"auto" or dimensions of the residual stream, such as (1415, 2533)')  # fmt: skip
                object.__setattr__(self, "sink_dims", dims)
            self._require(_number(self.tau) and self.tau > 0, "tau", "more than 0")
            self._require(_number(self.recycle) and 0 <= self.recycle <= 1, "recycle", "from 0 to 1")
            self._require_choice("preset", PRESETS)
            self._require(self.non_sink_min is None or (_number(self.non_sink_min) and self.non_sink_min >= 0),
                          "non_sink_min", "None or 0 or more")  # fmt: skip
            self._require(_number(self.min_visual) and 0 <= self.min_visual <= 1, "min_visual", "from 0 to 1")
            self._require_int("skip_first", 0)
            self._require_int("skip_last", 0)
            self._require(isinstance(self.generated_sinks, bool), "generated_sinks", "True or False")
            if self.visual_mask is not None:
                mask = torch.as_tensor(self.visual_mask)
                self._require(mask.dim() == 2, "visual_mask", "None or an array [rows, tokens]")
                object.__setattr__(self, "visual_mask", mask.bool().tolist())

        @property
        def rule(self) -> Rule:
            least = PRESETS[self.preset] if self.non_sink_min is None else self.non_sink_min
            return Rule(recycle=self.recycle, non_sink_min=least, min_visual=self.min_visual)

        def measure(self, model: nn.Module) -> MethodConfig:
            if self.sink_dims != "auto":
                return self
            from ..var import find_sink_dims

            dims = find_sink_dims(model, threshold=self.tau)
            if not dims:
                raise ValueError(
                    f"VAR: sink_dims is 'auto', but in no dimension does the first token of a text exceed {self.tau} "
                    "times its root mean square (tau) in all layers of the middle third; give sink_dims, or a lower tau"
                )
            return self.replace(sink_dims=dims)

    config: Config

    @classmethod
    def unfit(cls, site: Site, config: MethodConfig) -> str | None:
        assert isinstance(config, cls.Config)
        if not site.causal:
            return "its attention is not causal: sinks are a matter of language models"
        if not visual_tokens(site.model_config) and config.visual_mask is None:
            return "the model's config names no image token; say with visual_mask which tokens are an image"
        if site.window is not None:
            return f"this layer sees a window of {site.window} tokens only"
        if site.position_bias:
            return "it adds a position bias to the scores"
        if site.cache_problem is not None:
            return site.cache_problem
        if site.layer_idx is None or not site.hidden_size:
            return "its place among the layers or its hidden size could not be read from the module"
        if config.tau >= math.sqrt(site.hidden_size):
            return (f"tau is {config.tau}, and no value of {site.hidden_size} can be {math.sqrt(site.hidden_size):.4g} "
                    "times their root mean square or more; give a smaller tau")  # fmt: skip
        if config.sink_dims != "auto" and max(config.sink_dims) >= site.hidden_size:
            return f"sink_dims names {max(config.sink_dims)}, but its hidden states have {site.hidden_size} dimensions"
        return None

    def build(self, site: Site) -> None:
        layers = site.config.num_hidden_layers
        assert site.layer_idx is not None
        self.active = self.config.skip_first <= site.layer_idx < layers - self.config.skip_last
        self.heads = site.heads
        self.last: dict[str, tuple[Tensor, Tensor | None]] = {}  # of "prompt" and "step": kinds of keys, rows moved

    def cache_layer(self, static_length: int | None) -> PatchCacheLayer | None:
        if not self.active:
            return None
        from ..marked import MarkedDynamicLayer, MarkedStaticLayer

        return MarkedDynamicLayer() if static_length is None else MarkedStaticLayer(static_length)

    def forward(self, ctx: AttentionContext) -> Tensor:
        rule = self.config.rule
        if not self.active:
            return ctx.attend()
        known = self._kinds(ctx)
        if known is None or rule.recycle == 0 or rule.non_sink_min > 1:
            return ctx.attend()
        kinds, images = known
        mask, keys = ctx.mask, ctx.k.shape[2]
        out, moved = grouped(
            ctx.q, ctx.k, ctx.v, kinds, images, rule,
            past=ctx.past_length, causal=mask.causal,
            keep=None if mask.dense is None else lambda a, b: mask.keep(a, b, keys, ctx.past_length, 0, ctx.q.device),
            scale=ctx.scaling, softcap=ctx.softcap, sinks=ctx.sinks, dropout=ctx.dropout,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            self.last["step" if self._generated(ctx) else "prompt"] = kinds, moved
        return out.transpose(1, 2)

    # ---- what each key is -----------------------------------------------------------------------------------

    def _generated(self, ctx: AttentionContext) -> bool:
        """Whether this call is one token after others: not of the prompt, as far as one can tell."""
        past = ctx.past_length
        return ctx.q.shape[2] == 1 and (isinstance(past, Tensor) or past > 0)

    def _kinds(self, ctx: AttentionContext) -> tuple[Tensor, Tensor] | None:
        """The kind of every key `[B, S]` and how many image keys every query has `[B, T]`; None: nothing to move."""
        cache: Any = ctx.cache
        if self._generated(ctx) and not self.config.generated_sinks:
            if not cache.noteworthy:
                return None
            marks = cache.marked(ctx.k.shape[2])
        else:
            visual = self._visual(ctx)
            if visual is None and cache is None:
                return None
            new = self._classify(ctx, visual)
            found = visual is not None and (torch.compiler.is_compiling() or bool((new == IMAGE_SINK).any()))
            if cache is not None:
                cache.mark(new, ctx.past_length)
                cache.noteworthy |= found
                found = cache.noteworthy
            if not found:
                return None
            marks = new if cache is None else cache.marked(ctx.k.shape[2])
        mask = ctx.mask
        if mask.padding is not None:
            marks = marks.masked_fill(~mask.key_padding(marks.shape[1], 0), PADDING)
        return marks, self._images(ctx, marks)

    def _visual(self, ctx: AttentionContext) -> Tensor | None:
        """`[B, T]`, which tokens of this call are of an image, or None if none is."""
        if self.config.visual_mask is not None:
            visual = _at(torch.tensor(self.config.visual_mask, device=ctx.q.device), ctx)
            return visual if torch.compiler.is_compiling() or bool(visual.any()) else None
        inputs = ctx.model_inputs
        if inputs is None or inputs.visual is None:
            raise RuntimeError("VAR: it is unknown which tokens are of an image, since a part of the model was called, "
                               "or no input_ids; call the whole model with input_ids, or give visual_mask")  # fmt: skip
        if not (torch.compiler.is_compiling() or inputs.has_visual):
            return None
        if inputs.visual.shape[1] != ctx.q.shape[2]:
            raise ValueError(f"VAR: the model was given {inputs.visual.shape[1]} tokens, but its layers get "
                             f"{ctx.q.shape[2]}; say with visual_mask which of these are of an image")  # fmt: skip
        return inputs.visual.to(ctx.q.device)

    def _classify(self, ctx: AttentionContext, visual: Tensor | None) -> Tensor:
        """What the tokens of this call are: `[B, T]`."""
        with torch.no_grad():
            sink = sink_value(ctx.residual, self.config.sink_dims) > self.config.tau
        kinds = torch.where(sink, TEXT_SINK, REST)
        if visual is not None:
            kinds = torch.where(visual, torch.where(sink, IMAGE_SINK, IMAGE), kinds)
        return kinds.to(ctx.q.device, torch.int8)

    def _images(self, ctx: AttentionContext, kinds: Tensor) -> Tensor:
        """How many image keys each query reads; 0 where none is a sink or the query is of an image itself."""
        image, sink = (kinds == IMAGE) | (kinds == IMAGE_SINK), kinds == IMAGE_SINK
        cache: Any = ctx.cache
        if self._generated(ctx):
            if cache is not None and cache.counts is not None:
                return cache.counts[:, None]
            counts = image.sum(dim=1).where(sink.any(dim=1), 0)
            if cache is not None:
                cache.counts = counts
            return counts[:, None]
        dense = ctx.mask.dense
        if dense is not None:
            image_keys, sink_keys = ((dense[:, 0] & keys[:, None]).sum(dim=-1) for keys in (image, sink))
        else:
            image_keys, sink_keys = (keys.cumsum(dim=1).index_select(1, ctx.positions) for keys in (image, sink))
        return image_keys.where((sink_keys > 0) & ~image.index_select(1, ctx.positions), 0)

    def report(self) -> dict[str, Any]:
        if "prompt" not in self.last:
            return {}
        kinds, moved = self.last["prompt"]
        said = {name: round(float((kinds == kind).sum()) / len(kinds), 1)
                for name, kind in (("image sinks", IMAGE_SINK), ("other sinks", TEXT_SINK))}  # fmt: skip
        return {**said, "rows moved": f"{float(moved.float().mean()):.1%}"} if moved is not None else said


def sink_value(residual: Tensor, sink_dims: Sequence[int]) -> Tensor:
    """How far the sink dimensions of each token stand out: `[B, T, C]` to `[B, T]`; at most the square root of C."""
    wide = residual.float()
    rms = wide.square().mean(dim=-1).add(1e-6).sqrt()
    return wide[..., list(sink_dims)].abs().amax(dim=-1) / rms


def _at(mask: Tensor, ctx: AttentionContext) -> Tensor:
    """The columns of `mask` for the tokens of this call, False beyond its end; its rows repeated for beams."""
    rows, length = mask.shape
    if ctx.q.shape[0] % rows:
        raise ValueError(f"VAR: visual_mask has {rows} rows, the batch {ctx.q.shape[0]}; give one row for each")
    there = mask.index_select(1, ctx.positions.clamp(max=length - 1)) & (ctx.positions < length)
    return there.repeat_interleave(ctx.q.shape[0] // rows, dim=0)


def _integers(values: Any) -> tuple[int, ...]:
    values = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(values, int):
        values = (values,)
    good = isinstance(values, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    return tuple(values) if good else ()


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
