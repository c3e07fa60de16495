"""A patch alone: saved, loaded, pushed to a stand-in for the hub with the real client."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import patchattn
from patchattn import hub
from patchattn.living import patch_state, plan_of
from patchattn.testing import FAMILIES, Setup, snapshot

from .hub_server import HubServer

ROOT = Path(__file__).parents[1]
GATES = patchattn.GatedAttention(kind="elementwise")
DUO = patchattn.DuoAttention(heads=0.5, sink=2, recent=5)


def setup_of(method: Any = GATES, family: str = "llama") -> Setup:
    return Setup(method, FAMILIES[family])


def saved(folder: Path, method: Any = GATES, family: str = "llama", **options: Any) -> tuple[Setup, nn.Module]:
    setup = setup_of(method, family)
    model = setup.patched()
    patchattn.save(model, folder, **options)
    return setup, model


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "patchattn_config.json"
    values = json.loads(file.read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        owner = values
        for part in path:
            owner = owner[part]
        owner[last] = value
    file.write_text(json.dumps(values))


def run_python(code: str, *, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd,
                            env={**os.environ, "PYTHONPATH": paths, **(environment or {})})  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


# ---- save and load -------------------------------------------------------------------------------------------

PATCHES = [
    ("llama", patchattn.Dense()),
    ("llama", GATES),
    ("llama", DUO),
    ("llama", [patchattn.GatedAttention(), DUO]),
    ("qwen3", {"0": DUO, "1-": [GATES, patchattn.Dense()]}),
    ("llava", GATES),
    ("vit", GATES),
    ("vit", {"odd": patchattn.GatedAttention(shared=True, kind="elementwise")}),
    ("dit", GATES),
]


@pytest.mark.parametrize(("family", "what"), PATCHES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_loaded_patch_gives_the_outputs_it_was_saved_with(tmp_path, family, what):
    setup = setup_of(family=family)
    model = patchattn.patch(setup.base(), what)
    for parameter in patchattn.patch_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    wanted = setup.run(model, setup.inputs)
    folder = patchattn.save(model, tmp_path / "patch")
    again = patchattn.load(setup.base(), folder)
    assert torch.equal(setup.run(again, setup.inputs), wanted)
    assert plan_of(again) == plan_of(model)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["README.md", "patchattn_config.json", *(["patchattn.safetensors"] if patch_state(model) else [])]
    )


def test_what_is_saved_is_a_versioned_config_and_tensors_by_their_names_in_the_base_model(tmp_path):
    _, model = saved(tmp_path, [patchattn.GatedAttention(), DUO])
    config = json.loads((tmp_path / "patchattn_config.json").read_text())
    plan = config.pop("plan")
    assert config == {
        "format_version": 1,
        "patchattn_version": patchattn.__version__,
        "transformers_version": sys.modules["transformers"].__version__,
        "base_model": None,
        "base_revision": None,
        "architecture": "LlamaForCausalLM",
        "shape": {"model_type": "llama", "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden_size": 32},
    }
    assert plan[0]["layers"] == [f"model.layers.{index}.self_attn" for index in range(3)]
    assert plan[0]["methods"][1]["heads"] == [[1, 0], [1, 0], [1, 0]]
    tensors = load_file(tmp_path / "patchattn.safetensors")
    assert tensors.keys() == patchattn.patch_parameters(model).keys()
    assert all(torch.equal(tensors[name], value) for name, value in patch_state(model).items())


def test_a_patch_cast_with_its_model_comes_back_in_the_same_dtype(tmp_path):
    setup = setup_of()
    model = setup.patched().to(torch.bfloat16)
    patchattn.save(model, tmp_path)
    again = patchattn.load(setup.base().to(torch.bfloat16), tmp_path)
    assert {tensor.dtype for tensor in patch_state(again).values()} == {torch.bfloat16}
    assert all(torch.equal(value, patch_state(model)[name]) for name, value in patch_state(again).items())
    wider = patchattn.load(setup.base(), tmp_path)
    assert {tensor.dtype for tensor in patch_state(wider).values()} == {torch.float32}
    assert all(torch.equal(value, patch_state(model)[name].float()) for name, value in patch_state(wider).items())


def test_a_patch_of_a_causal_lm_fits_the_bare_decoder_and_back(tmp_path):
    from transformers import LlamaModel

    setup, model = saved(tmp_path / "lm")
    bare = LlamaModel(setup.base().config)
    bare.load_state_dict(setup.base().model.state_dict())
    patchattn.load(bare, tmp_path / "lm")
    ids = setup.inputs["input_ids"]
    wanted = model.model(ids).last_hidden_state
    assert torch.equal(bare.eval()(ids).last_hidden_state, wanted)
    patchattn.save(bare, tmp_path / "bare")
    again = patchattn.load(setup.base(), tmp_path / "bare")
    assert torch.equal(setup.run(again, setup.inputs), setup.run(model, setup.inputs))


def test_names_are_those_of_the_model_inside_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    setup = setup_of()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(setup.base(), lora)
    patchattn.patch(wrapped, GATES)
    for parameter in patchattn.patch_parameters(wrapped).values():
        nn.init.normal_(parameter, std=0.3)
    wanted = setup.run(wrapped, setup.inputs)
    patchattn.save(wrapped, tmp_path)
    plain, _ = saved(tmp_path / "plain")
    assert (
        load_file(tmp_path / "patchattn.safetensors").keys()
        == load_file(tmp_path / "plain/patchattn.safetensors").keys()
    )
    patchattn.unpatch(wrapped)
    patchattn.load(wrapped, tmp_path)
    assert torch.equal(setup.run(wrapped, setup.inputs), wanted)
    patchattn.load(plain.base(), tmp_path)


@pytest.mark.parametrize("patch_first", [True, False])
def test_a_model_that_accelerate_offloads_can_be_saved_and_loaded(tmp_path, patch_first):
    from accelerate import cpu_offload

    setup, model = saved(tmp_path / "plain")
    wanted = setup.run(model, setup.inputs)
    if patch_first:
        offloaded = cpu_offload(setup.patched(), execution_device=torch.device("cpu"))
        assert any(tensor.device.type == "meta" for tensor in patch_state(offloaded).values())
    else:
        offloaded = cpu_offload(setup.base(), execution_device=torch.device("cpu"))
        patchattn.load(offloaded, tmp_path / "plain")
    assert torch.equal(setup.run(offloaded, setup.inputs), wanted)
    patchattn.save(offloaded, tmp_path / "again")
    ours, theirs = (
        load_file(tmp_path / "again/patchattn.safetensors"),
        load_file(tmp_path / "plain/patchattn.safetensors"),
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- what is refused -----------------------------------------------------------------------------------------


def _drop_tensor(folder: Path) -> None:
    file = folder / "patchattn.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.patchattn.0.bias"]
    save_file(tensors, file)


def _add_tensor(folder: Path) -> None:
    file = folder / "patchattn.safetensors"
    save_file({**load_file(file), "model.layers.1.self_attn.patchattn.0.more": torch.zeros(1)}, file)


def _reshape_tensor(folder: Path) -> None:
    file = folder / "patchattn.safetensors"
    save_file({**load_file(file), "model.layers.2.self_attn.patchattn.0.bias": torch.zeros(4)}, file)


REFUSALS = [
    (lambda folder: edit(folder, format_version=2, patchattn_version="9.0"),
     r"format_version 2, written by patchattn 9\.0; this is patchattn .*, which reads 1; run pip install --upgrade"),
    (lambda folder: edit(folder, format_version="one"), "format_version 'one'"),
    (lambda folder: edit(folder, shape__heads=8), "LlamaForCausalLM with heads 8; this LlamaForCausalLM has 4"),
    (lambda folder: edit(folder, shape__layers=30), "with layers 30; this LlamaForCausalLM has 3"),
    (lambda folder: edit(folder, shape__hidden_size=64), "with hidden_size 64; this LlamaForCausalLM has 32"),
    (lambda folder: edit(folder, shape__model_type="qwen3"),
     "with model_type 'qwen3'; this LlamaForCausalLM has 'llama'"),
    (lambda folder: edit(folder, plan=[{"layers": ["h.0.attn"], "methods": []}]),
     "with the attention module 'h.0.attn', which this LlamaForCausalLM does not have"),
    (lambda folder: edit(folder, plan=[{"layers": ["model.layers.0.self_attn"], "methods": [{"method": "gone"}]}]),
     "unknown method 'gone'; known methods: "),
    (lambda folder: (folder / "patchattn_config.json").write_text('{"plan": []}'), "has no field 'format_version'"),
    (lambda folder: (folder / "patchattn_config.json").write_text("{"), "patchattn_config.json is no JSON object"),
    (lambda folder: (folder / "patchattn_config.json").unlink(),
     "holds no patch: it has neither patchattn_config.json nor a config.json"),
    (_drop_tensor, r"lacks the tensor model\.layers\.1\.self_attn\.patchattn\.0\.bias"),
    (_add_tensor, r"has an unexpected tensor model\.layers\.1\.self_attn\.patchattn\.0\.more"),
    (_reshape_tensor, r"has model\.layers\.2\.self_attn\.patchattn\.0\.bias in shape \[4\]; this model needs \[32\]"),
    (lambda folder: (folder / "patchattn.safetensors").unlink(),
     r"which has no patchattn\.safetensors, lacks the tensor .* and 5 more"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_a_patch_that_does_not_fit_is_named_and_the_model_is_not_touched(tmp_path, spoil, message):
    setup, _ = saved(tmp_path)
    spoil(tmp_path)
    model = setup.base()
    before, wanted = snapshot(model), setup.run(model, setup.inputs)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        patchattn.load(model, tmp_path)
    assert snapshot(model) == before
    assert torch.equal(setup.run(model, setup.inputs), wanted)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "./no/such/folder",
            r"there is no folder '\./no/such/folder', and a repository of the hub is named 'owner/name'",
        ),
        ("nothing", "there is no folder 'nothing'"),
    ],
)
def test_a_source_that_is_neither_folder_nor_repository_is_named(source, message):
    with pytest.raises(FileNotFoundError, match=message):
        patchattn.load(setup_of().base(), source)


def test_an_unpatched_model_has_nothing_to_save_and_a_patched_one_takes_no_second_patch(tmp_path):
    setup, model = saved(tmp_path)
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not patched; call"):
        patchattn.save(setup.base(), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="patched already"):
        patchattn.load(model, tmp_path)


@pytest.mark.parametrize("results", [{"loss": float("nan")}, {"loss": torch.ones(2)}])
def test_results_must_be_json(tmp_path, results):
    with pytest.raises(ValueError, match="the patch or its results cannot be written as JSON"):
        patchattn.save(setup_of().patched(), tmp_path / "patch", results=results)
    assert not (tmp_path / "patch").exists()


def named(model: nn.Module, name: str, revision: str | None = None) -> nn.Module:
    model.config._name_or_path, model.config._commit_hash = name, revision
    return model


def test_a_patch_for_another_repository_is_refused_unless_asked_for(tmp_path):
    setup = setup_of()
    model = patchattn.patch(named(setup.base(), "someone/base", "a1"), GATES)
    patchattn.save(model, tmp_path)
    config = json.loads((tmp_path / "patchattn_config.json").read_text())
    assert (config["base_model"], config["base_revision"]) == ("someone/base", "a1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patchattn.load(named(setup.base(), "someone/base", "a1"), tmp_path)
        patchattn.load(named(setup.base(), str(tmp_path)), tmp_path)  # a folder: nobody knows what is in it
    other = named(setup.base(), "someone/tuned", "b2")
    with pytest.raises(ValueError, match=r"made for someone/base; this model is someone/tuned\. .*strict_base=False"):
        patchattn.load(other, tmp_path)
    patchattn.load(other, tmp_path, strict_base=False)
    with pytest.warns(UserWarning, match="made for someone/base at revision a1; this is c3"):
        patchattn.load(named(setup.base(), "someone/base", "c3"), tmp_path)


# ---- writing -------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def break_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next safetensors file is begun, and never finished."""
    import safetensors.torch

    def save_half(tensors: Any, file: Any, metadata: Any = None) -> None:
        Path(file).write_bytes(b"half a fi")
        raise OSError("the disk is full")

    monkeypatch.setattr(safetensors.torch, "save_file", save_half)


