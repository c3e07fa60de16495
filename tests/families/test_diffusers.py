"""Diffusers' models, patched through their attention processors."""

import copy
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_ltx import LTXAttention
from torch import Tensor, nn

import patchattn
from patchattn.families.diffusers import PatchedProcessor
from patchattn.method import Method
from patchattn.sites import find_sites

TEXT, IMAGE, WIDTH = 7, 16, 32  # text tokens, image tokens, hidden size


def dit():
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    inputs = dict(
        hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([3, 5]), class_labels=torch.tensor([1, 2])
    )
    return model, inputs


def pixart():
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8,
        cross_attention_dim=WIDTH, caption_channels=16,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(2, 4, 8, 8),
        timestep=torch.tensor([3, 5]),
        encoder_hidden_states=torch.randn(2, TEXT, 16),
        encoder_attention_mask=torch.tensor([[1] * TEXT, [1] * 4 + [0] * 3]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    return model, inputs


def sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"):
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=WIDTH, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=dual_attention_layers, qk_norm=qk_norm,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(2, 4, 8, 8),
        timestep=torch.tensor([3, 5]),
        encoder_hidden_states=torch.randn(2, TEXT, 16),
        pooled_projections=torch.randn(2, 16),
    )
    return model, inputs


def flux():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(2, IMAGE, 4),
        timestep=torch.tensor([0.3, 0.5]),
        encoder_hidden_states=torch.randn(2, TEXT, 16),
        pooled_projections=torch.randn(2, 16),
        img_ids=torch.randn(IMAGE, 3),
        txt_ids=torch.randn(TEXT, 3),
    )
    return model, inputs


@dataclass(frozen=True)
class Family:
    make: Callable
    usable: tuple[str, ...]  # in this order the layers are numbered


