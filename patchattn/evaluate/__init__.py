"""Evaluation with lm-eval, the language model evaluation harness: patched models in it, and tasks that need no network.

`evaluate` runs tasks on a model, as `patchattn eval` does; `python -m patchattn.evaluate` is lm-eval's own command
line with the models `patchattn` and `patchattn-multimodal` in it. `folder()` holds the tasks and suites that ship, for
any lm-eval's `--include_path`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .library import folder, require_harness, suites, tasks

if TYPE_CHECKING:
    from .run import Results, evaluate

__all__ = ["Results", "evaluate", "folder", "suites", "tasks"]


def __getattr__(name: str) -> Any:
    """`evaluate` on first use: listing tasks must not import lm-eval."""
    if name in ("evaluate", "Results"):
        require_harness()
        from . import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
