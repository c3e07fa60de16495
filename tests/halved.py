"""A quantizer of transformers for tests: linear layers keep half of each weight, as integers of eight bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class HalvedLinear(nn.Module):
    """`x @ (weight / 2).T`, with the weight in steps of 1/64."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty_like(inner.weight, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype) / 128)


@register_quantization_config("halved")
@dataclass
class HalvedConfig(QuantizationConfigMixin):
    """No settings."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = "halved"


@register_quantizer("halved")
class HalvedQuantizer(HfQuantizer):
    """Exchanges the linear layers of the decoder, before or after their weights are loaded."""

    def _exchange(self, model: nn.Module) -> None:
        for module in list(model.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    new = HalvedLinear(child)
                    if child.weight.device.type != "meta":
                        new.weight.copy_((child.weight * 64).round().clamp(-127, 127))
                    setattr(module, name, new)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            self._exchange(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self._exchange(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
