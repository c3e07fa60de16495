"""Every method that ships keeps the contract on every family."""

from __future__ import annotations

import pytest

from patchattn import testing
from patchattn.method import builtin_names, methods

METHODS = builtin_names()  # and not what other tests have registered in this process
VARIANTS = {
    "gated_attention-elementwise": ("gated_attention", {"kind": "elementwise", "init": "open", "bias": True}),
    "duo_attention-all-streaming": ("duo_attention", {"heads": 0.0, "sink": 1, "recent": 3}),
    "duo_attention-cache-positions": (
        "duo_attention",
        {"heads": 0.5, "sink": 2, "recent": 5, "positions": "cache", "slack": 2},
    ),
    "duo_attention-compensation": (
        "duo_attention",
        {"heads": 0.5, "sink": 2, "recent": 5, "compensation": True, "slack": 3},
    ),
    "moh-linear": ("moh", {"router": "linear", "shared": 1, "top_k": 2}),
    "hedgehog-pure": ("hedgehog", {"window": 0, "feature_dim": 6}),
    "hedgehog-terraced": (
        "hedgehog",
        {"window": 3, "window_kind": "terraced", "feature_map": "relu", "tie_qk": True, "affine": True},
    ),
    "lawcat-window": (
        "lawcat",
        {"window": 5, "feature_dim": 5, "conv_activation": "silu", "share_conv": True, "gate_rank": None},
    ),
    "lawcat-rotated": ("lawcat", {"rotary": True, "conv_size": 0, "tie_qk": False}),
    "moh-kv-group": ("moh", {"route": "kv_group", "shared": 0, "top_k": 2, "least_keys": 0}),
}


# Compiling takes seconds; by default the families with their own code path do it, the others when slow tests run.
COMPILING = ("compile_equals_eager", "compiled_decode_equals_eager")
COMPILED_BY_DEFAULT = ("llama", "vit", "dit")


def setups():
    settings = {name: (name, methods()[name].example) for name in METHODS}
    for label, (name, fields) in {**settings, **VARIANTS}.items():
        for family in testing.FAMILIES.values():
            setup = testing.Setup(methods()[name](**fields), family)
            if testing.installed(family):
                for check in testing.checks(family):
                    what = check.__name__.removeprefix("check_")
                    slow = what in COMPILING and family.name not in COMPILED_BY_DEFAULT
                    marks = pytest.mark.slow if slow else ()
                    yield pytest.param(setup, check, id=f"{label}-{family.name}-{what}", marks=marks)


@pytest.mark.parametrize(("setup", "check"), list(setups()))
def test_contract(setup, check):
    reason = setup.reason()
    if reason is None:
        check(setup)
    else:
        testing.check_refusal(setup, reason)