@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch, existing):
    folder = tmp_path / "patch"
    setup = setup_of()
    if existing:
        saved(folder, patchattn.GatedAttention())
    before = contents(tmp_path)
    break_writing(monkeypatch)
    with pytest.raises(OSError, match="the disk is full"):
        patchattn.save(setup.patched(), folder)
    assert contents(tmp_path) == before
    assert folder.exists() == existing


def test_saving_again_replaces_the_patch_and_leaves_other_files(tmp_path):
    saved(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    _, model = saved(tmp_path, DUO)
    assert contents(tmp_path).keys() == {"README.md", "patchattn_config.json", "notes.txt"}
    assert plan_of(patchattn.load(setup_of().base(), tmp_path)) == plan_of(model)


def test_a_folder_that_is_a_link_stays_one_and_a_file_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    saved(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/patchattn_config.json").is_file()
    with pytest.raises(NotADirectoryError, match=r"README\.md is a file; give a folder"):
        patchattn.save(setup_of().patched(), tmp_path / "real/README.md")


def test_nothing_that_is_saved_is_a_pickle(tmp_path):
    saved(tmp_path)
    for name, content in contents(tmp_path).items():
        assert name.endswith((".json", ".md", ".safetensors"))
        assert not content.startswith((b"\x80", b"PK"))
    with safe_open(tmp_path / "patchattn.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# ---- the model card ------------------------------------------------------------------------------------------


def test_the_model_card_says_what_it_is(tmp_path):
    setup = setup_of([patchattn.GatedAttention(), DUO])
    model = patchattn.patch(named(setup.base(), "someone/base", "a1"), [patchattn.GatedAttention(), DUO])
    patchattn.save(model, tmp_path, results={"perplexity": 7.125, "passkey": {"4k": 0.5, "16k": 0.25}})
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "patchattn",
        "tags": ["patchattn", "gated_attention", "duo_attention"],
        "base_model": "someone/base",
        "base_model_relation": "adapter",
    }
    for part in (
        'AutoModelForCausalLM.from_pretrained("someone/base", revision="a1")',
        "| gated_attention | kind='headwise', init='identity'",
        "| duo_attention | heads=[[1, 0], [1, 0], [1, 0]], share=None, sink=2, recent=5, prefill='exact', ",
        "3: `model.layers.0.self_attn` ... `model.layers.2.self_attn`",
        "Base model: `someone/base`, revision `a1` (`LlamaForCausalLM`: model_type llama, layers 3,",
        "| perplexity | 7.125 |",
        "| passkey / 16k | 0.25 |",
    ):
        assert part in body, part
    patchattn.save(model, tmp_path)
    assert "Results" not in (tmp_path / "README.md").read_text()


def example_of(folder: Path) -> str:
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S).group(1)


def test_the_example_of_the_model_card_runs(tmp_path):
    from transformers import AutoModelForCausalLM

    setup = setup_of()
    setup.base().save_pretrained(tmp_path / "base")
    model = patchattn.patch(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), GATES)
    for parameter in patchattn.patch_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    patchattn.save(model, tmp_path / "patch")
    code = (
        example_of(tmp_path / "patch")
        + "import torch\nprint(model(torch.tensor([[5, 6, 7]])).logits.double().sum().item())"
    )
    wanted = model(torch.tensor([[5, 6, 7]])).logits.double().sum().item()
    assert float(run_python(code)) == pytest.approx(wanted, abs=1e-6)
    assert "base_model:" not in (tmp_path / "patch/README.md").read_text()  # a folder is no name on the hub


