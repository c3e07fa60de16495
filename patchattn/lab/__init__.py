"""The lab: small checkpoints, shipped with patchattn, whose attention has really learned something.

Their names, such as `lab-llama`, stand wherever a model's name may stand. Each was trained by the recipe of its name
under `recipes/lab/`; `patchattn lab evaluate` measures what they can do.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

FOLDER = Path(__file__).parents[1] / "checkpoints"


def names() -> list[str]:
    """The checkpoints there are."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.json"))


def path(name: str) -> Path:
    """The folder of a checkpoint: an ordinary Hugging Face folder."""
    if name not in names():
        raise ValueError(f"there is no lab checkpoint {name!r}; there are {', '.join(names()) or 'none'}")
    return FOLDER / name


def resolve(name: str) -> str:
    """The folder of a checkpoint, if this is the name of one; any other name, and a folder of that name, as it is."""
    return str(path(name)) if name in names() and not Path(name).exists() else name


def load(name: str, **options: Any) -> nn.Module:
    """A checkpoint, ready to run in float32; options as for `patchattn.loading.load_model`."""
    from ..loading import load_model

    return load_model(str(path(name)), **{"dtype": "float32", **options})


def recipe(name: str) -> str:
    """The name of the recipe that a checkpoint was trained by."""
    return f"lab/{name}"


def facts(name: str) -> dict[str, Any]:
    """What is known of a checkpoint without running it: its size, how many tokens it attends over, where it is."""
    from safetensors import safe_open

    folder = path(name)
    files = sorted(folder.glob("*.safetensors"))
    parameters = 0
    for file in files:
        with safe_open(file, "np") as weights:
            parameters += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "name": name,
        "class": config.get("_class_name") or config["architectures"][0],
        "tokens": _tokens(config.get("text_config", config)),
        "parameters": parameters,
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 2),
        "recipe": recipe(name),
        "folder": str(folder),
    }


def _tokens(config: dict[str, Any]) -> int:
    """The longest context, or the patches of an image."""
    if "patch_size" in config:
        size = config.get("image_size") or config["sample_size"]
        return int(size // config["patch_size"]) ** 2
    return int(config["max_position_embeddings"])
