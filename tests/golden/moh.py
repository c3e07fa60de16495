"""Golden cases of MoH: an attention layer of a DiT, a ViT or a Llama, or a tiny Llama that generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, ViTConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import patchattn
from patchattn.living import watching
from patchattn.methods.moh import load_balance

from .loader import Case, Comparison, exactly

FORWARD, GRADIENT = 1e-5, 5e-5
ROUTERS = {"wg": "routed_weight", "wg_1": "shared_weight", "wg_0": "kind_weight"}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")


def check(case: Case) -> Iterator[Comparison]:
    if "input_ids" in case:
        yield from _model(case)
    elif "hidden_states" in case:
        yield from _llama_layer(case)
    else:
        yield from _learned(case)


# ---- learned routers: DiT and ViT ------------------------------------------------------------------------------


def _learned(case: Case) -> Iterator[Comparison]:
    c, x = case.config, case["x"].clone().requires_grad_()
    layer = Layer((_dit if "qk_norm" in c else CosineAttention)(case))
    method = patchattn.MoH(shared=c["shared_heads"], top_k=c["routed_topk"], router="linear")
    patchattn.patch(layer, method).train(c["training"])
    moh = layer.attn.patchattn[0]
    for theirs, ours in ROUTERS.items():
        weight = getattr(moh, ours)
        yield exactly(f"whether there is {theirs}", weight is not None, f"w.{theirs}.weight" in case)
        if weight is not None:
            weight.data = case[f"w.{theirs}.weight"].clone()
    seen: dict[str, Tensor] = {}

    def note(ctx: Any) -> Tensor:
        seen.update(gates=moh.gates(ctx), heads=ctx.base())
        return ctx.attend()

    with watching(layer, note):
        out = layer(x)
    yield Comparison("gates", seen["gates"], case["gates"], FORWARD)
    yield exactly("heads that are on", seen["gates"] != 0, case["gates"] != 0)
    yield Comparison("heads", seen["heads"], case["head_out"], FORWARD)
    yield Comparison("output", out, case["out"], FORWARD)
    terms = list(moh.auxiliary_losses().values())
    yield exactly("whether there is a load balance", bool(terms), "aux_loss" in case)
    for term in terms:
        yield Comparison("load balance", term.reshape(1), 0.01 * case["aux_loss"], 0.01 * FORWARD)
    torch.stack([(out * case["cotangent"]).sum(), *terms]).sum().backward()
    yield Comparison("gradient of x", x.grad, case["grad_x"], GRADIENT)
    for name, theirs in case.under("grad.").items():
        router = ROUTERS.get(name.removesuffix(".weight"))
        ours = _gradient(layer.attn, name) if router is None else getattr(moh, router).grad
        yield Comparison(f"gradient of {name}", ours, theirs, GRADIENT)


class Layer(nn.Module):
    """A model that is one attention module."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn: Any = attn
        self.config = getattr(attn, "config", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


def _dit(case: Case) -> nn.Module:
    c = case.config
    norm = {"qk_norm": "layer_norm"} if c["qk_norm"] else {}
    attn = Attention(query_dim=c["dim"], heads=c["num_heads"], dim_head=c["head_dim"], bias=True, **norm)
    for name, theirs in case.under("w.").items():
        for part, value in zip(_parts(attn, name), theirs.chunk(len(_parts(attn, name))), strict=True):
            part.data = value.clone()
    return attn


def _parts(attn: nn.Module, name: str) -> list[nn.Parameter]:
    """Our parameters that together are the official one of that name; none for a router."""
    places = {"qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",), "q_norm": ("norm_q",), "k_norm": ("norm_k",)}
    owner, _, kind = name.rpartition(".")
    if isinstance(attn, CosineAttention):
        return [attn.get_parameter(name)]
    if owner in ROUTERS:
        return [nn.Parameter()]
    return [attn.get_parameter(f"{place}.{kind}") for place in places[owner]]


def _gradient(attn: nn.Module, name: str) -> Tensor:
    gradients = [part.grad for part in _parts(attn, name)]
    return torch.cat([gradient for gradient in gradients if gradient is not None])


class CosineAttention(nn.Module):
    """TransNeXt's attention, handing q, k and v to transformers' table."""

    is_causal = False

    def __init__(self, case: Case) -> None:
        super().__init__()
        c, own = case.config, case.under("w.")
        self.config = ViTConfig(attn_implementation="sdpa")
        self.num_heads, self.head_dim, self.hidden_size = c["num_heads"], c["head_dim"], c["dim"]
        for name in ("qkv", "proj", "cpb_fc1", "cpb_fc2"):
            setattr(self, name, nn.Linear(own[f"{name}.weight"].shape[1], own[f"{name}.weight"].shape[0]))
        self.temperature, self.query_embedding = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
        for name, parameter in self.named_parameters():
            parameter.data = own[name].clone()
        self.coords, self.index = case["rel_coords"], case["rel_pos_index"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        length = hidden_states.shape[1]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        bias = self.cpb_fc2(functional.relu(self.cpb_fc1(self.coords))).T[:, self.index].unflatten(1, (length, length))
        sharpness = functional.softplus(self.temperature) * torch.tensor(float(length)).log()
        q = (functional.normalize(q, dim=-1) + self.query_embedding) * sharpness
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, q, functional.normalize(k, dim=-1), v, bias[None], scaling=1.0)
        return self.proj(out.flatten(2))


