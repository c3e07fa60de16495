"""Every architecture of the installed transformers at toy size, patched and compared with itself unpatched.

    python -m tests.architectures llama gemma2                     what happens with some models
    python -m tests.architectures --write docs/architectures.md    the table of all of them

The models are made from their default configurations by the rules below, which go by the names of the fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

import patchattn
from patchattn.context import AttentionContext
from patchattn.method import Method
from patchattn.record import attachment_of, patch_of
from patchattn.sites import Site

VOCAB, RESERVED = 199, 64  # token ids below RESERVED are kept for what a model calls special
WINDOW = 4  # of sliding and chunked attention: shorter than the test's texts

KINDS = {
    "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image and text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}

# Pattern on a field's name, and the largest value that the field may keep. The first that fits counts.
SIZES: list[tuple[str, int]] = [
    (r"type_vocab|_types$", 4),
    (r"vocab|num_embeddings|codebook_size|position_embedding_size$", VOCAB),
    (r"nextn_predict|mtp", 0),
    (r"first_k_dense|num_dense_layers|max_window_layers", 1),
    (r"per_tok$|moe_top_?k|moe_k$|top_k_experts|topk_group|shared_experts$", 1),
    (r"n_group$", 2),
    (r"intermediate|ffn|d_?ff$|dim_ff|n_inner|mlp_dim|feed_forward|d_inner", 48),
    (r"experts|expert_num", 4),
    (r"top_?k", 8),
    (r"groups$", 2),
    (r"(key_value|kv)_heads|kv_n_heads|num_key_heads", 2),
    (r"mamba_n(um)?_heads|n_mamba_heads", 8),
    (r"heads|^n_head$|num_filters|heads_per_layer", 4),
    (r"head_dim|head_size|d_kv|d_head|dim_head|key_dim", 16),
    (r"_rank$|lowrank", 16),
    (r"position_embeddings|n_positions|n_ctx|max_seq_len|_positions$|context_length|max_distance|rel_extent", 128),
    (r"window|attention_chunk_size|local_attention|chunk_length", WINDOW),
    (r"chunk_size$|block_size$", 8),
    (r"layers?$|^depth|blocks$|_depth$|layers_per_stack", 2),
    (r"patch_size$", 8),
    (r"(image|img|crop)_size$|resolution$", 32),
    (r"image_seq|num_patches|tokens_per_image|query_tokens|latents|query_num|image_tokens", 16),
    (r"state", 16),
    (r"hidden|d_model|n_embd|embed|dim$|width|channels|_size$|d_ssm|d_rel", 64),
]  # fmt: skip
# What some configurations have and leave off by default, each tried as a variant.
VARIANTS = {
    "windowed": {"use_sliding_window": True, "sliding_window": WINDOW},
    "shared keys": {"num_kv_shared_layers": 0},  # filled in: the second half of the layers
}
LAYER_COUNTS = (
    r"^(num_hidden_layers|n_layers?|num_layers|layers|(encoder|decoder)_layers|num_(encoder|decoder)_layers)$"
)

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}

# What the rules cannot know, by model type.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 4},
    "blt": {"num_hidden_layers": 2},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 20, "IMGIMGBS00Z": 21}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "cosmos3_edge_text": MROPE,
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 1},
    "deepseek_v2": {"num_experts_per_tok": 1},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 1, "moe_intermediate_size": 48},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 1},
    "dots3_note_text": {"sliding_window": WINDOW, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
                        "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 32,
                        "swa_qk_nope_head_dim": 24, "swa_v_head_dim": 16},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 20, "<image>": 21}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "gemma3n_text": {"intermediate_size": 48, "num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "glm4v_text": MROPE,
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 2},
    "glm_ocr_text": MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl_text": {"head_dim": 16, **MROPE},
    "kimi_linear": {"num_experts": 4},
    "kolibri1": {"num_local_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"], "num_hidden_layers": 3},
    "longcat_flash": {"moe_topk": 2},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mamba2": {"num_heads": 8},
    "mimi": {"codebook_size": 128},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "paddleocr_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": WINDOW},
    "swin": {"image_size": 128, "embed_dim": 32, "num_heads": (2, 2, 4, 4)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
}  # fmt: skip


class NotTried(Exception):
    """Why a model is not in the sweep."""


# ---- toy models --------------------------------------------------------------------------------------------


def shrink(config_class: type[PreTrainedConfig], variant: str = "") -> PreTrainedConfig:
    """The default configuration of a class with every size made small.

    A variant turns something on where a configuration has it and leaves it off by default.
    """
    default = config_class()
    full = vars(default)
    special = SPECIAL.get(config_class.model_type or config_class.__name__, {})
    count, layers = _layer_count(full), special.get("num_hidden_layers") or _layers_needed(default)
    names = {field.name for field in dataclasses.fields(config_class)}
    turned_on = {
        name: value for name, value in VARIANTS.get(variant, {}).items() if name in names and not full.get(name)
    }
    if "num_kv_shared_layers" in turned_on:
        turned_on, layers = {"num_kv_shared_layers": layers}, 2 * layers
    ids = iter(range(3, RESERVED))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        name = field.name
        value = full.get(config_class.attribute_map.get(name, name))
        if isinstance(value, PreTrainedConfig):
            changes[name] = shrink(type(value), variant)
        elif name in turned_on:
            changes[name] = turned_on[name]
        elif re.search("(key_value|kv)_heads$", name) and value != 1:
            changes[name] = 4 if "kv_lora_rank" in full else 2
        elif name == "head_dim" and value is None:
            changes[name] = 16
        elif isinstance(value, (list, tuple)) and len(value) == count:
            if field.default is not None or (isinstance(value[0], str) and not turned_on):
                changes[name] = type(value)(value[:layers])
        elif field.default is None or isinstance(value, bool):
            continue
        elif isinstance(value, int):
            changes[name] = _smaller(name, value, layers, ids)
        elif isinstance(value, (list, tuple)) and "depth" in name:
            changes[name] = type(value)(min(item, 2) for item in value)
    return config_class(**{**changes, **special})


def _smaller(name: str, value: int, layers: int, ids: Any) -> int:
    if re.search(r"(_id|_index|_idx|token_ids?)$", name):
        return value if value < 3 else next(ids)
    if re.search(LAYER_COUNTS, name):
        return min(value, layers)
    for pattern, most in SIZES:
        if re.search(pattern, name):
            return min(value, most)
    return value


def _layer_count(values: dict[str, Any]) -> int | None:
    return next(
        (value for name, value in values.items() if re.search(LAYER_COUNTS, name) and isinstance(value, int)), None
    )


def _layers_needed(config: PreTrainedConfig) -> int:
    """The first layers of a model that have one of every kind, and at least two."""
    count, needed = _layer_count(vars(config)), 2
    kinds = [*vars(config).values(), *(getattr(config, name, None) for name in ("layer_types", "layers_block_type"))]
    for value in kinds:
        if isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(item, str) for item in value):
            needed = max(needed, max(list(value).index(kind) for kind in set(value)) + 1)
    return needed


def model_class(kind: str, model_type: str) -> type[nn.Module]:
    name = KINDS[kind][model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def _decoder(kind: str, config: PreTrainedConfig) -> PreTrainedConfig:
    if kind == "text" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def build(kind: str, model_type: str, variant: str = "") -> nn.Module:
    """A toy model with weights large enough that a wrong mask shows."""
    cls = model_class(kind, model_type)
    config = _decoder(kind, shrink(cls.config_class, variant))
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def outline(kind: str, model_type: str) -> nn.Module:
    """The model as it is by default, without weights: enough to ask what could be patched."""
    cls = model_class(kind, model_type)
    with torch.device("meta"):
        return cls(_decoder(kind, cls.config_class()))


# ---- what is asked of a model ------------------------------------------------------------------------------

LENGTH, PADDING, CHUNKS = 12, 3, (5, 4, 1, 1, 1)


class Runs:
    """The same calls on a model, before, while and after it is patched. Each gives numbers of real tokens."""

    def __init__(self, kind: str, model: nn.Module) -> None:
        self.model = model
        self.noted = [
            (module, [key for key, value in vars(module).items() if value is None]) for module in model.modules()
        ]
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(RESERVED, VOCAB, (2, LENGTH), generator=generator)
        self.extra: dict[str, Tensor] = {}
        if getattr(model.config, "is_encoder_decoder", False) and kind == "image and text":
            self.extra["decoder_input_ids"] = self.ids
        calls = [self.plain, self.left, self.right, self.decode, self.static, self.generate]
        if kind == "image":
            config = model.config.get_text_config()
            size = getattr(config, "image_size", None) or 32
            size = size if isinstance(size, (tuple, list)) else (size, size)
            self.extra["pixel_values"] = torch.randn(2, getattr(config, "num_channels", 3), *size, generator=generator)
            if "spatial_shapes" in inspect.signature(model.forward).parameters:  # takes patches of images of any shape
                count, width = model.config.vision_config.num_patches, 3 * model.config.vision_config.patch_size**2
                self.extra["pixel_values"] = torch.randn(2, count, width, generator=generator)
                self.extra["spatial_shapes"] = torch.tensor([[4, 4], [2, 6]])
                self.extra["pixel_attention_mask"] = torch.arange(count) < torch.tensor([[16], [12]])
            calls = [self.image]
        self.calls: dict[str, Callable[[], Tensor]] = {call.__name__: call for call in calls}

    def image(self) -> Tensor:
        return self.model(**self.extra).logits

    def plain(self) -> Tensor:
        return self.model(input_ids=self.ids, **self.extra).logits

    def _padded(self, place: slice) -> tuple[Tensor, Tensor]:
        mask, ids = torch.ones_like(self.ids), self.ids.clone()
        mask[1, place], ids[1, place] = 0, 1
        return ids, mask

    def left(self) -> Tensor:
        ids, mask = self._padded(slice(0, PADDING))
        return self.model(input_ids=ids, attention_mask=mask, **self.extra).logits[mask.bool()]

    def right(self) -> Tensor:
        ids, mask = self._padded(slice(LENGTH - PADDING, LENGTH))
        return self.model(input_ids=ids, attention_mask=mask, **self.extra).logits[mask.bool()]

    def decode(self) -> Tensor:
        """Left-padded, in chunks and then token by token, with a cache."""
        ids, mask = self._padded(slice(0, PADDING))
        cache, first, logits = None, 0, []
        for size in CHUNKS:
            out = self.model(input_ids=ids[:, first : first + size], attention_mask=mask[:, : first + size],
                             past_key_values=cache, use_cache=True, **self.extra)  # fmt: skip
            cache = out.past_key_values
            if cache is None:
                raise ValueError("it returns no cache")
            logits.append(out.logits)
            first += size
        return torch.cat(logits, dim=1)[mask.bool()]

    def generate(self, **options: Any) -> Tensor:
        """Logits of three tokens after a left-padded prompt."""
        ids, mask = self._padded(slice(0, PADDING))
        options = dict(options, max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
        return torch.stack(out.logits)

    def static(self) -> Tensor:
        """The same with a cache that has its full length from the start."""
        return self.generate(cache_implementation="static", disable_compile=True)

    def run(self, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What these calls give, and for those that raise, what they say."""
        results, failures = {}, {}
        for name in names:
            torch.manual_seed(2)  # some models start from noise
            try:
                with torch.no_grad():
                    results[name] = self.calls[name]()
            except Exception as error:
                failures[name] = f"{name}: {brief(error)}"
            for module, keys in self.noted:  # what a model noted in one call is not for the next
                vars(module).update(dict.fromkeys(key for key in keys if not key.startswith("_")))
        return results, failures


def brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def worst(results: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    return max((results[name] - reference[name]).abs().max().item() for name in results)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that unpatch must give back."""
    modules = list(model.named_modules())
    return {
        "parameters": list(model.state_dict()),
        "config": model.config.to_dict(),
        "implementation": [(name, module.config._attn_implementation) for name, module in modules
                           if isinstance(vars(module).get("config"), PreTrainedConfig)],
        "attributes": [(name, sorted(vars(module)), sorted(module._modules)) for name, module in modules],
        "hooks": [(name, [*module._forward_pre_hooks, *module._forward_hooks]) for name, module in modules],
    }  # fmt: skip


class Checked(Method):
    """Dense, and a check that the module was read rightly."""

    def build(self, site: Site) -> None:
        self.site = site

    def forward(self, ctx: AttentionContext) -> Tensor:
        site = self.site
        read = dict(heads=site.heads, kv_heads=site.kv_heads, head_dim=site.head_dim, hidden_size=site.hidden_size)
        seen = dict(heads=ctx.q.shape[1], kv_heads=ctx.k.shape[1], head_dim=ctx.v.shape[-1],
                    hidden_size=ctx.hidden_states.shape[-1])  # fmt: skip
        if site.pieces:
            read["head_dim"] = seen["head_dim"]  # a piece may hold a part of the values
        assert read == seen, f"{site.name}: read {read}, but the call has {seen}"
        out = ctx.attend()
        assert out.shape[:3] == (ctx.q.shape[0], ctx.q.shape[2], ctx.q.shape[1]), f"{site.name}: out is {out.shape}"
        return out


class Blind(Method):
    """Attends to nothing, which must change the logits wherever the attention is reached."""

    def forward(self, ctx: AttentionContext) -> Tensor:
        return torch.zeros_like(ctx.attend())


# ---- the sweep ---------------------------------------------------------------------------------------------

TOLERANCE = 1e-5
SOFT = 1e-4  # for another order of sums, through some layers with large weights


@dataclasses.dataclass
class Row:
    """What happened with one architecture."""

    kind: str
    model_type: str
    result: str = "no"  # "yes", "no", or "not tried"
    reason: str = ""
    error: float | None = None  # the largest difference of logits, over all calls
    base: str = ""
    layers: str = ""
    duo: str = ""
    gated: str = ""
    checks: list[str] = dataclasses.field(default_factory=list)

    @property
    def works(self) -> bool:
        return self.result == "yes"


def sweep(kind: str, model_type: str) -> Row:
    """Put one architecture through everything."""
    row = Row(kind, model_type)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # toy sizes: threads only wait for each other
    try:
        model = _toy(row)
        if model is not None:
            _examine(row, model)
    except (NotTried, ImportError) as error:
        row.result, row.reason = "not tried", brief(error).partition(". You can install")[0]
    except AssertionError as error:
        row.reason = brief(error)
    finally:
        torch.set_num_threads(threads)
    return row


def _toy(row: Row) -> nn.Module | None:
    """A toy model that can be patched, or None and the reason why this architecture cannot be."""
    try:
        model, failure = build(row.kind, row.model_type), None
    except ImportError:
        raise
    except Exception as error:
        try:
            model, failure = outline(row.kind, row.model_type), error
        except Exception:
            raise NotTried(f"no toy model: {brief(error)}") from error
    try:
        patchattn.patch(model, Checked())
    except ValueError as error:
        row.reason = re.sub(r"^\w+ has no attention module that patchattn can reach: ", "", brief(error))
        return None
    if failure is not None:
        raise NotTried(f"no toy model: {brief(failure)}")
    return patchattn.unpatch(model)


def _examine(row: Row, model: nn.Module) -> None:
    runs = Runs(row.kind, model)
    first = next(iter(runs.calls))
    reference, failures = runs.run(runs.calls)
    if first in failures:
        raise NotTried(f"the sweep gives it too little: {failures[first]}")
    if not all(value.isfinite().all() for value in reference.values()):
        raise NotTried("the toy model gives no finite logits")
    before = state_of(model)

    patchattn.patch(model, Checked())
    row.error = _same(runs, reference, TOLERANCE)
    sites = patch_of(model).patched
    called = [site for site in sites if attachment_of(site.module).calls]
    total = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0
    row.layers = f"{len(called)} of {total}" if len(called) < total else str(len(called))
    if not called:
        missed = patchattn.inspect(model).unreachable[0]
        reason = f"{missed.name}, a {missed.kind}: {missed.reason}"
        raise AssertionError(f"the attention it uses cannot be patched: {reason}")
    row.base = attachment_of(called[0].module).base
    patchattn.unpatch(model)
    for name, value in state_of(model).items():
        assert value == before[name], f"unpatch does not give back: {name}"
    assert worst(runs.run([first])[0], reference) == 0, "logits differ after unpatch"

    patchattn.patch(model, Blind())
    assert worst(runs.run([first])[0], reference) > 1e-3, "the logits do not depend on what was patched"
    patchattn.unpatch(model)

    row.gated = _fits(runs, patchattn.GatedAttention(), reference, TOLERANCE)
    last = dict([list(reference.items())[-1]])
    row.duo = _fits(runs, patchattn.DuoAttention(heads=0.5, sink=2, recent=4), last, float("inf"))
    if row.duo == "yes":  # with a window over everything, streaming heads are full ones
        row.duo = _fits(runs, patchattn.DuoAttention(heads=0.5, sink=2, recent=64), reference, SOFT)
    _variants(row, model, [name for name in ("left", "decode") if name in reference] or [first])
    row.result = "yes"


def _same(runs: Runs, reference: dict[str, Tensor], tolerance: float) -> float:
    results, failures = runs.run(reference)
    assert not failures, next(iter(failures.values()))
    error = worst(results, reference)
    wrong = {name: worst({name: results[name]}, reference) for name in results}
    assert error <= tolerance, f"logits differ: {', '.join(f'{n} {e:.2g}' for n, e in wrong.items() if e > tolerance)}"
    return error


def _fits(runs: Runs, method: Method, reference: dict[str, Tensor] | None, tolerance: float = 0.0) -> str:
    """Yes, or why this method does not fit."""
    try:
        patchattn.patch(runs.model, method)
    except ValueError as error:
        return re.sub(r"^.* cannot take \w+: ", "", brief(error))
    try:
        _same(runs, reference, tolerance)
    except AssertionError as error:
        return f"fails: {error}"
    finally:
        patchattn.unpatch(runs.model)
    return "yes"


def _variants(row: Row, model: nn.Module, calls: list[str]) -> None:
    """The same with eager attention, and with what the model has to turn on."""
    if row.base != "eager":
        model.set_attn_implementation("eager")
        _again(row, model, "eager", calls)
    cls = model_class(row.kind, row.model_type)
    usual = shrink(cls.config_class).to_dict()
    for variant in VARIANTS:
        if shrink(cls.config_class, variant).to_dict() != usual:
            _again(row, build(row.kind, row.model_type, variant), variant, calls)


def _again(row: Row, model: nn.Module, name: str, calls: list[str]) -> None:
    runs = Runs(row.kind, model)
    reference, _ = runs.run(calls)
    try:
        patchattn.patch(model, Checked())
        row.error = max(row.error or 0.0, _same(runs, reference, TOLERANCE))
    except (ValueError, AssertionError) as error:
        raise AssertionError(f"{name} attention: {brief(error)}") from error
    row.checks.append(name)


# ---- the table ---------------------------------------------------------------------------------------------

HEADINGS = (
    "model type",
    "works",
    "difference",
    "attention",
    "patched",
    "DuoAttention",
    "GatedAttention",
    "why not",
)
PAGE = """# Architectures

Written by `python -m tests.architectures --write docs/architectures.md`, on transformers {transformers} and
torch {torch}; do not edit it by hand.

**{works} of {count} architectures work**: {text} of {all_text} causal language models, {image} of {all_image} image
classifiers, {both} of {all_both} models of images and text (given text alone); they are {distinct} different model
types. {tried} could not be tried here, most because they want a picture or a package that is not installed.

Each is made at toy size from its default configuration, with random weights, sliding windows of {window} tokens, and
at least one layer of every kind it has. It *works* if, with its attention patched by a method that computes what the
model computes, all this holds:

- its logits are those of the unpatched model, to {tolerance:g} (*difference* says how far they are in fact): of plain,
  left-padded and right-padded batches, decoded with a cache in chunks and token by token, and in `generate` with a
  dynamic and (where the unpatched model can) a static cache;
- heads, sizes and hidden states are what patchattn read from the module beforehand;
- the logits change when the patched attention is blinded, so it is the attention the model uses;
- after unpatch parameters, hooks, attributes, config and logits are what they were.

*Attention* is what the model loads with, then what was tried besides: eager attention, and sliding windows and layers
with shared keys where the default configuration leaves them off. *Patched* counts attention modules, of all layers
where some have none: mixtures of experts, linear attention and whatever else there is stay as they are. DuoAttention
fits where half the KV heads of some layers can stream; with a window over everything it then gives the unpatched
logits, to {soft:g}. GatedAttention fits where a gate that is the identity changes nothing.
"""


def _cell(value: str) -> str:
    return value.replace("|", "/").replace("<", "&lt;").replace("*", "\\*")


def _line(row: Row) -> str:
    error = "" if row.error is None or not row.works else ("0" if row.error == 0 else f"{row.error:.1e}")
    attention = ", ".join([row.base, *row.checks]) if row.works else ""
    cells = (row.model_type, row.result, error, attention, row.layers, row.duo, row.gated, row.reason)
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def write(path: Path, rows: list[Row]) -> None:
    """The page with the table of every kind."""
    groups = {kind: [row for row in rows if row.kind == kind] for kind in KINDS}
    working = {kind: sum(row.works for row in group) for kind, group in groups.items()}
    page = PAGE.format(
        transformers=transformers.__version__, torch=torch.__version__.split("+")[0],
        works=sum(working.values()), count=len(rows),
        text=working["text"], image=working["image"], both=working["image and text"], all_text=len(groups["text"]),
        all_image=len(groups["image"]), all_both=len(groups["image and text"]), window=WINDOW, tolerance=TOLERANCE,
        soft=SOFT, distinct=len({row.model_type for row in rows if row.works}),
        tried=sum(row.result == "not tried" for row in rows),
    )  # fmt: skip
    for kind, group in groups.items():
        lines = [f"| {' | '.join(HEADINGS)} |", "| " + " | ".join("---" for _ in HEADINGS) + " |", *map(_line, group)]
        page += f"\n## {kind.capitalize()}\n\n" + "\n".join(lines) + "\n"
    path.write_text(page, encoding="utf-8")


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of a written page, by kind and model type."""
    table, kind = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind = line[3:].lower()
        elif line.startswith("| ") and kind and not line.startswith(("| ---", "| model type")):
            cells = [cell.strip() for cell in line[1:-1].split("|")]
            table[kind, cells[0]] = dict(zip(HEADINGS, cells, strict=True))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", help="model types or kinds (text, image, 'image and text'); default: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table of all to this file")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for kind, names in KINDS.items():
        for model_type in names:
            if not options.models or {kind, model_type} & set(options.models):
                row = sweep(kind, model_type)
                rows.append(row)
                print(_line(row), flush=True)
    print(f"{sum(row.works for row in rows)} of {len(rows)} work", file=sys.stderr)
    if options.write:
        write(options.write, rows)


if __name__ == "__main__":
    main()
