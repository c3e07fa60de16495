"""patchattn: swap the attention of pretrained models for published alternatives, and take it back exactly.

    import patchattn
    model = patchattn.patch(model, patchattn.DuoAttention(sink=64, recent=256))
    ...
    patchattn.unpatch(model)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "patch": "attach",
    "unpatch": "attach",
    "disabled": "attach",
    "settings": "attach",
    "patch_parameters": "attach",
    "freeze_base": "attach",
    "cache_bytes": "cache",
    "Method": "method",
    "MethodConfig": "method",
    "register": "method",
    "runtime": "method",
    "methods": "method",
}
_SUBMODULES = ("duo", "hub", "testing")

__all__ = [*_HOMES, "Dense", "DuoAttention", "GatedAttention", "__version__"]

if TYPE_CHECKING:
    from .attach import disabled, freeze_base, patch, patch_parameters, settings, unpatch
    from .cache import cache_bytes
    from .method import Method, MethodConfig, methods, register, runtime
    from .methods.dense import Dense
    from .methods.duo_attention import DuoAttention
    from .methods.gated_attention import GatedAttention


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