FAMILIES = {
    "dit": Family(dit, tuple(f"transformer_blocks.{i}.attn1" for i in range(2))),
    "pixart": Family(pixart, tuple(f"transformer_blocks.{i}.attn1" for i in range(2))),
    "sd3": Family(
        sd3,
        (
            "transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn",
            "transformer_blocks.1.attn2", "transformer_blocks.2.attn",
        ),
    ),
    "flux": Family(
        flux,
        (
            "transformer_blocks.0.attn", "transformer_blocks.1.attn",
            "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn",
        ),
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def made(family):
    model, inputs = family.make()
    return model.eval(), inputs


class Probe(Method):
    """Notes what each call was about, and attends as before."""

    name = "probe"
    needs = frozenset()

    def forward(self, ctx):
        out = ctx.attend()
        self.seen = dict(
            q=ctx.q, k=ctx.k, v=ctx.v, hidden_states=ctx.hidden_states, mask=ctx.mask, layer=ctx.layer_idx, out=out,
            causal=ctx.causal, module=ctx.module,
        )  # fmt: skip
        return out


class Silence(Method):
    name = "silence"

    def forward(self, ctx):
        return torch.zeros_like(ctx.attend())


class NeedsRaw(Probe):
    name = "needs_raw"
    rotary = "raw"


class NeedsResidual(Probe):
    name = "needs_residual"
    needs = frozenset({"residual", "to_v", "model_inputs"})

    def forward(self, ctx):
        self.noted = dict(residual=ctx.residual, projected=ctx.projected("to_v"), inputs=ctx.model_inputs.values)
        return super().forward(ctx)


def methods_of(model):
    return [model.get_submodule(f"{name}.patchattn")[0] for name in _patched_names(model)]


def _patched_names(model):
    return [name.removesuffix(".patchattn") for name, _ in model.named_modules() if name.endswith(".patchattn")]


def randomise(model):
    for parameter in patchattn.patch_parameters(model).values():
        nn.init.normal_(parameter)


# ---- what is found -----------------------------------------------------------------------------------------


def test_self_and_joint_attention_is_found_in_the_order_of_the_model(family):
    model, _ = made(family)
    usable = [site for site in find_sites(model) if site.problem is None]
    assert [site.name for site in usable] == list(family.usable)
    assert [site.layer_idx for site in usable] == list(range(len(usable)))
    config = model.config
    for site in usable:
        assert site.family == "diffusers" and not site.causal and site.window is None
        assert (site.heads, site.head_dim) == (config.num_attention_heads, config.attention_head_dim)
        assert (site.kv_heads, site.hidden_size) == (site.heads, WIDTH)
        assert site.config is config


def test_cross_attention_is_a_site_that_cannot_be_patched():
    model, _ = made(FAMILIES["pixart"])
    cross = [site for site in find_sites(model) if site.problem is not None]
    assert [site.name for site in cross] == ["transformer_blocks.0.attn2", "transformer_blocks.1.attn2"]
    assert all("cross-attention" in site.problem for site in cross)
    with pytest.raises(ValueError, match=r"attn2.*cross-attention: its keys come from another sequence"):
        patchattn.patch(model, "dense", layers="*.attn2")
    before = cross[0].module.processor
    patchattn.patch(model, "dense")
    assert cross[0].module.processor is before


class CrossProcessor(AttnProcessor2_0):
    pass


CROSS = {
    "it says so": lambda: Attention(query_dim=WIDTH, heads=4, dim_head=8, cross_attention_dim=WIDTH),
    "its keys have another width": lambda: LTXAttention(WIDTH, heads=4, kv_heads=4, dim_head=8, cross_attention_dim=24),
    "its processor's name": lambda: Attention(query_dim=WIDTH, heads=4, dim_head=8, processor=CrossProcessor()),
}


@pytest.mark.parametrize("sign", CROSS)
def test_cross_attention_is_told_by(sign):
    (site,) = find_sites(OneModule(CROSS[sign]()))
    assert site.problem == "cross-attention: its keys come from another sequence" and site.layer_idx is None


def test_looking_for_sites_in_a_transformers_model_imports_no_diffusers():
    code = (
        "import sys, patchattn\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, "
        "num_key_value_heads=2, intermediate_size=16, vocab_size=8))\n"
        "patchattn.unpatch(patchattn.patch(model, 'dense'))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'diffusers']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what a patch computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_equals_the_unpatched_model_bit_for_bit(family, dtype):
    model, inputs = made(family)
    model.to(dtype)
    inputs = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    reference = run(model, inputs)
    patchattn.patch(model, "dense")
    assert torch.equal(run(model, inputs), reference)
    calls = [model.get_submodule(name).__dict__["_patchattn"].calls for name in family.usable]
    assert calls == [1] * len(family.usable)


def test_the_methods_decide_what_attention_is(family):
    model, inputs = made(family)
    reference = run(model, inputs)
    patchattn.patch(model, Silence())
    silent = run(model, inputs)
    assert not torch.equal(silent, reference)
    patchattn.unpatch(model)
    for name in family.usable:  # values that are zero give the same silence
        module = model.get_submodule(name)
        for child in ("to_v", "add_v_proj"):
            if getattr(module, child, None) is not None:
                for parameter in getattr(module, child).parameters():
                    nn.init.zeros_(parameter)
    assert torch.equal(run(model, inputs), silent)


def test_gates_at_the_identity_change_nothing_and_take_gradients(family):
    model, inputs = made(family)
    reference = run(model, inputs)
    patchattn.patch(model, [patchattn.GatedAttention(kind="elementwise"), "dense"])
    assert torch.equal(run(model, inputs), reference)
    model(**inputs, return_dict=False)[0].square().mean().backward()
    parameters = patchattn.patch_parameters(model)
    assert len(parameters) == 2 * len(family.usable)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters.values())


def test_hidden_states_line_up_with_the_tokens_of_the_query(family):
    model, inputs = made(family)
    patchattn.patch(model, Probe())
    run(model, inputs)
    for index, (name, probe) in enumerate(zip(family.usable, methods_of(model), strict=True)):
        seen, module = probe.seen, model.get_submodule(name)
        batch, heads, tokens, size = seen["q"].shape
        assert seen["module"] is module and seen["layer"] == index and not seen["causal"]
        assert seen["out"].shape == (batch, tokens, heads, size)
        assert seen["hidden_states"].shape == (batch, tokens, WIDTH)
        # v is neither normalised nor rotated, so it says which projection each token came through.
        v, of_image = seen["v"].transpose(1, 2).flatten(2), module.to_v(seen["hidden_states"])
        from_image = torch.isclose(v, of_image, atol=1e-5).all(dim=-1)
        if getattr(module, "add_v_proj", None) is None:
            assert from_image.all()
        else:
            from_text = torch.isclose(v, module.add_v_proj(seen["hidden_states"]), atol=1e-5).all(dim=-1)
            assert (from_text ^ from_image).all()
            assert from_text.sum(dim=1).tolist() == [TEXT] * batch and tokens == TEXT + IMAGE


def test_a_causal_method_is_refused_by_name(family):
    model, inputs = made(family)
    reference = run(model, inputs)
    with pytest.raises(
        ValueError, match=rf"{family.usable[0]}.* cannot take duo_attention: its attention is not causal"
    ):
        patchattn.patch(model, patchattn.DuoAttention(sink=2, recent=4))
    assert torch.equal(run(model, inputs), reference) and not _patched_names(model)


def test_a_method_that_needs_raw_queries_is_refused_with_the_processor_named():
    model, _ = made(FAMILIES["flux"])
    with pytest.raises(
        ValueError, match="needs_raw needs q and k before rotary, which FluxAttnProcessor applies itself"
    ):
        patchattn.patch(model, NeedsRaw())


def test_residual_projections_and_model_inputs_reach_a_method():
    model, inputs = made(FAMILIES["dit"])
    entering = []
    handle = model.transformer_blocks[1].register_forward_pre_hook(lambda block, args: entering.append(args[0]))
    patchattn.patch(model, NeedsResidual())
    run(model, inputs)
    noted, seen = methods_of(model)[1].noted, methods_of(model)[1].seen
    assert torch.equal(noted["residual"], entering[0])
    assert torch.equal(noted["projected"], seen["v"].transpose(1, 2).flatten(2))
    assert torch.equal(noted["inputs"]["timestep"], inputs["timestep"])
    handle.remove()
    patchattn.unpatch(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_residual_stream_of_joint_attention_is_refused():
    model, _ = made(FAMILIES["sd3"])
    with pytest.raises(ValueError, match="needs_residual needs the residual stream; joint attention has two"):
        patchattn.patch(model, NeedsResidual(), layers=0)


def test_a_padding_mask_reaches_the_method_and_the_base():
    mask = torch.ones(2, IMAGE, dtype=torch.bool)
    mask[1, 5:] = False
    model, inputs = made(FAMILIES["pixart"])
    check_mask(model, {**inputs, "attention_mask": mask}, mask)
    mask = torch.ones(2, TEXT + IMAGE, dtype=torch.bool)
    mask[1, 3:TEXT] = False
    model, inputs = made(FAMILIES["flux"])
    check_mask(model, {**inputs, "joint_attention_kwargs": {"attention_mask": mask}}, mask)


def check_mask(model, inputs, mask):
    reference = run(model, inputs)
    patchattn.patch(model, [Probe(), "dense"])
    assert torch.equal(run(model, inputs), reference)
    for probe in methods_of(model):
        seen = probe.seen["mask"]
        assert seen.padding is None and torch.equal(seen.dense, mask[:, None, None])
        q, k, v = (probe.seen[name] for name in "qkv")
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.dense).transpose(1, 2)
        torch.testing.assert_close(probe.seen["out"], expected)


def test_a_compiled_patched_model_equals_the_uncompiled_one(family):
    model, inputs = made(family)
    patchattn.patch(model, ["gated_attention", "dense"])
    randomise(model)
    expected = run(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), expected)
    with patchattn.disabled(model):
        base = run(model, inputs)
        assert not torch.equal(base, expected)
        torch.testing.assert_close(run(compiled, inputs), base)


def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, inputs = made(family)
    patchattn.freeze_base(patchattn.patch(model, "gated_attention"))
    randomise(model)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in patchattn.patch_parameters(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# ---- on and off --------------------------------------------------------------------------------------------


def trace(model):
    """All that a patch could leave behind."""
    return {
        "state": list(model.state_dict()),
        "config": dict(model.config),
        "modules": {
            name: (
                {key: value for key, value in module.__dict__.items() if not key.startswith("_")},
                sorted(module.__dict__),
                list(module._modules),
                list(module._forward_pre_hooks),
                list(module._forward_hooks),
            )
            for name, module in model.named_modules()
        },
        "processors": [id(module.processor) for module in model.modules() if hasattr(module, "processor")],
    }


def test_unpatch_leaves_the_very_same_model(family):
    model, inputs = made(family)
    reference, before = run(model, inputs), trace(model)
    patchattn.patch(model, ["gated_attention", Probe()])
    assert trace(model) != before
    randomise(model)
    assert not torch.equal(run(model, inputs), reference)
    patchattn.unpatch(model)
    assert trace(model) == before
    assert torch.equal(run(model, inputs), reference)


def test_a_patched_model_can_be_disabled_for_a_while(family):
    model, inputs = made(family)
    reference = run(model, inputs)
    patchattn.patch(model, "gated_attention")
    randomise(model)
    patched = run(model, inputs)
    with patchattn.disabled(model):
        assert torch.equal(run(model, inputs), reference)
    assert torch.equal(run(model, inputs), patched) and not torch.equal(patched, reference)


def test_parameters_are_children_of_the_attention_module_and_load_by_name(family):
    model, inputs = made(family)
    other = copy.deepcopy(model)
    patchattn.patch(model, ["gated_attention", "dense"])
    randomise(model)
    names = set(patchattn.patch_parameters(model))
    assert names == {f"{name}.patchattn.0.{leaf}" for name in family.usable for leaf in ("weight", "bias")}
    state = {name: value for name, value in model.state_dict().items() if name in names}
    patchattn.patch(other, ["gated_attention", "dense"])
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and not names & set(missing)
    assert torch.equal(run(other, inputs), run(model, inputs))


def test_a_copy_of_a_patched_model_is_its_own(family):
    model, inputs = made(family)
    reference = run(model, inputs)
    patchattn.patch(model, "gated_attention")
    twin = copy.deepcopy(model)
    randomise(twin)
    assert not torch.equal(run(twin, inputs), reference)
    assert torch.equal(run(model, inputs), reference)
    patchattn.unpatch(twin)
    assert torch.equal(run(twin, inputs), reference)
    assert isinstance(model.get_submodule(family.usable[0]).processor, PatchedProcessor)


def test_some_layers_can_be_patched_and_the_others_keep_their_processors():
    model, _ = made(FAMILIES["flux"])
    before = {name: model.get_submodule(name).processor for name in FAMILIES["flux"].usable}
    patchattn.patch(model, {"single_transformer_blocks.*": "gated_attention"})
    kept = [model.get_submodule(name).processor is processor for name, processor in before.items()]
    assert kept == [True, True, False, False]
    assert len(patchattn.patch_parameters(model)) == 4


# ---- living with diffusers' own ways -----------------------------------------------------------------------


def plain_sd3():
    """Diffusers' own fused processor knows neither dual attention layers nor norms of queries and keys."""
    return sd3(dual_attention_layers=(), qk_norm=None)


@pytest.mark.parametrize("make", [plain_sd3, flux])
@pytest.mark.parametrize("fused_first", [True, False], ids=["fused, then patched", "patched, then fused"])
def test_fused_projections_and_a_patch_live_together(make, fused_first):
    model, inputs = make()
    model.eval()
    usable = [site.name for site in find_sites(model)]
    patchattn.patch(model, "gated_attention")
    randomise(model)
    gates = {name: parameter.detach() for name, parameter in patchattn.patch_parameters(model).items()}
    expected = run(model, inputs)
    originals = model.attn_processors
    if fused_first:
        patchattn.unpatch(model)
        model.fuse_qkv_projections()
        patchattn.patch(model, "gated_attention")
        model.load_state_dict(gates, strict=False)
    else:
        model.fuse_qkv_projections()
    for name in usable:
        model.get_submodule(name).to_q.weight.data.zero_()  # what is fused is what runs
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    kinds = {type(processor).__name__ for processor in model.attn_processors.values()}
    assert kinds == {"FluxAttnProcessor" if make is flux else "FusedJointAttnProcessor2_0"}
    patchattn.unpatch(model)
    base = run(model, inputs)
    patchattn.patch(model, "dense")
    assert torch.equal(run(model, inputs), base) and not torch.equal(base, expected)
    model.unfuse_qkv_projections()
    patchattn.unpatch(model)
    assert model.attn_processors == originals
    assert not any(isinstance(processor, PatchedProcessor) for processor in model.attn_processors.values())


def test_a_patch_stays_on_when_the_processor_is_changed():
    model, inputs = made(FAMILIES["dit"])
    patchattn.patch(model, Silence())
    module, silent = model.transformer_blocks[0].attn1, run(model, inputs)
    new = AttnProcessor2_0()
    module.set_processor(new)
    assert isinstance(module.processor, PatchedProcessor) and module.get_processor() is new
    assert torch.equal(run(model, inputs), silent)
    patched = module.processor
    module.set_processor(patched)  # as somebody would who kept it
    assert module.get_processor() is new
    with pytest.raises(
        ValueError, match=r"transformer_blocks.0.attn1 is patched, and its processor AttnProcessor calls"
    ):
        module.set_processor(AttnProcessor())
    assert module.get_processor() is new
    patchattn.unpatch(model)
    assert module.processor is new
    expected = run(model, inputs)
    module.processor = patched  # without its patch it is what it wraps
    assert torch.equal(run(model, inputs), expected)


def test_an_attention_backend_set_on_a_patched_model_is_set_on_its_processors():
    model, inputs = made(FAMILIES["flux"])
    reference = run(model, inputs)
    patchattn.patch(model, "dense")
    model.set_attention_backend("native")
    assert torch.equal(run(model, inputs), reference)
    patchattn.unpatch(model)
    assert {processor._attention_backend.value for processor in model.attn_processors.values()} == {"native"}


def test_a_wrapped_processor_takes_the_arguments_of_the_one_it_wraps(family):
    model, _ = made(family)
    before = {name: model.get_submodule(name).processor for name in family.usable}
    patchattn.patch(model, "dense")
    for name, processor in before.items():
        wrapper = model.get_submodule(name).processor
        assert inspect.signature(wrapper.__call__) == inspect.signature(processor.__call__)
        assert not isinstance(wrapper, nn.Module)


# ---- processors one by one ---------------------------------------------------------------------------------


class OneModule(nn.Module):
    """A model around a single attention module."""

    def __init__(self, attention):
        super().__init__()
        self.attn = attention

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


class Twice:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        once = F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)
        return F.scaled_dot_product_attention(once, once, once)


class Looping:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return torch.stack([F.scaled_dot_product_attention(x, x, x) for x in hidden_states])


class OwnAttention:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return dispatch_attention_fn(hidden_states, hidden_states, hidden_states)  # noqa: F821


class WithWeights(nn.Module):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)