def test_a_card_that_somebody_else_wrote_is_left_alone(tmp_path):
    saved(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text().replace("gated_attention", "edited"))
    saved(tmp_path)
    assert "edited" not in card.read_text()
    mine = "\n".join(line for line in card.read_text().splitlines() if "delete this line" not in line)
    card.write_text(mine)
    saved(tmp_path, DUO)
    assert card.read_text() == mine


# ---- push ----------------------------------------------------------------------------------------------------

PUSHES = """
import json, sys
from pathlib import Path
import torch
import patchattn
from patchattn import hub
from patchattn.testing import FAMILIES, Setup
from transformers import AutoModelForCausalLM

gates = Setup(patchattn.GatedAttention(), FAMILIES["llama"])
duo = Setup(patchattn.DuoAttention(heads=0.5, sink=2, recent=5), FAMILIES["llama"])
done, folder = {}, Path(sys.argv[-1])

def attempt(name, action, *args, **kwargs):
    try:
        done[name] = action(*args, **kwargs)
    except Exception as error:
        done[name] = f"{type(error).__name__}: {error}"

def same(setup, model, other):
    return torch.equal(setup.run(model, setup.inputs), setup.run(other, setup.inputs))

model = gates.patched()
attempt("url", patchattn.push, model, "gates", private=True, results={"loss": 2.5})
attempt("loaded", lambda: same(gates, model, patchattn.load(gates.base(), "owner/gates")))
attempt("second url", patchattn.push, duo.patched(), "owner/gates", commit_message="Now with DuoAttention")
attempt("reloaded", lambda: same(duo, duo.patched(), patchattn.load(duo.base(), "owner/gates")))
attempt("first again", lambda: same(gates, model, patchattn.load(gates.base(), "owner/gates", revision=FIRST())))
attempt("branch", patchattn.push, model, "owner/gates", revision="trial")
attempt("from branch", lambda: same(gates, model, patchattn.load(gates.base(), "owner/gates", "trial")))
attempt("no revision", patchattn.load, gates.base(), "owner/gates", revision="gone")
attempt("no repository", patchattn.load, gates.base(), "owner/nothing")
attempt("not mine", patchattn.push, model, "somebody/gates")
attempt("bad token", patchattn.push, model, "owner/other", token="hf_wrong")
attempt("bad name", patchattn.push, model, "a b/c")
attempt("no patch", patchattn.load, gates.base(), "owner/empty")

patchattn.save(model, folder / "patch")
attempt("folder url", hub.push_folder, folder / "patch", "owner/folder", True, "From a folder")
attempt("no folder", hub.push_folder, folder / "nothing", "owner/folder")

whole = dict(commit_message="The whole model", tags=["extra"])
attempt("whole url", lambda: model.push_to_hub("owner/whole", **whole).repo_url.url)
attempt("whole", lambda: same(gates, model, AutoModelForCausalLM.from_pretrained("owner/whole")))
attempt("patch of whole", lambda: same(gates, model, patchattn.load(gates.base(), "owner/whole")))
attempt("saved and pushed", model.save_pretrained, folder / "both", push_to_hub=True, repo_id="owner/both")
attempt("whole folder", hub.push_folder, folder / "both", "owner/bare")
print(json.dumps(done, default=str))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory):
    """Everything that is done with the hub, in one fresh interpreter; the server, and what came of it."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as server:
        from .hub_server import Commit, Repository

        empty = server.repositories["owner/empty"] = Repository(private=False)
        empty.add("main", Commit("initial commit", {"config.json": b"{}"}))
        bare = server.repositories["owner/bare"] = Repository(private=False)
        bare.add(
            "main", Commit("initial commit", {"model.safetensors": b"old", "README.md": b"# Mine", "vocab.txt": b""})
        )
        first = "(lambda: __import__('huggingface_hub').HfApi().list_repo_commits('owner/gates')[1].commit_id)"
        code = PUSHES.replace("FIRST", first)
        code = f"import sys; sys.argv.append({str(folder)!r})\n{code}"
        output = run_python(code, environment=server.environment(folder / "home"))
        yield server, json.loads(output.splitlines()[-1])


