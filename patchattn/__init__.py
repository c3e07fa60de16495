"""patchattn: swap the attention of pretrained models for published alternatives, and take it back exactly.

import patchattn
model = patchattn.patch(model, patchattn.DuoAttention(sink=64, recent=256))
...
patchattn.unpatch(model)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._lazy import after_import

__version__ = "0.1.0.dev0"

_HOMES = {
    "aux_loss": "living",
    "cache_bytes": "cache",
    "disabled": "living",
    "explain": "explanation",
    "freeze_base": "living",
    "inspect": "inspection",
    "load": "hub",
    "Method": "method",
    "MethodConfig": "method",
    "only": "living",
    "patch": "attach",
    "patch_parameters": "living",
    "profile": "profiling",
    "push": "hub",
    "register": "method",
    "runtime": "method",
    "save": "hub",
    "settings": "living",
    "unpatch": "attach",
}
_SUBMODULES = ("duo", "evaluate", "gates", "lab", "profiling", "testing", "var")

__all__ = [
    "LAWCAT",
    "VAR",
    "Dense",
    "DuoAttention",
    "GatedAttention",
    "Hedgehog",
    "LongHeads",
    "Method",
    "MethodConfig",
    "MoH",
    "SeerAttention",
    "SeerAttentionDecode",
    "__version__",
    "aux_loss",
    "cache_bytes",
    "disabled",
    "explain",
    "freeze_base",
    "inspect",
    "load",
    "only",
    "patch",
    "patch_parameters",
    "profile",
    "push",
    "register",
    "runtime",
    "save",
    "settings",
    "unpatch",
]

if TYPE_CHECKING:
    from .attach import patch, unpatch
    from .cache import cache_bytes
    from .explanation import explain
    from .hub import load, push, save
    from .inspection import inspect
    from .living import aux_loss, disabled, freeze_base, only, patch_parameters, settings
    from .method import Method, MethodConfig, register, runtime
    from .methods.dense import Dense
    from .methods.duo_attention import DuoAttention
    from .methods.gated_attention import GatedAttention
    from .methods.hedgehog import Hedgehog
    from .methods.lawcat import LAWCAT
    from .methods.longheads import LongHeads
    from .methods.moh import MoH
    from .methods.seer_attention import SeerAttention
    from .methods.seer_attention_decode import SeerAttentionDecode
    from .methods.var import VAR
    from .profiling import profile


def __getattr__(name: str) -> Any:
    """Load the parts on first use, so that `import patchattn` costs nothing; method classes by their file's name."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name[:1].isupper():
        from .method import builtin_names

        for known in builtin_names():
            if known.replace("_", "") == name.lower():
                return getattr(import_module(f".methods.{known}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Whole patched models open through `from_pretrained` once patchattn is imported; see checkpoint.py.
after_import("transformers.quantizers.auto", "patchattn._transformers_plugin")
after_import("diffusers.quantizers.auto", "patchattn._diffusers_plugin")
# `--model patchattn` is known to lm-eval once patchattn is imported; see evaluate/.
after_import("lm_eval.models", "patchattn._lm_eval_plugin")