class Decorated:
    @torch.no_grad()
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)


def without_source():
    scope = {}
    exec("class Typed:\n    def __call__(self, attn, hidden_states):\n        return hidden_states\n", scope)
    return scope["Typed"]()


REFUSED = {
    "AttnProcessor calls .* 0 times": AttnProcessor,
    "Twice calls .* 2 times": Twice,
    "Looping calls .* in a loop": Looping,
    "OwnAttention has a dispatch_attention_fn of its own": OwnAttention,
    "WithWeights has weights of its own": WithWeights,
    "Decorated is no plain class": Decorated,
    "Typed has no source code": without_source,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_processor_that_cannot_be_wrapped_is_named_with_the_reason(reason):
    model = OneModule(Attention(query_dim=WIDTH, heads=4, dim_head=8, processor=REFUSED[reason]()))
    (site,) = find_sites(model)
    assert re.match(f"its processor {reason}", site.problem) and site.layer_idx is None
    with pytest.raises(ValueError, match=f"attn cannot take dense: its processor {reason}"):
        patchattn.patch(model, "dense", layers="attn")
    assert "_patchattn" not in model.attn.__dict__


class OwnProcessor:
    """A processor of a user's own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            proj(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for proj in (attn.to_q, attn.to_k, attn.to_v)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, 0.0, False, scale=0.5)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


def test_a_processor_of_ones_own_is_wrapped_with_all_its_arguments():
    model = OneModule(Attention(query_dim=WIDTH, heads=4, dim_head=8, processor=OwnProcessor())).eval()
    states, mask = torch.randn(2, 5, WIDTH), torch.ones(5, 5, dtype=torch.bool).tril()
    expected = model(states, attention_mask=mask)
    patchattn.patch(model, Probe())
    assert torch.equal(model(states, attention_mask=mask), expected)
    (probe,) = methods_of(model)
    assert torch.equal(probe.seen["mask"].dense, mask[None, None])  # SDPA reads two dimensions as [T, S]


class Scaled(Probe):
    name = "scaled"

    def forward(self, ctx):
        self.scaling, self.dropout = ctx.scaling, ctx.dropout
        return super().forward(ctx)


def test_scaling_given_to_the_attention_call_reaches_the_method():
    model = OneModule(Attention(query_dim=WIDTH, heads=4, dim_head=8, processor=OwnProcessor()))
    patchattn.patch(model, Scaled())
    model(torch.randn(2, 5, WIDTH))
    (method,) = methods_of(model)
    assert (method.scaling, method.dropout) == (0.5, 0.0)


def test_image_shaped_hidden_states_are_given_as_tokens():
    model = OneModule(Attention(query_dim=8, heads=2, dim_head=4, norm_num_groups=2, residual_connection=True)).eval()
    states = torch.randn(2, 8, 3, 5)
    expected = model(states)
    patchattn.patch(model, ["gated_attention", Probe()])
    assert torch.equal(model(states), expected)
    seen = model.attn.patchattn[1].seen
    assert torch.equal(seen["hidden_states"], states.flatten(2).transpose(1, 2))


def test_self_attention_may_be_said_with_the_same_tensor_twice():
    model = OneModule(Attention(query_dim=WIDTH, heads=4, dim_head=8)).eval()
    states = torch.randn(2, 5, WIDTH)
    expected = model(states, encoder_hidden_states=states)
    patchattn.patch(model, Probe())
    assert torch.equal(model(states, encoder_hidden_states=states), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(states, encoder_hidden_states=states), expected)


def test_a_call_as_cross_attention_is_refused_when_it_happens():
    model = OneModule(Attention(query_dim=WIDTH, heads=4, dim_head=8)).eval()
    patchattn.patch(model, "dense")
    with pytest.raises(RuntimeError, match="attn was called as cross-attention"):
        model(torch.randn(2, 5, WIDTH), encoder_hidden_states=torch.randn(2, 3, WIDTH))


def joint(text_width, processor):
    return OneModule(
        Attention(
            query_dim=WIDTH, heads=4, dim_head=8, added_kv_proj_dim=text_width, out_dim=WIDTH, context_pre_only=True,
            bias=True, processor=processor,
        )
    ).eval()  # fmt: skip


def test_text_and_image_of_unequal_width_have_no_common_hidden_states():
    model = joint(24, JointAttnProcessor2_0())
    inputs = torch.randn(2, IMAGE, WIDTH), torch.randn(2, TEXT, 24)
    expected = model(*inputs)
    with pytest.raises(ValueError, match=r"attn cannot take gated_attention: .*hidden size could not be read"):
        patchattn.patch(model, "gated_attention")
    patchattn.patch(model, "dense")
    assert torch.equal(model(*inputs)[0], expected[0])
    patchattn.unpatch(model)
    patchattn.patch(model, Probe())
    with pytest.raises(RuntimeError, match="attn: its text tokens are 24 wide and its image tokens 32"):
        model(*inputs)


class Unnamed:
    """Joins two streams, and does not say by its names which is which."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def split(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = torch.cat([split(attn.add_q_proj(encoder_hidden_states)), split(attn.to_q(hidden_states))], dim=2)
        a, b = split(attn.add_v_proj(encoder_hidden_states)), split(attn.to_v(hidden_states))
        query = value = torch.cat([a, b], dim=2)
        both = [query, value]
        out = F.scaled_dot_product_attention(both[0], both[0], both[1])
        return attn.to_out[0](out.transpose(1, 2).flatten(2)[:, encoder_hidden_states.shape[1] :])


def test_an_order_that_cannot_be_read_is_said_and_not_guessed():
    model = joint(WIDTH, Unnamed())
    inputs = torch.randn(2, IMAGE, WIDTH), torch.randn(2, TEXT, WIDTH)
    expected = model(*inputs)
    (site,) = find_sites(model)
    assert site.problem is None and site.hidden_size == 0
    patchattn.patch(model, "dense")
    assert torch.equal(model(*inputs), expected)
    patchattn.unpatch(model)
    patchattn.patch(model, Probe())
    with pytest.raises(RuntimeError, match="does not say in which order text and image tokens are joined"):
        model(*inputs)


def test_hidden_states_of_another_length_than_the_query_are_refused():
    model = OneModule(Attention(query_dim=WIDTH, heads=4, dim_head=8, processor=Halving())).eval()
    patchattn.patch(model, Probe())
    with pytest.raises(
        RuntimeError, match=r"its hidden states \[2, 6, 32\] cannot be lined up with its q \[2, 4, 3, 8\]"
    ):
        model(torch.randn(2, 6, WIDTH))


class Halving:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query = attn.to_q(hidden_states[:, ::2]).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, query, query).transpose(1, 2).flatten(2)