def test_a_push_is_one_commit_and_gives_the_address(pushed):
    server, done = pushed
    assert done["url"] == done["second url"] == f"{server.url}/owner/gates"
    gates = server.repositories["owner/gates"]
    assert gates.private
    assert gates.history() == ["initial commit", "Upload gated_attention patch", "Now with DuoAttention",
                               "Upload gated_attention patch"]  # fmt: skip
    first = list(gates.commits.values())[1]
    assert first.files.keys() == {".gitattributes", "README.md", "patchattn_config.json", "patchattn.safetensors"}
    assert first.large == {"patchattn.safetensors"}
    assert "| loss | 2.5 |" in first.files["README.md"].decode()
    assert 'patchattn.load(model, "owner/gates")' in first.files["README.md"].decode()


def test_a_pushed_patch_loads_by_name_also_an_earlier_one_and_one_of_a_branch(pushed):
    _, done = pushed
    assert (done["loaded"], done["reloaded"], done["first again"], done["from branch"]) == (True, True, True, True)


def test_a_second_push_takes_away_what_no_longer_belongs(pushed):
    server, _ = pushed
    assert server.files("owner/gates").keys() == {".gitattributes", "README.md", "patchattn_config.json"}
    assert "patchattn.safetensors" in server.files("owner/gates", "trial")


