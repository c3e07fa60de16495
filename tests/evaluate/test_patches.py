"""What may stand after `patch=`, as lm-eval reads its command line, and what is said of what may not."""

from __future__ import annotations

import json

import pytest
from lm_eval.utils import simple_parse_args_string

import patchattn
from patchattn import lab
from patchattn.evaluate.patches import read_patch
from patchattn.method import describe

WRITTEN = {
    "duo_attention": [("duo_attention", {})],
    "DuoAttention": [("duo_attention", {})],
    "duo_attention:sink=4": [("duo_attention", {"sink": 4})],
    "duo_attention:sink=4;recent=12": [("duo_attention", {"sink": 4, "recent": 12})],
    "gated_attention+duo_attention:sink=4;recent=12": [
        ("gated_attention", {}), ("duo_attention", {"sink": 4, "recent": 12}),
    ],
    "gated_attention:kind=elementwise;init=open+dense": [
        ("gated_attention", {"kind": "elementwise", "init": "open"}), ("dense", {}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("reader", ["as it is", "lm_eval now", "lm_eval before"])
def test_methods_survive_lm_evals_reading_of_model_args(text, reader):
    line = f"pretrained=some/model,patch={text},layers=0;3-,dtype=float32"
    if reader == "lm_eval now":
        utilities = pytest.importorskip("lm_eval._cli.utils")
        arguments = utilities.key_val_to_dict(line)
    elif reader == "lm_eval before":
        arguments = simple_parse_args_string(line)
    else:
        arguments = {"patch": text, "layers": "0;3-"}
    found = read_patch(arguments["patch"], arguments["layers"])
    assert found.text == text and found.layers == "0,3-"
    assert len(found.what) == len(WRITTEN[text])
    for method, (name, settings) in zip(found.what, WRITTEN[text], strict=True):
        assert method.name == name
        assert settings.items() <= describe(method).items()


def test_objects_are_written_as_text_that_reads_back():
    plan = {"even": "duo_attention:sink=4", "odd": ["gated_attention", "dense"]}
    for given in (patchattn.DuoAttention(sink=4), [patchattn.GatedAttention(), patchattn.Dense()], plan):
        found = read_patch(given)
        again = read_patch(found.text)
        assert again.text == found.text and type(again.what) is type(found.what)


@pytest.mark.parametrize("place", ["line", "file"])
def test_a_plan_is_text_or_a_file(tmp_path, place):
    plan = '{"even": "duo_attention:sink=4", "odd": "dense"}'
    (tmp_path / "plan.json").write_text(plan)
    found = read_patch(plan if place == "line" else str(tmp_path / "plan.json"))
    assert {selector: method.name for selector, (method,) in found.what.items()} == {
        "even": "duo_attention", "odd": "dense",
    }  # fmt: skip


def test_a_saved_patch_goes_on_as_it_was(tmp_path):
    model = lab.load("lab-llama")
    patchattn.patch(model, "duo_attention:sink=2,recent=6", "1-2")
    patchattn.save(model, tmp_path / "my-patch")
    other = lab.load("lab-llama")
    read_patch(str(tmp_path / "my-patch")).put_on(other)
    assert patchattn.living.plan_of(other) == patchattn.living.plan_of(model)


def test_a_repository_is_looked_for_only_when_it_is_put_on():
    found = read_patch("owner/my-patch", revision="main")
    assert (found.source, found.revision, found.what) == ("owner/my-patch", "main", None)


def test_no_patch_is_none():
    assert read_patch(None) is None and read_patch("") is None


WRONG = {
    "nonsense": r"patch='nonsense' is no folder here, no repository .* unknown method 'nonsense'; known .*dense",
    "duo_attention:sunk=4": "unknown field 'sunk'; allowed: .*sink",
    "duo_attention:recent=0": "recent is 0; it must be",
    "duo_attention:recent": "'recent' is no setting",
    "dense+owner/my-patch": "'owner/my-patch' is a saved patch, which stands alone",
    "nowhere.json": "there is no such file",
    "{0": "is no JSON",
    "{}": "a plan is an object",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_said(text):
    with pytest.raises((ValueError, FileNotFoundError), match=WRONG[text]):
        read_patch(text)


def test_a_folder_without_a_patch_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no patch"):
        read_patch(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [(None, "there is no patch"), ("owner/patch", "names its layers by itself"), ('{"0": "dense"}', "is a plan")],
)
def test_layers_stand_with_methods_only(given, message):
    with pytest.raises(ValueError, match=message):
        read_patch(given, "even")


def test_json_of_a_list_is_methods():
    found = read_patch(json.dumps([{"method": "gated_attention"}, {"method": "duo_attention", "sink": 3}]))
    assert [method.name for method in found.what] == ["gated_attention", "duo_attention"]
