"""The checkpoints that ship with patchattn: found by name, small, and able to do what their cards say."""

import json
import re
import types

import pytest
import torch
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

from patchattn import lab
from patchattn.cli import app
from patchattn.lab.evaluate import JUDGE, MOST_MEGABYTES, LabReport, Number, evaluate
from patchattn.lab.images import answered, classified, draw, recognised
from patchattn.loading import load_model, load_shell, load_tokenizer
from patchattn.train import library
from patchattn.train.images import open_source
from patchattn.train.recipe import load_recipe
from patchattn.train.schema import ImageSource

# ---- what ships --------------------------------------------------------------------------------------------------


def test_checkpoints_have_recipes_and_are_small_enough_for_a_wheel():
    assert lab.names() == ["lab-dit", "lab-llama", "lab-llava", "lab-vit"]
    assert {lab.recipe(name) for name in lab.names()} <= set(library.names())
    files = [file for file in lab.FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MOST_MEGABYTES * 1e6


@pytest.mark.parametrize("name", lab.names())
def test_a_checkpoint_is_in_bfloat16_with_a_card_and_a_recipe(name):
    dtypes = set()
    for file in lab.path(name).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            dtypes |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}
    assert lab.facts(name)["parameters"] == sum(weight.numel() for weight in load_model(name).parameters())
    assert f"patchattn convert {lab.recipe(name)}" in (lab.path(name) / "README.md").read_text(encoding="utf-8")
    assert load_recipe(lab.recipe(name)).output == name


@pytest.mark.parametrize("name", lab.names())
def test_no_checkpoint_tells_in_which_folder_it_was_made(name):
    for file in lab.path(name).rglob("*config.json"):
        assert not re.search(r'"_name_or_path": "[^"]', file.read_text(encoding="utf-8")), file


def test_names_open_where_a_model_is_named(tmp_path):
    assert load_shell("lab-vit").config.model_type == "vit"
    assert load_tokenizer("lab-vit") is None
    assert CliRunner().invoke(app, ["inspect", "lab-vit", "--json"]).exit_code == 0


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    assert lab.resolve("lab-vit") == str(lab.FOLDER / "lab-vit")
    (tmp_path / "lab-vit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lab.resolve("lab-vit") == "lab-vit"


def test_other_names_stay_as_they_are():
    assert lab.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    with pytest.raises(ValueError, match=r"no lab checkpoint 'lab-vim'; there are .*lab-vit"):
        lab.path("lab-vim")


# ---- measuring ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few():
    """Forty digits, four of each."""
    config = types.SimpleNamespace(image_size=8, num_channels=1, num_labels=10)
    source = ImageSource(path="digits", limit=40)
    return open_source(source, task="image-classification", processor=None, model_config=config, seed=0)


class Constant(nn.Module):
    """Says the same class of every image."""

    def __init__(self, answer, **config):
        super().__init__()
        self.answer, self.config = answer, types.SimpleNamespace(image_size=8, num_channels=1, **config)

    def forward(self, pixel_values):
        logits = nn.functional.one_hot(torch.tensor(self.answer), 10).float()
        return types.SimpleNamespace(logits=logits.expand(len(pixel_values), 10))


def test_a_classifier_that_says_one_class_is_right_on_that_class_alone(few):
    assert classified(Constant(3), few) == 0.1


def test_a_judge_is_asked_about_each_drawing():
    classes = torch.tensor([3, 3, 3, 4])
    assert recognised(torch.zeros(4, 1, 5, 5), classes, Constant(3)) == 0.75


class Oracle(nn.Module):
    """Predicts the noise that leads to an image whose every pixel is the asked class's; the null class's is 0."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.config = types.SimpleNamespace(in_channels=1, sample_size=4, num_embeds_ada_norm=10)

    def forward(self, noisy, timestep, class_labels):
        kept = self.schedule.alphas_cumprod[timestep][:, None, None, None]
        target = torch.where(class_labels < 10, class_labels / 10, 0.0)[:, None, None, None]
        return types.SimpleNamespace(sample=(noisy - kept.sqrt() * target) / (1 - kept).sqrt())


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_drawing_follows_the_noise_prediction_to_the_class_that_is_asked_for(guidance):
    diffusers = pytest.importorskip("diffusers")
    schedule = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    classes = torch.tensor([1, 4, 6])
    images = draw(Oracle(schedule), schedule, classes, guidance=guidance)
    wanted = (guidance * classes / 10 + 1) / 2
    assert torch.allclose(images, wanted[:, None, None, None].expand_as(images), atol=0.02)


def test_answers_are_wrong_where_other_answers_are_expected():
    from transformers import AutoProcessor

    model, processor = lab.load("lab-llava"), AutoProcessor.from_pretrained(lab.path("lab-llava"))

    def share(names):
        source = ImageSource(path="digits", limit=20, names=names)
        return answered(model, open_source(source, task="image-text", processor=processor,
                                           model_config=model.config, seed=0))  # fmt: skip

    assert share(None) > 0.8
    assert share(list("1234567890")) < 0.2


def test_a_number_without_value_or_goal_is_neither_reached_nor_missed():
    rows = [Number("lab-x", "bits", 2.1, 2.2, "", smaller=True), Number("lab-x", "bits", None, 2.2, "no text")]
    rows += [Number("lab-x", "share", 0.94, 0.95, ""), Number("lab-x", "share", 0.94, None, "")]
    assert [row.reached for row in rows] == [True, None, False, None]
    report = LabReport([], rows)
    assert [row["reached"] for row in report.to_dict()["numbers"]] == [True, None, False, None]
    assert "at most 2.20" in str(report) and "at least 95.0%" in str(report) and "no text" in str(report)


@pytest.mark.parametrize("name", [name for name in ("lab-vit", "lab-dit") if {name, JUDGE} <= set(lab.names())])
def test_image_checkpoints_reach_their_goals_and_measure_the_same_again(name):
    first, second = evaluate([name]), evaluate([name])
    assert first == second
    assert all(number.reached for number in first.numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", lab.names())
def test_the_card_says_what_is_measured(name):
    card = (lab.path(name) / "README.md").read_text(encoding="utf-8")
    for number in evaluate([name]).numbers:
        assert number.what in card
        assert number.value is None or f"{number.value:.1%}" in card


# ---- command line ------------------------------------------------------------------------------------------------


def test_list_and_path_print_every_checkpoint():
    listed = json.loads(CliRunner().invoke(app, ["lab", "list", "--json"]).stdout)
    assert [entry["name"] for entry in listed] == lab.names()
    for entry in listed:
        assert CliRunner().invoke(app, ["lab", "path", entry["name"]]).stdout.split() == [entry["folder"]]


@pytest.mark.parametrize("command", ["path", "evaluate"])
def test_a_wrong_name_is_wrong_usage(command):
    result = CliRunner().invoke(app, ["lab", command, "lab-vim"])
    assert result.exit_code == 2
    assert "lab-vim" in result.stderr


def test_evaluate_prints_numbers_beside_goals():
    result = CliRunner().invoke(app, ["lab", "evaluate", "lab-vit", "--json"])
    (number,) = json.loads(result.stdout)["numbers"]
    assert number["checkpoint"] == "lab-vit" and number["goal"] == 0.97 and number["reached"] is True


def test_data_says_where_the_text_went_and_under_what_licence(monkeypatch, tmp_path):
    monkeypatch.setattr("patchattn.lab.sources.fetch", lambda folder: {"books": folder / "books"})
    result = CliRunner().invoke(app, ["lab", "data", str(tmp_path)])
    assert str(tmp_path / "books") in result.stdout and "public domain" in result.stdout
