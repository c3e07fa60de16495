"""Patched models in lm-eval: what a patch that changes nothing scores, what one that changes something scores, and what
the results say of it."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

import patchattn
from patchattn import lab
from patchattn.evaluate import evaluate
from patchattn.evaluate.models import PatchattnLM
from patchattn.loading import load_model, load_tokenizer
from patchattn.method import builtin_names, method_class

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "assets"
LOCAL = ["lambada_openai", "hellaswag", "piqa", "arc_easy", "winogrande", "wikitext", "babi", "babilong_qa1",
         "recall_passkey", "recall_mqar", "text_by_position"]  # fmt: skip
SMALL = {"lengths": [128, 192], "depths": [0.5], "samples": 2, "buckets": 2}
DUO = "duo_attention:heads=0;sink=2;recent=30"


def scores(model="lab-llama", tasks=LOCAL, bench=None, **options):
    options = {"metadata": SMALL, "limit": 2, "batch_size": 4, "gen_kwargs": {"max_gen_toks": 8},
               "bootstrap_iters": 0, **options}  # fmt: skip
    return evaluate(model, tasks, data=None if bench is None else str(bench), **options)


@pytest.fixture(scope="module")
def plain(bench):
    """What lm-eval's own model scores."""
    return scores(bench=bench, kind="hf").scores()


@pytest.fixture
def our_tasks_only(monkeypatch):
    """lm-eval without its own fifteen thousand tasks, which take a while to read."""
    from lm_eval.tasks.manager import TaskManager

    def start(self, *arguments, include_defaults=True, **options):
        whole(self, *arguments, include_defaults=False, **options)

    whole = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", start)


# ---- a patch that changes nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [None, "dense"])
def test_no_patch_and_a_dense_one_score_what_lm_evals_own_model_scores(bench, plain, patch):
    assert len(plain) == len(LOCAL)
    assert scores(bench=bench, patch=patch).scores() == plain


def test_a_whole_patched_checkpoint_is_a_model_like_any_other_to_lm_evals_own(tmp_path):
    model = lab.load("lab-llama")
    patchattn.patch(model, "duo_attention:heads=0,sink=2,recent=30")
    model.save_pretrained(tmp_path / "whole")
    load_tokenizer("lab-llama").save_pretrained(tmp_path / "whole")
    tasks = ["text_by_position"]
    own = scores(str(tmp_path / "whole"), tasks, kind="hf").scores()
    assert own == scores(str(tmp_path / "whole"), tasks).scores()
    assert own == scores(tasks=tasks, patch=DUO, model_args={"dtype": "float32"}).scores()


def test_a_patch_that_changes_attention_changes_scores_that_need_it(plain, bench):
    found = scores(bench=bench, tasks=["text_by_position", "recall_mqar"], patch=DUO, layers="0;1-").scores()
    assert found["text_by_position"] != plain["text_by_position"]
    assert found["recall_mqar"]["perplexity"] > plain["recall_mqar"]["perplexity"]


def test_an_open_model_scores_what_its_folder_scores():
    model = patchattn.patch(load_model("lab-llama"), "duo_attention:heads=0,sink=2,recent=30")
    found = scores(model, ["text_by_position"])
    assert found.scores() == scores(tasks=["text_by_position"], patch=DUO).scores()
    assert found.raw["config"]["patchattn"]["plan"][0]["methods"][0]["recent"] == 30
    assert patchattn.living.plan_of(model)


# ---- what the results say ----------------------------------------------------------------------------------


def test_results_say_what_was_measured_and_on_what(tmp_path):
    found = scores(
        tasks=["recall_passkey"], patch=DUO, layers="1-2", output_path=str(tmp_path / "out"), log_samples=True
    )
    facts = found.raw["config"]["patchattn"]
    assert facts["patch"] == DUO and facts["model_class"] == "LlamaForCausalLM"
    (entry,) = facts["plan"]
    assert entry["layers"] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert entry["methods"][0]["method"] == "duo_attention" and entry["methods"][0]["sink"] == 2
    assert {"device", "threads", "torch", "transformers", "patchattn", "lm_eval"} <= facts["machine"].keys()
    assert found.raw["cells"]["recall_passkey"] == [
        {"length": length, "depth": 0.5, "acc": cell["acc"], "samples": 1}
        for length, cell in zip((128, 192), found.raw["cells"]["recall_passkey"], strict=True)
    ]
    written = {file.name.partition("_")[0]: file for file in (tmp_path / "out").rglob("*.json*")}
    assert json.loads(written["results"].read_text())["config"]["patchattn"] == facts
    assert json.loads(written["samples"].read_text().splitlines()[0])["doc"]["length"] == 128
    assert "recall_passkey" in str(found)


