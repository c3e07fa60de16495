"""Golden cases of LAWCAT: whole layers with gradients and decoding, transfer, padding, and the gated recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.context import AttentionContext
from patchattn.living import watching
from patchattn_kernels.linear import FeatureMap, linear

from .loader import Case, Comparison

FORWARD, GRADIENT = 2e-5, 5e-4
# Their names of what the method learns, and of what the layer had.
OWN = {"W_fq": "query_map", "W_fk": "key_map", "conv_q": "query_conv", "conv_k": "key_conv", "gate_down": "gate_down",
       "gate_up": "gate_up", "gate_full": "gate_up", "gate_bias": "gate_bias",
       "window_logit": "window_logit"}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def check(case: Case) -> Iterator[Comparison]:
    if "log_decay" in case and "S0" in case:
        yield from _recurrence(case)
    elif "y_teacher" in case:
        yield from _transfer(case)
    elif "attention_mask" in case:
        yield from _padded(case)
    else:
        yield from _layer(case)


def _recurrence(case: Case) -> Iterator[Comparison]:
    names = ("phi_q", "phi_k", "v", "log_decay", "S0")
    given = {name: case[name].clone().requires_grad_() for name in names}
    q, k, v, gate = (given[name].transpose(1, 2) for name in names[:4])
    options: dict[str, Any] = dict(q_map=FeatureMap("identity"), gate=gate, state=given["S0"], eps=case.config["eps"],
                                   feature_scale=case.config["K"] ** -0.5)  # fmt: skip
    out, state = linear(q, k, v, **options)
    yield Comparison("output", out.transpose(1, 2), case["y"], FORWARD)
    yield Comparison("state", state, case["S_final"], FORWARD)
    plain, _ = linear(q, k, v, normalise=False, **options)
    yield Comparison("numerator", plain.transpose(1, 2), case["numerator"], FORWARD)
    (out.transpose(1, 2) * case["cotangent"]).sum().backward()
    for name, x in given.items():
        yield Comparison(f"gradient of {name}", x.grad, case[f"grad_{name}"], GRADIENT, relative=True)


def _model(case: Case) -> LlamaForCausalLM:
    c = case.config
    config = LlamaConfig(hidden_size=c.get("C", c["H"] * c["D"]), intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=c["H"], num_key_value_heads=c["Hkv"], head_dim=c["D"], vocab_size=8,
                         rope_parameters={"rope_type": "default", "rope_theta": c.get("rope_theta", 1e4)})  # fmt: skip
    activation = c.get("qk_activation", "identity")
    method = patchattn.LAWCAT(
        feature_dim=c["feature_dim"], conv_size=case["conv_q"].shape[-1], share_conv=c.get("share_qk_conv", False),
        conv_activation=None if activation == "identity" else activation, tie_qk=c.get("tie_qk_kernels", True),
        gate_rank=case["gate_down"].shape[0] if "gate_down" in case else None, window=c["window"],
        gate_normalizer=c.get("gate_logit_normalizer", 16),
    )  # fmt: skip
    model = patchattn.patch(LlamaForCausalLM(config).eval(), method)
    layer = model.model.layers[0].self_attn
    for name in PROJECTIONS:
        getattr(layer, name).weight.data = case[name].clone()
    own = layer.patchattn[0]
    for name, ours in OWN.items():
        if name in case:
            getattr(own, ours).data = case[name].reshape(getattr(own, ours).shape).clone()
    return model


def _layer(case: Case) -> Iterator[Comparison]:
    model, length = _model(case), case["hidden"].shape[1]
    layer = model.model.layers[0].self_attn
    method, seen = layer.patchattn[0], []
    layer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    hidden = case["hidden"].clone().requires_grad_()
    out = _run(model, hidden)
    yield Comparison("heads", seen[0], case["y"], FORWARD)
    yield Comparison("output", out, case["out"], FORWARD)
    group = case.config["H"] // case.config["Hkv"]
    decay = method.log_decay(hidden).repeat_interleave(group, dim=1).transpose(1, 2)
    yield Comparison("decay", decay, case["log_decay"], FORWARD)
    (out * case["cotangent"]).sum().backward()
    found = {"hidden": hidden.grad} | {name: getattr(layer, name).weight.grad for name in PROJECTIONS}
    found |= {name: getattr(method, ours).grad for name, ours in OWN.items() if name in case}
    for name, gradient in found.items():
        theirs = case[f"grad_{name}"]
        yield Comparison(f"gradient of {name}", gradient.view_as(theirs), theirs, GRADIENT, relative=True)

    start = case.config["prefill"]
    for parts in ([start] + [1] * (length - start), [start, length - start]):
        cache, done, outs = DynamicCache(config=model.config), 0, []
        for part in parts:
            with torch.no_grad():
                outs.append(_run(model, case["hidden"][:, done : done + part], cache, done))
            if done == 0:
                yield from _states(cache.layers[0], case, "prefill")
            done += part
        yield Comparison(f"output of {len(parts)} calls", torch.cat(outs, dim=1), case["decode_out"], FORWARD)
        yield Comparison("last state", cache.layers[0].state, case["S_final"], FORWARD, relative=True)


def _states(layer: Any, case: Case, when: str) -> Iterator[Comparison]:
    yield Comparison(f"state after {when}", layer.state, case[f"S_{when}"], FORWARD, relative=True)
    before = layer.before.transpose(1, 2).chunk(2, dim=1)  # the last W - 1 inputs; theirs are W
    for name, ours in zip("qk", before, strict=True):
        theirs = case[f"conv_{name}_state_{when}"][..., -ours.shape[-1] :]
        yield Comparison(f"inputs of {name} kept after {when}", ours, theirs, FORWARD)


def _transfer(case: Case) -> Iterator[Comparison]:
    model = patchattn.freeze_base(_model(case))
    layer = model.model.layers[0].self_attn
    method, found = layer.patchattn[0], []

    def around(ctx: AttentionContext) -> Tensor:
        target = ctx.base()
        found.append((ctx.transfer_loss(target, "output"), target, ctx.attend()))
        return target

    with watching(model, around):
        out = _run(model, case["hidden"])
    loss, teacher, student = found[0]
    yield Comparison("teacher", teacher.flatten(2), case["y_teacher"], FORWARD)
    yield Comparison("student", student.flatten(2), case["y_student"], FORWARD)
    yield Comparison("handed on", out, case["out_teacher"], FORWARD)
    yield Comparison("loss", 1000 * loss[None], case["loss"], GRADIENT, relative=True)
    (1000 * loss).backward()
    for name, ours in OWN.items():
        if name in case:
            theirs = case[f"grad_{name}"]
            gradient = getattr(method, ours).grad.view_as(theirs)
            yield Comparison(f"gradient of {name}", gradient, theirs, GRADIENT, relative=True)


def _padded(case: Case) -> Iterator[Comparison]:
    real = case["attention_mask"].bool()
    with torch.no_grad():
        out = _run(_model(case), case["hidden"], mask=real)
    yield Comparison("output", out[real], case["expected"][real], FORWARD)


def _run(model: LlamaForCausalLM, hidden: Tensor, cache: Any = None, first: int = 0, mask: Any = None) -> Tensor:
    angles = model.model.rotary_emb(hidden, torch.arange(first, first + hidden.shape[1])[None])
    layer = model.model.layers[0].self_attn
    return layer(hidden, position_embeddings=angles, attention_mask=mask, past_key_values=cache)[0]
