"""The check that compiles for GPUs that are not there: it passes what may ship and names what may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchattn_kernels import dispatch, static
from patchattn_kernels.static import Compile

pytestmark = pytest.mark.skipif(not dispatch.INSTALLED, reason="triton is not installed")

SCRIPT = """
import json
from tests.kernels.static_kernels import STATIC
from patchattn_kernels import static

print(json.dumps([vars(static.compile_one(entry, 90, "bf16")) for entry in STATIC]))
"""


def compiling(*command, **variables):
    """Run Python without the interpreter that the other tests use."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=environment | variables, capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    return done


def test_kernels_that_spill_or_multiply_otherwise_than_said_fail():
    done = compiling("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    rows = {row["label"]: row for row in json.loads(done.stdout)}
    assert [label for label, row in rows.items() if not row["problems"]] == ["fits", "own", "few rows"]
    assert rows["spills"]["spilled"] > 0 and "spills" in rows["spills"]["problems"][0]
    assert 0 < rows["fits"]["registers"] < rows["spills"]["registers"]
    assert (rows["own"]["products"], rows["few rows"]["products"]) == ("wgmma.mma_async", "mma.sync")
    assert "multiplies with mma.sync, not wgmma" in rows["few rows said to be many"]["problems"][0]


def test_the_command_exits_with_1_on_a_failure(monkeypatch, capsys):
    from patchattn_kernels import check

    row = {"ok": False}
    monkeypatch.setattr(static, "check", lambda primitives, chips: [row])
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(sys, "argv", ["check", "--static"])
    assert check.main() == 1
    assert "0 passed, 1 failed for sm_80, sm_90, sm_100" in capsys.readouterr().out
    row["ok"] = True
    assert check.main() == 0


@pytest.mark.parametrize(("option", "before", "after"), [("--static", "1", "0"), ("--device=cpu", "0", "1")])
def test_the_command_starts_again_where_triton_was_imported_otherwise(option, before, after, monkeypatch):
    from patchattn_kernels import check

    started = []

    def run(command, env):
        started.append((command[1:], env["TRITON_INTERPRET"]))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(check.subprocess, "run", run)
    monkeypatch.setenv("TRITON_INTERPRET", before)
    monkeypatch.setattr(sys, "argv", ["check", option])
    assert check.main() == 7
    assert started == [(["-m", "patchattn_kernels.check", option], after)]


def test_memory_beyond_that_of_the_chip_is_a_problem():
    assert not list(static.problems(90, "none", 0, 232448, []))
    assert list(static.problems(80, "none", 0, 232448, [])) == [
        "needs 232448 bytes of shared memory, of which there are 101376"
    ]


def test_the_interpreter_cannot_check(monkeypatch):
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        static.check(["sink_window"])


def entries():
    return list(static.entries()) if dispatch.INSTALLED else []


@pytest.mark.parametrize(("primitive", "entry"), entries(), ids=lambda x: getattr(x, "label", x))
def test_every_entry_speaks_of_the_arguments_of_its_kernel(primitive, entry):
    for dtype in entry.dtypes:
        signature, _ = static.arguments(entry, dtype)
        assert list(signature) == list(entry.kernel.arg_names)


def test_every_primitive_says_what_to_compile_and_calls_nothing_by_the_same_name():
    labels = [(primitive, entry.label, entry.dtypes, entry.chips) for primitive, entry in entries()]
    assert "sink_window" in {primitive for primitive, *_ in labels}
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("arguments", "constants", "message"),
    [
        ({"x_ptr": "*T"}, {"N": 2}, r"missing: \['out_ptr'\]"),
        ({"x_ptr": "*T", "out_ptr": "*T", "y": "i32"}, {"N": 2}, r"unknown: \['y'\]"),
        ({"x_ptr": "*T", "out_ptr": "*T", "N": "i32"}, {"N": 2}, r"twice: \['N'\]"),
    ],
)
def test_an_entry_that_does_not_fit_its_kernel_is_refused(arguments, constants, message):
    from .static_kernels import centre_kernel

    with pytest.raises(ValueError, match=f"some kernel: .*{message}"):
        static.arguments(Compile("some kernel", centre_kernel, arguments, constants), "bf16")
