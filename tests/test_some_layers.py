"""A patch on some of its layers: for a moment with `only`, for good with `unpatch(model, layers)`."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.living import plan_of
from patchattn.record import record_of
from patchattn.testing import FAMILIES, Setup, snapshot

METHODS = {
    "gates": ("gated_attention:init=random", ("llama", "qwen3", "llava", "vit", "dit")),
    "features": ("hedgehog:window=5", ("llama", "llava")),
    "raw queries": ("lawcat", ("llama", "qwen3")),
    "pattern": ("duo_attention:heads=[[1,0],[0,1],[0,0]],sink=1,recent=3", ("llama", "llava")),
    "counts": ("moh:shared=[1,2,0],top_k=[2,1,3]", ("llama", "qwen3")),
    "projections": ("moh:router=query_norm", ("llama", "vit", "dit")),
    "two methods": (["gated_attention:init=random", "hedgehog:window=5"], ("llama", "qwen3")),
}
CASES = [(name, family) for name, (_, families) in METHODS.items() for family in families]


def setup_of(name: str, family: str) -> Setup:
    return Setup(METHODS[name][0], FAMILIES[family])


@pytest.mark.parametrize(("name", "family"), CASES)
@torch.no_grad()
def test_with_only_or_unpatched_in_part_a_model_is_as_if_the_other_layers_were_never_named(name, family):
    if FAMILIES[family].needs:
        pytest.importorskip(FAMILIES[family].needs)
    setup = setup_of(name, family)
    model, inputs = setup.patched(), setup.inputs
    base, whole = setup.run(setup.base(), inputs), setup.run(model, inputs)
    with patchattn.only(model, [1]):
        wanted = setup.run(model, inputs)
    with patchattn.only(model, []):
        assert (setup.run(model, inputs) - base).abs().max() < 1e-5
    assert torch.equal(setup.run(model, inputs), whole)
    assert (wanted - base).abs().max() > 1e-6 and (wanted - whole).abs().max() > 1e-6

    parameters = patchattn.patch_parameters(model)
    assert patchattn.unpatch(model, "0,2" if family != "dit" else "0") is model
    assert torch.equal(setup.run(model, inputs), wanted)
    kept = patchattn.patch_parameters(model)
    assert all(parameters[key] is value for key, value in kept.items()) and len(kept) <= len(parameters)
    assert [len(entry["layers"]) for entry in plan_of(model)] == [1]
    assert len(patchattn.explain(model).to_dict()["layers"]) == (1 if family == "dit" else len(record_of(model).sites))


@pytest.mark.parametrize(
    ("name", "family"), [("pattern", "llama"), ("counts", "qwen3"), ("two methods", "llama"), ("gates", "dit")]
)
@torch.no_grad()
def test_what_is_left_of_a_patch_can_be_saved_and_taken_off(name, family, tmp_path):
    if FAMILIES[family].needs:
        pytest.importorskip(FAMILIES[family].needs)
    setup = setup_of(name, family)
    model, inputs = setup.patched(), setup.inputs
    patchattn.unpatch(model, [0])
    wanted = setup.run(model, inputs)
    patchattn.save(model, tmp_path / "part")
    loaded = patchattn.load(setup.base(), tmp_path / "part")
    assert torch.equal(setup.run(loaded, inputs), wanted)
    model.save_pretrained(tmp_path / "whole")
    opened = type(model).from_pretrained(tmp_path / "whole").eval()
    assert (setup.run(opened, inputs) - wanted).abs().max() < 1e-6
    untouched = setup.base()
    before = snapshot(untouched)
    patchattn.unpatch(patchattn.unpatch(patchattn.patch(untouched, setup.method), [0]))
    assert snapshot(untouched) == before


@torch.no_grad()
def test_a_cache_has_the_methods_layers_where_the_patch_is_on():
    setup = setup_of("features", "llama")
    model, ids = setup.patched(), setup.inputs["input_ids"]
    whole = model(ids).logits
    with patchattn.only(model, [0, 2]):
        wanted, cache = model(ids).logits, DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(4, dim=1)]
    assert [type(layer).__name__ for layer in cache.layers] == ["RecurrentLayer", "DynamicLayer", "RecurrentLayer"]
    assert (torch.cat(parts, dim=1) - wanted).abs().max() < 1e-5
    assert torch.equal(model(ids).logits, whole)


def test_layers_that_are_not_patched_cannot_be_taken_off_or_left_alone():
    model = patchattn.patch(setup_of("features", "llama").base(), "hedgehog:window=5", layers=[1])
    before = plan_of(model)
    message = "none of the layers '0' is patched; patched are model.layers.1.self_attn"
    with pytest.raises(ValueError, match="unpatch: " + message):
        patchattn.unpatch(model, "0")
    with pytest.raises(ValueError, match="only: " + message), patchattn.only(model, "0"):
        pass
    with pytest.raises(ValueError, match="there is no layer 7"):
        patchattn.unpatch(model, 7)
    assert plan_of(model) == before
    patchattn.unpatch(model, "0-1")
    with pytest.raises(ValueError, match="is not patched"), patchattn.only(model, "0"):
        pass
