"""The registered methods as a table: what each is for and what it fits."""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import SimpleNamespace
from typing import Any

from torch import nn

from .method import Method, builtin_names, method_class, methods
from .sites import Site
from .tables import setting_text

_SITE = Site(
    name="example", module=nn.Module(), family="interface", config=SimpleNamespace(), layer_idx=0, heads=8, kv_heads=4,
    head_dim=16, hidden_size=128, causal=True, window=None,
)  # fmt: skip
# One made-up attention module of each kind, of which every method is asked whether it fits.
FAMILIES = {
    "decoder": _SITE,
    "vision-language decoder": dataclasses.replace(
        _SITE, hidden_size=1024, model_config=SimpleNamespace(image_token_id=1)
    ),
    "sliding-window decoder": dataclasses.replace(_SITE, window=64),
    "encoder/ViT": dataclasses.replace(_SITE, causal=False, kv_heads=8, layer_idx=None),
    "diffusion": dataclasses.replace(_SITE, family="diffusers", causal=False, kv_heads=8),
}


def fits(cls: type[Method]) -> list[str]:
    """The kinds of attention that a method, with its default settings, has nothing against."""
    config = cls().config
    return [family for family, site in FAMILIES.items() if cls.unfit(site, config) is None]


def catalog() -> list[dict[str, Any]]:
    """One entry for every registered method."""
    return [
        {
            "name": name,
            "for": cls.summary,
            "trained": cls.trained,
            "exact": cls.exact,
            "fits": fits(cls),
            "paper": cls.paper,
            "settings": settings(cls),
        }
        for name, cls in methods().items()
    ]


def settings(cls: type[Method]) -> dict[str, Any]:
    """Every setting of a method with its default."""
    return cls().config.to_dict()


def short_text(described: dict[str, Any]) -> str:
    """A method as the command line writes it, without the settings that are its defaults."""
    usual = settings(method_class(described["method"]))
    return setting_text({k: v for k, v in described.items() if k == "method" or v != usual.get(k, v)})


def explain_settings(name: str) -> str:
    """What a method is and what its settings mean, from its docstrings."""
    cls = method_class(name)
    parts = [f"{cls.name}: {cls.summary or inspect.getdoc(cls)}", f"paper: {cls.paper}" if cls.paper else ""]
    parts += [
        f"with its defaults: {setting_text({'method': cls.name, **settings(cls)})}",
        inspect.getdoc(cls.Config) or "",
    ]
    return "\n\n".join(part for part in parts if part)


def markdown() -> str:
    """The table of shipped methods for the README, without the methods somebody else registered."""
    lines = ["| Method | What it is for | Trained | Fits | Paper |", "| --- | --- | --- | --- | --- |"]
    for entry in catalog():
        if entry["name"] not in builtin_names():
            continue
        paper = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", entry["paper"])
        name = f"[`{entry['name']}`](docs/methods/{entry['name']}.md)"
        cells = [name, entry["for"], "yes" if entry["trained"] else "no", ", ".join(entry["fits"]), paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
