"""The recipes that ship with patchattn, by name: their path below `recipes/` without the `.yaml`."""

from __future__ import annotations

from pathlib import Path

from .typed import choose

CONFIGS = "accelerate"  # the subfolder with configurations of `accelerate launch`: no recipes, but found and copied too


def folder() -> Path:
    """Where they lie: in the installed package, or beside it in a source tree."""
    package = Path(__file__).parents[1]
    for place in (package / "recipes", package.parent / "recipes"):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"this installation has no recipes: neither {package / 'recipes'} nor beside the package")


def names() -> list[str]:
    """Names of the shipped recipes."""
    return [name for name in _all() if not name.startswith(f"{CONFIGS}/")]


def configs() -> list[str]:
    """Names of the shipped configurations of `accelerate launch`."""
    return [name for name in _all() if name.startswith(f"{CONFIGS}/")]


def find(name: str, configurations: bool = True) -> Path:
    """The file of a shipped recipe, or of an `accelerate launch` configuration."""
    wanted, known = name.removesuffix(".yaml"), _all() if configurations else names()
    if wanted not in known:
        raise FileNotFoundError(
            f"there is no file {name!r} and no shipped recipe of that name; {choose(wanted, known)}"
        )
    return folder() / f"{wanted}.yaml"


def _all() -> list[str]:
    root = folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
