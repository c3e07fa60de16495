"""lm-eval's models of transformers with a patch on them: `patchattn` and `patchattn-multimodal`.

They take every argument of lm-eval's `hf` and `hf-multimodal`, and do all that these do in their way: batches, padding,
likelihoods, generation, chat templates, `accelerate launch`. Without a patch they are these.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM

from .. import lab
from ..environment import default_device, machine
from ..living import patch_parameters, plan_of
from ..record import patch_of
from .patches import read_patch


class _Patched:
    """What both have beside lm-eval's own: a patch, and what there is to tell of it.

    Args:
        pretrained: folder, repository, lab checkpoint, or a model that is open already.
        patch: see `patches.py`.
        layers: which layers, where the patch is methods.
        patch_revision: branch, tag or commit of the patch's repository.
        strict_base: whether a patch made for a base model of another name is refused.
        device: default: the GPU if there is one.
    """

    def __init__(
        self,
        pretrained: Any,
        patch: Any = None,
        layers: Any = None,
        patch_revision: str | None = None,
        strict_base: bool = True,
        device: str | None = None,
        **options: Any,
    ) -> None:
        wanted = read_patch(patch, layers, patch_revision, strict_base)
        name = lab.resolve(pretrained) if isinstance(pretrained, str) else pretrained
        super().__init__(name, device=device or default_device(), **options)  # type: ignore[call-arg]
        self.patch = wanted
        if wanted is not None:
            wanted.put_on(self.model)  # type: ignore[attr-defined]

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model: lm-eval's own, the patch with all its settings, versions and machine."""
        return {**super().get_model_info(), "patchattn": self.facts()}  # type: ignore[misc]

    def facts(self) -> dict[str, Any]:
        """The patch that is on the model, whoever put it there, JSON-ready."""
        model = self.model  # type: ignore[attr-defined]
        patched = patch_of(model) is not None
        return {
            "patch": None if self.patch is None else self.patch.text,
            "plan": plan_of(model) if patched else [],
            "parameters": sum(value.numel() for value in patch_parameters(model).values()) if patched else 0,
            "model_class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "machine": {**machine(), "lm_eval": metadata.version("lm_eval")},
        }


class PatchattnLM(_Patched, HFLM):
    """`--model patchattn`: a decoder of text."""


class PatchattnMultimodalLM(_Patched, HFMultimodalLM):
    """`--model patchattn-multimodal`: a vision-language model, on tasks with images and on such without."""
