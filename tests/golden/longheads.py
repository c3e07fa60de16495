"""Golden cases of LongHeads: one attention layer on a prompt, or a model that reads a prompt and decodes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn_kernels.chunk_select import select_chunks

from .loader import Case, Comparison, exactly

LAYER, MODEL = 2e-5, 5e-5
MARGIN = 1e-4  # scores closer than this may be put in either order


def check(case: Case) -> Iterator[Comparison]:
    run = _decoding if "decode_logits" in case else _layer
    for include_self, suffix in ((False, ""), (True, "_self_included")):
        yield from run(case, include_self, suffix)


def _model(case: Case, include_self: bool, **sizes: int) -> LlamaForCausalLM:
    c = case.config
    shape = dict(hidden_size=c["heads"] * c["head_dim"], num_attention_heads=c["heads"], head_dim=c["head_dim"],
                 num_key_value_heads=c["kv_heads"], max_position_embeddings=4096,
                 rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]}, **sizes)  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    method = patchattn.LongHeads(
        chunk=c["chunk"],
        window=c["attention_length"],
        begin=c["begin_selective"],
        include_self=include_self,
        compat="reference",
    )
    return patchattn.patch(model, method)


def _layer(case: Case, include_self: bool, suffix: str) -> Iterator[Comparison]:
    c = case.config
    model = _model(case, include_self, num_hidden_layers=1, intermediate_size=16, vocab_size=8)
    layer = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layer, name).weight.data = case[f"{name}.weight"].clone()
    cache = DynamicCache(config=model.config)
    rotary = model.model.rotary_emb(case["hidden"], torch.arange(c["seq"])[None])
    with torch.no_grad():
        out, _ = layer(
            hidden_states=case["hidden"], position_embeddings=rotary, attention_mask=None, past_key_values=cache
        )
    yield Comparison(f"output{suffix}", out, case[f"out{suffix}"], LAYER)
    if suffix:
        return
    complete = c["seq"] // c["chunk"]
    kept = cache.layers[0].chunk_keys[:, :, :complete]
    yield Comparison("chunk keys", kept, case["chunk_keys"][:, :, :complete], LAYER)
    sure = case["free_score_margin"] > MARGIN
    q = layer.q_proj(case["hidden"]).unflatten(2, (c["heads"], c["head_dim"])).transpose(1, 2)
    current = torch.arange(c["seq"]).expand(c["batch"], -1) // c["chunk"]
    first = c["begin_selective"]
    chosen = select_chunks(q[:, :, first:], cache.layers[0].chunk_keys, current[:, first:], chunks=c["n_chunks"])
    yield exactly("selected", chosen[sure], case["selected"][sure])


def _decoding(case: Case, include_self: bool, suffix: str) -> Iterator[Comparison]:
    c = case.config
    model = _model(case, include_self, num_hidden_layers=c["layers"], intermediate_size=c["intermediate"],
                   vocab_size=c["vocab"], rms_norm_eps=c["rms_eps"])  # fmt: skip
    model.load_state_dict(case.under("w."))
    cache, ids = DynamicCache(config=model.config), case["input_ids"]
    methods = [layer.self_attn.patchattn[0] for layer in model.model.layers]
    logits, chosen = [], [[] for _ in methods]  # type: ignore[var-annotated]
    with torch.no_grad():
        prompt = model(ids[:, : c["seq"]], past_key_values=cache).logits
        for at in range(c["seq"], ids.shape[1]):
            logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
            if at + 1 >= c["begin_selective"]:
                for kept, method in zip(chosen, methods, strict=True):
                    kept.append(method.selected[:, :, 1 : c["attention_length"] // c["chunk"] - 2])
    yield Comparison(f"prompt{suffix}", prompt, case[f"prompt_logits{suffix}"], MODEL)
    yield Comparison(f"decoding{suffix}", torch.cat(logits, dim=1), case[f"decode_logits{suffix}"], MODEL)
    complete = ids.shape[1] // c["chunk"]
    for index, layer in enumerate(cache.layers):
        theirs = case[f"layer{index}.chunk_keys_final{suffix}"]
        yield Comparison(f"chunk keys of layer {index}{suffix}", layer.chunk_keys[:, :, :complete], theirs, MODEL)
        yield exactly(
            f"chosen in layer {index}{suffix}",
            torch.stack(chosen[index], dim=1),
            case[f"layer{index}.decode_free_chunks{suffix}"],
        )
