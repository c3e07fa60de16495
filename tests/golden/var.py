"""Golden cases of VAR: the rule on given weights, and a whole decoder with sinks found on its prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.methods.var import sink_value
from patchattn_kernels import grouped
from patchattn_kernels.grouped import IMAGE, IMAGE_SINK, TEXT_SINK, Rule, redistribute

from .loader import Case, Comparison, exactly

WEIGHTS, DECODER = 1e-5, 5e-5


def check(case: Case) -> Iterator[Comparison]:
    yield from _decoder(case) if "inputs_embeds" in case else _attention(case)


def _attention(case: Case) -> Iterator[Comparison]:
    c, weights = case.config, case["attn"]
    start, stop = c["image_start"], c["image_start"] + c["image_len"]
    kinds = torch.zeros(1, c["keys"], dtype=torch.int8)
    kinds[:, start:stop] = IMAGE
    kinds[:, case["sink_index"].long()] = TEXT_SINK
    kinds[:, c["visual_sinks"]] = IMAGE_SINK
    rule = Rule(recycle=1 - c["p_code_keep"], non_sink_min=1 - c["rho_code"], min_visual=c["summ"])

    past = c["keys"] - c["queries"]
    place = torch.arange(c["queries"]) + past
    eligible = (place >= stop) & bool(c["visual_sinks"])
    images = torch.where(eligible, c["image_len"], 0)[None]
    sure = _sure(case, rule)

    ours, moved = redistribute(weights, kinds, images, rule)
    yield exactly("rows moved", moved[sure], case["row_modified"].bool()[sure])
    yield Comparison("weights", ours[sure], case["attn_var"][sure], WEIGHTS)
    q, k, v = case["q"], case["k"], case["v"]
    plain, _ = grouped(q, k, v, kinds, past=past)
    yield Comparison("ordinary output", plain, case["out"], WEIGHTS)
    out, moved = grouped(q, k, v, kinds, images, rule, past=past)
    assert moved is not None
    yield exactly("rows moved in one pass", moved[sure], case["row_modified"].bool()[sure])
    yield Comparison("output", out[sure], case["out_var"][sure], WEIGHTS)


def _sure(case: Case, rule: Rule) -> Tensor:
    """Rows that are not so close to a threshold that rounding decides."""
    share, visual = case["sink_share"], case["visual_sum"]
    return ((share - (1 - rule.non_sink_min)).abs() > WEIGHTS) & ((visual - rule.min_visual).abs() > WEIGHTS)


def _decoder(case: Case) -> Iterator[Comparison]:
    c = case.config
    config = LlamaConfig(hidden_size=c["heads"] * c["head_dim"], num_attention_heads=c["heads"],
                         num_key_value_heads=c["kv_heads"], head_dim=c["head_dim"], num_hidden_layers=c["layers"],
                         intermediate_size=c["intermediate"], rms_norm_eps=c["rms_eps"], vocab_size=8,
                         rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]})  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.load_state_dict({**case.under("w."), "embed_tokens.weight": model.model.embed_tokens.weight})
    visual = torch.zeros(1, c["prompt"], dtype=torch.bool)
    visual[:, c["image_start"] : c["image_start"] + c["image_len"]] = True
    embeddings = case["inputs_embeds"]
    for skip_last, wanted in ((0, "hidden"), (1, "hidden_skip_last")):
        patchattn.patch(model, patchattn.VAR(
            sink_dims=c["dim_sink"], tau=c["tau"], recycle=1 - c["p_code_keep"], non_sink_min=1 - c["rho_code"],
            min_visual=c["summ"], skip_last=skip_last, visual_mask=visual))  # fmt: skip
        cache, done = DynamicCache(config=config), 0
        with torch.no_grad():
            for call, length in enumerate([c["prompt"]] + [1] * c["steps"]):
                part = embeddings[:, done : done + length]
                hidden = model.model(inputs_embeds=part, past_key_values=cache).last_hidden_state
                yield Comparison(f"call {call}, {wanted}", hidden, case[f"call{call}.{wanted}"], DECODER)
                done += length
        for index, layer in enumerate(cache.layers):
            if hasattr(layer, "marks"):
                sinks = (layer.marks == IMAGE_SINK) | (layer.marks == TEXT_SINK)
                if skip_last == 0:
                    yield exactly(f"sinks of layer {index}", sinks[0], case["sink_mask"][index].bool())
        patchattn.unpatch(model)
    with torch.no_grad():
        noted: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: noted.append(args[0])) for layer in model.model.layers
        ]
        hidden = model.model(inputs_embeds=embeddings[:, : c["prompt"]]).last_hidden_state
        for hook in hooks:
            hook.remove()
    yield Comparison("unpatched", hidden, case["call0.hidden_plain"], DECODER)
    for index in (0, 1, 2):  # before the first layer that moves anything
        value = sink_value(noted[index], c["dim_sink"])
        yield Comparison(f"sink values of layer {index}", value, case["phi"][:, index], DECODER)
