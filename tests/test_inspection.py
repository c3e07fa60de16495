"""`inspect` says what could be patched, `explain` what a patch did: against models whose answers are known."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import patchattn
import patchattn_kernels
from patchattn import method
from patchattn.inspection import inspect
from patchattn.tables import grouped, names_text
from patchattn.testing import snapshot

SMALL = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=61)


@pytest.fixture(autouse=True)
def shipped_methods_only(monkeypatch):
    """What other tests register does not count here."""
    monkeypatch.setattr(method, "_REGISTERED", {name: method.method_class(name) for name in method.builtin_names()})


def llama(layers=4, **changes):
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=layers, pad_token_id=0, **changes)).eval()


def tokens(rows=1, length=20):
    return torch.randint(1, 61, (rows, length))


def generate(model, ids, **options):
    config = GenerationConfig(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, **options)
    return model.generate(ids, generation_config=config, return_dict_in_generate=True)


def fit_of(report, method, **settings):
    return next(fit for fit in report.fits if fit.method == method and fit.settings == settings)


# ---- inspect -----------------------------------------------------------------------------------------------


def test_every_attention_module_is_described():
    rows = inspect(llama()).modules
    assert [row.name for row in rows] == [f"model.layers.{index}.self_attn" for index in range(4)]
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    row = rows[0]
    assert (row.kind, row.family, row.heads, row.kv_heads, row.head_dim, row.hidden_size) == (
        "LlamaAttention", "interface", 4, 2, 8, 32,
    )  # fmt: skip
    assert (row.causal, row.window, row.default, row.gate, row.patched) == (True, None, True, None, [])


@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_the_parameters_foretold_are_those_that_patch_adds(kind):
    model = llama()
    settings = {} if kind == "headwise" else {"kind": kind}
    foretold = fit_of(inspect(model), "gated_attention", **settings).parameters
    patchattn.patch(model, patchattn.GatedAttention(kind=kind))
    added = dict.fromkeys(foretold, 0)
    for name, parameter in patchattn.patch_parameters(model).items():
        added[name.partition(".patchattn.")[0]] += parameter.numel()
    assert foretold == added
    assert min(added.values()) > 0


def test_a_model_without_weights_gives_the_same_report():
    with torch.device("meta"):
        shell = llama()
    assert inspect(shell).to_dict() == inspect(llama()).to_dict()


def test_inspecting_changes_nothing():
    model = llama()
    before = snapshot(model)
    inspect(model)
    assert snapshot(model) == before


def test_inspecting_and_explaining_leave_a_patch_as_it_is():
    model = patchattn.patch(llama(), {"even": "duo_attention", "odd": "gated_attention"})
    ids = tokens()
    with torch.no_grad():
        before, names = model(ids).logits, list(model.state_dict())
        inspect(model), patchattn.explain(model)
        assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == names


def vision_language():
    return LlavaForConditionalGeneration(LlavaConfig())


REASONS = {
    "sliding window": (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=9)), "sliding window of 9"),
    "encoder": (lambda: ViTForImageClassification(ViTConfig()), "not causal"),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_method_that_does_not_fit_says_why(case):
    build, reason = REASONS[case]
    with torch.device("meta"):
        fit = fit_of(inspect(build()), "duo_attention")
    assert fit.parameters == {}
    assert any(reason in problem for problem in fit.problems.values())


def test_a_position_bias_is_named_whether_or_not_the_module_can_be_reached():
    with torch.device("meta"):  # T5 asks AttentionInterface in later releases of transformers, and not in 5.0
        report = inspect(T5ForConditionalGeneration(T5Config()), "duo_attention")
    reasons = [reason for fit in report.fits for reason in fit.problems.values()]
    assert any("position bias" in reason for reason in reasons + [entry.reason for entry in report.unreachable])


def test_a_composite_model_takes_its_language_part_by_default():
    with torch.device("meta"):
        report = inspect(vision_language())
    assert {row.name for row in report.modules if row.default} == {
        row.name for row in report.modules if "language_model" in row.name
    }
    duo = fit_of(report, "duo_attention")
    assert set(duo.parameters) == {row.name for row in report.modules if row.default}
    assert all("vision_tower" in name for name in duo.problems)


def test_settings_that_do_not_match_the_model_are_its_problem():
    fit = inspect(llama(), patchattn.DuoAttention(heads=[[1, 0]] * 3)).fits[0]
    assert set(fit.problems) == {f"model.layers.{index}.self_attn" for index in range(4)}
    assert "heads has 3 rows" in next(iter(fit.problems.values()))


def test_a_method_that_is_not_registered_can_be_tried():
    class Unregistered(patchattn.Method):
        def build(self, site):
            self.weight = nn.Parameter(torch.zeros(7, device=site.device))

    fit = inspect(llama(), Unregistered()).fits[0]
    assert (fit.method, set(fit.parameters.values())) == ("Unregistered", {7})


GATED = {
    "a projection called gate": (lambda: AfmoeForCausalLM(AfmoeConfig(num_hidden_layers=2)), "gate_proj"),
    "queries and gates in one": (lambda: Qwen3NextForCausalLM(Qwen3NextConfig(num_hidden_layers=4)), "q_proj"),
}


@pytest.mark.parametrize("case", GATED)
def test_a_model_that_is_gated_already_is_recognised(case):
    build, gate = GATED[case]
    with torch.device("meta"):
        report = inspect(build())
    assert {row.gate for row in report.modules} == {gate}
    assert any("already gated" in warning and "second gate" in warning for warning in report.warnings)


def test_an_ungated_model_brings_no_warning():
    assert inspect(llama()).warnings == []


@dataclass
class Looks:
    """A module that looks like attention, made of named parts."""

    parts: dict
    reason: str

    def model(self):
        inner = type("ToySelfAttention", (nn.Module,), {"forward": lambda self, x: x})()
        for name, part in self.parts.items():
            inner.add_module(name, part)
        outer = type("ToyAttention", (nn.Module,), {})()  # a shell around it, as in ViT or T5
        outer.add_module("inner", inner)
        return nn.Sequential(nn.Linear(2, 2), outer)


@pytest.mark.parametrize(
    "looks",
    [
        Looks({"query": nn.Linear(2, 2)}, "does not ask AttentionInterface"),
        Looks({"relative_attention_bias": nn.Embedding(2, 2)}, "relative position bias"),
        Looks({"conv1d": nn.Conv1d(2, 2, 1)}, "recurrent"),
    ],
    ids=lambda looks: next(iter(looks.parts)),
)
def test_what_looks_like_attention_and_cannot_be_reached_is_named_once_with_the_reason(looks):
    report = inspect(looks.model())
    assert [(entry.name, entry.kind) for entry in report.unreachable] == [("1.inner", "ToySelfAttention")]
    assert looks.reason in report.unreachable[0].reason
    assert any("can be patched" in warning for warning in report.warnings)
    assert "1.inner" in str(report)


def test_modules_around_an_attention_module_are_not_called_unreachable():
    with torch.device("meta"):
        assert inspect(vision_language()).unreachable == []


def test_a_patched_model_shows_its_methods():
    model = patchattn.patch(llama(), {"even": ["gated_attention", "duo_attention"], "odd": "dense"})
    now = [[method["method"] for method in row.patched] for row in inspect(model).modules]
    assert now == [["gated_attention", "duo_attention"], ["dense"]] * 2


@pytest.mark.parametrize("report", [lambda model: inspect(model), patchattn.explain])
def test_a_report_is_json_ready_and_prints_as_a_table(report):
    model = patchattn.patch(llama(), {"even": "duo_attention", "odd": "gated_attention"})
    model(tokens())
    found = report(model)
    assert json.loads(json.dumps(found.to_dict()))["model"] == "LlamaForCausalLM"
    assert "model.layers.0,2.self_attn" in str(found)
    assert "model.layers.1,3.self_attn" in str(found)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([0], "a.0.b"),
        ([0, 1, 2, 3], "a.0-3.b"),
        ([0, 2], "a.0,2.b"),
        ([0, 1, 2, 5, 7, 8], "a.0-2,5,7-8.b"),
        ([1, 3, 5, 7, 9], "a.1,3,..,9.b"),
        ([0, 3, 4, 7], "a.0,3-4,7.b"),
    ],
)
def test_names_that_differ_in_a_number_are_written_as_one(numbers, text):
    assert names_text([{"name": f"a.{number}.b"} for number in numbers]) == text


def test_rows_that_differ_in_more_than_a_number_stay_apart():
    rows = [{"name": "a.0.b", "x": 1}, {"name": "a.1.b", "x": 2}, {"name": "a.2.b", "x": 1}, {"name": "a.3.c", "x": 1}]
    assert [names for names, _ in grouped(rows, lambda row: row["x"])] == ["a.0,2.b", "a.1.b", "a.3.c"]


# ---- explain -----------------------------------------------------------------------------------------------


def test_an_unpatched_model_has_nothing_to_explain():
    with pytest.raises(ValueError, match=r"not patched.*patchattn\.inspect"):
        patchattn.explain(llama())


def test_a_patch_that_never_ran_says_so():
    report = patchattn.explain(patchattn.patch(llama(), "dense"))
    assert any("never called" in note and "torch.compile" in note for note in report.notes)
    assert {layer.ran for layer in report.layers} == {None}


def test_a_layer_that_never_ran_is_named():
    model = patchattn.patch(llama(), "dense")
    model.model.layers[2].forward = lambda hidden_states, **kwargs: hidden_states  # a model that skips a layer
    model(tokens(), use_cache=False)
    assert "never called: model.layers.2.self_attn" in "\n".join(patchattn.explain(model).notes)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_calls_and_the_attention_that_ran_are_told(base):
    model = llama(attn_implementation=base)
    patchattn.patch(model, {0: "dense", 1: "duo_attention", 2: ["gated_attention", "dense"]})
    generate(model, tokens())
    layers = patchattn.explain(model).layers
    assert [layer.calls for layer in layers] == [5, 5, 5, 0]
    assert [layer.ran for layer in layers] == [base, "the method's own", base, base]
    assert {layer.base for layer in layers} == {base}
    assert [len(layer.methods) for layer in layers] == [1, 1, 2, 0]


@pytest.mark.parametrize(("choice", "reason"), [("auto", "on cpu"), ("torch", "asked for")])
def test_which_kernel_ran_and_why_is_told(choice, reason):
    model = patchattn.patch(llama(), {0: "dense", 1: "duo_attention"})
    with patchattn_kernels.backend(choice):
        model(tokens())
    report = patchattn.explain(model)
    assert [layer.kernels for layer in report.layers[:2]] == [{}, {"sink_window": f"torch ({reason})"}]
    assert f"sink_window: torch ({reason})" in " ".join(str(report).split())


CACHES = {
    "dynamic": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("kind", CACHES)
def test_cache_bytes_stand_beside_those_of_the_unpatched_model(kind):
    model, ids = llama(), tokens(2)
    dense = patchattn.cache_bytes(generate(model, ids, **CACHES[kind]).past_key_values)
    patchattn.patch(model, {0: "dense", 1: patchattn.DuoAttention(heads=0.5, sink=1, recent=3), 2: "gated_attention"})
    cache = generate(model, ids, **CACHES[kind]).past_key_values
    report = patchattn.explain(model)
    assert report.cache_bytes == patchattn.cache_bytes(cache) == report.to_dict()["cache_bytes"]
    assert report.dense_bytes == dense
    assert report.layers[1].cache == "TwoTierLayer"
    assert report.layers[1].bytes < report.layers[1].dense_bytes
    assert {layer.tokens for layer in report.layers} == {24}


def test_a_sliding_cache_is_compared_with_one_that_keeps_every_token():
    model = MistralForCausalLM(MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=9)).eval()
    patchattn.patch(model, "dense")
    cache = DynamicCache(config=model.config)
    for length in (40, 1):
        model(tokens(2, length), past_key_values=cache)
    layer = patchattn.explain(model).layers[0]
    assert layer.dense_bytes == 2 * 41 * 2 * (8 + 8) * 4  # rows, tokens, KV heads, keys and values, float32
    assert layer.bytes < layer.dense_bytes


def test_a_cache_that_is_gone_says_how_to_keep_it():
    model = patchattn.patch(llama(), "dense")
    model.generate(tokens(), max_new_tokens=2, do_sample=False)
    report = patchattn.explain(model)
    assert report.cache_bytes is None
    assert any("return_dict_in_generate" in note for note in report.notes)


def test_a_model_without_a_cache_asks_for_none():
    model = patchattn.patch(ViTForImageClassification(ViTConfig(**VIT)).eval(), "dense")
    model(torch.randn(1, 3, 16, 16))
    report = patchattn.explain(model)
    assert report.notes == []
    assert {(layer.calls, layer.cache, layer.bytes) for layer in report.layers} == {(1, None, None)}


VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)


def test_what_the_methods_report_is_there():
    model = patchattn.patch(llama(), [patchattn.GatedAttention(), patchattn.DuoAttention(heads=0.5)])
    model(tokens())
    report = patchattn.explain(model).layers[0].report
    assert report["gated_attention"]["mean gate"] == 1
    assert report["duo_attention"] == {"full heads": "1 of 2"}


def test_a_patch_that_is_switched_off_says_so():
    model = patchattn.patch(llama(), "dense")
    with patchattn.disabled(model):
        assert any("switched off" in note for note in patchattn.explain(model).notes)
    assert not any("switched off" in note for note in patchattn.explain(model).notes)


@pytest.mark.parametrize("report", [patchattn.explain, lambda model: inspect(model)])
def test_a_patch_that_somebody_bypassed_is_noticed(report):
    model = patchattn.patch(llama(), "dense")
    assert "set_attn_implementation" not in str(report(model))
    model.set_attn_implementation("eager")
    assert "was set to 'eager' after patch" in " ".join(str(report(model)).split())


def test_calls_inside_a_compiled_model_are_not_counted():
    model = patchattn.patch(llama(1), "dense")
    torch.compile(model, backend="eager", fullgraph=True)(tokens(), use_cache=False)
    report = patchattn.explain(model)
    assert report.layers[0].calls == 0
    assert any("torch.compile" in note for note in report.notes)
