"""`patchattn recipes` shows what ships, copies it, and says what a recipe would do or what is wrong with it."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from patchattn import cli
from patchattn.train import library
from patchattn.train.recipe import load_recipe, resolved

COMMANDS = ("list", "show", "copy", "check")

GOOD = """\
# patchattn convert some/good
version: 1
about: a good one
model: some/model
patch: {even: "gated_attention:kind=elementwise", odd: [gated_attention, dense]}
data:
  train:
    - {kind: text, path: [a.txt, b.txt], weight: 3}
    - {kind: synthetic, generator: mqar}
stages:
  - {kind: attention_transfer, tokens: 5e6, learning_rate: 2e-3, length: 256}
  - {kind: tune, steps: 1000, data: {train: {kind: chat, path: talks}, packing: false, held_out: 0}}
budget: {hours: 2}
output: out
"""
BAD = "version: 1\nmodel: {}\ndata: {train: {kind: text, path: a}, lenght: 3}\nstages: {kind: tune}\noutput: 3\n"


@pytest.fixture
def run(command_line, tmp_path, monkeypatch):
    """Runs a command in a folder with a good and a bad recipe, the good one shipped too; gives code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped" / "some").mkdir(parents=True)
    (tmp_path / "shipped" / "accelerate").mkdir()
    (tmp_path / "shipped" / "some" / "good.yaml").write_text(GOOD)
    (tmp_path / "shipped" / "accelerate" / "ddp.yaml").write_text("num_processes: 4\n")
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(BAD)
    monkeypatch.setattr(library, "folder", lambda: tmp_path / "shipped")
    return functools.partial(command_line, "recipes")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"patchattn recipes {command}" in out.partition("Examples")[2]


def test_the_help_names_every_command(run):
    out = run("--help")[1]
    assert all(f" {command} " in out for command in COMMANDS)


def test_list_shows_what_each_makes_and_leaves_out_what_is_no_recipe(run):
    code, out, _ = run("list")
    assert code == 0
    assert "some/good" in out and "a good one" in out and "attention_transfer, tune" in out
    assert "to copy likewise: accelerate/ddp" in out
    (entry,) = json.loads(run("list", "--json")[1])
    assert (entry["name"], entry["model"]) == ("some/good", "some/model")
    assert entry["stages"] == ["attention_transfer", "tune"]


def test_listing_imports_no_torch():
    code = """
import sys
sys.argv = ["patchattn", "recipes", "list"]
from patchattn.cli import main
try:
    main()
finally:
    assert not {"torch", "transformers"} & set(sys.modules), "they were imported"
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_show_gives_the_whole_recipe_which_can_be_run_as_it_is(run, tmp_path):
    code, out, _ = run("show", "some/good", "seed=7", "stages.1.steps=5")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(out)
    shown = load_recipe(tmp_path / "shown.yaml")
    assert shown == load_recipe("some/good", ["seed=7", "stages.1.steps=5"])
    assert shown.seed == 7
    assert json.loads(run("show", "some/good", "--json")[1]) == resolved(load_recipe("some/good"))


@pytest.mark.parametrize(
    ("destination", "file"),
    [((), "good.yaml"), (("mine.yaml",), "mine.yaml"), (("new/folder",), "new/folder/good.yaml")],
)
def test_copy_writes_the_file_as_it_is(run, tmp_path, destination, file):
    (tmp_path / "good.yaml").unlink()
    code, out, _ = run("copy", "some/good", *destination)
    assert (code, out.strip()) == (0, f"wrote {Path(file)}")
    assert (tmp_path / file).read_text() == GOOD


def test_copy_takes_the_configurations_of_accelerate_too(run, tmp_path):
    assert run("copy", "accelerate/ddp")[0] == 0
    assert (tmp_path / "ddp.yaml").read_text() == "num_processes: 4\n"


def test_copy_leaves_a_file_alone_without_force(run, tmp_path):
    (tmp_path / "good.yaml").write_text("mine")
    code, _, err = run("copy", "some/good")
    assert code == 1 and "--force" in err
    assert (tmp_path / "good.yaml").read_text() == "mine"
    assert run("copy", "some/good", "--force")[0] == 0
    assert (tmp_path / "good.yaml").read_text() == GOOD


def test_copy_of_nothing_says_what_there_is(run):
    code, _, err = run("copy", "some/goood")
    assert code == 1
    assert "did you mean some/good? allowed: accelerate/ddp, some/good" in err


def test_check_says_what_a_good_recipe_would_do(run):
    code, out, err = run("check", "good.yaml", "stages.1.batch_size=2")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert "model some/model, causal-lm, float32" in rows
    assert "patch gated_attention:kind=elementwise on even; gated_attention over dense on odd" in rows
    assert "data 75% text a.txt, b.txt; 25% synthetic mqar; samples of 1,024 tokens, packed" in rows
    assert "data held out 2.00% of it" in rows
    assert ("stage 0 attention_transfer: 5,000,000 tokens, 8 samples of 256 tokens per step, "
            "learning rate 0.002") in rows  # fmt: skip
    assert "stage 1 tune: 1,000 steps, 2 samples per step, learning rate 0.001" in rows
    assert "stage 1 data chat talks; samples of 1,024 tokens" in rows
    assert "stage 1 data held out none" in rows
    assert "output out, stopping after 2 hours" in rows


def test_check_tells_everything_that_is_wrong_and_leaves_with_1(run):
    code, out, err = run("check", "bad.yaml", "seed=x")
    assert (code, out) == (1, "")
    assert [line.partition(" is ")[0].partition(" it ")[0] for line in err.splitlines()] == [
        "error: bad.yaml:2: model:",
        "error: bad.yaml:3: data.lenght: unknown key; did you mean length? allowed: train, held_out, length, packing, "
        "held_out_samples",
        "error: bad.yaml:4: stages.0:",
        "error: bad.yaml:5: output: 3",
        "error: command line: seed: 'x'",
    ]


def test_check_gives_json_for_good_and_bad(run):
    code, out, _ = run("check", "good.yaml", "--json")
    assert code == 0 and json.loads(out)["problems"] == [] and json.loads(out)["resolved"]["about"] == "a good one"
    code, out, _ = run("check", "bad.yaml", "--json")
    assert code == 1 and len(json.loads(out)["problems"]) == 4


@pytest.mark.parametrize("command", ["check", "show", "convert"])
def test_a_bad_recipe_is_refused_in_a_line_for_each_mistake(run, monkeypatch, capsys, command):
    code, out, err = run(command, "bad.yaml") if command != "convert" else convert(monkeypatch, capsys, "bad.yaml")
    assert (code, out) == (1, "")
    assert [line[:16] for line in err.splitlines()] == ["error: bad.yaml:"] * 4


def convert(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["patchattn", "convert", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err
