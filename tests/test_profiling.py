"""Profiles: what patching each layer costs, measured as by hand, resumed, and made into plans that `patch` takes."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

import patchattn
from patchattn import profiling
from patchattn.loading import load_tokenizer
from patchattn.profiling import Layer, Profile, Score, load_profile, profile, task_rows, text_rows
from patchattn.testing import FAMILIES, TEXT, snapshot
from patchattn.train.tasks import task_of

METHOD = "duo_attention:heads=0,sink=1,recent=3"


def llama():
    torch.manual_seed(0)
    return FAMILIES["llama"].build().eval()


def batch(rows, length, labelled=None, seed=3):
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    if labelled is not None:
        labels[:, :-labelled] = -100
    return {"input_ids": ids, "labels": labels}


ROWS = {"text": [batch(2, 21), batch(1, 21, seed=4)], "task": [batch(3, 15, labelled=2)]}


@torch.no_grad()
def by_hand(model, wanted):
    """Scores of `model` on ROWS, told from `wanted`, logits by rows and batch."""
    found = {}
    for name, batches in ROWS.items():
        own, base, labels = [], [], []
        for one, logits in zip(batches, wanted[name], strict=True):
            chosen = one["labels"][:, 1:] != -100
            own.append(model(one["input_ids"]).logits[:, :-1][chosen])
            base.append(logits[:, :-1][chosen])
            labels.append(one["labels"][:, 1:][chosen])
        own, base, labels = torch.cat(own), torch.cat(base), torch.cat(labels)
        p = base.softmax(-1)
        divergence = (p * (base.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean().item()
        right = (own.argmax(-1) == labels).float().mean().item()
        found[name] = Score(functional.cross_entropy(own, labels).item(), divergence, right)
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert vars(one[name]) == pytest.approx(vars(other[name]), abs=1e-5)


# ---- measuring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_cell_is_what_patching_those_layers_gives():
    model = llama()
    before, wanted = snapshot(model), {name: [model(one["input_ids"]).logits for one in ROWS[name]] for name in ROWS}
    found = profile(model.train(), METHOD, ROWS)
    assert model.training and snapshot(model.eval()) == before
    same(found.unpatched, by_hand(model, wanted))
    assert found.targets == {"text": 60, "task": 6} and found.cached == 21
    assert [layer.selector for layer in found.layers] == ["0", "1", "2"]
    for layers, scores in [("all", found.patched)] + [
        (places, getattr(found.layers[index], way))
        for index in range(3)
        for way, places in (("alone", [index]), ("without", [i for i in range(3) if i != index]))
    ]:
        patchattn.patch(model, METHOD, layers)
        same(scores, by_hand(model, wanted))
        patchattn.unpatch(model)
    assert all(layer.bytes < layer.dense_bytes for layer in found.layers)


@torch.no_grad()
def test_a_trained_patch_is_profiled_with_what_it_learned():
    model = patchattn.patch(llama(), "hedgehog:window=4", layers="1-")
    for parameter in patchattn.patch_parameters(model).values():
        parameter.add_(torch.randn_like(parameter))
    found = profile(model, None, ROWS, ways=["without"])
    with patchattn.disabled(model):
        wanted = {name: [model(one["input_ids"]).logits for one in ROWS[name]] for name in ROWS}
    same(found.patched, by_hand(model, wanted))
    assert [layer.selector for layer in found.layers] == ["1", "2"] and not found.layers[0].alone
    patchattn.unpatch(model, 2)
    same(found.layers[1].without, by_hand(model, wanted))
    assert found.plan(0.5)["1" if found.kept(0.5)[0].selector == "2" else "2"] == {"method": "hedgehog", "window": 4}


def test_parameters_without_dimensions_and_of_half_precision_are_told_apart():
    tensors = [torch.tensor(1.5), torch.ones(3, dtype=torch.bfloat16), torch.zeros(0)]
    assert profiling._fingerprint(tensors) != profiling._fingerprint([torch.tensor(2.5), *tensors[1:]])


@torch.no_grad()
def test_another_model_may_say_what_is_to_be_kept():
    model, other = llama(), llama()
    for parameter in other.parameters():
        parameter.mul_(1.1)
    wanted = {name: [other(one["input_ids"]).logits for one in ROWS[name]] for name in ROWS}
    found = profile(model, METHOD, ROWS, reference=other, ways=["alone"])
    same(found.unpatched, by_hand(model, wanted))
    assert found.unpatched["text"].divergence > 0


def test_images_are_profiled_by_their_task():
    inputs = FAMILIES["vit"].inputs(2, 0)
    rows = {"images": [{**inputs, "labels": torch.tensor([1, 3])}]}
    found = profile(FAMILIES["vit"].build().eval(), "hedgehog:window=0", rows, task=task_of("image-classification"))
    assert found.targets == {"images": 2} and found.cached is None and len(found.layers) == 3
    with pytest.raises(ValueError, match="this model was measured without one; use 'layers'"):
        found.plan(0.5, of="cache")
    pytest.importorskip("diffusers")
    from diffusers import DDPMScheduler

    inputs = FAMILIES["dit"].inputs(2, 0)
    noisy = {"sample": inputs.pop("hidden_states"), "noise": torch.randn(2, 3, 8, 8), **inputs}
    task = task_of("denoising", DDPMScheduler())
    torch.manual_seed(0)
    model = FAMILIES["dit"].build().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    found = profile(model, "hedgehog:window=0", {"images": [noisy]}, task=task)
    assert found.patched["images"].right is None and found.patched["images"].divergence > 0
    with pytest.raises(ValueError, match="by is 'right', which this model's predictions have not; use 'loss'"):
        found.sensitivity(by="right")
    assert len(found.plan(0.5)) == 1


def test_a_run_that_was_stopped_goes_on_and_measures_nothing_twice(tmp_path):
    whole, file = profile(llama(), METHOD, ROWS), tmp_path / "deeper" / "profile.json"
    steps = []

    def stop(line):
        steps.append(line)
        if len(steps) == 11:
            raise KeyboardInterrupt

    model = llama()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        profile(model, METHOD, ROWS, file=file, say=stop)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="is not finished; the same command goes on with it"):
        load_profile(file)
    assert profile(llama(), METHOD, ROWS, file=file, say=steps.append) == whole == load_profile(file)
    assert len(steps) == 3 * 8 and steps[-1].startswith("24 of 24: task, without") and len(set(steps)) == 24
    profile(llama(), METHOD, ROWS, file=file, say=steps.append)
    assert len(steps) == 24


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        (dict(what="duo_attention:heads=0,sink=1,recent=4"), "layers"),
        (dict(rows={"text": ROWS["text"]}), "rows"),
        (dict(ways=["alone"]), "ways"),
        (dict(reference=llama()), "reference"),
    ],
)
def test_a_file_of_other_measurements_is_not_gone_on_with(tmp_path, changes, differs):
    file = tmp_path / "profile.json"
    profile(llama(), METHOD, ROWS, file=file)
    with pytest.raises(ValueError, match=f"holds a profile of another kind \\(its {differs} differ\\); name another"):
        profile(llama(), **{"what": METHOD, "rows": ROWS, **changes}, file=file)


def test_what_cannot_be_measured_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="this model is not patched; name methods for it"):
        profile(model, None, ROWS)
    with pytest.raises(ValueError, match="there are no rows to measure on"):
        profile(model, METHOD, {"text": []})
    with pytest.raises(ValueError, match="ways is 'apart'; it must be one of alone, without"):
        profile(model, METHOD, ROWS, ways=["apart"])
    patchattn.patch(model, METHOD)
    with pytest.raises(ValueError, match="is patched already; give None for its own patch"):
        profile(model, METHOD, ROWS)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 99}', "no JSON"])
def test_files_that_are_no_profile_are_refused(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=r"p\.json (is no profile|has format 99; this version reads 1)"):
        load_profile(tmp_path / "p.json")


# ---- planning ------------------------------------------------------------------------------------------------------


def made(alone, without, held=None, methods=None):
    """A profile with these divergences on two kinds of rows, the second ten times the first."""

    def scores(value):
        return {"text": Score(2 + value, value, 0.5 - value / 100), "task": Score(value, 10 * value, 1 - value / 10)}

    layers = [
        Layer(f"layers.{i}", str(i), methods[i] if methods else [{"method": "hedgehog", "window": 8, "affine": False}],
              *(held[i] if held else (100, 400)), scores(alone[i]), {} if without is None else scores(5 - without[i]))
        for i in range(len(alone))
    ]  # fmt: skip
    return Profile("Toy", layers, scores(0.0), scores(5.0), {"text": 9, "task": 9}, 64)


def test_the_most_sensitive_layers_stay():
    found = made([1, 3, 2, 0], [1, 2, 3, 0])
    assert found.sensitivity("alone", on="text") == [1, 3, 2, 0]
    assert found.sensitivity("without", on="text") == pytest.approx([1, 2, 3, 0])
    assert found.sensitivity(0.25, on=["text"]) == pytest.approx([1, 2.25, 2.75, 0])
    assert found.sensitivity("alone", by="right", on="task") == pytest.approx([0.1, 0.3, 0.2, 0])
    assert found.sensitivity("alone") == pytest.approx([5.5, 16.5, 11, 0])
    assert [layer.name for layer in found.kept(0.25)] == ["layers.2"]  # most are patched: what is spared counts
    assert [layer.name for layer in found.kept(0.75)] == ["layers.0", "layers.1", "layers.2"]
    assert [layer.name for layer in found.kept(0.49, way="alone")] == ["layers.1"]
    assert found.kept(0) == []
    assert found.plan(0.5) == {"0,3": {"method": "hedgehog", "window": 8}}
    only_alone = made([1, 3, 2, 0], None)
    assert [layer.name for layer in only_alone.kept(0.25)] == ["layers.1"]
    with pytest.raises(ValueError, match="'without' was not measured; it has alone"):
        only_alone.kept(0.25, way="without")


def test_a_budget_of_bytes_buys_what_spares_most_for_its_size():
    held = [(100, 400), (100, 1100), (100, 400), (100, 400)]
    found = made([2, 3, 1, 0], [2, 3, 1, 0], held)
    least = 400 / 2300
    assert found.kept(least, of="cache") == []
    assert [layer.name for layer in found.kept((400 + 300) / 2300, of="cache")] == ["layers.0"]
    assert [layer.name for layer in found.kept((400 + 600) / 2300, of="cache")] == ["layers.0", "layers.2"]
    assert [layer.name for layer in found.kept((400 + 1300) / 2300, of="cache")] == ["layers.0", "layers.1"]
    with pytest.raises(ValueError, match=r"budget is 0.1 of the cache; with every layer patched it takes 0.174 at 64"):
        found.kept(0.1, of="cache")
    with pytest.raises(ValueError, match="hold as much as before at 64 tokens; use 'layers'"):
        made([1, 2], [1, 2], [(400, 400), (400, 400)]).kept(1, of="cache")


def test_a_plan_says_each_layer_by_what_it_was_patched_with():
    one, two = [{"method": "hedgehog", "window": 8}], [{"method": "gated_attention"}, {"method": "duo_attention"}]
    found = made([1, 1, 1, 9], [1, 1, 1, 9], methods=[one, two, one, one])
    assert found.plan(0.25) == {"0,2": one[0], "1": two}
    with pytest.raises(ValueError, match="with a budget of 1 every layer stays as it was; give a smaller one"):
        found.plan(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(budget=1.5), "budget is 1.5; it must be from 0 to 1"),
        (dict(budget=0.5, of="heads"), "of is 'heads'; it must be one of layers, cache"),
        (dict(budget=0.5, by="speed"), "by is 'speed'; it must be one of divergence, loss, right"),
        (dict(budget=0.5, on="music"), "on is 'music'; it must be one of text, task"),
        (dict(budget=0.5, way="apart"), "way is 'apart'; it must be one of alone, without"),
    ],
)
def test_plans_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made([1, 2], [1, 2]).plan(**options)


@torch.no_grad()
def test_a_plan_goes_through_json_into_patch_and_into_a_recipe(tmp_path):
    from patchattn.train.recipe import load_recipe

    what = {"0,2": ["gated_attention:init=random", METHOD], "1": "hedgehog:window=4"}
    plan = profile(llama(), what, ROWS).plan(0.34)
    assert len(plan) in (1, 2) and json.loads(json.dumps(plan)) == plan
    model = patchattn.patch(llama(), plan)
    assert len(patchattn.explain(model).layers) == TEXT["num_hidden_layers"]
    (tmp_path / "recipe.yaml").write_text(
        "version: 1\nmodel: lab-llama\ndata: {train: {kind: text, path: a.txt}}\nstages: [{kind: tune, steps: 1}]\n"
        f"output: out\npatch: {json.dumps(plan)}\n"
    )
    assert load_recipe(str(tmp_path / "recipe.yaml")).patch == plan


# ---- rows and what is printed --------------------------------------------------------------------------------------


def test_rows_of_text_and_of_tasks():
    tokenizer = load_tokenizer("lab-llama")
    rows = text_rows(tokenizer, ["one two three " * 40, "four five six " * 40], length=33, rows=5, batch=2)
    assert [one["input_ids"].shape for one in rows] == [(2, 33), (2, 33), (1, 33)]
    assert all(torch.equal(one["input_ids"], one["labels"]) for one in rows)
    with pytest.raises(ValueError, match="with length 4000 they must have as many"):
        text_rows(tokenizer, ["short"], length=4000)
    rows = task_rows(tokenizer, "mqar", length=96, rows=3, batch=2, pairs=4)
    assert [one["input_ids"].shape[0] for one in rows] == [2, 1]
    answers = rows[0]["labels"] != -100
    assert answers.any() and torch.equal(rows[0]["labels"][answers], rows[0]["input_ids"][answers])


def test_it_prints_a_line_for_each_layer():
    text = str(made([1, 2], [1, 2]))
    assert "on all layers" in text and "layers.1" in text and "text alone" in text and "20.0000" in text
    assert profiling.Profile.to_dict(made([1], [1]))["layers"][0]["bytes"] == 100


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return command_line


def test_commands_profile_a_model_and_make_a_plan_of_it(run, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time there was a whale. " * 40)
    command = ["profile", "lab-llama", "-m", "hedgehog:window=8", "--task", "mqar:pairs=4", "--data", "a.txt",
               "--length", "64", "--rows", "2", "-o", "p.json"]  # fmt: skip
    code, out, err = run(*command)
    assert code == 0 and "model.layers.3.self_attn" in out and "20 of 20: text, without" in err
    code, out, err = run(*command, "--json")
    assert json.loads(out)["targets"]["text"] == 126 and "of 20" not in err
    code, out, _ = run("plan", "p.json", "--budget", "0.5", "--on", "text", "-o", "plan.json", "--json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0 and json.loads(out)["plan"] == plan and len(json.loads(out)["kept"]) == 2
    code, out, _ = run("patch", "lab-llama", "--plan", "plan.json", "-o", "patch")
    assert code == 0
    code, out, _ = run("profile", "lab-llama", "--patch", "patch", "--task", "mqar:pairs=4", "--length", "64",
                       "--rows", "1", "--way", "alone", "-o", "q.json")  # fmt: skip
    assert code == 0 and out.count("self_attn") == 2
    assert run("plan", "p.json", "--budget", "0.5")[1].startswith("stays as it was: model.layers.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "lab-llama", "-m", "hedgehog", "-o", "p"], "name a text with --data or a task with --task"),
        (["profile", "lab-llama", "-m", "hedgehog", "--task", "chess", "-o", "p"], "chess"),
        (["profile", "lab-llama", "-m", "hedgehog", "--task", "mqar:pears=3", "-o", "p"], "pears"),
        (["profile", "lab-llama", "-m", "hedgehog", "--task", "mqar:8", "-o", "p"], "'8' is no option; write name"),
        (["profile", "lab-llama", "-m", "hedgehog", "--patch", "x", "--task", "mqar", "-o", "p"], "or a saved patch"),
    ],
)
def test_wrong_commands_say_what_is_wrong(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in " ".join(err.replace("│", " ").split())  # it is set in a box
