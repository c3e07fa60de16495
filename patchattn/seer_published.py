"""SeerAttention's published gates: a `config.json` with fields `seerattn_*` beside `attn_gate_weights.pth`.

The weights are a flat dict of tensors, named `<attention module>.attn_gate.<matrix>.weight`. They are read as tensors
alone, no other object; `patchattn.save` then writes them as any patch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .seer import POOLS

WEIGHTS = "attn_gate_weights.pth"
NAMES = {
    "mask_linear_q": "query_weight", "mask_linear_k": "key_weight",
    "attngate_linear_q": "query_weight", "attngate_linear_k": "key_weight",
    "attngate_qnorm": "query_norm", "attngate_knorm": "key_norm",
}  # fmt: skip


class Published(NamedTuple):
    """What is published, in the form of a patch: its description, and its tensors by our names."""

    description: dict[str, Any]
    tensors: Tensors


class Tensors:
    """Tensors in memory, asked as an open safetensors file is."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def get_slice(self, name: str) -> Any:
        return _Shape(self.tensors[name])


class _Shape(NamedTuple):
    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)


def is_published(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def read_published(folder: Path) -> Published:
    """The gates of a folder; an error names what is missing or unknown."""
    file = folder / WEIGHTS
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has {WEIGHTS}, but its config.json cannot be read: {error}") from None
    found = torch.load(file, map_location="cpu", weights_only=True)
    tensors, layers = {}, []
    for name, tensor in found.items():
        layer, gate, rest = name.partition(".attn_gate.")
        kind = rest.removesuffix(".weight")
        if not gate or kind not in NAMES or not isinstance(tensor, Tensor):
            raise ValueError(f"{file} has {name!r}, which is no part of a gate; known are {', '.join(NAMES)}")
        tensors[f"{layer}.patchattn.0.{NAMES[kind]}"] = tensor
        layers.append(layer)
    if not layers:
        raise ValueError(f"{file} holds no gate")
    decodes = any(".attngate_linear_k." in name for name in found)
    method = (_decode if decodes else _prefill)(values, {name.rpartition(".attn_gate.")[2] for name in found}, found)
    start = method.get("start_layer", 0)
    chosen = [layer for layer in dict.fromkeys(layers) if int((re.findall(r"\.(\d+)\.", layer) or ["0"])[-1]) >= start]
    description = {
        "architecture": (values.get("architectures") or ["a model of the authors"])[0],
        "shape": {},
        "base_model": values.get("base_model"),
        "plan": [{"layers": chosen, "methods": [method]}],
    }
    kept = {name: tensor for name, tensor in tensors.items() if name.partition(".patchattn.")[0] in chosen}
    return Published(description, Tensors(kept))


def _prefill(values: dict[str, Any], names: set[str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    q, k = re.fullmatch(r"Q([a-z]+)_K([a-z]+)", _field(values, "gate_type", "Qavg_Kmaxminavg")).groups()  # type: ignore[union-attr]
    method = _field(values, "sparsity_method", "threshold")
    threshold, share = _field(values, "threshold", 0.0), _field(values, "nz_ratio", 1.0)
    return {
        "method": "seer_attention",
        "block": _field(values, "gate_block_size", 64),
        "q_pool": _pools(q),
        "k_pool": _pools(k),
        "gate_dim": _width(tensors),
        "double": "mask_linear_q.weight" in names,
        "threshold": threshold if method == "threshold" and threshold else None,
        "density": share if method == "nz_ratio" and share < 1 else None,
        "last_block_dense": _field(values, "last_block_dense", True),
    }


def _decode(values: dict[str, Any], names: set[str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    by_threshold = _field(values, "sparsity_method", "token_budget") == "threshold" and _field(values, "threshold", 0.0)
    return {
        "method": "seer_attention_decode",
        "block": _field(values, "gate_block_size", 64),
        "q_heads": _field(values, "q_head_pooling_type", "Qproj").removeprefix("Q"),
        "k_pool": _pools(_field(values, "k_seq_pooling_type", "Kmaxminavg").removeprefix("K")),
        "gate_dim": None if "attngate_linear_q.weight" not in names else _width(tensors),
        "qk_norm": "attngate_qnorm.weight" in names,
        "rope": _field(values, "use_rope", True),
        "token_budget": None if by_threshold else _field(values, "token_budget", 4096),
        "threshold": _field(values, "threshold", 0.0) if by_threshold else None,
        "start_layer": _field(values, "start_layer", 0),
    }


def _field(values: dict[str, Any], name: str, default: Any) -> Any:
    value = values.get(f"seerattn_{name}")
    return default if value is None else value


def _pools(text: str) -> str:
    return ",".join(pool for pool in POOLS if pool in text)


def _width(tensors: dict[str, Tensor]) -> int:
    return next(tensor.shape[-1] for name, tensor in tensors.items() if "linear_k" in name)
