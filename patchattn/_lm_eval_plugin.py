"""Makes `--model patchattn` and `--model patchattn-multimodal` known to lm-eval. Importing this file registers them.

lm-eval looks for no plug-ins by itself: whoever starts it has to import patchattn first, as
`python -m patchattn.evaluate` does.
"""

from __future__ import annotations

from lm_eval.api.registry import model_registry

MODELS = {
    "patchattn": "patchattn.evaluate.models:PatchattnLM",
    "patchattn-multimodal": "patchattn.evaluate.models:PatchattnMultimodalLM",
}

for name, target in MODELS.items():
    if name not in model_registry:
        model_registry.register(name, target=target)
