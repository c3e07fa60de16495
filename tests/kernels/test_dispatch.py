"""Which implementation runs: chosen in code or by the environment, told to who asks, never changed in silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from patchattn_kernels import backend, dispatch


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_cpu_runs_torch_unless_the_interpreter_is_asked_for_by_name(monkeypatch):
    x = torch.ones(2)
    assert not dispatch.use_triton("any", x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not dispatch.use_triton("any", x)
    with backend("triton"):
        assert dispatch.use_triton("any", x)
    with backend("torch"):
        assert not dispatch.use_triton("any", x)


def test_triton_on_a_cpu_without_its_interpreter_is_refused():
    with backend("triton"), pytest.raises(RuntimeError, match=r"any: .*on cpu.*TRITON_INTERPRET=1; choose .*'auto'"):
        dispatch.use_triton("any", torch.ones(2))


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ([torch.ones(2, dtype=torch.float64)], {}, "no float64"),
        ([torch.ones(2)], {"unsupported": "dropout"}, "no dropout"),
        ([torch.ones(2), None, torch.ones(2, device="meta")], {}, "on cpu and meta"),
    ],
)
def test_what_a_kernel_cannot_do_is_named(tensors, options, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not dispatch.use_triton("any", *tensors, **options)
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        dispatch.use_triton("any", *tensors, **options)


def test_what_ran_is_noted_with_the_reason_and_only_inside_the_block(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran, x = {}, torch.ones(2)
    with dispatch.recording(ran):
        dispatch.use_triton("first", x)
        with backend("triton"):
            dispatch.use_triton("second", x)
        with backend("torch"):
            dispatch.use_triton("third", x)
    dispatch.use_triton("fourth", x)
    assert ran == {"first": "torch (on cpu)", "second": "triton", "third": "torch (asked for)"}


def test_the_choice_ends_with_its_block_even_after_an_error():
    with pytest.raises(KeyError), backend("torch"):
        raise KeyError
    assert dispatch._backend == "auto"


def test_a_backend_that_does_not_exist_is_refused_in_code_and_in_the_environment():
    with pytest.raises(ValueError, match=r"backend is 'cuda'; it must be one of auto, torch, triton"), backend("cuda"):
        pass
    code = "import torch; from patchattn_kernels import dispatch; dispatch.use_triton('any', torch.ones(1))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATCHATTN_BACKEND": "cuda"}, capture_output=True, text=True
    )
    assert "PATCHATTN_BACKEND is 'cuda'; it must be one of auto, torch, triton" in done.stderr


def test_the_choice_can_be_traced_and_is_guarded():
    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x):
        return x + dispatch.use_triton("any", x)

    x = torch.zeros(1)
    assert chosen(x) == 0
    with backend("torch"):
        assert chosen(x) == 0
    with backend("triton"), pytest.raises(Exception, match="TRITON_INTERPRET"):
        chosen(x)
