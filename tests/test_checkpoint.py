"""Whole patched models: written by their own `save_pretrained`, opened by `from_pretrained`."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

import patchattn
from patchattn.living import patch_state, plan_of
from patchattn.method import Method, MethodConfig, register
from patchattn.testing import FAMILIES, TEXT, Setup

from .test_hub import DUO, GATES, break_writing, contents, example_of, run_python, setup_of

OPENERS = {"llava": AutoModelForImageTextToText, "vit": AutoModelForImageClassification}
GATED = [patchattn.GatedAttention(), DUO]


def written(folder: Path, method: Any = GATES, family: str = "llama", **options: Any) -> tuple[Setup, nn.Module]:
    setup = setup_of(method, family)
    model = setup.patched()
    model.save_pretrained(folder, **options)
    return setup, model


def open_(folder: Path, family: str = "llama", **options: Any) -> nn.Module:
    return OPENERS.get(family, AutoModelForCausalLM).from_pretrained(folder, **options)


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    state, wanted = model.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


# ---- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "llava", "vit"])
def test_a_whole_model_opens_as_it_was_saved(tmp_path, family):
    setup, model = written(tmp_path, family=family)
    again = open_(tmp_path, family)
    assert type(again) is type(model)
    assert_same_state(again, model)
    assert plan_of(again) == plan_of(model)
    assert torch.equal(setup.run(again, setup.inputs), setup.run(model, setup.inputs))


def test_a_composed_method_without_tensors_of_its_own_opens_too(tmp_path):
    for folder, method in ((tmp_path / "both", GATED), (tmp_path / "duo", DUO)):
        model = patchattn.patch(setup_of().base(), method)
        model.save_pretrained(folder)
        assert plan_of(open_(folder)) == plan_of(model)
    assert not (tmp_path / "duo/patchattn.safetensors").exists()
    assert (tmp_path / "duo/model.safetensors").exists()


def test_what_is_written_is_the_unpatched_checkpoint_and_the_patch_beside_it(tmp_path):
    setup, model = written(tmp_path / "patched")
    setup.base().save_pretrained(tmp_path / "base")
    ours, base = contents(tmp_path / "patched"), contents(tmp_path / "base")
    new = {"README.md", "modeling_patchattn.py", "patchattn.safetensors", "model.safetensors.index.json"}
    assert ours.keys() == {"config.json", "generation_config.json", "model-00001-of-00001.safetensors", *new}
    assert ours["model-00001-of-00001.safetensors"] == base["model.safetensors"]
    assert ours["generation_config.json"] == base["generation_config.json"]
    config, plain = json.loads(ours["config.json"]), json.loads(base["config.json"])
    description = config.pop("patchattn")
    assert config.pop("quantization_config") == {"quant_method": "patchattn"}
    assert config.pop("auto_map") == {"AutoConfig": "modeling_patchattn.AutoConfig",
                                      "AutoModelForCausalLM": "modeling_patchattn.AutoModelForCausalLM"}  # fmt: skip
    assert config == plain
    assert description["plan"] == plan_of(model)
    index = json.loads(ours["model.safetensors.index.json"])
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    tensors = load_file(tmp_path / "patched/patchattn.safetensors")
    assert tensors.keys() == patch_state(model).keys()


def attributes(model: nn.Module) -> dict[str, Any]:
    values = {name: (list(vars(module)), list(module._modules)) for name, module in model.named_modules()}
    return {**values, "config": model.config.to_dict(), "state": list(model.state_dict())}


def test_saving_leaves_the_model_as_it_was(tmp_path):
    setup, model = written(tmp_path / "first")
    wanted, before = setup.run(model, setup.inputs), attributes(model)
    model.save_pretrained(tmp_path / "second")
    assert attributes(model) == before
    assert torch.equal(setup.run(model, setup.inputs), wanted)


def test_an_opened_model_is_an_ordinary_patched_one(tmp_path):
    setup, model = written(tmp_path / "patched")
    setup.base().save_pretrained(tmp_path / "base")
    opened, plain = open_(tmp_path / "patched"), open_(tmp_path / "base")
    assert vars(opened).keys() == vars(patchattn.patch(open_(tmp_path / "base"), GATES)).keys()
    named = {"_name_or_path": None}
    assert {**opened.config.to_dict(), **named} == {**plain.config.to_dict(), **named}
    assert not any("quant" in name for name in {**vars(opened), **vars(opened.config)})
    patchattn.unpatch(opened)
    assert {**vars(opened.config), **named}.keys() == {**vars(plain.config), **named}.keys()
    assert_same_state(opened, plain)
    opened.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "base")
    assert model.config.to_dict() == patchattn.unpatch(model).config.to_dict()


def test_an_opened_model_can_be_saved_moved_copied_and_cast(tmp_path):
    setup, model = written(tmp_path / "first")
    wanted = setup.run(model, setup.inputs)
    opened = open_(tmp_path / "first")
    opened.save_pretrained(tmp_path / "second")
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    first.pop("README.md"), second.pop("README.md")
    assert first == second
    for name, other in (("copy", copy.deepcopy(opened)), ("double", copy.deepcopy(opened).to(torch.float64))):
        with torch.no_grad():
            patch_state(other)["model.layers.0.self_attn.patchattn.0.bias"].add_(1)
        other.save_pretrained(tmp_path / name)
        again = open_(tmp_path / name, dtype="auto")
        assert_same_state(again, other)
        assert not torch.equal(setup.run(again, setup.inputs).float(), wanted)
    assert torch.equal(setup.run(opened.to("cpu"), setup.inputs), wanted)


def test_saving_follows_a_model_through_pickle():
    root = nn.Linear(2, 2)
    root.save_pretrained = None
    from patchattn.checkpoint import prepare_saving, save_pretrained, undo_saving

    class Saved(nn.Linear):
        def save_pretrained(self, save_directory: Any, max_shard_size: int = 5) -> None:
            """Of the class."""

    globals()["Saved"] = Saved
    Saved.__qualname__ = "Saved"
    model = Saved(2, 2)
    before = dict(vars(model))
    prepare_saving(model)
    again = pickle.loads(pickle.dumps(model))
    assert again.save_pretrained.func is save_pretrained and again.save_pretrained.args[0] is again
    assert again.save_pretrained.__doc__ == "Of the class."
    undo_saving(model)
    assert vars(model) == before


def test_an_opened_model_trains_with_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    written(tmp_path / "patched")
    model = patchattn.freeze_base(open_(tmp_path / "patched"))
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(5, 60, (4, 12))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.1, report_to=[],
                                  use_cpu=True, save_strategy="steps", save_steps=2, disable_tqdm=True)  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == patchattn.patch_parameters(model).keys()
    assert_same_state(open_(tmp_path / "run/checkpoint-2"), model)


def test_lora_is_merged_then_saved(tmp_path):
    from peft import LoraConfig, get_peft_model

    setup = setup_of()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(setup.patched(), lora)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = open_(tmp_path)
    assert_same_state(again, merged)
    assert torch.equal(setup.run(again, setup.inputs), setup.run(merged, setup.inputs))
    assert not torch.equal(setup.run(again, setup.inputs), setup.run(setup.patched(), setup.inputs))


def test_with_an_adapter_of_transformers_own_the_patch_is_written_beside_it(tmp_path):
    from peft import LoraConfig

    setup, model = written(tmp_path / "whole")
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wanted = setup.run(model, setup.inputs)
    model.save_pretrained(tmp_path / "adapter")
    assert contents(tmp_path / "adapter").keys() >= {
        "adapter_config.json",
        "patchattn_config.json",
        "patchattn.safetensors",
    }
    again = patchattn.load(setup.base(), tmp_path / "adapter")
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(setup.run(again, setup.inputs), wanted)


# ---- dtypes, shards, devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"device_map": "cpu"}])
def test_gates_in_float32_stay_so_in_a_bf16_model(tmp_path, options):
    setup = setup_of()
    setup.base().save_pretrained(tmp_path)
    model = patchattn.patch(open_(tmp_path, dtype=torch.bfloat16), GATES)
    for parameter in patchattn.patch_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = open_(tmp_path, dtype="auto", **options)
    assert again.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in patch_state(again).values()} == {torch.float32}
    assert_same_state(again, model)
    assert torch.equal(setup.run(again, setup.inputs), setup.run(model, setup.inputs))
    narrow = open_(tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in patch_state(narrow).values()} == {torch.float32}


def test_gates_cast_with_their_model_stay_so(tmp_path):
    model = setup_of().patched().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = open_(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in patch_state(again).values()} == {torch.bfloat16}
    assert_same_state(again, model)


def test_layers_may_live_on_the_disk(tmp_path):
    setup, model = written(tmp_path / "patched")
    wanted = setup.run(model, setup.inputs)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    again = open_(tmp_path / "patched", device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(setup.run(again, setup.inputs), wanted)
    again.save_pretrained(tmp_path / "again")
    assert_same_state(open_(tmp_path / "again"), model)


def test_a_checkpoint_opens_as_another_class_of_the_same_family(tmp_path):
    setup, model = written(tmp_path)
    ids = setup.inputs["input_ids"]
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_state_dict_may_be_handed_to_both_sides(tmp_path):
    _, model = written(tmp_path / "patched")
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "handed", state_dict=state)
    again = open_(tmp_path / "handed")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    third = type(model).from_pretrained(None, config=_config(tmp_path / "patched"), state_dict=state)
    assert_same_state(third, again)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_variants_stand_side_by_side(tmp_path):
    _, model = written(tmp_path)
    wide = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    again = open_(tmp_path, dtype=torch.float32)
    assert all(torch.equal(tensor, wide[name]) for name, tensor in again.state_dict().items())
    assert_same_state(open_(tmp_path, variant="fp16", dtype=torch.float16), model)


def test_the_attention_asked_for_is_the_one_inside(tmp_path):
    setup, model = written(tmp_path)
    opened = open_(tmp_path, attn_implementation="eager")
    assert torch.allclose(setup.run(opened, setup.inputs), setup.run(model, setup.inputs), atol=1e-5)
    assert patchattn.unpatch(opened).config._attn_implementation == "eager"


def test_a_compiled_model_saves_what_is_inside(tmp_path):
    setup = setup_of()
    model = setup.patched()
    torch.compile(model).save_pretrained(tmp_path, results={"loss": 1.5})
    assert_same_state(open_(tmp_path), model)
    assert "| loss | 1.5 |" in (tmp_path / "README.md").read_text()


# ---- names that the loader would change ----------------------------------------------------------------------


@register("oddly_named")
class OddlyNamed(Method):
    """Parameters with names that transformers renames in some models' checkpoints."""

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """No settings."""

    def build(self, site: Any) -> None:
        self.experts = nn.ParameterDict({"gate_proj": torch.rand(2, 3), "w1": torch.rand(2)})
        self.linear_gate, self.other_gate = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        self.register_buffer("seen", torch.rand(2))

    def forward(self, ctx: Any) -> Tensor:
        return ctx.attend()


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize(
    "build", [_mixtral, FAMILIES["vit"].build, FAMILIES["llava"].build], ids=["moe", "vit", "llava"]
)
def test_tensors_keep_their_names_whatever_the_loader_renames(tmp_path, build):
    model = patchattn.patch(build().eval(), OddlyNamed())
    model.save_pretrained(tmp_path)
    kind = type(model)
    again = kind.from_pretrained(tmp_path, key_mapping={"linear_gate": "other_gate", "seen": "unseen"})
    state = patch_state(again)
    assert all(torch.equal(state[name], tensor) for name, tensor in patch_state(model).items())
    assert state.keys() == patch_state(model).keys()
    assert any(name.endswith("self_attn.patchattn.0.seen") or name.endswith("patchattn.0.seen") for name in state)


