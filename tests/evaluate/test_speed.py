"""`patchattn bench`: what it times is checked first, shares its weights, and is left as it was."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn import cli, method
from patchattn.evaluate import speed
from patchattn.method import Method, builtin_names, method_class, register

SIZES = dict(lengths=[24, 40], batches=[1, 2], tokens=2, rounds=2, warmup=1)
DUO = "duo_attention:heads=0;sink=2;recent=6"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=61)  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def wrong_when_decoding(monkeypatch):
    monkeypatch.setattr(method, "_REGISTERED", {name: method_class(name) for name in builtin_names()})

    @register("forgetful")
    class Forgetful(Method):
        def forward(self, ctx):
            return ctx.attend() * (1 if ctx.q.shape[2] > 1 else 0.5)


def test_every_side_is_checked_timed_and_measured(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = speed.bench(model, ["dense", DUO, patchattn.GatedAttention()], **SIZES)
    assert [check.passed for check in report.checks] == [True] * 4 and report.passed
    assert report.checks[1].from_base == 0 and report.checks[2].from_base > 0
    assert [(row.batch, row.length) for row in report.rows[::4]] == [(1, 24), (1, 40), (2, 24), (2, 40)]
    for row in report.rows:
        assert len(row.seconds["prompt"]) == len(row.seconds["tokens"]) == 2
        assert row.prefill.low <= row.prefill.median <= row.prefill.high
    base, dense, duo, _ = report.rows[4:8]
    assert base.prefill.ratio == base.decode.ratio == 1
    assert dense.cache_bytes == base.cache_bytes > duo.cache_bytes
    assert report.sides[3]["parameters"] > 0 and report.sides[2]["plan"][0]["methods"][0]["recent"] == 6
    assert json.loads(json.dumps(report.to_dict()))["machine"] == report.machine
    assert "one more token ms" in str(report) and "LlamaForCausalLM" in str(report)
    assert patchattn.record.patch_of(model) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sides_share_their_weights(model):
    other = speed._sharing(model)
    assert [value.data_ptr() for value in other.parameters()] == [value.data_ptr() for value in model.parameters()]
    patchattn.patch(other, "dense")
    assert patchattn.record.patch_of(model) is None and model.config is not other.config


def test_what_is_wrong_is_not_timed(model, wrong_when_decoding):
    report = speed.bench(model, ["forgetful"], **SIZES)
    assert not report.passed and report.rows == [] and [check.passed for check in report.checks] == [True, False]
    assert "not timed" in str(report)


WRONG = {
    "rounds": ("rounds is 1", dict(rounds=1)),
    "lengths": (r"lengths is \[\]", dict(lengths=[])),
    "batches": (r"batches is \[0\]", dict(batches=[0])),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_sizes_are_refused(model, case):
    message, change = WRONG[case]
    with pytest.raises(ValueError, match=message):
        speed.bench(model, ["dense"], **{**SIZES, **change})


def test_a_patch_is_named_once_and_the_model_comes_without_one(model):
    with pytest.raises(ValueError, match="name each patch once"):
        speed.bench(model, ["dense", "dense"], **SIZES)
    with pytest.raises(ValueError, match="patched already"):
        speed.bench(patchattn.patch(model, "dense"), [DUO], **SIZES)


def test_the_command_prints_and_writes(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    line = ["bench", "tiny", "--patch", DUO, "--lengths", "24", "--rounds", "2", "-n", "2", "-o", "out.json"]
    monkeypatch.setattr(sys, "argv", ["patchattn", *line])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "duo_attention" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["model"] == "tiny" and [row["side"] for row in written["rows"]] == ["base", DUO]


@pytest.mark.parametrize("option", [["--lengths", "0"], ["--batches", "many"], ["--patch", "nonsense"]])
def test_wrong_usage_leaves_with_2(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["patchattn", "bench", "lab-llama", "--patch", "dense", *option])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
