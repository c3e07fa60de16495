"""Golden cases of SeerAttention: both gates with masks, losses and gradients, decoding, whole layers and models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import patchattn
from patchattn import losses
from patchattn.living import watching
from patchattn.methods.seer_attention import SeerAttention
from patchattn.methods.seer_attention_decode import SeerAttentionDecode
from patchattn.record import attachment_of, record_of
from patchattn_kernels import BlockLists, block_sparse, block_sparse_decode

from .loader import Case, Comparison, exactly

FORWARD, GRADIENT, MODEL = 2e-5, 1e-3, 5e-5
NEAR = 1e-5  # a score this near to the cut may fall on either side
PUBLISHED = {"last_block_dense": False, "keep_diagonal": False, "keep_first": False, "dense_below": 0}


def check(case: Case) -> Iterator[Comparison]:
    if "gate_probs" in case:
        yield from _gate(case)
    elif "ground_truth_full" in case:
        yield from _prefill_training(case)
    elif "block_max_per_head" in case:
        yield from _decode_training(case)
    elif "kc_paper" in case:
        yield from _decoding(case)
    elif "hidden_states" in case:
        yield from _layer(case)
    else:
        yield from _model(case)


# ---- the prefill gate --------------------------------------------------------------------------------------------


def _pools(gate_type: str) -> dict[str, str]:
    """`"Qavg_Kmaxminavg"` as settings."""
    q, k = re.fullmatch(r"Q(.*)_K(.*)", gate_type).groups()  # type: ignore[union-attr]
    return {name: ",".join(re.findall("max|min|avg", pools)) for name, pools in (("q_pool", q), ("k_pool", k))}


def _settings(kind: str, value: float, dense: bool, blocks: int) -> dict[str, Any]:
    """The published settings in ours; the share of blocks is cut down to a whole number there."""
    chosen: dict[str, Any] = {"threshold": None, "top_k_blocks": None, "last_block_dense": dense}
    if kind == "threshold":
        return {**chosen, "threshold": value}
    return {**chosen, "top_k_blocks": max(1, int((1 - math.sqrt(1 - value)) * blocks))}


def _method(case: Case, **changes: Any) -> SeerAttention:
    c = case.config
    shape = dict(block=c["block"], gate_dim=c["gate_hidden"], double=c.get("force_double", False),
                 rope=c.get("rope", True))  # fmt: skip
    return SeerAttention(**{**shape, **_pools(c["gate_type"]), **PUBLISHED, **changes})


def _llama(case: Case, **sizes: Any) -> LlamaForCausalLM:
    c = case.config
    shape = dict(hidden_size=c.get("hidden", c["num_q_heads"] * c["head_dim"]), num_attention_heads=c["num_q_heads"],
                 num_key_value_heads=c["num_kv_heads"], head_dim=c["head_dim"], num_hidden_layers=1,
                 intermediate_size=16, vocab_size=8)  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": c["rope_theta"] or 10000.0}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **sizes}, rope_parameters=rope)).eval()


def _watched(model: Any, run: Callable[[], Any], look: Callable[[Any], Any]) -> Any:
    """What `look(ctx)` gives inside the attention of a one-layer model."""
    found = []

    def around(ctx: Any) -> Tensor:
        found.append(look(ctx))
        return ctx.base()

    with watching(model, around):
        run()
    return found[0]


def _attention(model: Any, hidden: Tensor) -> Tensor:
    layer = model.model.layers[0].self_attn
    rotary = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    return layer(hidden_states=hidden, position_embeddings=rotary, attention_mask=None)[0]


def _gate(case: Case) -> Iterator[Comparison]:
    c = case.config
    model = patchattn.patch(_llama(case), _method(case, threshold=0.0, untaught=0.0))
    (method,) = attachment_of(model.model.layers[0].self_attn).methods
    for ours, theirs in (("query_weight", "w_q"), ("key_weight", "w_k")):
        if theirs in case:
            getattr(method, ours).data = case[theirs].clone()
    q, k = (case[name].transpose(1, 2).contiguous().requires_grad_() for name in ("q_nope", "k_nope"))

    def look(ctx: Any) -> Tensor:
        ctx.q, ctx.k = q.detach(), k.detach()
        return method.block_map(ctx)[0]

    hidden = torch.zeros(c["B"], c["S"], c["num_q_heads"] * c["head_dim"])
    scores = _watched(model, lambda: _attention(model, hidden), look)
    lower = torch.ones(c["num_blocks"], c["num_blocks"], dtype=torch.bool).tril()
    probs = scores.softmax(dim=-1)
    yield Comparison("logits", scores.masked_fill(~lower, 0.0), case["gate_logits"].masked_fill(~lower, 0.0), FORWARD)
    yield Comparison("probabilities", probs, case["gate_probs"], FORWARD)
    (probs * case["cotangent"]).sum().backward()
    for ours, theirs in (("query_weight", "grad_w_q"), ("key_weight", "grad_w_k")):
        if theirs in case:
            yield Comparison(theirs, getattr(method, ours).grad, case[theirs], GRADIENT, relative=True)
    row = torch.arange(c["num_blocks"])[None]
    for name in case.tensors:
        if found := re.fullmatch(r"mask_(threshold|nzratio)_([\d.]+)_lastdense([01])", name):
            kind, value, dense = found[1], float(found[2]), bool(int(found[3]))
            config = method.config.replace(**_settings(kind, value, dense, c["num_blocks"]))
            mask, _ = method.select(scores.detach(), row, torch.tensor([c["num_blocks"]]), config)
            yield exactly(name, *_sure(mask, case[name].bool(), probs.detach(), config))


def _sure(ours: Tensor, theirs: Tensor, probs: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Both masks where no rounding can tell them apart; a row that reads nothing there reads its own block here."""
    ours = ours & theirs.any(dim=-1, keepdim=True)
    sure = (probs - config.threshold).abs() > NEAR if config.threshold is not None else torch.ones_like(ours)
    return ours & sure, theirs & sure