def test_a_folder_is_pushed_as_it_is_with_a_card_that_names_the_repository(pushed):
    server, done = pushed
    assert done["folder url"] == f"{server.url}/owner/folder"
    assert 'patchattn.load(model, "owner/folder")' in server.files("owner/folder")["README.md"].decode()
    assert server.repositories["owner/folder"].history() == ["initial commit", "From a folder"]


def test_a_whole_model_is_pushed_in_one_commit_with_its_card(pushed):
    server, done = pushed
    assert done["whole url"] == f"{server.url}/owner/whole"
    assert server.repositories["owner/whole"].history() == ["initial commit", "The whole model"]
    files = server.files("owner/whole")
    assert files.keys() >= {"config.json", "modeling_patchattn.py", "patchattn.safetensors", "README.md"}
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["library_name"] == "patchattn" and front["tags"] == ["patchattn", "gated_attention", "extra"]
    assert 'AutoModelForCausalLM.from_pretrained("owner/whole")' in files["README.md"].decode()
    assert (done["whole"], done["patch of whole"]) == (True, True)


def test_save_pretrained_pushes_what_it_wrote(pushed):
    server, done = pushed
    assert done["saved and pushed"] is None
    assert server.repositories["owner/both"].history() == ["initial commit", "Upload LlamaForCausalLM"]
    assert server.files("owner/both").keys() == {".gitattributes", *server.files("owner/whole").keys()}


