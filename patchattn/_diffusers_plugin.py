"""The reader of `quantization_config: {"quant_method": "patchattn"}` that diffusers calls in `from_pretrained`.

Importing this file adds it to diffusers' tables of quantizers, for which diffusers offers no function. Nothing is
quantized: a quantizer is the way to change a model between its construction and the loading of its weights.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin


class _QuantMethod(str, Enum):
    PATCHATTN = "patchattn"


class PatchedCheckpointConfig(QuantizationConfigMixin):
    """Holds the description of the patch, which stands in the model's config.json."""

    def __init__(self, patchattn: Any = None, **kwargs: Any) -> None:
        self.quant_method = _QuantMethod.PATCHATTN
        self.description = patchattn

    def to_dict(self) -> dict[str, Any]:
        """What diffusers may tell others: not the patch."""
        return {"quant_method": self.quant_method.value}

    to_diff_dict = to_dict


class PatchedCheckpointReader(DiffusersQuantizer):
    """Patches the empty model, loads the patch's own tensors as they were saved, and leaves no trace of itself."""

    use_keep_in_fp32_modules = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized or self.quantization_config.description is None:
            raise ValueError('quant_method "patchattn" only opens what a patched model saved; call patchattn.patch')

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from .living import patch_state
        from .opening import patch_empty

        patch_empty(model, self.quantization_config.description)
        self.names = set(patch_state(model))

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        for name in sorted(self.names.intersection(missing_keys)):
            raise ValueError(f"the checkpoint of this {type(model).__name__} lacks the tensor {name} of its patch")
        return missing_keys

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        return param_name in self.names

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        raise ValueError(
            f"the checkpoint has {param_name} in shape {list(loaded_param.shape)}; "
            f"this model needs {list(current_param.shape)}"
        )

    def create_quantized_param(
        self,
        model: Any,
        param_value: Any,
        param_name: str,
        target_device: Any,
        state_dict: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        from accelerate.utils import set_module_tensor_to_device

        from .tensors import saved_dtype

        value = state_dict[param_name]  # param_value has been cast
        dtype = saved_dtype(value.dtype, model.get_parameter(param_name).dtype, model)
        set_module_tensor_to_device(model, param_name, target_device, value=value, dtype=dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del model.is_quantized, model.quantization_method
        config = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(config)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING["patchattn"] = PatchedCheckpointConfig
AUTO_QUANTIZER_MAPPING["patchattn"] = PatchedCheckpointReader