def _load(model: Any, case: Case, names: dict[str, str]) -> Any:
    layer = model.model.layers[0].self_attn
    (method,) = attachment_of(layer).methods
    for name, tensor in case.under("w.").items():
        if name.startswith("attn_gate."):
            getattr(method, names[name.split(".")[1]]).data = tensor.clone()
        else:
            layer.get_submodule(name.rpartition(".")[0]).weight.data = tensor.clone()
    return method


PREFILL = {"mask_linear_q": "query_weight", "mask_linear_k": "key_weight"}
DECODE = {"attngate_linear_q": "query_weight", "attngate_linear_k": "key_weight", "attngate_qnorm": "query_norm",
          "attngate_knorm": "key_norm"}  # fmt: skip


def _prefill_training(case: Case) -> Iterator[Comparison]:
    c = case.config
    model = patchattn.patch(_llama(case), _method(case, untaught=0.0))
    method = _load(model, case, PREFILL)
    first = c["loss_skip_first_query_blocks"]

    def look(ctx: Any) -> tuple[Tensor, ...]:
        scores, block = method.block_map(ctx)
        target = losses.block_target(ctx, block, *scores.shape[1:3])
        used = scores[:, :, first:]
        return scores, target / target.sum(dim=-1, keepdim=True), losses.block_map_divergence(
            ctx, used, block, reduction="reference")  # fmt: skip

    scores, truth, loss = _watched(model, lambda: _attention(model, case["hidden_states"]), look)
    loss.backward()
    yield Comparison("output", _attention(model, case["hidden_states"]), case["attn_output"], FORWARD)
    yield Comparison("logits", scores.masked_fill(scores == -torch.inf, 0.0), case["gate_logits_full"].tril(), FORWARD)
    yield Comparison("truth", truth, case["ground_truth_full"], FORWARD)
    yield Comparison("truth used", truth[:, :, first:], case["ground_truth_used"], FORWARD)
    logged = scores[:, :, first:].log_softmax(dim=-1).clamp(min=-1e4)
    yield Comparison("log probabilities", logged, case["gate_log_probs_used"], 1e-4)
    yield Comparison("loss", loss.reshape(1), case["kl_loss"], FORWARD)
    theirs = case["grad.attn_gate.mask_linear_k.weight"]
    yield Comparison("gradient", method.key_weight.grad, theirs, GRADIENT, relative=True)


def _layer(case: Case) -> Iterator[Comparison]:
    c = case.config
    model = patchattn.patch(_llama(case), _method(case, threshold=0.0))
    method = _load(model, case, PREFILL)
    with torch.no_grad():
        for kind, value, dense in c["settings"]:
            name = f"{kind}_{value}_lastdense{int(dense)}"
            kept: list[Tensor] = []
            with patchattn.settings(model, **_settings(kind, value, dense, c["num_blocks"])), _masks(method, kept):
                out = _attention(model, case["hidden_states"])
            yield exactly(f"mask_{name}", kept[0], case[f"mask_{name}"].bool())
            yield Comparison(name, out, case[f"attn_output_{name}"], FORWARD)
    lists = BlockLists.from_mask(case["kernel_mask"].bool())
    out = block_sparse(case["kernel_q"], case["kernel_k"], case["kernel_v"], lists, block=c["block"])
    yield Comparison("kernel", out, case["kernel_out"], FORWARD)