# ---- the parameter-free router: Llama --------------------------------------------------------------------------


def _llama(c: dict[str, Any], **sizes: int) -> LlamaForCausalLM:
    config = LlamaConfig(hidden_size=c["hidden"], num_attention_heads=c["num_heads"], head_dim=c["head_dim"],
                         num_key_value_heads=c["num_kv_heads"], rms_norm_eps=c.get("rms_eps", 1e-6),
                         rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]}, **sizes)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _llama_layer(case: Case) -> Iterator[Comparison]:
    def layer(**settings: Any) -> tuple[Any, Callable[..., Any]]:
        c = case.config
        model = _llama(c, num_hidden_layers=1, intermediate_size=16, vocab_size=8)
        attn: Any = model.model.layers[0].self_attn
        for name in LLAMA:
            getattr(attn, name).weight.data = case[f"w.{name}.weight"].clone()
        patchattn.patch(model, patchattn.MoH(shared=c["shared_heads"], top_k=c["routed_topk"], **settings))

        def call(x: Tensor, first: int = 0, cache: Any = None) -> Tensor:
            positions = case["position_ids"][:, first : first + x.shape[1]]
            rotary = model.model.rotary_emb(x, positions)
            mask = case["attention_mask"][:, :, first : first + x.shape[1], : first + x.shape[1]]
            return attn(hidden_states=x, position_embeddings=rotary, attention_mask=mask, past_key_values=cache)[0]

        return model, call

    rows = torch.arange(case.config["S"]) >= torch.tensor(case.config["left_pad"])[:, None]

    model, call = layer()
    moh, seen = model.model.layers[0].self_attn.patchattn[0], {}

    def note(ctx: Any) -> Tensor:
        norms = moh.norms(ctx)
        seen.update(norms=norms, p=moh.probabilities(norms), gates=moh.gates(ctx))
        return ctx.attend()

    x = case["hidden_states"].clone().requires_grad_()
    with watching(model, note):
        out = call(x)
    shared = case.config["shared_heads"]
    chosen = seen["gates"][..., shared:] != 0
    yield Comparison("norms", seen["norms"], case["router_logits"], FORWARD)
    yield Comparison("router", seen["p"], case["router_gates"], FORWARD)
    yield exactly("heads that are on", chosen, case["routed_mask"].bool())
    yield exactly("gates are 0 or 1", seen["gates"], (seen["gates"] != 0).float())
    yield Comparison("output", out * rows[..., None], case["out"], FORWARD)
    balance = load_balance(seen["p"], chosen)
    yield Comparison("load balance", balance.reshape(1), case["derived_aux"], FORWARD)
    own = model.model.layers[0].self_attn
    (gradient,) = torch.autograd.grad(balance, own.q_proj.weight, retain_graph=True)
    yield Comparison("its gradient of q_proj", gradient, case["derived_aux_grad.q_proj.weight"], GRADIENT)
    (out * case["cotangent"]).sum().backward()
    yield Comparison("gradient of x", x.grad, case["derived_ste_grad_x"], GRADIENT)
    for name in LLAMA:
        theirs = case[f"derived_ste_grad.{name}.weight"]
        yield Comparison(f"gradient of {name}", getattr(own, name).weight.grad, theirs, GRADIENT)

    model, call = layer(ste="none")
    (call(case["hidden_states"]) * case["cotangent"]).sum().backward()
    theirs, own = case["nograd_router_grad.q_proj.weight"], model.model.layers[0].self_attn
    yield Comparison("gradient of q_proj past the router", own.q_proj.weight.grad, theirs, GRADIENT)
    cache, last = DynamicCache(config=model.config), case.config["S"] - 1
    with torch.no_grad():
        call(case["hidden_states"][:, :last], cache=cache)
        out = call(case["hidden_states"][:, last:], first=last, cache=cache)
    yield Comparison("decoded", out, case["decode_last_out"], FORWARD)


def _model(case: Case) -> Iterator[Comparison]:
    c = case.config
    model = _llama(c, num_hidden_layers=c["layers"], intermediate_size=c["intermediate"], vocab_size=c["vocab"])
    model.load_state_dict(case.under("w."))
    patchattn.patch(model, patchattn.MoH(shared=c["shared_heads"], top_k=c["routed_topk"]))
    chosen: list[Tensor] = []

    def note(ctx: Any) -> Tensor:
        chosen.append(ctx.attachment.methods[0].gates(ctx)[..., c["shared_heads"] :] != 0)
        return ctx.attend()

    with torch.no_grad(), watching(model, note):
        logits = model(case["input_ids"]).logits
    yield Comparison("logits", logits, case["logits"], FORWARD)
    for index, ours in enumerate(chosen):
        yield exactly(f"heads on in layer {index}", ours, case[f"routed_mask_layer{index}"].bool())
    theirs = case["greedy_tokens"]
    prompt, new = 9, theirs.shape[1] - 9
    written = model.generate(
        case["input_ids"][:1, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    yield exactly("greedy tokens", written, theirs)
