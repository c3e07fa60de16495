"""patch, unpatch, disabled, settings: plans, errors, wrappers, masks, rotary."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import patchattn
from patchattn import Method, MethodConfig
from patchattn.living import plan_of
from patchattn.method import as_methods
from patchattn.record import attachment_of
from patchattn.testing import FAMILIES, IMAGE_TOKEN, TEXT, snapshot


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 4, **changes})).eval()


def tokens(rows=2, length=20):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(7))


def patched_layers(model):
    return [i for i, layer in enumerate(model.model.layers) if "patchattn" in layer.self_attn._modules]


# ---- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (None, [0, 1, 2, 3]),
        ("all", [0, 1, 2, 3]),
        ("even", [0, 2]),
        ("odd", [1, 3]),
        ("1-2", [1, 2]),
        ("0,2-", [0, 2, 3]),
        ("-1", [3]),
        (2, [2]),
        ([0, -1], [0, 3]),
        (range(1, 3), [1, 2]),
        ("*.layers.3.self_attn", [3]),
        ("*.self_attn", [0, 1, 2, 3]),
    ],
)
def test_selectors_name_layers(layers, wanted):
    model = llama()
    patchattn.patch(model, "dense", layers=layers)
    assert patched_layers(model) == wanted


@pytest.mark.parametrize(
    "what",
    [
        patchattn.GatedAttention(kind="elementwise"),
        patchattn.GatedAttention.Config(kind="elementwise"),
        "gated_attention:kind=elementwise",
        "GatedAttention:kind=elementwise,init=identity",
        {"method": "gated-attention", "kind": "elementwise"},
    ],
)
def test_a_method_can_be_said_in_many_ways(what):
    model = patchattn.patch(llama(), what)
    assert [type(m).__name__ for m in model.model.layers[0].self_attn.patchattn] == ["GatedAttention"]
    assert model.model.layers[0].self_attn.patchattn[0].config.kind == "elementwise"


def test_a_list_composes_with_the_outermost_first():
    model = patchattn.patch(llama(), ["gated_attention", patchattn.DuoAttention(sink=2, recent=5)])
    names = [type(m).__name__ for m in model.model.layers[0].self_attn.patchattn]
    assert names == ["GatedAttention", "DuoAttention"]
    bare = patchattn.patch(llama(), patchattn.DuoAttention(sink=2, recent=5))
    assert torch.equal(model(tokens()).logits, bare(tokens()).logits)  # the identity gate changes nothing


@pytest.mark.parametrize(
    ("what", "layers", "message"),
    [
        ("hedgehogg", None, "unknown method 'hedgehogg'; known methods: dense, duo_attention, gated_attention"),
        (
            "duo_attention:windw=3",
            None,
            "DuoAttention: unknown field 'windw'; allowed: heads, share, sink, recent, prefill",
        ),
        (
            ["duo_attention", "gated_attention"],
            None,
            "duo_attention computes attention itself, so gated_attention after it in a list would not run; put "
            "duo_attention last",
        ),
        (
            ["seer_attention_decode", "duo_attention"],
            None,
            "seer_attention_decode and duo_attention each keep a cache layer of their own",
        ),
        ("duo_attention:sink", None, "'sink' is no setting; write name:key=value"),
        ("dense", "0-9", "there is no layer 9; the model has 4"),
        ("dense", "3-1", "runs backwards"),
        ("dense", "*.attention", "matches no attention module"),
        ("dense", "1-2-3", "is no range"),
        ({"0-1": "dense", "1": "gated_attention"}, None, "named by two selectors"),
        ({"0-1": "dense"}, "0", "a plan names its layers by itself"),
        ({}, None, "an empty plan"),
        ([], None, "an empty list of methods"),
        (["dense", "dense"], None, "the same method twice"),
        (patchattn.DuoAttention(heads=[[1, 0]] * 3), None, "heads has 3 rows; it must have 4"),
        (
            patchattn.DuoAttention(heads=[[1, 0, 1]] * 4),
            None,
            "heads has 3 values for model.layers.0.self_attn, which has 2",
        ),
        (patchattn.DuoAttention(heads=[[0.3, 0.9]] * 4), None, "share must say how many heads stay full"),
    ],
)
def test_a_wrong_patch_is_refused_by_name_and_leaves_the_model_untouched(what, layers, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message.replace("(", "\\(").replace("*", "\\*")):
        patchattn.patch(model, what, layers=layers)
    assert snapshot(model) == before


def test_what_is_no_method_is_refused():
    with pytest.raises(TypeError, match="3 is no method"):
        patchattn.patch(llama(), 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patchattn.DuoAttention(sink=-1), "sink is -1; it must be an integer of at least 0"),
        (lambda: patchattn.DuoAttention(recent=0), "recent is 0; it must be an integer of at least 1"),
        (lambda: patchattn.DuoAttention(heads=1.5), "heads is 1.5; it must be a share from 0 to 1"),
        (lambda: patchattn.DuoAttention(prefill="fast"), "prefill is 'fast'; it must be one of 'exact', 'chunked'"),
        (lambda: patchattn.DuoAttention(heads=0.5, share=0.5), "share is 0.5; it must be left out"),
        (lambda: patchattn.DuoAttention(heads="no/such.tsv").config.resolve([], 1), "no pattern at no/such.tsv"),
        (lambda: patchattn.GatedAttention(kind="rowwise"), "kind is 'rowwise'; it must be one of"),
        (lambda: patchattn.GatedAttention(activation="silu"), "'2sigmoid' with init='identity'"),
        (lambda: patchattn.GatedAttention(init="open", bias=False), "bias is False; it must be True"),
        (lambda: patchattn.GatedAttention(shared=True), "kind is 'headwise'; it must be 'elementwise'"),
    ],
)
def test_impossible_settings_are_refused_on_creation(make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("(", "\\(")):
        make()


def test_patching_a_patched_model_says_how_to_replace_or_compose():
    model = patchattn.patch(llama(), "dense")
    with pytest.raises(ValueError, match=r"unpatch\(model\) first, to compose .* give them as one list"):
        patchattn.patch(model, "gated_attention")
    assert patched_layers(model) == [0, 1, 2, 3]


def test_unpatching_an_unpatched_model_is_refused():
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not patched"):
        patchattn.unpatch(llama())


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="no attention module that patchattn can reach"):
        patchattn.patch(torch.nn.Linear(2, 2), "dense")


def test_a_failure_while_attaching_leaves_the_model_untouched():
    @dataclass(frozen=True)
    class Empty(MethodConfig):
        pass

    class Late(Method):
        name, Config, needs = "late", Empty, frozenset({"z_proj"})

    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="has no projection 'z_proj'"):
        patchattn.patch(model, Late())
    assert snapshot(model) == before


def test_position_biases_are_refused_by_reason():
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=32))
    with pytest.raises(ValueError, match="it adds a position bias to the scores"):
        patchattn.patch(t5, patchattn.DuoAttention(heads=0.5, sink=1, recent=2))


# ---- settings, disabled, gates -----------------------------------------------------------------------------


def test_settings_change_run_time_knobs_and_put_them_back():
    model = patchattn.patch(llama(), patchattn.DuoAttention(heads=0.0, sink=2, recent=5))
    ids = tokens()
    exact = model(ids).logits
    with patchattn.settings(model, prefill="chunked"):
        chunked = model(ids).logits
    assert (
        torch.equal(chunked, patchattn.unpatch(copy.deepcopy(model))(ids).logits)
        or (chunked - exact).abs().max() > 1e-3
    )
    assert (chunked - exact).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, exact)


def test_settings_refuse_what_cannot_change():
    model = patchattn.patch(llama(), patchattn.DuoAttention(heads=0.5, sink=2, recent=5))
    with (
        pytest.raises(ValueError, match="settings: 'sink' cannot be changed at run time; allowed: prefill"),
        patchattn.settings(model, sink=3),
    ):
        pass
    with pytest.raises(ValueError, match="prefill is 'x'"), patchattn.settings(model, prefill="x"):
        pass


def test_disabled_can_be_nested_and_survives_errors():
    model = llama()
    ids = tokens()
    base = model(ids).logits
    patchattn.patch(model, patchattn.DuoAttention(heads=0.0, sink=2, recent=5))
    ours = model(ids).logits
    with pytest.raises(KeyError), patchattn.disabled(model):
        with patchattn.disabled(model):
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, base)
        raise KeyError
    assert torch.equal(model(ids).logits, ours)


def test_a_copy_of_a_patched_model_is_independent_and_can_be_unpatched():
    model = llama()
    ids = tokens()
    base = model(ids).logits
    patchattn.patch(model, patchattn.GatedAttention(init="random"))
    twin = copy.deepcopy(model)
    ours = model(ids).logits
    assert torch.equal(patchattn.unpatch(twin)(ids).logits, base)
    assert torch.equal(model(ids).logits, ours)
    assert not torch.equal(ours, base)


def test_the_identity_gate_is_exact_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = llama().to(dtype)
        base = model(tokens()).logits
        for kind in ("headwise", "elementwise"):
            patchattn.patch(model, patchattn.GatedAttention(kind=kind))
            assert torch.equal(model(tokens()).logits, base)
            patchattn.unpatch(model)


def test_the_open_gate_leaves_the_stated_share():
    model = llama(num_hidden_layers=1)
    patchattn.patch(model, patchattn.GatedAttention(init="open"))
    gate = model.model.layers[0].self_attn.patchattn[0].gate(torch.randn(1, 3, 32))
    torch.testing.assert_close(gate, torch.full_like(gate, torch.sigmoid(torch.tensor(5.0)).item()))


def test_freeze_base_leaves_only_the_gates_to_train():
    model = patchattn.freeze_base(patchattn.patch(llama(), "gated_attention"))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == set(patchattn.patch_parameters(model)) and len(learning) == 8


# ---- wrappers ----------------------------------------------------------------------------------------------


def test_lora_and_a_patch_live_together_in_either_order():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    ids = tokens()
    outputs = []
    for patch_first in (True, False):
        model = llama()
        if patch_first:
            patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=2, recent=5))
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, lora)
        if not patch_first:
            assert patchattn.patch(wrapped, patchattn.DuoAttention(heads=0.5, sink=2, recent=5)) is wrapped
        outputs.append(wrapped(ids).logits)
        with patchattn.disabled(wrapped), wrapped.disable_adapter():
            assert torch.equal(wrapped(ids).logits, llama()(ids).logits)
        patchattn.unpatch(wrapped)
        assert not any("patchattn" in name for name, _ in wrapped.named_modules())
    assert torch.equal(*outputs)


def test_lora_does_not_touch_the_gate():
    peft = pytest.importorskip("peft")
    model = patchattn.patch(llama(), "gated_attention")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    assert not any("lora" in name and "patchattn" in name for name, _ in wrapped.named_parameters())
    assert set(patchattn.patch_parameters(wrapped)) == {
        f"model.layers.{i}.self_attn.patchattn.0.{p}" for i in range(4) for p in ("weight", "bias")
    }


def test_offloaded_weights_compute_the_same():
    accelerate = pytest.importorskip("accelerate")
    ids = tokens()
    wanted = patchattn.patch(llama(), ["gated_attention", patchattn.DuoAttention(heads=0.5, sink=2, recent=5)])(
        ids
    ).logits
    model = accelerate.cpu_offload(llama(), execution_device="cpu")
    patchattn.patch(model, ["gated_attention", patchattn.DuoAttention(heads=0.5, sink=2, recent=5)])
    torch.testing.assert_close(model(ids).logits, wanted)
    patchattn.unpatch(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_generate(dtype):
    model = patchattn.patch(llama().to(dtype), ["gated_attention", patchattn.DuoAttention(heads=0.5, sink=2, recent=5)])
    out = model.generate(tokens(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (2, 25) and model(tokens()).logits.dtype == dtype


def test_models_that_share_a_config_are_patched_one_by_one():
    torch.manual_seed(0)
    config = LlamaConfig(**TEXT)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    ids = tokens()
    wanted = other(ids).logits
    patchattn.patch(one, patchattn.DuoAttention(heads=0.0, sink=1, recent=2))
    assert other.config._attn_implementation == "sdpa" and other.config is config
    assert torch.equal(other(ids).logits, wanted)
    patchattn.patch(other, "gated_attention")
    assert torch.equal(other(ids).logits, wanted)
    patchattn.unpatch(one)
    assert one.config is config and one.model.layers[0].self_attn.config is config
    assert torch.equal(other(ids).logits, wanted) and patched_layers(other) == [0, 1, 2]


def test_what_is_changed_in_the_config_of_a_patched_model_stays_after_unpatch():
    model = patchattn.patch(llama(), "dense")
    model.config.use_cache = False
    patchattn.unpatch(model)
    assert model.config.use_cache is False and model.config._attn_implementation == "sdpa"


def test_importing_patchattn_changes_nothing_in_transformers():
    code = """