def test_the_class_of_a_model_is_found_by_its_config():
    from patchattn.evaluate.run import _kind

    assert _kind("lab-llama", {}) == "patchattn"
    assert _kind("lab-llava", {}) == "patchattn-multimodal"


def test_errors_come_before_a_model_is_opened(our_tasks_only):
    with pytest.raises(ValueError, match="unknown method 'nonsense'"):
        PatchattnLM("no/such/model/at/all", patch="nonsense")
    with pytest.raises(ValueError, match="unknown method 'nonsense'"):
        evaluate("no/such/model/at/all", "recall_passkey", patch="nonsense")
    with pytest.raises(ValueError, match="'hf' takes no patch"):
        evaluate("lab-llama", "recall_passkey", patch="dense", kind="hf")
    with pytest.raises(ValueError, match="no task is called 'recall_passkeys'"):
        evaluate("lab-llama", "recall_passkeys,recall_copy")
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        evaluate("lab-llama", "recall_passkey", include_path="nowhere")
    with pytest.raises(ValueError, match="one number, or four"):
        evaluate("lab-llama", "recall_passkey", seed=[1, 2])


# ---- likelihoods -------------------------------------------------------------------------------------------


def test_perplexity_of_a_pretrained_checkpoint_is_what_plain_transformers_computes():
    folder = SHARED / "stories15M"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    text = (SHARED / "text" / "tinystories_valid_sample.txt").read_text(encoding="utf-8")[:2500]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
    length, total, given = 256, 0.0, [tokenizer.bos_token_id, *ids]
    for start in range(0, len(ids), length):  # disjoint windows, each after the token before it
        stop = min(start + length, len(ids))
        first = max(0, stop - length) if start else 0  # the last window reads back to be as long as the others
        window = torch.tensor([given[first : stop + 1]])
        with torch.no_grad():
            likely = model(window[:, :-1]).logits.double().log_softmax(dim=-1)
        taken = likely.gather(-1, window[:, 1:, None])[0, :, 0]
        total += taken[start - first :].sum().item()
    expected = math.exp(-total / len(ids))
    for patch in (None, "dense"):
        lm = PatchattnLM(str(folder), patch=patch, dtype="float32", batch_size=4, device="cpu")
        (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        assert math.exp(-found / len(ids)) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def llama():
    return lab.load("lab-llama")


EXACT = [name for name in builtin_names() if name != "var" and not method_class(name).chooses]  # rounding turns choices


@pytest.mark.parametrize("name", EXACT)
def test_a_batch_scores_and_writes_what_single_questions_do(llama, name):
    method = method_class(name)
    lengths = (40, 90, 61)
    texts = [("The bakers open their doors. " * 40)[: length * 3] for length in lengths]
    asked = [Instance("loglikelihood", {}, (text, " and the river runs"), n) for n, text in enumerate(texts)]
    written = [Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 6}), 0) for text in texts]
    patchattn.patch(llama, method(**method.example))
    try:
        alone, together = (PatchattnLM(llama, batch_size=size, tokenizer=str(lab.path("lab-llama"))) for size in (1, 4))
        single, batch = alone.loglikelihood(asked), together.loglikelihood(asked)
        assert [likelihood for likelihood, _ in batch] == pytest.approx([one for one, _ in single], rel=1e-4)
        assert together.generate_until(written) == alone.generate_until(written)
    finally:
        patchattn.unpatch(llama)


# ---- models of images and text -----------------------------------------------------------------------------

DIGITS = """
import datasets
from PIL import Image
from sklearn.datasets import load_digits

def digits(**metadata):
    found = load_digits()
    rows = []
    for index in range(1500, 1512):
        small = Image.fromarray((found.images[index] * 255 / 16).astype("uint8"))
        image = small.resize((16, 16), Image.Resampling.BILINEAR).convert("RGB")
        rows.append({"image": image, "answer": str(found.target[index])})
    return {"test": datasets.Dataset.from_list(rows)}
"""
DIGITS_TASK = r"""
task: digits
custom_dataset: !function digits.digits
test_split: test
output_type: generate_until
doc_to_image: [image]
doc_to_text: "<image>\nWhich digit is this?"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
filter_list: [{name: strip, filter: [{function: regex, regex_pattern: "(\\d)"}, {function: take_first}]}]
"""


