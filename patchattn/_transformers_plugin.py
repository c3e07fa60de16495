"""The reader of `quantization_config: {"quant_method": "patchattn"}` that transformers calls in `from_pretrained`.

Importing this file registers it. Nothing is quantized: a quantizer is transformers' official way to change a model
between its construction and the loading of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "patchattn"


@register_quantization_config(METHOD)
@dataclass
class PatchedCheckpointConfig(QuantizationConfigMixin):
    """Says that the model's config has a field `patchattn`."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = METHOD


@register_quantizer(METHOD)
class PatchedCheckpointReader(HfQuantizer):
    """Patches the empty model, so that its weights are loaded into it, then leaves no trace of itself."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError('quant_method "patchattn" only opens what a patched model saved; call patchattn.patch')

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        from . import opening

        self.description: Any = getattr(model.config, "patchattn", None)
        if self.description is None:
            raise ValueError(
                f"the config of this {type(model).__name__} has no field 'patchattn', which its quantization_config "
                "promises; open the checkpoint with the class it was saved from"
            )
        self.file = opening.before_weights(model, self.description, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from . import opening

        opening.after_weights(model, self.description, self.file)
        self.remove_quantization_config(model)
        opening.forget(model, "quantization_config")
        model.__dict__.pop("is_quantized", None)
        for module in model.modules():
            getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