import sys, patchattn
assert not any(m.startswith("transformers.models.") for m in sys.modules)
assert "torch" not in sys.modules
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers import modeling_utils, masking_utils
before = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
from patchattn import running
running.register()
after = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
assert [b - a for a, b in zip(before, after)] == [{"patchattn"}, {"patchattn"}]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- masks: exact where the method is exact ----------------------------------------------------------------


def gemma2(**changes):
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**TEXT, sliding_window=6, attn_logit_softcapping=2.0, **changes)).eval()


def gpt_oss():
    torch.manual_seed(0)
    config = GptOssConfig(**TEXT, sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def mistral():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**TEXT, sliding_window=6)).eval()


def qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=6, max_window_layers=1)).eval()


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**TEXT)).eval()


@pytest.mark.parametrize("build", [llama, mistral, qwen2, qwen3, gemma2, gpt_oss], ids=lambda f: f.__name__)
@pytest.mark.parametrize("side", ["left", "right", "packed", "none"])
def test_dense_equals_the_unpatched_model_under_every_mask(build, side):
    model, ids = build(), tokens()
    inputs = {"input_ids": ids, "use_cache": False}
    real = torch.ones_like(ids).bool()
    if side == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    elif side != "none":
        real[1, :7] = False
        real = real if side == "left" else real.flip(1)
        inputs["attention_mask"] = real.long()
    wanted = model(**inputs).logits
    patchattn.patch(model, "dense")
    assert torch.equal(model(**inputs).logits[real], wanted[real])