class _masks:
    """Inside, the masks that a gate chooses are noted."""

    def __init__(self, method: Any, kept: list[Tensor]) -> None:
        self.method, self.kept = method, kept

    def __enter__(self) -> None:
        def choose(*args: Any) -> Tensor:
            self.kept.append(type(self.method).choose(self.method, *args))
            return self.kept[-1]

        self.method.__dict__["choose"] = choose

    def __exit__(self, *error: Any) -> None:
        del self.method.__dict__["choose"]


def _model(case: Case) -> Iterator[Comparison]:
    c = case.config
    model = _llama(case, num_hidden_layers=c["layers"], intermediate_size=c["intermediate"], vocab_size=c["vocab"],
                   rms_norm_eps=c["rms_eps"])  # fmt: skip
    weights = case.under("w.")
    model.load_state_dict({name: tensor for name, tensor in weights.items() if ".attn_gate." not in name})
    patchattn.patch(model, _method(case, threshold=0.0))
    for site in record_of(model).patched:
        (method,) = attachment_of(site.module).methods
        for theirs, ours in PREFILL.items():
            name = f"{site.name}.attn_gate.{theirs}.weight"
            if name in weights:
                getattr(method, ours).data = weights[name].clone()
    blocks = -(-c["S"] // c["block"])
    for name in case.tensors:
        if found := re.fullmatch(r"logits_(threshold|nz_ratio)_([\d.]+)_lastdense([01])", name):
            chosen = _settings(found[1], float(found[2]), bool(int(found[3])), blocks)
            with torch.no_grad(), patchattn.settings(model, **chosen):
                yield Comparison(name, model(case["input_ids"]).logits, case[name], MODEL)


# ---- the decode gate ---------------------------------------------------------------------------------------------


def _decode_method(case: Case, **changes: Any) -> SeerAttentionDecode:
    c = case.config
    pools = ",".join(re.findall("max|min|avg", c["k_pooling"]))
    settings = dict(block=c["block"], gate_dim=c["gate_hidden"], k_pool=pools, qk_norm=c["use_qk_norm"],
                    q_heads=c["q_head_pooling"].removeprefix("Q"), keep_first=False)  # fmt: skip
    return SeerAttentionDecode(**{**settings, **changes})


def _decode_training(case: Case) -> Iterator[Comparison]:
    c = case.config
    shape = dict(hidden_size=c["hidden"], num_attention_heads=c["num_q_heads"], num_key_value_heads=c["num_kv_heads"],
                 head_dim=c["head_dim"], num_hidden_layers=1, intermediate_size=16, vocab_size=8,
                 rms_norm_eps=c["rms_eps"],
                 rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]})  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    patchattn.patch(model, _decode_method(case, untaught=0.0))
    method = _load(model, case, DECODE)
    losses_, at = [], 0
    for index, length in enumerate(c["lengths"]):
        hidden = case["hidden_states"][None, at : at + length]
        first = int(length * c["loss_slice_ratio"])

        def look(ctx: Any, first: int = first) -> tuple[Tensor, ...]:
            scores, block = method.block_map(ctx)
            per_head = losses.block_target(ctx, block, c["num_q_heads"], scores.shape[2])
            asked = scores > -torch.inf
            target = losses.block_target(ctx, block, *scores.shape[1:3]).masked_fill(~asked, 0.0)
            target = target / (target.sum(dim=-1, keepdim=True) + 1e-9)
            loss = losses.block_map_divergence(ctx, scores[:, :, first:], block, reduction="reference")
            # The published mean counts the columns of the longest sequence of the pack.
            return scores, per_head, target, loss * scores.shape[3] / c["num_blocks"]

        scores, per_head, target, loss = _watched(model, lambda h=hidden: _attention(model, h), look)  # type: ignore[misc]
        losses_.append(loss)
        blocks = scores.shape[3]
        maxima = case["block_max_per_head"][index, :, :length, :blocks]
        yield Comparison(f"maxima {index}", per_head[0], maxima, FORWARD)
        logits = scores[0].masked_fill(scores[0] == -torch.inf, 0.0)
        yield Comparison(f"logits {index}", logits, case["gate_logits"][index, :, :length, :blocks], 1e-4)
        yield Comparison(f"truth {index}", target[0, :, first:], case[f"gt_seq{index}"][..., :blocks], FORWARD)
        yield Comparison(f"loss {index}", loss.reshape(1), case[f"kl_seq{index}"], FORWARD)
        out = _attention(model, hidden)[0]
        yield Comparison(f"output {index}", out, case["attn_output"][at : at + length], 1e-4)
        at += length
    loss = torch.stack(losses_).mean()
    loss.backward()
    yield Comparison("loss", loss.reshape(1), case["kl_loss"], FORWARD)
    for theirs, ours in DECODE.items():
        gradient = case[f"grad.attn_gate.{theirs}.weight"]
        yield Comparison(theirs, getattr(method, ours).grad, gradient, GRADIENT, relative=True)