# ---- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "dit"])
def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, family):
    folder = tmp_path / "checkpoint"
    setup, _ = written(folder, family=family)
    model = setup.patched()
    before = contents(tmp_path)
    monkeypatch.setattr("patchattn.tensors.write_tensors", lambda tensors, file: _fail(file))
    with pytest.raises(OSError, match="the disk is full"):
        model.save_pretrained(folder)
    assert contents(tmp_path) == before
    break_writing(monkeypatch)
    with pytest.raises(OSError, match="the disk is full"):
        model.save_pretrained(tmp_path / "new")
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    assert all("patchattn" in module._modules for module in _patched(model))


def _fail(file: Path) -> None:
    file.write_bytes(b"half a fi")
    raise OSError("the disk is full")


def _patched(model: nn.Module) -> list[nn.Module]:
    return [site.module for site in vars(model)["_patchattn_patch"].patched]


def test_a_checkpoint_replaces_an_earlier_one_of_other_shards(tmp_path):
    setup = setup_of()
    setup.base().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (tmp_path / "model.safetensors").exists()
    _, model = written(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_state(open_(tmp_path), model)
    written(tmp_path, max_shard_size="20KB")
    many = {path.name for path in tmp_path.glob("model-*")}
    assert_same_state(open_(tmp_path), model)
    patchattn.patch(setup.base(), DUO).save_pretrained(tmp_path)
    left = contents(tmp_path).keys()
    assert left == {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_patchattn.py",
                    "tokenizer.json"}  # fmt: skip
    assert len(many) > 2
    assert [method["method"] for method in plan_of(open_(tmp_path))[0]["methods"]] == ["duo_attention"]


def test_a_patch_alone_and_a_whole_model_do_not_share_a_folder(tmp_path):
    setup, model = written(tmp_path / "whole")
    with pytest.raises(ValueError, match="whole holds a whole patched model; give the patch a folder of its own"):
        patchattn.save(model, tmp_path / "whole")
    patchattn.save(patchattn.patch(setup.base(), DUO), tmp_path / "patch")
    model.save_pretrained(tmp_path / "patch")
    assert plan_of(patchattn.load(setup.base(), tmp_path / "patch")) == plan_of(model)


def test_the_patch_of_a_whole_checkpoint_loads_by_itself(tmp_path):
    setup, model = written(tmp_path)
    again = patchattn.load(setup.base(), tmp_path)
    assert torch.equal(setup.run(again, setup.inputs), setup.run(model, setup.inputs))


def test_unpatching_takes_saving_back_too(tmp_path):
    setup = setup_of()
    setup.base().save_pretrained(tmp_path / "base")
    model = patchattn.unpatch(setup.patched())
    assert "save_pretrained" not in vars(model) and "push_to_hub" not in vars(model)
    model.save_pretrained(tmp_path / "unpatched")
    assert contents(tmp_path / "unpatched") == contents(tmp_path / "base")


def test_a_process_that_is_not_the_main_one_writes_no_patch(tmp_path):
    setup = setup_of()
    setup.patched().save_pretrained(tmp_path / "patched", is_main_process=False)
    setup.base().save_pretrained(tmp_path / "base", is_main_process=False)
    plain = contents(tmp_path / "base") if (tmp_path / "base").exists() else {}
    assert (contents(tmp_path / "patched") if (tmp_path / "patched").exists() else {}) == plain


def test_what_cannot_be_written_is_refused(tmp_path):
    model = setup_of().patched()
    with pytest.raises(ValueError, match="distributed_checkpoint=True cannot be used on a patched model"):
        model.save_pretrained(tmp_path / "out", distributed_checkpoint=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; give a folder"):
        model.save_pretrained(tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_a_broken_checkpoint_is_named(tmp_path):
    written(tmp_path)
    file = tmp_path / "patchattn.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.patchattn.0.bias"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match=f"lacks the tensor {name}".replace(".", r"\.")):
        open_(tmp_path)
    save_file({**tensors, name: torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"bias in shape \[3\]; this model needs \[32\]"):
        open_(tmp_path)
    save_file(tensors, file)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        (
            {"patchattn": {**config["patchattn"], "format_version": 7}},
            "config of this LlamaForCausalLM has format_version 7",
        ),
        ({"patchattn": None}, "has no field 'patchattn', which its quantization_config promises"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            open_(tmp_path)


def test_the_quantizer_only_opens_what_was_saved(tmp_path):
    setup_of().base().save_pretrained(tmp_path)
    from patchattn._transformers_plugin import PatchedCheckpointConfig

    with pytest.raises(ValueError, match=r"only opens what a patched model saved; call patchattn\.patch"):
        open_(tmp_path, quantization_config=PatchedCheckpointConfig())


# ---- a base model that is quantized --------------------------------------------------------------------------


def test_a_quantized_base_opens_as_remote_code(tmp_path):
    from . import halved

    setup = setup_of()
    setup.base().save_pretrained(tmp_path / "base")
    model = open_(tmp_path / "base", quantization_config=halved.HalvedConfig())
    patchattn.patch(model, GATES)
    for parameter in patchattn.patch_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    wanted = setup.run(model, setup.inputs)
    model.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "halved"
    assert "trust_remote_code=True)" in example_of(tmp_path / "whole")
    again = open_(tmp_path / "whole", trust_remote_code=True)
    assert type(again) is type(model) and again.hf_quantizer.quantization_config.quant_method == "halved"
    assert_same_state(again, model)
    assert torch.equal(setup.run(again, setup.inputs), wanted)
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again")["config.json"] == contents(tmp_path / "whole")["config.json"]
    loaded = patchattn.load(open_(tmp_path / "base", quantization_config=halved.HalvedConfig()), tmp_path / "whole")
    assert torch.equal(setup.run(loaded, setup.inputs), wanted)
    (tmp_path / "whole/patchattn.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match=r"patchattn\.safetensors"):
        open_(tmp_path / "whole", trust_remote_code=True)


# ---- diffusers -----------------------------------------------------------------------------------------------


def test_a_diffusers_model_opens_as_it_was_saved(tmp_path):
    from diffusers import DiTTransformer2DModel

    setup, model = written(tmp_path / "first", family="dit")
    setup.base().save_pretrained(tmp_path / "base")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "first")
    assert_same_state(again, model)
    assert torch.equal(setup.run(again, setup.inputs), setup.run(model, setup.inputs))
    narrow = DiTTransformer2DModel.from_pretrained(tmp_path / "first", torch_dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert all(torch.equal(tensor, patch_state(model)[name]) for name, tensor in patch_state(narrow).items())
    narrow.to(torch.float16).save_pretrained(tmp_path / "narrow")
    cast = DiTTransformer2DModel.from_pretrained(tmp_path / "narrow", torch_dtype=torch.float16)
    assert_same_state(cast, narrow)
    plain = patchattn.unpatch(again)
    assert "hf_quantizer" not in vars(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert contents(tmp_path / "plain").keys() == contents(tmp_path / "base").keys()
    assert "quant" not in (tmp_path / "plain/config.json").read_text()
    assert torch.equal(
        setup.run(patchattn.load(setup.base(), tmp_path / "first"), setup.inputs), setup.run(model, setup.inputs)
    )


def test_a_broken_diffusers_checkpoint_is_named(tmp_path):
    from diffusers import DiTTransformer2DModel

    _, model = written(tmp_path, family="dit")
    file = tmp_path / "patchattn.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    index_file = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    save_file({**tensors, name: torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"in shape|expected shape"):
        DiTTransformer2DModel.from_pretrained(tmp_path)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    del index["weight_map"][name]
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"DiTTransformer2DModel lacks the tensor {name} of its patch"):
        DiTTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safe_serialization=False cannot be used"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.hf_quantizer = type("Quantizer", (), {"quantization_config": type("C", (), {"quant_method": "other"})})()
    with pytest.raises(ValueError, match="diffusers opens a checkpoint either quantized or patched"):
        model.save_pretrained(tmp_path)


def test_a_pipeline_carries_its_patched_model(tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    setup = setup_of(GATES, "dit")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, sample_size=8)
    pipeline = DiTPipeline(transformer=setup.patched(), vae=vae, scheduler=DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(setup.run(again.transformer, setup.inputs), setup.run(pipeline.transformer, setup.inputs))
    assert plan_of(again.transformer) == plan_of(pipeline.transformer)


# ---- fresh interpreters --------------------------------------------------------------------------------------

OPEN = """
import json, sys
{imports}
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
before = "patchattn" in sys.modules
text = AutoModelForCausalLM.from_pretrained({text!r}{options})
image = AutoModelForImageClassification.from_pretrained({image!r}{options})
ids = torch.tensor([[5, 6, 7, 8]])
print(json.dumps([before, type(text).__module__, type(image).__name__,
                  text(ids).logits.double().sum().item(), image(torch.ones(1, 3, 16, 16)).logits.double().sum().item(),
                  len([name for name, _ in text.named_parameters() if ".patchattn." in name])]))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """A patched Llama and a patched ViT on the disk, and what they compute."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    _, text = written(folder / "text", GATED)
    _, image = written(folder / "image", GATES, "vit")
    sums = [text(torch.tensor([[5, 6, 7, 8]])).logits.double().sum().item(),
            image(torch.ones(1, 3, 16, 16)).logits.double().sum().item()]  # fmt: skip
    return str(folder / "text"), str(folder / "image"), sums


@pytest.mark.parametrize(
    ("imports", "options", "imported"),
    [("import patchattn", "", True), ("import transformers.quantizers.auto, patchattn", "", True),
     ("", ", trust_remote_code=True", False)],
)  # fmt: skip
def test_a_fresh_interpreter_opens_it(checkpoints, tmp_path, imports, options, imported):
    text, image, sums = checkpoints
    code = OPEN.format(imports=imports, options=options, text=text, image=image)
    output = run_python(code, environment={"HF_MODULES_CACHE": str(tmp_path)})
    before, module, name, *found, parameters = json.loads(output.splitlines()[-1])
    assert (before, module, name) == (imported, "transformers.models.llama.modeling_llama", "ViTForImageClassification")
    assert found == pytest.approx(sums, abs=1e-5)
    assert parameters == 6


def test_without_the_package_remote_code_says_how_to_install_it(checkpoints, tmp_path):
    text, _, _ = checkpoints
    code = f"""
import sys
sys.modules["patchattn"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({text!r}, trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    output = run_python(code, environment={"HF_MODULES_CACHE": str(tmp_path)})
    assert "the package patchattn, which could not be imported; to install it" in output
    assert output.rstrip().endswith("pip install patchattn")


def test_importing_patchattn_imports_nothing_else_and_leaves_no_finder_behind():
    code = """
import sys
plain = list(sys.meta_path)
import patchattn
print(sorted({"torch", "transformers", "diffusers", "huggingface_hub"} & set(sys.modules)))
names = [finder.name for finder in sys.meta_path if finder not in plain]
import transformers.quantizers.auto as auto
print(names, "patchattn" in auto.AUTO_QUANTIZER_MAPPING, "patchattn" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
print([finder.name for finder in sys.meta_path if hasattr(finder, "name")], auto.__spec__.loader is auto.__loader__)
import importlib
importlib.reload(auto)
"""
    first, second, third = run_python(code).splitlines()
    assert first == "[]"
    assert second == "['lm_eval.models', 'diffusers.quantizers.auto', 'transformers.quantizers.auto'] True True"
    assert third == "['lm_eval.models', 'diffusers.quantizers.auto'] True"


def test_a_module_is_imported_after_another_once_and_its_failure_is_only_a_warning(tmp_path, monkeypatch):
    from patchattn._lazy import after_import

    (tmp_path / "first_one.py").write_text("value = 1\n")
    (tmp_path / "then_one.py").write_text("import first_one\nfirst_one.value += 1\n")
    (tmp_path / "first_two.py").write_text("value = 1\n")
    (tmp_path / "then_two.py").write_text("from first_two import missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    for _ in range(2):
        after_import("first_one", "then_one")
    after_import("first_two", "then_two")
    assert len(sys.meta_path) == len(before) + 2
    import first_one

    assert first_one.value == 2
    with pytest.warns(
        RuntimeWarning, match="then_two cannot be used with what is installed: cannot import name 'missing'"
    ):
        import first_two
    assert first_two.value == 1
    assert sys.meta_path == before
    with pytest.warns(RuntimeWarning, match="then_two cannot be used"):
        after_import("first_one", "then_two")


def test_the_example_of_the_model_card_runs(checkpoints):
    text, image, sums = checkpoints
    code = (
        example_of(Path(text)) + "import torch\nprint(model(torch.tensor([[5, 6, 7, 8]])).logits.double().sum().item())"
    )
    assert float(run_python(code)) == pytest.approx(sums[0], abs=1e-5)
    assert "AutoModelForImageClassification.from_pretrained" in example_of(Path(image))
    assert "trust_remote_code=True` does in place of" in Path(text, "README.md").read_text()


def test_lm_eval_opens_it_as_any_other_model(checkpoints, tmp_path):
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(checkpoints[0], folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", bos_token="w1", pad_token="w0").save_pretrained(
        folder
    )
    code = f"""
import sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
assert "patchattn" not in sys.modules
model = HFLM(pretrained={str(folder)!r}, trust_remote_code=True, device="cpu", dtype="float32", batch_size=1)
request = Instance(request_type="loglikelihood", doc={{}}, arguments=("w5 w6", " w7"), idx=0)
print(model.loglikelihood([request])[0][0])
"""
    output = run_python(code, environment={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    model = open_(Path(checkpoints[0]))
    wanted = model(torch.tensor([[5, 6]])).logits.log_softmax(-1)[0, -1, 7].item()
    assert float(output.splitlines()[-1]) == pytest.approx(wanted, abs=1e-5)


def test_a_base_that_is_remote_code_itself_opens_with_its_own_code(tmp_path):
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    marker = 'own'\n"
    )
    setup = setup_of()
    base = setup.base()
    base.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = f"""
import shutil
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
assert "patchattn" not in sys.modules
import patchattn
patchattn.patch(model, patchattn.GatedAttention())
for parameter in patchattn.patch_parameters(model).values():
    torch.nn.init.normal_(parameter, std=0.3)
model.save_pretrained({str(tmp_path / "out")!r})
shutil.copy({str(tmp_path / "modeling_own.py")!r}, {str(tmp_path / "out")!r})  # not every release copies it
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
ids = torch.tensor([[5, 6, 7]])
print(again.marker, torch.equal(again(ids).logits, model(ids).logits), sorted(again.config.auto_map))
"""
    output = run_python(code, environment={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert output.splitlines()[-1] == "own True ['AutoModelForCausalLM']"