def test_dense_runs_on_flex_attention_where_the_model_was_loaded_so():
    torch.manual_seed(0)
    config = MistralConfig(**{**TEXT, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 1}, sliding_window=6)
    model = MistralForCausalLM(config).eval()  # flex attention wants heads of 16 and more
    model.set_attn_implementation("flex_attention")
    ids = tokens()
    real = torch.ones_like(ids).bool()
    real[1, :7] = False
    with torch.no_grad():
        wanted = model(ids, attention_mask=real.long(), use_cache=False).logits
        patchattn.patch(model, "dense")
        assert torch.equal(model(ids, attention_mask=real.long(), use_cache=False).logits[real], wanted[real])
    assert model.model.layers[0].self_attn._patchattn.base_ran == "flex_attention"


def test_dropout_in_training_is_the_models_own():
    ids = tokens()

    def run(model, seed):
        torch.manual_seed(seed)
        return model(ids, use_cache=False).logits

    model = llama(attention_dropout=0.3).train()
    wanted = run(model, 1)
    patchattn.patch(model, "dense")
    assert torch.equal(run(model, 1), wanted) and not torch.equal(run(model, 2), wanted)
    patchattn.unpatch(model)
    patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=2, recent=5))
    assert torch.equal(run(model, 1), run(model, 1)) and not torch.equal(run(model, 2), run(model, 1))
    assert torch.equal(run(model.eval(), 1), run(model, 2))


