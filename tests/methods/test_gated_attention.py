"""Gated attention: variants, initialisations, the official layouts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.methods.gated_attention import ACTIVATIONS, split_official
from patchattn.testing import TEXT


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 1})).eval()


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"kind": "headwise"}, (4, 32)),
        ({"kind": "elementwise"}, (32, 32)),
        ({"kind": "elementwise", "shared": True}, (8, 32)),
    ],
)
def test_a_gate_has_the_parameters_the_paper_gives_it(fields, shape):
    model = patchattn.patch(llama(), patchattn.GatedAttention(**fields))
    assert {n.rpartition(".")[2]: tuple(p.shape) for n, p in patchattn.patch_parameters(model).items()} == {
        "weight": shape,
        "bias": shape[:1],
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "shared"), [("headwise", False), ("elementwise", False), ("elementwise", True)])
def test_the_gate_multiplies_each_heads_output(activation, kind, shared):
    model = llama()
    gated = patchattn.GatedAttention(kind=kind, shared=shared, init="random", activation=activation, bias=False)
    attention = model.model.layers[0].self_attn
    seen = {}
    handle = attention.o_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    inner = attention.register_forward_pre_hook(lambda m, a, k: seen.update(x=k["hidden_states"]), with_kwargs=True)
    ids = torch.randint(5, 60, (2, 9))
    model(ids)
    plain, x = seen["out"], seen["x"]
    patchattn.patch(model, gated)
    model(ids)
    weight = attention.patchattn[0].weight
    functions = {
        "sigmoid": torch.sigmoid,
        "2sigmoid": lambda z: 2 / (1 + (-z).exp()),
        "ns_sigmoid": lambda z: 0.5 + 0.5 * torch.sigmoid(z),
        "silu": lambda z: z * torch.sigmoid(z),
    }
    gate = functions[activation](x @ weight.T)
    if kind == "headwise":
        gate = gate.repeat_interleave(8, dim=-1)
    elif shared:
        gate = gate.repeat(1, 1, 4)
    torch.testing.assert_close(seen["out"], plain * gate)
    handle.remove()
    inner.remove()


def test_a_static_gate_looks_at_no_input_and_an_added_one_adds():
    ids = torch.randint(5, 60, (2, 9))
    for fields in ({"static": True}, {"combine": "add"}, {"static": True, "combine": "add", "kind": "elementwise"}):
        model = llama()
        wanted, seen = model(ids).logits, []
        patchattn.patch(model, patchattn.GatedAttention(**fields))
        assert torch.equal(model(ids).logits, wanted)  # the identity
        method = model.model.layers[0].self_attn.patchattn[0]
        names = {name.rpartition(".")[2] for name in patchattn.patch_parameters(model)}
        assert names == ({"bias"} if fields.get("static") else {"weight", "bias"})
        torch.nn.init.normal_(method.bias)
        inner = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda m, a, seen=seen: seen.append(a[0])
        )
        model(ids)
        with patchattn.disabled(model):
            model(ids)
        inner.remove()
        z = method.bias if fields.get("kind") == "elementwise" else method.bias.repeat_interleave(8)
        gated = seen[1] + z * torch.sigmoid(z) if "combine" in fields else seen[1] * 2 * torch.sigmoid(z)
        torch.testing.assert_close(seen[0], gated)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"combine": "mix"}, "combine is 'mix'; it must be one of 'multiply', 'add'"),
        ({"combine": "add", "activation": "sigmoid"}, "'silu' with init='identity', since no other is 0 at 0"),
        ({"combine": "add", "init": "open"}, "combine is 'add'; it must be 'multiply' with init='open'"),
        ({"static": True, "bias": False}, "bias is False; it must be True with static=True"),
    ],
)
def test_impossible_variants_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        patchattn.GatedAttention(**fields)


def test_the_official_layouts_are_split_into_query_and_gate_rows():
    heads, kv_heads, head_dim, hidden = 6, 2, 4, 5
    query, gate = torch.randn(heads * head_dim, hidden), torch.randn(heads * head_dim, hidden)
    q, g = query.unflatten(0, (heads, head_dim)), gate.unflatten(0, (heads, head_dim))
    group = heads // kv_heads
    grouped = torch.cat(
        [torch.cat([*q[i * group : (i + 1) * group], *g[i * group : (i + 1) * group]]) for i in range(kv_heads)]
    )
    per_head = torch.cat([torch.cat([q[h], g[h]]) for h in range(heads)])
    for packed, layout in ((grouped, "grouped"), (per_head, "per_head")):
        ours = split_official(packed, heads, kv_heads, head_dim, layout)
        assert torch.equal(ours[0], query) and torch.equal(ours[1], gate)
    with pytest.raises(ValueError, match="layout is 'interleaved'; it must be 'grouped' or 'per_head'"):
        split_official(grouped, heads, kv_heads, head_dim, "interleaved")


def test_gate_parameters_are_float32_in_a_half_precision_model():
    model = patchattn.patch(llama().bfloat16(), patchattn.GatedAttention(init="open"))
    assert {p.dtype for p in patchattn.patch_parameters(model).values()} == {torch.float32}
    assert model(torch.randint(5, 60, (1, 6))).logits.dtype == torch.bfloat16


def test_the_report_says_how_far_the_gates_are_from_open():
    model = patchattn.patch(llama(), patchattn.GatedAttention(init="random"))
    method = model.model.layers[0].self_attn.patchattn[0]
    assert method.report() == {}
    method.weight.data.zero_()
    method.bias.data.copy_(torch.tensor([-9.0, 0.0, 0.0, 9.0]))
    model(torch.randint(5, 60, (1, 6)))
    assert method.report() == {"mean gate": 0.5, "share below 0.1": 0.25}


INNER = {
    "duo": patchattn.DuoAttention(heads=0.5, sink=1, recent=4),
    "longheads": patchattn.LongHeads(chunk=2, window=8),
    "seer": patchattn.SeerAttention(block=2, density=0.4, init="mean", dense_below=0),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_over_another_method_the_gate_multiplies_what_that_gives(kind, inner):
    model, ids, seen = llama(), torch.randint(5, 60, (2, 19)), []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].unflatten(-1, (4, 8))))
    with torch.no_grad():
        model(ids)
        patchattn.patch(model, inner)
        model(ids)
        patchattn.unpatch(model)
        patchattn.patch(model, [patchattn.GatedAttention(kind=kind, init="random"), inner])
        model(ids)
        gate = attention.patchattn[0].gate(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))
    dense, plain, gated = seen
    assert not torch.allclose(plain, dense, atol=1e-4) and not torch.allclose(gate, torch.ones_like(gate), atol=1e-3)
    torch.testing.assert_close(gated, plain * gate)
