"""`python -m patchattn.evaluate` is `lm_eval` with patchattn's models: `--model patchattn --model_args patch=...`."""

from __future__ import annotations

from .library import require_harness

require_harness()

from lm_eval.__main__ import cli_evaluate  # noqa: E402

cli_evaluate()
