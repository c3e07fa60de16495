"""Golden cases of Hedgehog: feature maps, whole layers, states, padding, a model with its transfer loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.context import AttentionContext
from patchattn.living import watching
from patchattn_kernels.linear import FeatureMap, features, linear, linear_weights

from .loader import Case, Comparison

FORWARD, GRADIENT, MODEL = 2e-5, 5e-4, 1e-4
FULL = {"softmax": "softmax_full", "softmax_half": "softmax_half", "exp": "exp_full", "exp_half": "exp_half"}


def check(case: Case) -> Iterator[Comparison]:
    if "softmax_full" in case:
        yield from _feature_maps(case)
    elif "q" in case and "hidden" not in case:
        yield from _hybrid(case)
    elif "input_ids" in case:
        yield from _model(case)
    elif "attention_mask" in case:
        yield from _padded(case)
    else:
        yield from _layer(case)


def _feature_maps(case: Case) -> Iterator[Comparison]:
    x, weight = case["x"].clone().requires_grad_(), case["W"].clone().requires_grad_()
    for kind, name in FULL.items():
        yield Comparison(kind, features(x, FeatureMap(kind, weight)), case[name], FORWARD)
    relu = FeatureMap("relu", case["W_square"], case["t2r_bias"].reshape(-1, 1))
    yield Comparison("relu", features(x, relu), case["t2r_relu"], FORWARD)
    skip = FeatureMap("softmax", case["W_square"], skip=True)
    yield Comparison("skip", features(x, skip), case["softmax_full_skip"], FORWARD)
    (features(x, FeatureMap("softmax", weight)) * case["cotangent"]).sum().backward()
    yield Comparison("gradient of x", x.grad, case["grad_x"], GRADIENT, relative=True)
    yield Comparison("gradient of W", weight.grad, case["grad_W"], GRADIENT, relative=True)
    c = case.config
    model = _llama(c["H"], c["H"], c["D"], patchattn.Hedgehog(feature_dim=c["feature_dim"]))
    yield Comparison("initial map", _method(model).query_map, case["W_init"], 0.0)


def _hybrid(case: Case) -> Iterator[Comparison]:
    c = case.config
    names = ("q", "k", "v", "W_fq", "W_fk", "window_logit")
    given = {name: case[name].clone().requires_grad_() for name in names}
    gamma = given["window_logit"].sigmoid().flatten()
    options: dict[str, Any] = dict(
        q_map=FeatureMap("softmax", given["W_fq"]), k_map=FeatureMap("softmax", given["W_fk"]), window=c["window"],
        window_kind="terraced" if "mask_window" in case else "sliding", window_factor=gamma,
        linear_factor=1 - gamma if c["affine_attention_factors"] else None,
    )  # fmt: skip
    tokens = given["q"], given["k"], given["v"]
    out, _ = linear(*tokens, **options)
    yield Comparison("output", out, case["y"], FORWARD)
    for length in (11, 16, c["T"] - 3):
        start, _ = linear(*(x[:, :, :length] for x in tokens), **options)
        yield Comparison(f"output of {length} tokens", start, case["y"][:, :, :length], FORWARD)
    window, behind = linear_weights(*tokens, **options)
    yield Comparison("share of the window", window.sum(-1), case["window_mass"], FORWARD)
    yield Comparison("share of the linear part", behind.sum(-1), case["linear_mass"], FORWARD)
    if "mask_window" in case:
        read = (window > 0).expand(1, c["H"], -1, -1)
        yield Comparison("window", read.float(), case["mask_window"].float().expand_as(read), 0.0)
    (out * case["cotangent"]).sum().backward()
    for name, x in given.items():
        yield Comparison(f"gradient of {name}", x.grad, case[f"grad_{name}"], GRADIENT, relative=True)


def _layer(case: Case) -> Iterator[Comparison]:
    c = case.config
    method = patchattn.Hedgehog(window=c.get("window", 0), feature_dim=c["feature_dim"])
    model = _llama(c["H"], c["Hkv"], c["D"], method, c["rope_theta"])
    _load(model, case.tensors)
    out, before = _run(model, case["hidden"])
    y = case["y"] if "y" in case else case["y_full"]
    yield Comparison("heads", before, y, FORWARD)
    yield Comparison("output", out, case["out"], FORWARD)
    if "cotangent" in case:
        yield from _gradients(model, case)
    for name in ("decode_out", "decode_out_prefill40", "decode_out_prefill5"):
        if name in case:
            start = c["prefill"] if name == "decode_out" else int(name.removeprefix("decode_out_prefill"))
            yield from _decoded(model, case, name, start)


def _decoded(model: LlamaForCausalLM, case: Case, name: str, start: int) -> Iterator[Comparison]:
    cache, length = DynamicCache(config=model.config), case["hidden"].shape[1]
    parts = [_run(model, case["hidden"][:, :start], cache)[0]]
    kind = "after_prefill" if name == "decode_out" else "prefill40"
    if name != "decode_out_prefill5":
        yield from _state(cache.layers[0], case, kind)
    for at in range(start, length):
        parts.append(_run(model, case["hidden"][:, at : at + 1], cache, at)[0])
    yield Comparison(name, torch.cat(parts, dim=1), case[name], FORWARD)
    yield from _state(cache.layers[0], case, "final")


def _state(layer: Any, case: Case, when: str) -> Iterator[Comparison]:
    """Ours is one token of the window ahead: it holds what the next query will read linearly."""
    kept = layer.recent
    if kept == 0:
        yield Comparison(f"S {when}", layer.state[..., :-1], case[f"kv_state_{when}"], FORWARD, relative=True)
        sums = case[f"k_state_{when}"].squeeze(2)
        yield Comparison(f"z {when}", layer.state[..., -1], sums, FORWARD, relative=True)
        return
    rings = (("k", layer.recent_keys), ("v", layer.recent_values))
    for name, held in rings:
        group = case.config["H"] // held.shape[1]
        theirs = case[f"{name}_ring_{when}"]
        yield Comparison(f"{name} ring {when}", held.repeat_interleave(group, 1), theirs[:, :, -kept:], FORWARD)
    oldest = (case[f"{name}_ring_{when}"][:, :, :1] for name in "kv")
    key, value = oldest
    phi = features(key, FeatureMap("softmax", case["W_fk"]))
    S = case[f"S_{when}"] + phi.mT @ value
    yield Comparison(f"S {when}", layer.state[..., :-1], S, FORWARD, relative=True)
    z = case[f"z_{when}"] + phi
    yield Comparison(f"z {when}", layer.state[..., -1], z.squeeze(2), FORWARD, relative=True)


def _gradients(model: LlamaForCausalLM, case: Case) -> Iterator[Comparison]:
    hidden = case["hidden"].clone().requires_grad_()
    layer, method = model.model.layers[0].self_attn, _method(model)
    with torch.enable_grad():
        out = layer(hidden, position_embeddings=_angles(model, hidden.shape[1]), attention_mask=None)[0]
        (out * case["cotangent"]).sum().backward()
    found = {"hidden": hidden.grad, "W_fq": method.query_map.grad, "W_fk": method.key_map.grad}
    found |= {name: getattr(layer, name).weight.grad for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    for name, gradient in found.items():
        yield Comparison(f"gradient of {name}", gradient, case[f"grad_{name}"], GRADIENT, relative=True)


def _padded(case: Case) -> Iterator[Comparison]:
    c = case.config
    real = case["attention_mask"].bool()
    for prefix, window, wanted in (
        ("lin.", 0, "expected_linear"),
        ("hyb.", c["window_hybrid"], "expected_hybrid"),
    ):
        method = patchattn.Hedgehog(window=window, feature_dim=c["feature_dim"])
        model = _llama(c["H"], c["Hkv"], c["D"], method)
        _load(model, case.under(prefix))
        layer = model.model.layers[0].self_attn
        for name, positions in (("from the first token", case["position_ids"]), ("from the padding", None)):
            angles = _angles(model, real.shape[1], positions=positions)
            with torch.no_grad():
                out, _ = layer(case["hidden"], position_embeddings=angles, attention_mask=real)
            yield Comparison(f"{wanted}, positions {name}", out[real], case[wanted][real], FORWARD)


def _model(case: Case) -> Iterator[Comparison]:
    c = case.config
    method = patchattn.Hedgehog(window=c["window"], feature_dim=c["feature_dim"])
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=c["hidden"], intermediate_size=c["intermediate"], num_hidden_layers=c["layers"],
                    num_attention_heads=c["H"], num_key_value_heads=c["Hkv"], head_dim=c["D"], vocab_size=c["vocab"],
                    rms_norm_eps=c["rms_eps"], tie_word_embeddings=c["tie_word_embeddings"],
                    rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]})
    ).eval()  # fmt: skip
    model.load_state_dict(case.under("model."))
    ids = case["input_ids"].long()
    with torch.no_grad():
        yield Comparison("base", model(ids).logits, case["teacher_logits"], MODEL)
    patchattn.freeze_base(patchattn.patch(model, method))
    methods = [layer.self_attn.patchattn[0] for layer in model.model.layers]
    for index, one in enumerate(methods):
        _fill(one, case.under(f"layers.{index}."))
    with torch.no_grad():
        yield Comparison("student", model(ids).logits, case["student_logits"], MODEL)
    found: dict[str, list[Tensor]] = {"output": [], "map": []}

    def around(ctx: AttentionContext) -> Tensor:
        target = ctx.base()
        for kind, losses in found.items():
            losses.append(ctx.transfer_loss(target, kind))
        return target

    with watching(model, around):
        handed_on = model(ids).logits
    yield Comparison("handed on", handed_on, case["teacher_logits"], MODEL)
    error, entropy = torch.stack(found["output"]), torch.stack(found["map"]).mean()
    yield Comparison("errors", error, case["mse_by_layer"], MODEL, relative=True)
    yield Comparison("cross-entropy", entropy[None], case["loss_xent"], MODEL, relative=True)
    total = c["mse_factor"] * error.mean() + c["xent_factor"] * entropy
    yield Comparison("loss", total[None], case["loss_total"], MODEL, relative=True)
    total.backward()
    for index, one in enumerate(methods):
        theirs = case.under(f"grad.layers.{index}.")
        ours = {"W_fq": one.query_map.grad, "W_fk": one.key_map.grad,
                "window_logit": one.window_logit.grad.reshape(1, -1, 1, 1)}  # fmt: skip
        for name, gradient in ours.items():
            yield Comparison(f"gradient of {name} {index}", gradient, theirs[name], GRADIENT, relative=True)


# ---- one layer of a Llama ----------------------------------------------------------------------------------------


def _llama(heads: int, kv_heads: int, size: int, method: Any, theta: float = 10000.0) -> LlamaForCausalLM:
    config = LlamaConfig(hidden_size=heads * size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=size, vocab_size=8,
                         rope_parameters={"rope_type": "default", "rope_theta": theta})  # fmt: skip
    return patchattn.patch(LlamaForCausalLM(config).eval(), method)


def _method(model: LlamaForCausalLM) -> Any:
    return model.model.layers[0].self_attn.patchattn[0]


def _fill(method: Any, tensors: dict[str, Tensor]) -> None:
    method.query_map.data, method.key_map.data = tensors["W_fq"].clone(), tensors["W_fk"].clone()
    if method.window_logit is not None:
        method.window_logit.data = tensors["window_logit"].flatten().clone()


def _load(model: LlamaForCausalLM, tensors: dict[str, Tensor]) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(model.model.layers[0].self_attn, name).weight.data = tensors[name].clone()
    _fill(_method(model), tensors)


def _angles(model: LlamaForCausalLM, length: int, first: int = 0, positions: Tensor | None = None) -> Any:
    if positions is None:
        positions = torch.arange(first, first + length)[None]
    return model.model.rotary_emb(torch.zeros(1), positions)


@torch.no_grad()
def _run(model: LlamaForCausalLM, hidden: Tensor, cache: Any = None, first: int = 0) -> tuple[Tensor, Tensor]:
    """The output of the layer, and what its output projection was given."""
    layer, seen = model.model.layers[0].self_attn, []
    handle = layer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    angles = _angles(model, hidden.shape[1], first)
    out, _ = layer(hidden, position_embeddings=angles, attention_mask=None, past_key_values=cache)
    handle.remove()
    return out, seen[0]