def _decoding(case: Case) -> Iterator[Comparison]:
    c = case.config
    for suffix, position in (("paper", "block_start"), ("asis", "block_end")):
        budget = c["block_budget"] * c["block"]
        method = _decode_method(case, compat="reference", gate_key_position=position, token_budget=budget)
        scores, keys = _decoded(case, method)
        kept = case[f"kc_{suffix}" if suffix == "paper" else "kc_asis_layer0"].transpose(1, 2)
        whole = (c["prompt_len"] + c["decode_steps"]) // c["block"]
        yield Comparison(f"keys {suffix}", keys[:, :, :whole], kept[:, :, :whole], FORWARD)
        yield from _chosen(case, suffix, method.config, scores)
    prompt = case["kc_prefill"].shape[1] * c["block"]
    _, keys = _decoded(case, _decode_method(case), prompt)
    theirs = case["kc_prefill"].transpose(1, 2)
    yield Comparison("keys of a prompt", keys[:, :, : theirs.shape[2]], theirs, FORWARD)
    yield from _kernel(case)


def _decoded(case: Case, method: SeerAttentionDecode, prompt: int | None = None) -> tuple[list[Tensor], Tensor]:
    """Scores of each decoded token, and the keys of the blocks in the end; or the keys of a prompt."""
    c = case.config
    model = patchattn.patch(_llama(case), method)
    layer = model.model.layers[0].self_attn
    (gate,) = attachment_of(layer).methods
    for theirs, ours in DECODE.items():
        if f"w.{theirs}.weight" in case:
            getattr(gate, ours).data = case[f"w.{theirs}.weight"].clone()
    cache, scores = DynamicCache(config=model.config), []
    lengths = [prompt] if prompt else [c["prompt_len"], *[1] * c["decode_steps"]]
    q, k = (case[name].transpose(1, 2) for name in ("q_nope", "k_nope"))
    at = 0

    def select(found: Tensor, *args: Any) -> Any:
        scores.append(found)
        return type(gate).select(found, *args)

    gate.__dict__["select"] = select
    for length in lengths:
        part = slice(at, at + length)

        def around(ctx: Any, part: slice = part) -> Tensor:
            ctx.q, ctx.k = q[:, :, part], k[:, :, part]
            return ctx.attend()

        hidden = torch.zeros(c["B"], length, model.config.hidden_size)
        rotary = model.model.rotary_emb(hidden, torch.arange(at, at + length)[None])
        with watching(model, around), torch.no_grad():
            layer(hidden_states=hidden, position_embeddings=rotary, attention_mask=None, past_key_values=cache)
        at += length
    return scores, cache.layers[0].notes["seer_attention_decode"].keys


def _chosen(case: Case, suffix: str, config: Any, scores: list[Tensor]) -> Iterator[Comparison]:
    c = case.config
    threshold = config.replace(token_budget=None, threshold=c["threshold"])
    for step, found in enumerate(scores):
        at = torch.tensor([[c["prompt_len"] + step]])
        blocks = found.shape[3]
        growing = (at + 1) % c["block"] != 0
        known = found.clone()
        if growing:
            known[..., -1] = 0.0
        probs = known.softmax(dim=-1)[0, :, 0]
        theirs = case[f"probs_{suffix}"][step, 0, :, :blocks]
        yield Comparison(f"probabilities {suffix} {step}", probs, theirs, FORWARD)
        for name, chosen in (("budget", config), ("threshold", threshold)):
            mask = SeerAttentionDecode.select(found, at, chosen)[0][0, :, 0]
            sure = (probs - c["threshold"]).abs() > NEAR
            official = case[f"mask_{name}_{suffix}"][step, 0, :, :blocks].bool()
            yield exactly(f"{name} {suffix} {step}", mask & sure, official & sure)


def _kernel(case: Case) -> Iterator[Comparison]:
    """Left-padded rows there; here blocks begin with each row's first token, so each block is listed token by token."""
    c = case.config
    q, k, v = case["decode_q"], case["decode_k"], case["decode_v"]
    length = k.shape[1]
    starts = length - case["decode_cache_lens"].long()
    mask = case["decode_block_mask"].bool()
    first = torch.nn.functional.one_hot(starts // c["block"], mask.shape[2]).bool()[:, None]
    tokens = (mask | first).repeat_interleave(c["block"], dim=2)[:, :, :length]
    by_rank = (torch.arange(length) + starts[:, None]).clamp(max=length - 1)[:, None].expand_as(tokens)
    lists = BlockLists.from_mask(tokens.gather(2, by_rank)[:, :, None])
    out = block_sparse_decode(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), lists, block=1, starts=starts)
    yield Comparison("kernel", out[:, :, 0], case["decode_out"], FORWARD)