def test_a_whole_model_replaces_older_weights_and_nothing_else(pushed):
    server, _ = pushed
    files = server.files("owner/bare")
    assert "model.safetensors" not in files and "model-00001-of-00001.safetensors" in files
    assert files["README.md"] == b"# Mine" and "vocab.txt" in files
    assert server.repositories["owner/bare"].history() == ["initial commit", "Upload patch"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no revision", "FileNotFoundError: owner/gates has no revision 'gone'"),
        ("no repository", "FileNotFoundError: there is no folder and no repository 'owner/nothing' at http"),
        ("not mine", "PermissionError: http.* does not let you write or read 'somebody/gates'"),
        ("bad token", "PermissionError: http.* does not let you write or read 'owner/other'"),
        ("bad name", "ValueError: 'a b/c' is no name of a repository"),
        ("no patch", "FileNotFoundError: owner/empty holds no patch"),
        ("no folder", "FileNotFoundError: .*nothing holds no patch"),
    ],
)
def test_what_the_hub_refuses_is_said_clearly(pushed, what, message):
    assert re.match(message, pushed[1][what]), pushed[1][what]


BROKEN = """
import patchattn
from patchattn.testing import FAMILIES, Setup
gates = Setup(patchattn.GatedAttention(), FAMILIES["llama"]).patched()
dense = Setup(patchattn.Dense(), FAMILIES["llama"]).patched()
for action, *args in ((patchattn.push, gates, "a"), (gates.push_to_hub, "b"), (patchattn.push, dense, "late")):
    try:
        action(*args)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_an_interrupted_push_commits_nothing(tmp_path):
    with HubServer() as server:
        server.breaks_at = ["/lfs/", "owner/late/commit"]
        output = run_python(BROKEN, environment=server.environment(tmp_path))
        assert output.count("the server broke off") == 3
        assert server.repositories.keys() == {"owner/a", "owner/b", "owner/late"}
        assert all(repository.history() == ["initial commit"] for repository in server.repositories.values())


UNREACHABLE = """
import patchattn
from patchattn.testing import FAMILIES, Setup
setup = Setup(patchattn.GatedAttention(), FAMILIES["llama"])
for action, model in ((patchattn.load, setup.base()), (patchattn.push, setup.patched())):
    try:
        action(model, "owner/gates")
    except ConnectionError as error:
        print(error)
"""


def test_no_network_is_said_clearly(tmp_path):
    with HubServer() as server:
        nobody = server.url
    output = run_python(UNREACHABLE, environment=server.environment(tmp_path))
    load, push = output.splitlines()
    assert re.match(rf"'owner/gates' is no folder here, is not in the cache, and {nobody} cannot be reached: ", load), (
        load
    )
    assert re.match(rf"{nobody} cannot be reached: ", push), push


def test_a_copy_of_a_patched_model_saves_its_own_patch(tmp_path):
    setup = setup_of()
    model = setup.patched()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in patchattn.patch_parameters(twin).values():
            parameter.add_(1)
    hub.save(twin, tmp_path)
    tensors = load_file(tmp_path / "patchattn.safetensors")
    assert all(torch.equal(tensors[name], value + 1) for name, value in patch_state(model).items())
