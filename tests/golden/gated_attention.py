"""Golden cases of gated attention: one gated layer, or a tiny gated model with its gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import patchattn
from patchattn.methods.gated_attention import split_official

from .loader import Case, Comparison

FORWARD, GRADIENT = 1e-5, 5e-4


def check(case: Case) -> Iterator[Comparison]:
    yield from _model(case) if "input_ids" in case else _layer(case)


def _gated(model: nn.Module, case: Case) -> nn.Module:
    config = case.config
    bias = bool(config.get("qkv_bias", False))
    return patchattn.patch(model, patchattn.GatedAttention(kind=config["mode"], init="random", bias=bias))


def _layer(case: Case) -> Iterator[Comparison]:
    c = case.config
    family = (Qwen3Config, Qwen3ForCausalLM) if c["qk_norm"] else (Qwen2Config, Qwen2ForCausalLM)
    shape = dict(hidden_size=c["C"], num_attention_heads=c["H"], num_key_value_heads=c["Hkv"], head_dim=c["D"],
                 num_hidden_layers=1, intermediate_size=16, vocab_size=8, rms_norm_eps=c["rms_eps"])  # fmt: skip
    model = family[1](family[0](**shape)).eval()
    layer = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = case["W_q" if name == "q_proj" else name]
        projection = nn.Linear(weight.shape[1], weight.shape[0], bias=f"b_{name[0]}" in case)
        projection.weight.data = weight.clone()
        if projection.bias is not None:
            projection.bias.data = case[f"b_{name[0]}"].clone()
        setattr(layer, name, projection)
    for name in ("q_norm", "k_norm"):
        if name in case:
            getattr(layer, name).weight.data = case[name].clone()
    _gated(model, case)
    gate = layer.patchattn[0]
    split = split_official(case["q_proj_official"], c["H"], c["Hkv"], c["D"])
    yield Comparison("split of the official q_proj: query rows", split[0], case["W_q"], 0.0)
    yield Comparison("split of the official q_proj: gate rows", split[1], case["W_g"], 0.0)
    gate.weight.data = case["W_g"].clone()
    if "b_g" in case:
        gate.bias.data = case["b_g"].clone()

    hidden = case["hidden"].clone().requires_grad_()
    padding = case["attention_mask"].bool() if "attention_mask" in case else None
    real = padding if padding is not None else torch.ones(hidden.shape[:2], dtype=torch.bool)
    yield Comparison("gate", gate.gate(hidden)[real].expand(-1, *case["gate"].shape[2:]), case["gate"][real], FORWARD)
    before: list[Tensor] = []
    layer.o_proj.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    mask = padding if padding is not None and not padding.all() else None
    out, _ = layer(hidden_states=hidden, position_embeddings=(case["cos"], case["sin"]), attention_mask=mask)
    gated = before[0].unflatten(-1, (c["H"], c["D"]))
    yield Comparison("gated heads", gated[real], case["y_gated"][real], FORWARD)
    out = out * real[..., None]
    yield Comparison("output", out, case["out"], FORWARD)
    (out * case["cotangent"]).sum().backward()
    parameters = {"hidden": hidden, "W_q": layer.q_proj.weight, "W_g": gate.weight, "b_g": gate.bias,
                  "k_proj": layer.k_proj.weight, "v_proj": layer.v_proj.weight,
                  "o_proj": layer.o_proj.weight}  # fmt: skip
    for name, parameter in parameters.items():
        if f"grad_{name}" in case:
            yield Comparison(f"gradient of {name}", parameter.grad, case[f"grad_{name}"], GRADIENT, relative=True)


def _model(case: Case) -> Iterator[Comparison]:
    c = case.config
    assert c["qk_norm"], "only Qwen3 models are described so"
    config = Qwen3Config(hidden_size=c["hidden"], intermediate_size=c["intermediate"], num_hidden_layers=c["layers"],
                         num_attention_heads=c["H"], num_key_value_heads=c["Hkv"], head_dim=c["D"],
                         vocab_size=c["vocab"], rms_norm_eps=c["rms_eps"], tie_word_embeddings=c["tie_word_embeddings"],
                         rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]})  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.load_state_dict(case.under("model."))
    _gated(model, case)
    gates = [layer.self_attn.patchattn[0] for layer in model.model.layers]
    for index, gate in enumerate(gates):
        gate.weight.data = case[f"gate.{index}.W_g"].clone()
    ids = case["input_ids"].long()
    result = model(ids, labels=ids)
    yield Comparison("logits", result.logits, case["logits"], FORWARD)
    yield Comparison("loss", result.loss.reshape(1), case["loss"].reshape(1), FORWARD)
    result.loss.backward()
    for index, gate in enumerate(gates):
        theirs = case[f"grad.gate.{index}.W_g"]
        yield Comparison(f"gradient of gate {index}", gate.weight.grad, theirs, GRADIENT, relative=True)
