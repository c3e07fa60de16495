"""What stands after `patch=`: a folder, a repository, a plan, or methods; read and checked before a model is opened.

    patch=my-patch                                              a folder that `patchattn patch` or `save` wrote
    patch=owner/my-patch                                        a repository of the hub
    patch=plan.json                                             a plan: methods by layers, as a file of JSON
    patch={"even": "duo_attention", "odd": "dense"}             the same on the line
    patch=duo_attention                                         a method
    patch=duo_attention:sink=4;recent=128                       a method with settings
    patch=gated_attention+duo_attention:sink=4;recent=128       several, the first on the outside

Settings are parted by semicolons, since lm-eval parts the arguments of a model by commas.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..card import REPO_ID

NEXT_METHOD = re.compile(r"\+(?=[A-Za-z][\w/-]*(?:[:+]|$))")
NEXT_SETTING = re.compile(r";(?=\s*\w+=)")


@dataclass(frozen=True)
class PatchArgument:
    """What to put on a model: methods or a plan, or the place of a saved patch."""

    text: str
    what: Any = None
    source: str | None = None
    layers: str | None = None
    revision: str | None = None
    strict_base: bool = True

    def put_on(self, model: nn.Module) -> None:
        """Patch the model in place."""
        from .. import load, patch

        if self.source is not None:
            load(model, self.source, self.revision, strict_base=self.strict_base)
        else:
            patch(model, self.what, self.layers)


def read_patch(
    given: Any, layers: Any = None, revision: str | None = None, strict_base: bool = True
) -> PatchArgument | None:
    """The patch that is meant, or None for none; an error says what it may be.

    Args:
        given: the text after `patch=`, or what `patchattn.patch` takes: a method, a list of them, a plan.
        layers: which layers, for methods: `0-11`, `even`, `0;3;8-` (or with commas, where they can be had).
        revision: of the repository.
        strict_base: whether a patch made for a base model of another name is refused.
    """
    chosen = None if layers is None else str(layers).replace(";", ",")
    if given is None or given == "":
        if chosen is not None:
            raise ValueError(f"layers is {layers!r}, but there is no patch; give patch=METHOD as well")
        return None
    if not isinstance(given, str):
        return _methods(_text(given), given, chosen)
    text = given.strip()
    if text[:1] in ("{", "["):
        return _methods(text, _parsed(text, text), chosen)
    if os.path.isdir(text):
        return _saved(text, chosen, revision, strict_base)
    if text.endswith(".json"):
        return _plan(text, chosen)
    if REPO_ID.fullmatch(text) and not text.startswith("."):
        return _saved(text, chosen, revision, strict_base)
    parts = NEXT_METHOD.split(text)
    places = [part for part in parts if os.path.isdir(part) or "/" in part.partition(":")[0]]
    if len(parts) > 1 and places:
        raise ValueError(
            f"patch={text!r}: {places[0]!r} is a saved patch, which stands alone; only methods are joined by +"
        )
    try:
        return _methods(text, [NEXT_SETTING.sub(",", part) for part in parts], chosen)
    except ValueError as error:
        if "unknown method" not in str(error):
            raise
        raise ValueError(
            f"patch={text!r} is no folder here, no repository (owner/name), no plan (a .json file), and no method: "
            f"{error}; write a method as name:key=value;key=value, several as one+another"
        ) from error


def _methods(text: str, given: Any, layers: str | None) -> PatchArgument:
    """Methods or a plan, each made once, so that what is wrong with them shows."""
    from ..method import as_methods

    if isinstance(given, dict) and "method" not in given:
        if layers is not None:
            raise ValueError(f"layers is {layers!r}, but the patch is a plan, which names its layers by itself")
        return PatchArgument(text, {selector: as_methods(item) for selector, item in given.items()})
    return PatchArgument(text, as_methods(given), layers=layers)


def _saved(place: str, layers: str | None, revision: str | None, strict_base: bool) -> PatchArgument:
    if layers is not None:
        raise ValueError(f"layers is {layers!r}, but the saved patch {place!r} names its layers by itself")
    if os.path.isdir(place):
        from ..hub import read_description
        from ..seer_published import is_published

        if not is_published(Path(place)):
            read_description(Path(place), place)  # says why, if this is no such folder
    return PatchArgument(place, source=place, revision=revision, strict_base=strict_base)


def _plan(file: str, layers: str | None) -> PatchArgument:
    if not os.path.isfile(file):
        raise FileNotFoundError(f"patch={file!r}: there is no such file")
    values = _parsed(Path(file).read_text(encoding="utf-8"), file)
    return _methods(json.dumps(values), values, layers)


def _parsed(text: str, where: str) -> Any:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"patch={where!r} is no JSON: {error}") from None
    if not isinstance(values, (dict, list)) or not values:
        raise ValueError(f'patch={where!r}: a plan is an object such as {{"even": "duo_attention", "odd": "dense"}}')
    return values


def _text(given: Any) -> str:
    """A patch that was given as objects, as JSON."""
    from ..method import as_methods, describe

    if isinstance(given, dict) and "method" not in given:
        return json.dumps({str(key): [describe(method) for method in as_methods(item)] for key, item in given.items()})
    return json.dumps([describe(method) for method in as_methods(given)])