def test_a_task_of_images_runs_through_the_harness_multimodal_class(tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "digits.py").write_text(DIGITS)
    (tmp_path / "digits.yaml").write_text(DIGITS_TASK)
    options = {"tasks": ["digits"], "include_path": str(tmp_path), "gen_kwargs": None, "limit": 8, "batch_size": 4}
    own = scores("lab-llava", kind="hf-multimodal", **options).scores()
    assert own["digits"]["exact_match"] >= 0.75
    assert scores("lab-llava", patch="dense", **options).scores() == own
    found = scores("lab-llava", patch="var:tau=2", **options)
    assert found.raw["config"]["patchattn"]["plan"][0]["methods"][0]["method"] == "var"
    assert found.raw["config"]["model"] == "patchattn-multimodal"


# ---- lm-eval's own command line ----------------------------------------------------------------------------


def in_a_process(*arguments, cwd):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def results_in(place):
    (file,) = place.rglob("results_*.json")
    return json.loads(file.read_text())


OWN_LINE = [
    "--model", "patchattn", "--model_args", f"pretrained={lab.path('lab-llama')},patch={DUO},dtype=float32",
    "--tasks", "text_by_position", "--include_path", str(patchattn.evaluate.folder()), "--device", "cpu",
    "--metadata", json.dumps(SMALL), "--limit", "2", "--output_path", "out",
]  # fmt: skip


def check_own_line(place):
    found = results_in(place)
    assert found["config"]["patchattn"]["plan"][0]["methods"][0]["recent"] == 30
    ours = scores(tasks=["text_by_position"], patch=DUO, model_args={"dtype": "float32"}, gen_kwargs=None, batch_size=1)
    wanted = ours.scores()["text_by_position"]["perplexity"]
    assert found["results"]["text_by_position"]["perplexity,none"] == wanted


def test_lm_evals_own_command_line_takes_our_model(tmp_path, monkeypatch, our_tasks_only):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *OWN_LINE])
    runpy.run_module("patchattn.evaluate", run_name="__main__")
    check_own_line(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(900)  # lm-eval reads all of its tasks
@pytest.mark.parametrize(
    "start", [["-m", "patchattn.evaluate"], ["-m", "accelerate.commands.launch", "-m", "patchattn.evaluate"]]
)
def test_lm_evals_own_command_line_in_a_process_of_its_own(tmp_path, start):
    in_a_process(*start, *OWN_LINE, cwd=tmp_path)
    check_own_line(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(900)  # lm-eval reads all of its tasks
def test_lm_eval_opens_a_whole_checkpoint_without_us(tmp_path):
    model = lab.load("lab-llama")
    patchattn.patch(model, "duo_attention:heads=0,sink=2,recent=30")
    model.save_pretrained(tmp_path / "whole")
    load_tokenizer("lab-llama").save_pretrained(tmp_path / "whole")
    arguments = OWN_LINE.copy()
    arguments[1], arguments[3] = "hf", "pretrained=whole,trust_remote_code=True"
    in_a_process("-m", "lm_eval", *arguments, cwd=tmp_path)
    ours = scores(tasks=["text_by_position"], patch=DUO, model_args={"dtype": "float32"}, batch_size=1)
    wanted = ours.scores()["text_by_position"]["perplexity"]
    assert results_in(tmp_path / "out")["results"]["text_by_position"]["perplexity,none"] == wanted


def test_importing_patchattn_imports_no_lm_eval():
    code = (
        "import sys, patchattn, patchattn.evaluate; assert 'lm_eval' not in sys.modules and 'torch' not in sys.modules"
    )
    in_a_process("-c", code, cwd=ROOT)


def test_without_lm_eval_it_says_what_to_install():
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'lm_eval' else find(name, *rest)\n"
        "sys.argv = ['patchattn', 'eval', 'lab-llama', '--suite', 'quick']\n"
        "from patchattn.cli import main\n"
        "main()"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    assert done.returncode == 1
    assert (
        done.stderr.strip() == "error: evaluation needs lm-eval, which is not installed: pip install 'patchattn[eval]'"
    )