@pytest.mark.parametrize("build", [llama, gemma2, gpt_oss], ids=lambda f: f.__name__)
def test_streaming_heads_respect_capped_scores_and_learned_sinks(build):
    model, ids = build(), tokens()
    wanted = model(ids).logits
    layers = (
        "all" if build is llama else [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    )
    patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=4, recent=100), layers=layers)  # sees everything
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=0)


def test_packed_sequences_stream_each_by_itself():
    model, ids = llama(), tokens(1, 30)
    patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=2, recent=5))
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :13], model(ids[:, :13]).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[:, 13:], model(ids[:, 13:]).logits, atol=1e-5, rtol=0)


def test_a_long_padded_batch_never_holds_a_square_mask():
    code = """
import resource, torch, patchattn
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=16,
                     max_position_embeddings=40000)
model = LlamaForCausalLM(config).eval().model
mask = torch.ones(2, 32768, dtype=torch.long)
mask[1, :5000] = 0
ids = torch.zeros_like(mask)
model(ids[:, :64], attention_mask=mask[:, :64] * 0 + 1)
patchattn.patch(model, "dense")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    model(ids, attention_mask=mask, use_cache=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    square = 2 * 32768**2  # bytes of a boolean mask
    assert grown < square / 2, f"{grown / 2**20:.0f} MiB more; a square mask takes {square / 2**20:.0f}"


# ---- rotary, captures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoFields(MethodConfig):
    pass


class RawDense(Method):
    """Dense attention that takes q and k before rotary and rotates them itself."""

    name, Config, rotary = "raw_dense", NoFields, "raw"

    def forward(self, ctx):
        keys = torch.arange(ctx.k.shape[2])[None]
        inner = ctx.attachment
        q, k = ctx.rotate(ctx.q), ctx.rotate(ctx.k, keys)
        self.seen = ctx.q
        inner.raw = False
        try:
            return ctx.attend(q, k)
        finally:
            inner.raw = True


class RawThrough(Method):
    """Asks for raw q and k and leaves the rotation to the inner attention."""

    name, Config, rotary = "raw_through", NoFields, "raw"

    def forward(self, ctx):
        return ctx.attend()


ROTARY_MODELS = {"llama": llama, "qwen3": qwen3, "mistral": mistral, "gemma2": gemma2, "gpt_oss": gpt_oss}


@pytest.mark.parametrize("name", ROTARY_MODELS)
def test_neutral_rotary_gives_raw_queries_and_the_methods_own_rotation_is_exact(name):
    model, ids = ROTARY_MODELS[name](), tokens()
    wanted = model(ids).logits
    raw = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: raw.append(out))
    patchattn.patch(model, RawDense())
    assert torch.equal(model(ids).logits, wanted)
    seen = model.model.layers[0].self_attn.patchattn[0].seen
    plain = raw[0].unflatten(-1, (4, 8))
    norm = getattr(model.model.layers[0].self_attn, "q_norm", None)
    plain = plain if norm is None else norm(plain)
    assert torch.equal(seen, plain.transpose(1, 2))
    handle.remove()
    patchattn.unpatch(model)
    assert torch.equal(model(ids).logits, wanted)


def test_raw_keys_in_the_cache_are_rotated_at_their_places():
    model, ids = llama(), tokens()
    wanted = model(ids).logits
    patchattn.patch(model, RawThrough())
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 10), (10, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, atol=1e-5, rtol=0)


class Curious(Method):
    """Notes what a context can tell."""

    name, Config, needs = "curious", NoFields, frozenset({"residual", "q_proj", "model_inputs"})

    def forward(self, ctx):
        self.residual, self.projected, self.inputs = ctx.residual, ctx.projected("q_proj"), ctx.model_inputs
        self.hidden, self.positions, self.visual = ctx.hidden_states, ctx.positions, ctx.model_inputs.visual
        return ctx.attend()


def test_a_context_gives_the_residual_stream_the_projections_and_the_models_inputs():
    model, ids = llama(), tokens()
    patchattn.patch(model, Curious())
    layer = model.model.layers[1]
    model(ids)
    assert attachment_of(layer.self_attn).model_inputs is None and not attachment_of(layer.self_attn).captured
    seen = layer.self_attn.patchattn[0]
    assert torch.equal(layer.input_layernorm(seen.residual), seen.hidden)
    assert torch.equal(layer.self_attn.q_proj(seen.hidden), seen.projected)
    assert torch.equal(seen.inputs.input_ids, ids) and seen.positions.tolist() == list(range(20))
    patchattn.unpatch(model)


def test_visual_tokens_of_a_vlm_are_known():
    family = FAMILIES["llava"]
    model, inputs = family.build().eval(), family.inputs(2, 20)
    assert isinstance(model, LlavaForConditionalGeneration)
    patchattn.patch(model, Curious())
    model(**inputs)
    language = model.model.language_model.layers[0].self_attn
    assert torch.equal(language.patchattn[0].visual, inputs["input_ids"] == IMAGE_TOKEN)
    assert not any("patchattn" in name for name, _ in model.model.vision_tower.named_modules())


def test_a_vision_tower_is_patched_when_it_is_named():
    family = FAMILIES["llava"]
    torch.manual_seed(0)
    model, inputs = family.build().eval(), family.inputs(2, 20)
    wanted = model(**inputs).logits
    patchattn.patch(model, {"*vision_tower*self_attn": "dense", "all": "dense"})
    assert torch.equal(model(**inputs).logits, wanted)
    assert sum(name.endswith("patchattn") for name, _ in model.named_modules()) == 5


def test_qwen2_5_vl_with_its_three_dimensional_rotary():
    torch.manual_seed(0)
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, patch_size=4, out_hidden_size=32,
                  fullatt_block_indexes=[1], window_size=16)  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, vision_start_token_id=62
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    ids = tokens()
    ids[:, 3:7] = IMAGE_TOKEN
    inputs = dict(input_ids=ids, pixel_values=torch.randn(2 * 16, 3 * 2 * 4 * 4), attention_mask=torch.ones_like(ids),
                  image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
                  mm_token_type_ids=(ids == IMAGE_TOKEN).int())  # fmt: skip
    wanted = model(**inputs).logits
    patchattn.patch(model, [Curious(), "dense"])
    assert torch.equal(model(**inputs).logits, wanted)
    layer = model.model.language_model.layers[0].self_attn
    assert torch.equal(layer.patchattn[0].visual, ids == IMAGE_TOKEN)
    patchattn.unpatch(model)
    patchattn.patch(model, patchattn.DuoAttention(heads=0.5, sink=2, recent=100))
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=0)


# ---- what a patch is, as data ------------------------------------------------------------------------------


def test_a_plan_is_data_and_makes_the_same_patch_again():
    model = llama()
    patchattn.patch(
        model, {"even": ["gated_attention", patchattn.DuoAttention(heads=0.5, sink=2, recent=5)], "odd": "dense"}
    )
    plan = plan_of(model)
    assert [entry["layers"] for entry in plan] == [
        [f"model.layers.{i}.self_attn" for i in pair] for pair in ((0, 2), (1, 3))
    ]
    assert [m["method"] for m in plan[0]["methods"]] == ["gated_attention", "duo_attention"]
    from patchattn.attach import apply_plan

    assert torch.equal(apply_plan(llama(), plan)(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["dense", "duo_attention", "gated_attention"])
def test_a_config_survives_json(name):
    import json

    from patchattn.method import describe

    method = as_methods(name)[0]
    again = as_methods(json.loads(json.dumps(describe(method))))[0]
    assert type(again) is type(method) and again.config == method.config
