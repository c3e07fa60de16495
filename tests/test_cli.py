"""The command line does what the library does, says what it did, and leaves with a code that means something."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import patchattn
from patchattn import demo, lab, method
from patchattn.lab import evaluate
from patchattn.method import builtin_names

from .hub_server import HubServer

COMMANDS = ("methods", "inspect", "explain", "patch", "profile", "plan", "push", "recipes", "env", "demo")


@pytest.fixture(autouse=True)
def shipped_methods_only(monkeypatch):
    """What other tests register does not count here."""
    monkeypatch.setattr(method, "_REGISTERED", {name: method.method_class(name) for name in method.builtin_names()})


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=61)
    ).save_pretrained(folder / "llama")  # fmt: skip
    ViTForImageClassification(
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                  patch_size=4)
    ).save_pretrained(folder / "vit")  # fmt: skip
    return folder


@pytest.fixture
def run(models, command_line, tmp_path, monkeypatch):
    """Runs a command in an empty folder that has the models beside it; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    return command_line


def ids():
    return torch.randint(1, 61, (1, 30), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model.eval()(ids()).logits


def as_json(result):
    code, out, _ = result
    assert code == 0
    return json.loads(out)


# ---- help and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"patchattn {command}" in out.partition("Examples")[2]


def test_the_help_names_every_command(run):
    _, out, _ = run("--help")
    assert all(f" {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("arguments", ["--help", "--version", "patch --help"])
def test_help_and_version_import_no_torch(arguments):
    code = f"""
import sys
sys.argv = ["patchattn", *{arguments.split()!r}]
from patchattn.cli import main
try:
    main()
finally:
    assert not {{"torch", "transformers"}} & set(sys.modules), "they were imported"
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_python_dash_m_is_the_same():
    done = subprocess.run([sys.executable, "-m", "patchattn", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == patchattn.__version__


WRONG_USAGE = {
    "no command of that name": ("compile",),
    "no such option": ("methods", "--fast"),
    "no model": ("inspect",),
    "no method": ("patch", "llama", "-o", "out"),
    "no such method": ("patch", "llama", "-m", "nonsense", "-o", "out"),
    "no such setting": ("patch", "llama", "-m", "dense:speed=3", "-o", "out"),
    "impossible setting": ("explain", "llama", "-m", "duo_attention:recent=0"),
    "malformed setting": ("inspect", "llama", "-m", "duo_attention:recent"),
    "method and plan": ("patch", "llama", "-m", "dense", "--plan", '{"0": "dense"}', "-o", "out"),
    "plan and layers": ("patch", "llama", "-l", "0", "--plan", '{"0": "dense"}', "-o", "out"),
    "plan that is no object": ("patch", "llama", "--plan", "{}", "-o", "out"),
    "plan that is no JSON": ("patch", "llama", "--plan", "{0", "-o", "out"),
    "layers of nothing": ("explain", "llama", "-l", "0"),
    "nothing to explain": ("explain", "llama"),
    "no such dtype": ("explain", "llama", "-m", "dense", "--dtype", "int4"),
    "settings of no method": ("methods", "nonsense"),
}


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage_leaves_with_2_and_writes_nothing(run, tmp_path, case):
    code, out, err = run(*WRONG_USAGE[case])
    assert code == 2
    assert out == "" and "Traceback" not in err
    assert not (tmp_path / "out").exists()


FAILURES = {
    "no such model": (("inspect", "nowhere"), "cannot open 'nowhere'"),
    "folder without a model": (("inspect", "."), "no config.json"),
    "method that does not fit": (("explain", "vit", "-m", "duo_attention"), "cannot take duo_attention"),
    "no such layer": (("patch", "llama", "-m", "dense", "-l", "7", "-o", "out"), "there is no layer 7"),
    "prompt without a tokenizer": (("explain", "llama", "-m", "dense", "--prompt", "a"), "no tokenizer"),
    "nothing to push": (("push", "llama", "me/x", "--dry-run"), "holds no patch"),
    "no such plan": (("patch", "llama", "--plan", "plan.json", "-o", "out"), "plan.json"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_leaves_with_1(run, tmp_path, case):
    arguments, message = FAILURES[case]
    code, out, err = run(*arguments)
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert out == "" and len(error) == 1 and message in error[0] and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [0, 2])
def test_debug_anywhere_on_the_line_shows_the_traceback(run, place):
    arguments = ["inspect", "nowhere"]
    arguments.insert(place, "--debug")
    with pytest.raises(RuntimeError, match="cannot open 'nowhere'"):
        run(*arguments)


# ---- methods, env ------------------------------------------------------------------------------------------


def test_methods_lists_the_registry(run):
    found = as_json(run("methods", "--json"))
    assert set(builtin_names()) <= {entry["name"] for entry in found}
    duo = next(entry for entry in found if entry["name"] == "duo_attention")
    assert duo["settings"]["sink"] == 64
    assert duo["fits"] == ["decoder", "vision-language decoder"]
    assert all(name in run("methods")[1] for name in builtin_names())


def test_methods_explains_the_settings_of_one(run):
    _, out, _ = run("methods", "duo-attention")
    assert "sink=64" in out and "tokens at the start that streaming heads keep" in out
    assert as_json(run("methods", "DuoAttention", "--json"))["name"] == "duo_attention"


def test_env_says_what_a_bug_report_needs(run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = as_json(run("env", "--json"))
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][0] == "cpu" and found["threads"]["torch"] == torch.get_num_threads()
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert torch.__version__ in run("env")[1]


# ---- inspect, explain --------------------------------------------------------------------------------------


def test_inspect_reads_the_config_and_no_weights(run, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "llama" / "config.json").read_bytes())
    found = as_json(run("inspect", "bare", "--json"))
    assert [row["layer"] for row in found["modules"]] == [0, 1, 2]
    assert "model.layers.0-2.self_attn" in run("inspect", "bare")[1]


def test_inspect_tries_the_methods_it_is_told(run):
    found = as_json(run("inspect", "llama", "-m", "gated_attention:kind=elementwise", "--json"))
    assert [(fit["method"], fit["settings"]) for fit in found["fits"]] == [("gated_attention", {"kind": "elementwise"})]


def test_explain_runs_the_model_and_says_what_the_cache_holds(run):
    found = as_json(run("explain", "llama", "-m", "duo_attention:sink=2,recent=6", "-l", "1-", "-n", "8", "--json"))
    assert [[entry["method"] for entry in layer["methods"]] for layer in found["layers"]] == [
        [], ["duo_attention"], ["duo_attention"],
    ]  # fmt: skip
    assert found["layers"][1]["calls"] == 8
    assert found["cache_bytes"] < found["dense_bytes"]
    assert "TwoTierLayer" in run("explain", "llama", "-m", "duo_attention")[1]


def test_explain_runs_a_model_that_does_not_generate(run):
    found = as_json(run("explain", "vit", "-m", "gated_attention", "--json"))
    assert {layer["calls"] for layer in found["layers"]} == {1}
    assert found["output"] == "logits [1, 2]"


# ---- patch, push -------------------------------------------------------------------------------------------


def test_patch_writes_what_load_reads(run, tmp_path):
    found = as_json(run("patch", "llama", "-m", "gated_attention:init=open", "-m", "duo_attention:sink=1,recent=4",
                        "-l", "even", "-o", "out", "--json"))  # fmt: skip
    assert {file["name"] for file in found["files"]} == {path.name for path in (tmp_path / "out").iterdir()}
    wanted = AutoModelForCausalLM.from_pretrained("llama")
    patchattn.patch(wanted, [patchattn.GatedAttention(init="open"), patchattn.DuoAttention(sink=1, recent=4)], "even")
    loaded = patchattn.load(AutoModelForCausalLM.from_pretrained("llama"), "out")
    assert torch.equal(logits(loaded), logits(wanted))
    assert as_json(run("explain", "llama", "--patch", "out", "--json"))["layers"][0]["methods"][1]["recent"] == 4


@pytest.mark.parametrize("place", ["line", "file"])
def test_patch_takes_a_plan_from_the_line_or_a_file(run, tmp_path, place):
    plan = json.dumps({"0": "duo_attention:recent=4", "1-": ["gated_attention", "dense"]})
    if place == "file":
        (tmp_path / "plan.json").write_text(plan)
        plan = "plan.json"
    found = as_json(run("patch", "llama", "--plan", plan, "-o", "out", "--json"))
    assert [(len(entry["layers"]), [one["method"] for one in entry["methods"]]) for entry in found["plan"]] == [
        (1, ["duo_attention"]), (2, ["gated_attention", "dense"]),
    ]  # fmt: skip


def test_patch_full_writes_a_model_that_opens_by_itself(run):
    as_json(run("patch", "llama", "-m", "duo_attention:sink=1,recent=4", "-o", "out", "--full", "--json"))
    wanted = patchattn.patch(AutoModelForCausalLM.from_pretrained("llama"), patchattn.DuoAttention(sink=1, recent=4))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("out")), logits(wanted))
    assert as_json(run("inspect", "out", "--json"))["modules"][0]["patched"][0]["recent"] == 4
    assert as_json(run("explain", "out", "--json"))["layers"][0]["calls"] == 32


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(run, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = ("patch", "llama", "-m", "gated_attention", "-o", "out", "--dry-run")
    found = as_json(run(*arguments, "--json"))
    assert (found["written"], found["parameters"]) == (False, 3 * 4 * 33)
    assert "would write" in run(*arguments)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_not_empty_is_left_alone_without_force(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = ("patch", "llama", "-m", "dense", "-o", "out")
    code, _, err = run(*arguments)
    assert code == 1 and "--force" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    code, _, _ = run(*arguments, "--force")
    assert code == 0
    assert {"mine.txt", "patchattn_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_push_dry_run_lists_the_files(run, tmp_path):
    run("patch", "llama", "-m", "gated_attention", "-o", "out")
    found = as_json(run("push", "out", "me/patch", "--dry-run", "--json"))
    assert (found["repository"], found["pushed"]) == ("me/patch", False)
    assert {file["name"]: file["bytes"] for file in found["files"]} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()
    }


def test_push_uploads_the_folder_and_says_where_it_is(run, tmp_path):
    run("patch", "llama", "-m", "gated_attention", "-o", "out")
    with HubServer() as hub:
        command = [sys.executable, "-m", "patchattn", "push", "out", "owner/patch", "--message", "First", "--json"]
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert json.loads(done.stdout)["url"] == f"{hub.url}/owner/patch"
        assert {path.name for path in (tmp_path / "out").iterdir()} <= set(hub.files("owner/patch"))
        assert hub.repositories["owner/patch"].history()[-1] == "First"
        done = subprocess.run(command, capture_output=True, text=True, env={**environment, "HF_TOKEN": "wrong"})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


# ---- demo --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(evaluate, "DRAWINGS", 1)
    monkeypatch.setattr(demo, "TIMED_TOKENS", 1)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)


def test_the_demo_passes_and_shows_every_method(run, small_demo):
    found = as_json(run("demo", "--tokens", "400", "--json"))
    assert found["passed"] and len(found["checks"]) == 4
    shown = {row["method"].partition(":")[0] for row in found["rows"]}
    assert {"unpatched", *builtin_names()} - set(found["left_out"]) <= shown
    assert list(found["left_out"]) == ["var"] and "no image token" in found["left_out"]["var"]
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["dense"]["difference"] <= 1e-4
    assert rows["duo_attention"]["bytes"] < rows["dense"]["bytes"] == rows["unpatched"]["bytes"]
    assert len({row["method"] for row in found["rows"]}) == len(found["rows"])
    scores = {(score["checkpoint"], score["method"].partition(":")[0]): score["value"] for score in found["scores"]}
    assert {checkpoint for checkpoint, _ in scores} == set(lab.names()) - {"lab-llama"}
    assert ("lab-llava", "var") in scores and ("lab-vit", "gated_attention") in scores
    for (checkpoint, name), value in scores.items():
        if name in ("dense", "gated_attention"):
            assert value == scores[checkpoint, "unpatched"] > 0.7


class Careless(method.Method):
    """Claims to be exact, forgets the padding and adds something."""

    exact = True

    def forward(self, ctx):
        return ctx.attend() + 30 * ctx.k.mean(dim=(1, 2))[:, None, None]


def test_the_demo_fails_with_a_method_that_is_wrong(run, small_demo, monkeypatch):
    Careless.name = "careless"
    monkeypatch.setitem(method._REGISTERED, "careless", Careless)
    code, out, _ = run("demo", "--tokens", "400")
    failed = [line for line in out.splitlines() if line.startswith("✗")]
    assert code == 1
    assert len(failed) == 2 and all("careless" in line for line in failed)


def test_the_demo_takes_a_model_of_ones_own(run, small_demo):
    found = as_json(run("demo", "--model", "llama", "--tokens", "350", "--json"))
    assert found["passed"] and found["model"] == "LlamaForCausalLM llama"
